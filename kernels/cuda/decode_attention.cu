// The attention of a decode step: gate, recurrence, norm per head and output gate in one kernel
// that reads and writes each state once.
//
// A block has a (sequence, state head, 64 columns of V); the blocks of a head are a cluster, which
// adds up the squares for the norm. The tile of the state goes to shared memory by asynchronous
// copies, all of them under way before the kernel ahead has ended: the state's last writer, this
// kernel in the step before, is far behind (launch.cuh). Each thread copies the bytes that it will
// work on itself, so it waits for no other thread, and rows leave while later rows still arrive. Of
// float32, 16 lanes share the 64 columns of a row; of int16, 4 (8 where query heads share a state).
// (The copies carry no cache hint: with one, CUDA 13.0 made copies that an H100 found illegal.)
//
// An int16 row is worked on in units of its decayed scale: with u = scale * decay, the new row is
// u (x + (key / u) v), x the integers, so an element costs one FMA, and u is a factor of the query
// and of the next scale. What a row needs once is found by one thread, before and after.
//
// The order of every sum is fixed by K, V and the format: down a thread's rows, over the rows of a
// warp by shuffles or through shared memory, over the warps and then over the blocks of a head
// through shared memory.
#include "kernels/cuda/decode_entry.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor.cuh"

namespace gla {
namespace {

constexpr int kTile = kStateTile;  // columns of V
constexpr int kRank = 16;          // of the gate's product
constexpr int kMostGroup = 8;      // query heads of a state
constexpr int kMostKeys = 512;     // whose tile fits in shared memory
constexpr int kMostTiles = 16;     // blocks of a cluster
constexpr int kParts = 4;          // into which the copies of a tile are cut

// x * ceil(2^36 / d) >> 36 is x / d for x * d <= 2^36.
constexpr int kInverseBits = 36, kMostHeads = 256;

struct Parameters {
  DecodeAttentionArgs a;
  // Of tiles, state heads, and those of them that share a key/value head.
  uint64_t inverse_tiles, inverse_heads, inverse_share;
  const bf16* gate_weight;  // [G * K, kRank]
  int64_t scales_at;        // int16: bytes from a state to its scales
  float clamp_min;
  bool clamps;
  int group, tiles;
};

// ---- Asynchronous copies ------------------------------------------------------------------------

// 4 bytes, zeros in their place when there is nothing to read.
__device__ inline void CopyFourBytes(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 4 : 0)
               : "memory");
}

// ---- Clusters -----------------------------------------------------------------------------------

// Until every block of the cluster has come here, with what it did to its barriers.
__device__ inline void MeetCluster() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  asm volatile("barrier.cluster.wait;" ::: "memory");
}
// A barrier that opens once when `bytes` bytes have been sent to it.
__device__ inline void ExpectBytes(uint64_t* barrier, int bytes) {
  InitBarrier(SharedAddress(barrier), 1);
  ArriveExpecting(SharedAddress(barrier), bytes);
}
// x to where the block of this rank has `to`, and word of it to its barrier.
__device__ inline void SendToRank(float* to, uint64_t* barrier, int rank, float x) {
  uint32_t remote_to, remote_barrier;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_to) : "r"(SharedAddress(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote_barrier)
      : "r"(SharedAddress(barrier)), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_to),
      "r"(__float_as_uint(x)), "r"(remote_barrier)
      : "memory");
}
__device__ inline void WaitForBytes(uint64_t* barrier) {
  uint32_t is_open = 0;
  while (is_open == 0) {
    asm volatile(
        "{\n"
        ".reg .pred open;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 open, [%1], 0;\n"
        "selp.u32 %0, 1, 0, open;\n"
        "}"
        : "=r"(is_open)
        : "r"(SharedAddress(barrier))
        : "memory");
  }
}

// ---- The two formats ----------------------------------------------------------------------------

__device__ inline void Widen(uint32_t pair, float* x) {
  x[0] = __uint_as_float(pair << 16), x[1] = __uint_as_float(pair & 0xFFFF0000u);
}
template <int kCount>
__device__ void LoadBf16(const bf16* from, float (&x)[kCount]) {
  if constexpr (kCount == 4) {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    Widen(raw.x, x), Widen(raw.y, x + 2);
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    Widen(raw.x, x), Widen(raw.y, x + 2), Widen(raw.z, x + 4), Widen(raw.w, x + 6);
  }
}

