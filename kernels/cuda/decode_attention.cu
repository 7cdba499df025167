// The attention of a decode step: gate, recurrence, norm per head and output gate in one kernel
// that reads and writes each state once.
//
// A block has a (sequence, state head, 64 columns of V); the blocks of a head are a cluster, which
// adds up the squares for the norm. The tile of the state lies in registers: eight lanes share a
// row of 64 columns, 32 rows are side by side, so a thread has every 32nd row and eight columns.
// With int16 states these are the 16 bytes of one load, and the eight lanes find their row's scale.
//
// The order of every sum is fixed by K and V: down a thread's rows, over four rows by shuffles,
// over eight warps through shared memory. The state is loaded before the kernel ahead has ended:
// its last writer, this kernel in the step before, is far behind (launch.cuh).
#include <cooperative_groups.h>

#include "kernels/cuda/decode_entry.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_format.cuh"

namespace gla {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kTile = 64;                       // columns of V
constexpr int kLanes = 8;                       // of a row
constexpr int kSideBySide = kThreads / kLanes;  // rows
constexpr int kRank = 16;                       // of the gate's product
constexpr int kMostGroup = 8;                   // query heads of a state

struct Parameters {
  DecodeAttentionArgs a;
  const bf16* gate_weight;  // [G * K, kRank]
  int64_t scales_at;        // int16: bytes from a state to its scales
  float clamp_min;
  bool clamps;
  int group, tiles;
};

// The first of a thread's columns 4 .. 7; those before follow `first`. float32 lanes stand side by
// side in two halves of a row, so that each load is 128 neighbouring bytes.
template <StateFormat kFormat>
struct Columns {
  static constexpr bool kHalves = kFormat == StateFormat::kFloat32;
  __device__ static int First(int lane) { return kHalves ? 4 * lane : 8 * lane; }
  __device__ static int Second(int lane) { return kHalves ? 32 + 4 * lane : 8 * lane + 4; }
};

// A state's row piece of this thread.
template <StateFormat kFormat>
struct RowStore;

template <>
struct RowStore<StateFormat::kFloat32> {
  struct Raw {
    float4 x[2];
  };
  __device__ static Raw Load(const char* state, const Parameters&, int64_t row, int column,
                             int lane, int value_dim) {
    const float* at = reinterpret_cast<const float*>(state) + row * value_dim + column + 4 * lane;
    return {{__ldcs(reinterpret_cast<const float4*>(at)),
             __ldcs(reinterpret_cast<const float4*>(at + 32))}};
  }
  __device__ static void Unpack(const Raw& raw, float (&s)[8]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      s[4 * i] = raw.x[i].x, s[4 * i + 1] = raw.x[i].y;
      s[4 * i + 2] = raw.x[i].z, s[4 * i + 3] = raw.x[i].w;
    }
  }
  __device__ static void Save(char* state, const Parameters&, int64_t row, int column, int lane,
                              int value_dim, const float (&s)[8], bool is_row) {
    if (!is_row) return;
    float* at = reinterpret_cast<float*>(state) + row * value_dim + column + 4 * lane;
    __stcs(reinterpret_cast<float4*>(at), float4{s[0], s[1], s[2], s[3]});
    __stcs(reinterpret_cast<float4*>(at + 32), float4{s[4], s[5], s[6], s[7]});
  }
};