// A lane's 16 bytes of a row.
template <StateFormat kFormat>
struct Piece;

template <>
struct Piece<StateFormat::kFloat32> {
  static constexpr int kColumns = 4;
  __device__ static void Unpack(uint4 raw, float (&s)[4]) {
    s[0] = __uint_as_float(raw.x), s[1] = __uint_as_float(raw.y);
    s[2] = __uint_as_float(raw.z), s[3] = __uint_as_float(raw.w);
  }
};

template <>
struct Piece<StateFormat::kInt16> {
  static constexpr int kColumns = 8;
  // kBias + x has what is stored for x, x + 2^15, in its low bits. (Conversion instructions run at
  // a quarter of the speed.)
  static constexpr float kBias = 0x1p23f + kInt16Zero;
  __device__ static uint4 Zeros() {
    constexpr uint32_t kTwo = kInt16Zero * 0x10001u;
    return {kTwo, kTwo, kTwo, kTwo};
  }
  __device__ static void Unpack(uint4 raw, float (&x)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(__byte_perm(words[i], 0x4B000000u, 0x7610)) - kBias;
      x[2 * i + 1] = __uint_as_float(__byte_perm(words[i], 0x4B000000u, 0x7632)) - kBias;
    }
  }
  // Adding the bias rounds to an integer, ties to even.
  __device__ static uint4 Pack(const float (&x)[8], float inverse) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = __byte_perm(__float_as_uint(fmaf(x[2 * i], inverse, kBias)),
                             __float_as_uint(fmaf(x[2 * i + 1], inverse, kBias)), 0x5410);
    }
    return {words[0], words[1], words[2], words[3]};
  }
  // max(size, |x|), NaN when there is a NaN.
  __device__ static float Largest(const float (&x)[8], float size) {
#pragma unroll
    for (int i = 0; i < 8; ++i) size = Larger(size, fabsf(x[i]));
    return size;
  }
  __device__ static float Larger(float x, float y) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(y));
    return x;
  }
  // Without a branch around it.
  __device__ static void Store(char* to, uint4 words, bool writes) {
    asm volatile(
        "{\n"
        ".reg .pred writes;\n"
        "setp.ne.u32 writes, %5, 0;\n"
        "@writes st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};\n"
        "}" ::"l"(__cvta_generic_to_global(to)),
        "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(uint32_t{writes})
        : "memory");
  }
  // 32767 / size, to two roundings.
  __device__ static float Inverse(float size) {
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(size));
    return 32767.0f * reciprocal;
  }

  // Sizes of a row are at least this, so that they have an inverse.
  static constexpr float kLeastSize = 0x1p-60f;
  // The unit of a row; one that can be divided by where the row is 0, or nothing beside the key or
  // by itself: this leaves of it at most 2^-65 |key| or 2^-105. NaN stays NaN.
  __device__ static float Unit(float scale, float decay, float key) {
    const float unit = scale * decay, least = fmaxf(fabsf(key) * 0x1p-80f, 0x1p-120f);
    return unit < least ? least : unit;
  }
  // The scale of a row of this size in units.
  __device__ static float Scale(float unit, float size) {
    const float largest = unit * size;
    if (largest < 0x1p-100f) return 0;
    return largest < INFINITY ? largest * (1.0f / 32767.0f) : NAN;
  }
};

// ---- The kernel ---------------------------------------------------------------------------------

// Of a key: its decay and itself; of an int16 row, its unit and the key in units.
struct KeyRow {
  float decay, key;
};

// What makes a key's gate.
struct GateRow {
  uint4 weight[2];
  float bias;

  __device__ void Load(const Parameters& p, int64_t row) {
    const uint4* from = reinterpret_cast<const uint4*>(p.gate_weight + row * kRank);
    weight[0] = __ldg(from), weight[1] = __ldg(from + 1);
    bias = p.a.gate_bias == nullptr ? 0.0f : __ldg(p.a.gate_bias + row);
  }
  __device__ float Product(const float (&in)[kRank]) const {
    float sum = bias;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t words[4] = {weight[half].x, weight[half].y, weight[half].z, weight[half].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float w[2];
        Widen(words[j], w);
        sum = fmaf(in[8 * half + 2 * j], w[0], sum);
        sum = fmaf(in[8 * half + 2 * j + 1], w[1], sum);
      }
    }
    return sum;
  }
};

// Pieces of a row that a lane has.
template <StateFormat kFormat, int kGroup>
constexpr int kPiecesOf = (kFormat == StateFormat::kInt16 && kGroup == 1) ? 2 : 1;

// Dynamic shared memory, in bytes from its start.
template <StateFormat kFormat, int kThreads, int kGroup>
struct Layout {
  // Sums over warps are added where the tile was, so that more blocks fit.
  static constexpr bool kSumsInTile = kPiecesOf<kFormat, kGroup> > 1;
  static constexpr int kPartialStep = kSumsInTile ? 128 : kGroup * kTile;  // floats of a warp

  int rows, queries, scales, partial, squares, barrier, total;

  __host__ __device__ explicit Layout(int key_dim)
      : rows(TileBytes(key_dim)),                                    // KeyRow [K]
        queries(rows + key_dim * static_cast<int>(sizeof(KeyRow))),  // [K][kGroup]
        scales(queries + key_dim * kGroup * 4),                      // [K], then sizes in units
        partial(kSumsInTile ? 0 : ScalesEnd(key_dim)),
        squares(kSumsInTile ? ScalesEnd(key_dim)
                            : partial + kThreads / 32 * kPartialStep * 4),  // [kGroup][tiles]
        barrier(squares + kGroup * kMostTiles * 4),
        total(barrier + 8) {}

 private:
  __host__ __device__ static int TileBytes(int key_dim) {
    constexpr int kRowBytes = kTile * (kFormat == StateFormat::kFloat32 ? 4 : 2);
    // A thread's two pieces of a row lie kThreads pieces apart: whole passes.
    const int rows = kSumsInTile ? RoundUp(key_dim, kThreads * 32 / kRowBytes) : key_dim;
    const int sums = kSumsInTile ? 64 * kThreads : 0;  // every thread's
    return rows * kRowBytes > sums ? rows * kRowBytes : sums;
  }
  __host__ __device__ int ScalesEnd(int key_dim) const {
    return scales + (kFormat == StateFormat::kInt16 ? RoundUp(key_dim, 4) * 4 : 0);
  }
};

// kGroup: at least the query heads of a state. kBlocks: on a multiprocessor, as registers allow.
template <StateFormat kFormat, int kThreads, int kGroup, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) DecodeAttentionKernel(const Parameters p) {
  using Piece = Piece<kFormat>;
  constexpr bool kIsInt16 = kFormat == StateFormat::kInt16;
  constexpr int kColumns = Piece::kColumns, kPieces = kPiecesOf<kFormat, kGroup>;
  constexpr int kLanes = kTile / kColumns / kPieces;
  constexpr int kSideBySide = kThreads / kLanes;  // rows
  constexpr int kWarps = kThreads / 32;
  constexpr int kPartialStep = Layout<kFormat, kThreads, kGroup>::kPartialStep;
  constexpr int kElementBytes = 16 / kColumns;
  extern __shared__ __align__(16) char shared[];
  const DecodeAttentionArgs& a = p.a;
  const Layout<kFormat, kThreads, kGroup> layout(a.key_dim);
  KeyRow* const key_rows = reinterpret_cast<KeyRow*>(shared + layout.rows);
  float* const queries = reinterpret_cast<float*>(shared + layout.queries);
  float* const scales = reinterpret_cast<float*>(shared + layout.scales);
  float* const partial = reinterpret_cast<float*>(shared + layout.partial);
  float* const squares = reinterpret_cast<float*>(shared + layout.squares);
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared + layout.barrier);

  const int id = threadIdx.x, warp = id / 32, lane = id % 32;
  const uint64_t cluster = blockIdx.x * p.inverse_tiles >> kInverseBits;
  const int tile = static_cast<int>(blockIdx.x - cluster * p.tiles);  // rank in the cluster
  const int64_t seq = static_cast<int64_t>(cluster * p.inverse_heads >> kInverseBits);
  const int head = static_cast<int>(cluster - seq * a.state_heads);
  const int kv_head = static_cast<int>(head * p.inverse_share >> kInverseBits);
  const int key_dim = a.key_dim, value_dim = a.value_dim;
  // Columns of the first piece; the second's are kPieceStep further.
  constexpr int kPieceStep = kLanes * kColumns;
  const int column = id % kLanes * kColumns, row0 = id / kLanes;
  bool has_columns[kPieces];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    has_columns[j] = tile * kTile + column + j * kPieceStep < value_dim;
  }

  // What the kernel ahead does not touch: slots, state, the gate's weights.
  const int read = a.read_slots[seq], write = a.write_slots[seq];
  const int64_t piece_at =
      ((int64_t{head} * key_dim + row0) * value_dim + tile * kTile + column) * kElementBytes;
  const int64_t row_step = int64_t{kSideBySide} * value_dim * kElementBytes;
  char* const mine = shared + 16 * id;  // the first piece; 16 kThreads bytes to the next
  const unsigned passes = CeilDiv<unsigned>(key_dim, kSideBySide);
  {
    const char* const state =
        static_cast<const char*>(a.state) + (read < 0 ? 0 : read * a.state_stride);
    if constexpr (kIsInt16) {
      const float* from = reinterpret_cast<const float*>(state + p.scales_at) +
                          int64_t{head} * key_dim * p.tiles + tile;
#pragma unroll 1
      for (int k = id; k < key_dim; k += kThreads) {
        CopyFourBytes(SharedAddress(scales + k), from + int64_t{k} * p.tiles, read >= 0);
      }
      CommitCopies();
    }
    bool reads[kPieces], reads_all = true;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      reads[j] = read >= 0 && has_columns[j];
      reads_all = reads_all && reads[j];
    }
    if constexpr (kIsInt16) {
      // Copies of nothing leave bits of 0, which are not the integer 0.
      const unsigned zero_passes = reads_all ? 0 : passes;
#pragma unroll 1
      for (unsigned i = 0; i < zero_passes; ++i) {
        if (row0 + i * kSideBySide >= key_dim) break;
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          if (reads[j]) continue;
          *reinterpret_cast<uint4*>(mine + (i * kPieces + j) * 16 * kThreads) = Piece::Zeros();
        }
      }
    }
    const char* from = state + piece_at;