template <>
struct RowStore<StateFormat::kInt16> {
  struct Raw {
    uint4 x;
    float scale;
  };
  __device__ static const float* ScaleAt(const char* state, const Parameters& p, int64_t row,
                                         int column, int value_dim) {
    return reinterpret_cast<const float*>(state + p.scales_at) + row * (value_dim / kTile) +
           column / kTile;
  }
  __device__ static Raw Load(const char* state, const Parameters& p, int64_t row, int column,
                             int lane, int value_dim) {
    const int16_t* at =
        reinterpret_cast<const int16_t*>(state) + row * value_dim + column + 8 * lane;
    return {__ldcs(reinterpret_cast<const uint4*>(at)),
            __ldcs(ScaleAt(state, p, row, column, value_dim))};
  }
  __device__ static void Unpack(const Raw& raw, float (&s)[8]) {
    const uint32_t words[4] = {raw.x.x, raw.x.y, raw.x.z, raw.x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[2 * i] = static_cast<float>(static_cast<int16_t>(words[i] & 0xFFFF)) * raw.scale;
      s[2 * i + 1] = static_cast<float>(static_cast<int32_t>(words[i]) >> 16) * raw.scale;
    }
  }
  __device__ static void Save(char* state, const Parameters& p, int64_t row, int column, int lane,
                              int value_dim, const float (&s)[8], bool is_row) {
    const Int16Scale scale = Int16Scale::Of(LargestOfRow(s));
    if (!is_row) return;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = (static_cast<uint32_t>(scale.Round(s[2 * i])) & 0xFFFF) |
                 static_cast<uint32_t>(scale.Round(s[2 * i + 1])) << 16;
    }
    int16_t* at = reinterpret_cast<int16_t*>(state) + row * value_dim + column + 8 * lane;
    __stcs(reinterpret_cast<uint4*>(at), uint4{words[0], words[1], words[2], words[3]});
    if (lane == 0) {
      __stcs(const_cast<float*>(ScaleAt(state, p, row, column, value_dim)), scale.scale);
    }
  }
  // Bits of the largest absolute value of the row's eight lanes: as integers NaN > inf > numbers.
  __device__ static uint32_t LargestOfRow(const float (&s)[8]) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(s[i]) & 0x7FFFFFFFu);
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) {
      largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, mask));
    }
    return largest;
  }
};

struct Shared {
  float partial[kThreads / 32][kTile];
  float output[kMostGroup][kTile];
  float squares[kMostGroup];
};

__device__ inline void LoadBf16(const bf16* from, float (&x)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}

// Blocks of a multiprocessor: with them 128 KiB of float32 states are on their way.
constexpr int BlocksFor(int rows) { return rows <= 4 ? 4 : rows <= 8 ? 2 : 1; }