#pragma unroll 1
    for (unsigned part = 0; part < kParts; ++part) {
#pragma unroll(kIsInt16 ? 1 : 4)
      for (unsigned i = passes * part / kParts; i < passes * (part + 1) / kParts; ++i) {
        if (row0 + i * kSideBySide < key_dim) {
#pragma unroll
          for (int j = 0; j < kPieces; ++j) {
            if (kIsInt16 && !reads[j]) continue;
            CopyAsync(SharedAddress(mine + (i * kPieces + j) * 16 * kThreads),
                      from + j * kPieceStep * kElementBytes, reads[j]);
          }
        }
        from += row_step;
      }
      CommitCopies();
    }
  }
  GateRow gate_row;  // of this thread's first key
  const bool has_gate_rows = a.gate_kind == GateKind::kPerKey;
  if (has_gate_rows && id < key_dim) gate_row.Load(p, int64_t{kv_head} * key_dim + id);
  const bool shares_squares = a.normalize && p.tiles > 1;
  if (shares_squares) {
    if (id == 0) ExpectBytes(barrier, p.tiles * p.group * static_cast<int>(sizeof(float)));
    MeetCluster();
  }
  WaitForPrevious();
  AllowNext();

  float v[kPieces][kColumns] = {};
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (!has_columns[j]) continue;
    LoadBf16(static_cast<const bf16*>(a.v) + seq * a.v_stride + int64_t{kv_head} * value_dim +
                 tile * kTile + column + j * kPieceStep,
             v[j]);
  }
  {
    const bf16* const k_row =
        static_cast<const bf16*>(a.k) + seq * a.k_stride + int64_t{kv_head} * key_dim;
    const bf16* const q_rows =
        static_cast<const bf16*>(a.q) + seq * a.q_stride + int64_t{head} * p.group * key_dim;
    float in[kRank], step_decay = 1;
    if (has_gate_rows) {
      const bf16* from = static_cast<const bf16*>(a.gate_in) + seq * a.gate_in_stride;
      const uint4 low = *reinterpret_cast<const uint4*>(from);
      const uint4 high = *reinterpret_cast<const uint4*>(from + 8);
      Widen(low.x, in), Widen(low.y, in + 2), Widen(low.z, in + 4), Widen(low.w, in + 6);
      Widen(high.x, in + 8), Widen(high.y, in + 10), Widen(high.z, in + 12), Widen(high.w, in + 14);
    } else if (a.gate_kind == GateKind::kConstant) {
      step_decay = expf(a.decay[head]);
    } else if (a.gate_kind == GateKind::kScalar) {
      step_decay = expf(a.gate[seq * a.gate_stride + kv_head]);
    }
#pragma unroll 1
    for (int k = id; k < key_dim; k += kThreads) {
      const float key = ToFloat(k_row[k]);
      float q[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        q[g] = g < p.group ? ToFloat(q_rows[int64_t{g} * key_dim + k]) : 0.0f;
      }
      float decay = step_decay;
      if (has_gate_rows) {
        if (k != id) gate_row.Load(p, int64_t{kv_head} * key_dim + k);
        const float x = gate_row.Product(in);
        // As in gate.cu: selections, because fminf and fmaxf would swallow a NaN.
        float gate = ((x > 0 ? 0.0f : x) - log1pf(expf(-fabsf(x)))) / a.gate_normalizer;
        if (p.clamps && gate < p.clamp_min) gate = p.clamp_min;
        decay = expf(gate);
      }
      if constexpr (kIsInt16) {
        WaitCopies<kParts>();
        const float unit = Piece::Unit(scales[k], decay, key);
        key_rows[k] = {unit, __fdividef(key, unit)};
#pragma unroll
        for (int g = 0; g < kGroup; ++g) q[g] *= unit;
      } else {
        key_rows[k] = {decay, key};
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) queries[k * kGroup + g] = q[g];
    }
  }
  // What the end needs, long before it is needed: two neighbouring columns of a head to a lane.
  constexpr int kHeads = CeilDiv(kGroup, kWarps);  // of a warp
  const int end_column = tile * kTile + 2 * lane;
  const bool has_end = end_column < value_dim;
  const auto at_end = [&](int g) {  // in a row of H heads
    return (int64_t{head} * p.group + g) * value_dim + end_column;
  };
  uint32_t output_gate[kHeads] = {};
  float2 norm_weight = {1, 1};
  if (has_end) {
    if (a.norm_weight != nullptr && warp < p.group) {
      norm_weight = __ldg(reinterpret_cast<const float2*>(a.norm_weight + end_column));
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int g = warp + i * kWarps;
      if (g >= p.group || a.output_gate == nullptr) break;
      output_gate[i] = *reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(a.output_gate) +
                                                          seq * a.output_gate_stride + at_end(g));
    }
  }
  __syncthreads();

  float o[kGroup][kPieces][kColumns] = {};
  char* const state = static_cast<char*>(a.state) + (write < 0 ? 0 : write * a.state_stride);
  char* to = state + piece_at;
  const auto step = [&](int i) {
    const int k = row0 + i * kSideBySide;
    if (k < key_dim) {  // the same for a whole warp
      float s[kPieces][kColumns];
      const KeyRow row = key_rows[k];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        Piece::Unpack(*reinterpret_cast<const uint4*>(mine + (i * kPieces + j) * 16 * kThreads),
                      s[j]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          s[j][c] = kIsInt16 ? fmaf(row.key, v[j][c], s[j][c])
                             : fmaf(row.decay, s[j][c], row.key * v[j][c]);
        }
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const float q = queries[k * kGroup + g];
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) o[g][j][c] = fmaf(q, s[j][c], o[g][j][c]);
        }
      }
      if constexpr (kIsInt16) {
        float size = Piece::kLeastSize;
#pragma unroll
        for (int j = 0; j < kPieces; ++j) size = Piece::Largest(s[j], size);
#pragma unroll
        for (int mask = 1; mask < kLanes; mask *= 2) {
          size = Piece::Larger(size, __shfl_xor_sync(0xFFFFFFFFu, size, mask));
        }
        const float inverse = Piece::Inverse(size);
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          Piece::Store(to + j * kPieceStep * kElementBytes, Piece::Pack(s[j], inverse),
                       write >= 0 && has_columns[j]);
        }
        if (lane % kLanes == 0) scales[k] = size;
      } else {
        if (write >= 0 && has_columns[0]) {
          __stcs(reinterpret_cast<float4*>(to), float4{s[0][0], s[0][1], s[0][2], s[0][3]});
        }
      }
    }
    to += row_step;
  };