// kRows: rows of a thread, K <= 32 kRows.
template <StateFormat kFormat, int kRows>
__global__ void __launch_bounds__(kThreads, BlocksFor(kRows))
    DecodeAttentionKernel(const Parameters p) {
  using Store = RowStore<kFormat>;
  extern __shared__ __align__(16) float dynamic[];  // decay [K], k [K], q [group][K]
  __shared__ Shared shared;
  const DecodeAttentionArgs& a = p.a;
  const int id = threadIdx.x, lane = id % kLanes, row0 = id / kLanes;
  const int tile = static_cast<int>(blockIdx.x % p.tiles);
  const int head = static_cast<int>(blockIdx.x / p.tiles % a.state_heads);
  const int64_t seq = blockIdx.x / p.tiles / a.state_heads;
  const int kv_head = head / (a.state_heads / a.num_kv_heads);
  const int key_dim = a.key_dim, column = tile * kTile;
  float* const decays = dynamic;
  float* const keys = decays + key_dim;
  float* const queries = keys + key_dim;

  // What the kernel ahead does not touch: slots, state, the gate's weights.
  const int read = a.read_slots[seq], write = a.write_slots[seq];
  typename Store::Raw raw[kRows];
  const int64_t first_row = int64_t{head} * key_dim;
  if (read >= 0) {
    const char* const from = static_cast<const char*>(a.state) + read * a.state_stride;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int k = row0 + i * kSideBySide;
      if (k < key_dim) raw[i] = Store::Load(from, p, first_row + k, column, lane, a.value_dim);
    }
  }
  constexpr int kGates = CeilDiv(32 * kRows, kThreads);  // of a thread
  uint4 gate_weight[kGates][2];
  float gate_bias[kGates];
  if (a.gate_kind == GateKind::kPerKey) {
#pragma unroll
    for (int i = 0; i < kGates; ++i) {
      const int k = id + i * kThreads;
      if (k >= key_dim) break;
      const int64_t row = int64_t{kv_head} * key_dim + k;
      const uint4* from = reinterpret_cast<const uint4*>(p.gate_weight + row * kRank);
      gate_weight[i][0] = __ldg(from), gate_weight[i][1] = __ldg(from + 1);
      gate_bias[i] = a.gate_bias == nullptr ? 0.0f : __ldg(a.gate_bias + row);
    }
  }
  WaitForPrevious();
  AllowNext();

  const bool is_padding = read < 0 && write < 0;
  float v[8];
  {
    const bf16* from =
        static_cast<const bf16*>(a.v) + seq * a.v_stride + int64_t{kv_head} * a.value_dim + column;
    const float4 low = LoadFour(from + Columns<kFormat>::First(lane));
    const float4 high = LoadFour(from + Columns<kFormat>::Second(lane));
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }
  for (int i = 8 * id; i < (1 + p.group) * key_dim; i += 8 * kThreads) {
    const bf16* from;
    if (i < key_dim) {
      from = static_cast<const bf16*>(a.k) + seq * a.k_stride + int64_t{kv_head} * key_dim + i;
    } else {
      from = static_cast<const bf16*>(a.q) + seq * a.q_stride + int64_t{head} * p.group * key_dim +
             (i - key_dim);
    }
    float x[8];
    LoadBf16(from, x);
    StoreFour(keys + i, {x[0], x[1], x[2], x[3]});
    StoreFour(keys + i + 4, {x[4], x[5], x[6], x[7]});
  }
  if (a.gate_kind == GateKind::kPerKey) {
    const bf16* from = static_cast<const bf16*>(a.gate_in) + seq * a.gate_in_stride;
    float in[2][8];
    LoadBf16(from, in[0]);
    LoadBf16(from + 8, in[1]);
#pragma unroll
    for (int i = 0; i < kGates; ++i) {
      const int k = id + i * kThreads;
      if (k >= key_dim) break;
      float sum = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 w = gate_weight[i][half];
        const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum = fmaf(in[half][2 * j], __uint_as_float(words[j] << 16), sum);
          sum = fmaf(in[half][2 * j + 1], __uint_as_float(words[j] & 0xFFFF0000u), sum);
        }
      }
      const float x = sum + gate_bias[i];
      // As in gate.cu: selections, because fminf and fmaxf would swallow a NaN.
      float gate = ((x > 0 ? 0.0f : x) - log1pf(expf(-fabsf(x)))) / a.gate_normalizer;
      if (p.clamps && gate < p.clamp_min) gate = p.clamp_min;
      decays[k] = expf(gate);
    }
  } else {
    float decay = 1;
    if (a.gate_kind == GateKind::kConstant) decay = expf(a.decay[head]);
    if (a.gate_kind == GateKind::kScalar) decay = expf(a.gate[seq * a.gate_stride + kv_head]);
    for (int k = id; k < key_dim; k += kThreads) decays[k] = decay;
  }
  __syncthreads();

  float state[kRows][8];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int k = row0 + i * kSideBySide;
    const bool is_row = k < key_dim;
    if (read >= 0 && is_row) {
      Store::Unpack(raw[i], state[i]);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c) state[i][c] = 0;
    }
    const float decay = is_row ? decays[k] : 0.0f, key = is_row ? keys[k] : 0.0f;
#pragma unroll
    for (int c = 0; c < 8; ++c) state[i][c] = fmaf(decay, state[i][c], is_row ? key * v[c] : 0.0f);
    if (write >= 0) {
      Store::Save(static_cast<char*>(a.state) + write * a.state_stride, p, first_row + k, column,
                  lane, a.value_dim, state[i], is_row);
    }
  }

  for (int g = 0; g < p.group; ++g) {
    float o[8] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int k = row0 + i * kSideBySide;
      if (k >= key_dim) break;
      const float q = queries[g * key_dim + k];
#pragma unroll
      for (int c = 0; c < 8; ++c) o[c] = fmaf(q, state[i][c], o[c]);
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      o[c] += __shfl_xor_sync(0xFFFFFFFFu, o[c], 8);
      o[c] += __shfl_xor_sync(0xFFFFFFFFu, o[c], 16);
    }
    if (g > 0) __syncthreads();  // `partial` has been read
    if (id % 32 < kLanes) {
      float* to = shared.partial[id / 32];
      StoreFour(to + Columns<kFormat>::First(lane), {o[0], o[1], o[2], o[3]});
      StoreFour(to + Columns<kFormat>::Second(lane), {o[4], o[5], o[6], o[7]});
    }
    __syncthreads();
    if (id < 32) {
      float squares = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = id + 32 * half;
        float sum = shared.partial[0][c];
#pragma unroll
        for (int w = 1; w < kThreads / 32; ++w) sum += shared.partial[w][c];
        sum *= a.scale;
        shared.output[g][c] = sum;
        squares = fmaf(sum, sum, squares);
      }
      squares = WarpSum(squares);
      if (id == 0) shared.squares[g] = squares;
    }
  }
  cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();  // of one block: a barrier

  for (int i = id; i < p.group * kTile; i += kThreads) {
    const int g = i / kTile, c = i % kTile;
    float x = shared.output[g][c];
    if (a.normalize) {
      float squares = 0;
      for (int t = 0; t < p.tiles; ++t) squares += *cluster.map_shared_rank(&shared.squares[g], t);
      x *= 1.0f / sqrtf(squares / static_cast<float>(a.value_dim) + a.eps);
    }
    if (a.norm_weight != nullptr) x *= __ldg(a.norm_weight + column + c);
    const int64_t at = (int64_t{head} * p.group + g) * a.value_dim + column + c;
    if (a.output_gate != nullptr) {
      x *= Silu(ToFloat(static_cast<const bf16*>(a.output_gate)[seq * a.output_gate_stride + at]));
    }
    static_cast<bf16*>(a.y)[seq * a.y_stride + at] = FromFloat<bf16>(is_padding ? 0.0f : x);
  }
  cluster.sync();  // the others have read this block's squares
}

template <StateFormat kFormat, int kRows>
void Launch(Device& device, const Parameters& p) {
  const auto kernel = &DecodeAttentionKernel<kFormat, kRows>;
  if (p.tiles > 8) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  LaunchOverlapped(device, kernel,
                   {.blocks = GridOf(int64_t{p.a.rows} * p.a.state_heads * p.tiles),
                    .threads = kThreads,
                    .shared_bytes = (2 + p.group) * p.a.key_dim * sizeof(float),
                    .cluster = static_cast<unsigned>(p.tiles),
                    .most_shared = true},
                   p);
}

template <StateFormat kFormat>
void LaunchRows(Device& device, const Parameters& p) {
  const int rows = CeilDiv(p.a.key_dim, kSideBySide);
  if (rows <= 1) return Launch<kFormat, 1>(device, p);
  if (rows <= 2) return Launch<kFormat, 2>(device, p);
  if (rows <= 4) return Launch<kFormat, 4>(device, p);
  if (rows <= 8) return Launch<kFormat, 8>(device, p);
  return Launch<kFormat, 12>(device, p);
}

}  // namespace

bool ServesDecodeAttention(const DecodeAttentionArgs& a) {
  const bool low_rank = a.gate_kind != GateKind::kPerKey ||
                        (a.gate_weight != nullptr && a.gate_weight->in() == kRank &&
                         a.gate_weight->dtype() == DType::kBFloat16);
  return low_rank && a.key_dim % 8 == 0 && a.key_dim <= 12 * kSideBySide &&
         a.value_dim % kTile == 0 && a.value_dim <= 16 * kTile &&
         a.num_heads / a.state_heads <= kMostGroup;
}

void DecodeAttention(Device& device, const DecodeAttentionArgs& a) {
  if (a.rows == 0) return;
  GLA_REQUIRES(ServesDecodeAttention(a), "sizes that Serves() accepts");
  Parameters p = {.a = a,
                  .gate_weight = a.gate_weight == nullptr
                                     ? nullptr
                                     : static_cast<const bf16*>(a.gate_weight->data()),
                  .scales_at = Int16ScalesAt(a.state_heads, a.key_dim, a.value_dim),
                  .clamp_min = a.gate_clamp_min == nullptr ? 0.0f : *a.gate_clamp_min,
                  .clamps = a.gate_clamp_min != nullptr,
                  .group = a.num_heads / a.state_heads,
                  .tiles = a.value_dim / kTile};
  if (a.state_format == StateFormat::kFloat32) {
    LaunchRows<StateFormat::kFloat32>(device, p);
  } else {
    LaunchRows<StateFormat::kInt16>(device, p);
  }
}

}  // namespace gla