#pragma unroll(kIsInt16 ? kParts : 1)
  for (unsigned part = 0; part < kParts; ++part) {
    if (part == 0) WaitCopies<3>();
    if (part == 1) WaitCopies<2>();
    if (part == 2) WaitCopies<1>();
    if (part == 3) WaitCopies<0>();
#pragma unroll(kIsInt16 ? 1 : 2)
    for (unsigned i = passes * part / kParts; i < passes * (part + 1) / kParts; ++i) step(i);
  }

  if constexpr (kPieces == 1) {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        for (int mask = kLanes; mask < 32; mask *= 2) {
          o[g][0][c] += __shfl_xor_sync(0xFFFFFFFFu, o[g][0][c], mask);
        }
      }
      if (lane < kLanes) {
        float* const part = partial + warp * kPartialStep + g * kTile + column;
#pragma unroll
        for (int c = 0; c < kColumns; c += 4) {
          StoreFour(part + c, {o[g][0][c], o[g][0][c + 1], o[g][0][c + 2], o[g][0][c + 3]});
        }
      }
    }
  } else {
    // Each thread's sums to where its pieces were; then two columns to a lane.
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
#pragma unroll
      for (int c = 0; c < kColumns; c += 4) {
        StoreFour(reinterpret_cast<float*>(mine + (j * kColumns + c) / 4 * 16 * kThreads),
                  {o[0][j][c], o[0][j][c + 1], o[0][j][c + 2], o[0][j][c + 3]});
      }
    }
    __syncwarp();
    const int piece = 2 * lane / kPieceStep, in_piece = 2 * lane % kPieceStep;
    const int four = (piece * kColumns + in_piece % kColumns) / 4;
    const char* const from =
        shared + (four * kThreads + 32 * warp + in_piece / kColumns) * 16 + 2 * lane % 4 * 4;
    float2 sum = {0, 0};
#pragma unroll
    for (int row = 0; row < 32 / kLanes; ++row) {
      const float2 one = *reinterpret_cast<const float2*>(from + row * kLanes * 16);
      sum.x += one.x, sum.y += one.y;
    }
    __syncwarp();
    *reinterpret_cast<float2*>(partial + warp * kPartialStep + 2 * lane) = sum;
  }
  __syncthreads();
  if constexpr (kIsInt16) {
    float* const scales_to =
        reinterpret_cast<float*>(state + p.scales_at) + int64_t{head} * key_dim * p.tiles + tile;
#pragma unroll 1
    for (int k = write < 0 ? key_dim : id; k < key_dim; k += kThreads) {
      __stcs(scales_to + int64_t{k} * p.tiles, Piece::Scale(key_rows[k].decay, scales[k]));
    }
  }

  // A warp to a query head.
  float2 x[kHeads] = {};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int g = warp + i * kWarps;
    if (g >= p.group) break;
    float2 sum = {0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part =
          *reinterpret_cast<const float2*>(partial + w * kPartialStep + g * kTile + 2 * lane);
      sum.x += part.x, sum.y += part.y;
    }
    x[i] = has_end ? float2{sum.x * a.scale, sum.y * a.scale} : float2{0, 0};
    if (!a.normalize) continue;
    const float mine_squared = WarpSum(fmaf(x[i].x, x[i].x, x[i].y * x[i].y));
    if (!shares_squares) {
      if (lane == 0) squares[g * kMostTiles] = mine_squared;
    } else if (lane < p.tiles) {
      SendToRank(squares + g * kMostTiles + tile, barrier, lane, mine_squared);
    }
  }
  if (shares_squares) {
    if (warp < p.group && lane == 0) WaitForBytes(barrier);
  }
  __syncwarp();
  const bool is_padding = read < 0 && write < 0;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int g = warp + i * kWarps;
    if (g >= p.group || !has_end) break;
    float2 y = x[i];
    if (a.normalize) {
      float sum = squares[g * kMostTiles];
      for (int t = 1; t < p.tiles; ++t) sum += squares[g * kMostTiles + t];
      const float factor = 1.0f / sqrtf(sum / static_cast<float>(value_dim) + a.eps);
      y.x *= factor, y.y *= factor;
    }
    y.x *= norm_weight.x, y.y *= norm_weight.y;
    if (a.output_gate != nullptr) {
      float gate[2];
      Widen(output_gate[i], gate);
      y.x *= Silu(gate[0]), y.y *= Silu(gate[1]);
    }
    if (is_padding) y = {0, 0};
    *reinterpret_cast<__nv_bfloat162*>(static_cast<bf16*>(a.y) + seq * a.y_stride + at_end(g)) =
        __floats2bfloat162_rn(y.x, y.y);
  }
}

template <StateFormat kFormat, int kThreads, int kGroup, int kBlocks>
void Launch(Device& device, const Parameters& p) {
  const auto kernel = &DecodeAttentionKernel<kFormat, kThreads, kGroup, kBlocks>;
  if (p.tiles > 8) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  LaunchOverlapped(
      device, kernel,
      {.blocks = GridOf(int64_t{p.a.rows} * p.a.state_heads * p.tiles),
       .threads = kThreads,
       .shared_bytes = static_cast<size_t>(Layout<kFormat, kThreads, kGroup>(p.a.key_dim).total),
       .cluster = static_cast<unsigned>(p.tiles),
       .most_shared = true},
      p);
}

template <StateFormat kFormat>
void LaunchGroup(Device& device, const Parameters& p) {
  // The number of threads changes the order of sums: it may depend on K, not on rows.
  if constexpr (kFormat == StateFormat::kInt16) {
    if (p.group == 1 && p.a.key_dim <= 256) return Launch<kFormat, 128, 1, 6>(device, p);
    if (p.group == 1) return Launch<kFormat, 256, 1, 3>(device, p);
  } else {
    if (p.group == 1 && p.a.key_dim <= 128) return Launch<kFormat, 128, 1, 8>(device, p);
    if (p.group == 1) return Launch<kFormat, 256, 1, 4>(device, p);
  }
  if (p.group == 2) return Launch<kFormat, 256, 2, 4>(device, p);
  if (p.group <= 4) return Launch<kFormat, 256, 4, 2>(device, p);
  return Launch<kFormat, 256, 8, 2>(device, p);
}

}  // namespace

bool ServesDecodeAttention(const DecodeAttentionArgs& a) {
  const bool has_gate = a.gate_kind != GateKind::kPerKey ||
                        (a.gate_weight != nullptr && a.gate_weight->in() == kRank &&
                         a.gate_weight->dtype() == DType::kBFloat16);
  const int state_heads = a.gate_kind == GateKind::kConstant ? a.num_heads : a.num_kv_heads;
  return has_gate && a.state_heads == state_heads && a.num_heads % a.num_kv_heads == 0 &&
         a.num_heads / state_heads <= kMostGroup && state_heads <= kMostHeads &&
         a.key_dim % 8 == 0 && a.key_dim <= kMostKeys && a.value_dim % 16 == 0 &&
         a.value_dim <= kMostTiles * kTile;
}

void DecodeAttention(Device& device, const DecodeAttentionArgs& a) {
  if (a.rows == 0) return;
  GLA_REQUIRES(ServesDecodeAttention(a), "sizes that Serves() accepts");
  GLA_REQUIRES(int64_t{a.rows} * a.state_heads < int64_t{1} << 28, "the clusters of one launch");
  const auto inverse = [](uint64_t divisor) {
    return ((uint64_t{1} << kInverseBits) + divisor - 1) / divisor;
  };
  const int tiles = CeilDiv(a.value_dim, kTile);
  const Parameters p = {.a = a,
                        .inverse_tiles = inverse(tiles),
                        .inverse_heads = inverse(a.state_heads),
                        .inverse_share = inverse(a.state_heads / a.num_kv_heads),
                        .gate_weight = a.gate_weight == nullptr
                                           ? nullptr
                                           : static_cast<const bf16*>(a.gate_weight->data()),
                        .scales_at = Int16ScalesAt(a.state_heads, a.key_dim, a.value_dim),
                        .clamp_min = a.gate_clamp_min == nullptr ? 0.0f : *a.gate_clamp_min,
                        .clamps = a.gate_clamp_min != nullptr,
                        .group = a.num_heads / a.state_heads,
                        .tiles = tiles};
  if (a.state_format == StateFormat::kFloat32) {
    LaunchGroup<StateFormat::kFloat32>(device, p);
  } else {
    LaunchGroup<StateFormat::kInt16>(device, p);
  }
}

}  // namespace gla
