// The attention of a decode step: gate, recurrence, norm per head and output gate in one kernel
// that reads and writes each state once.
//
// A block has a (sequence, state head, 64 columns of V); the blocks of a head are a cluster, which
// adds up the squares for the norm. The copy engine brings the tile of the state to shared memory,
// all of it under way before the kernel ahead has ended: the state's last writer, this kernel in
// the step before, is far behind (decode.h). (With copies by the threads, cp.async, whatever else
// a block needs waits behind the states of the blocks beside it: two thirds of its time.) Of
// float32, 16 lanes share the 64 columns of a row; of int16, 4 (8 where query heads share a state).
//
// An int16 row is worked on in units of its decayed scale: with u = scale * decay, the new row is
// u (x + (key / u) v), x the integers, so an element costs one FMA, and u is a factor of the query
// and of the next scale. What a row needs once is found by one thread, before and after.
//
// The order of every sum is fixed by K, V, the format and how many query heads share a state: down
// a thread's rows, over the rows of a warp by shuffles, over the warps and then over the blocks of
// a head through shared memory.
#include <algorithm>
#include <numbers>

#include "kernels/cuda/decode_entry.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor.cuh"
#include "kernels/cuda/tensor_map.h"

namespace gla {
namespace {

constexpr int kTile = kStateTile;  // columns of V
constexpr int kRank = 16;          // of the gate's product
constexpr int kMostGroup = 8;      // query heads of a state
constexpr int kMostKeys = 512;     // whose tile fits in shared memory
constexpr int kMostTiles = 16;     // blocks of a cluster
constexpr int kParts = 4;          // into which the copies of a tile are cut
constexpr uint64_t kMostSlots = uint64_t{1} << 31;

// The most keys of a launch with so many threads.
template <StateFormat kFormat, int kThreads>
constexpr int kMostKeysOf = kThreads == 256                  ? kMostKeys
                            : kFormat == StateFormat::kInt16 ? 256
                                                             : 128;

constexpr int kMostHeads = 256;     // so that 32 bits count the bytes of a state
constexpr int kRowsAlongY = 32768;  // of a grid

struct Parameters {
  DecodeAttentionArgs a;
  int share;                // state heads of a key/value head
  const bf16* gate_weight;  // [G * K, kRank]
  int64_t scales_at;        // int16: bytes from a state to its scales
  float inverse_normalizer, inverse_value_dim;
  float clamp_min;  // of gates, as logarithms to base 2
  bool clamps;
  int group, tiles;
};

// ---- Clusters -----------------------------------------------------------------------------------

__device__ inline int RankInCluster() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline int ClusterAlongX() {
  int id;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}
// The second waits until every thread of the cluster has done the first.
__device__ inline void ArriveAtCluster() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ inline void WaitForCluster() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
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

// ---- The two formats ----------------------------------------------------------------------------

__device__ inline float Widen(uint16_t raw) { return __uint_as_float(uint32_t{raw} << 16); }
__device__ inline void Widen(uint32_t pair, float* x) {
  x[0] = __uint_as_float(pair << 16), x[1] = __uint_as_float(pair & 0xFFFF0000u);
}
// bfloat16s as they are loaded.
template <int kCount>
using RawOf = std::conditional_t<kCount == 4, uint2, uint4>;
__device__ inline void Widen(uint2 raw, float* x) { Widen(raw.x, x), Widen(raw.y, x + 2); }
__device__ inline void Widen(uint4 raw, float* x) {
  Widen(raw.x, x), Widen(raw.y, x + 2), Widen(raw.z, x + 4), Widen(raw.w, x + 6);
}

// A lane's 16 bytes of a row.
template <StateFormat kFormat>
struct Piece;

template <>
struct Piece<StateFormat::kFloat32> {
  static constexpr int kColumns = 4;
  __device__ static uint4 Zeros() { return {}; }
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
  // The largest |x|, NaN when there is a NaN.
  __device__ static float Largest(const float (&x)[8]) {
    float size[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) size[i] = Larger(fabsf(x[i]), fabsf(x[4 + i]));
    return Larger(Larger(size[0], size[1]), Larger(size[2], size[3]));
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

// Of a key: its decay and itself, of an int16 row its unit and the key in units, and at last the
// size of the row in units; and the queries that meet it.
template <int kGroup>
struct alignas(16) KeyRow {
  float decay, key;
  float query[kGroup];
};

// What makes a key's gate.
struct GateRow {
  uint4 weight[2];
  float bias;

  __device__ void Load(const Parameters& p, int row) {
    const uint4* const from = reinterpret_cast<const uint4*>(p.gate_weight) + row * (kRank / 8);
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

// The logarithm to base 2 of the sigmoid of x, by the special function units: to 2^-21 and, close
// to 0 (long memory), to 2^-16 of itself. Selections, because fminf and fmaxf would swallow a NaN.
__device__ inline float LogSigmoid(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float z = exp2f(-fabsf(x) * kLog2E);
  const float series = kLog2E * z * fmaf(z, fmaf(z, fmaf(z, -0.25f, 1.0f / 3), -0.5f), 1.0f);
  const float log = z < 0x1p-6f ? series : __log2f(1.0f + z);
  return (x > 0 ? 0.0f : x * kLog2E) - log;
}

// Pieces of a row that a lane has.
template <StateFormat kFormat, int kGroup>
constexpr int kPiecesOf = (kFormat == StateFormat::kInt16 && kGroup == 1) ? 2 : 1;

// Bytes of the rows that a block's threads work on at a time.
template <StateFormat kFormat, int kThreads, int kGroup>
constexpr int kPassBytes = (16 * kThreads) * kPiecesOf<kFormat, kGroup>;
template <StateFormat kFormat>
constexpr int kRowBytes = (kFormat == StateFormat::kFloat32 ? 4 : 2) * kTile;

// Rows of a box of the copy engine, of which a tile is at most kParts.
template <StateFormat kFormat, int kThreads, int kGroup>
__host__ __device__ constexpr int RowsOfPart(int key_dim) {
  constexpr int kRows = kPassBytes<kFormat, kThreads, kGroup> / kRowBytes<kFormat>;
  return CeilDiv(CeilDiv(key_dim, kRows), kParts) * kRows;
}

// Dynamic shared memory, in bytes from its start.
template <StateFormat kFormat, int kThreads, int kGroup>
struct Layout {
  int part, parts;  // bytes of one, how many
  int rows, partial, norms, squares, barriers, total;

  __host__ __device__ explicit Layout(int key_dim)
      : part(RowsOfPart<kFormat, kThreads, kGroup>(key_dim) * kRowBytes<kFormat>),
        parts(CeilDiv(key_dim * kRowBytes<kFormat>, part)),
        rows(parts * part),  // KeyRow [K, and on to the end of the last part]
        partial(rows + rows / kRowBytes<kFormat> * int{sizeof(KeyRow<kGroup>)}),
        norms(partial + kThreads / 32 * kGroup * kTile * 4),  // partial: [warps][kGroup][kTile]
        squares(norms + kTile * 4),                           // [kTile]; [kGroup][kMostTiles]
        barriers(squares + kGroup * kMostTiles * 4),          // parts', squares'
        total(barriers + (kParts + 1) * 8) {}
};

// Sums over the rows of a warp. The kAll / 2 lanes that hold the same kAll columns, each of other
// rows, halve the columns among themselves step by step: a lane is left with the sums of two, x[0]
// and x[1]; returns which of its columns x[0] is.
template <int kCount, int kAll>
__device__ int SumRows(float (&x)[kAll], int lane) {
  if constexpr (kCount == 2) {
    return 0;
  } else {
    constexpr int kHalf = kCount / 2, kMask = 16 * kCount / kAll;
    const bool is_upper = (lane & kMask) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float keep = is_upper ? x[kHalf + i] : x[i], give = is_upper ? x[i] : x[kHalf + i];
      x[i] = keep + __shfl_xor_sync(0xFFFFFFFFu, give, kMask);
    }
    return (is_upper ? kHalf : 0) + SumRows<kHalf>(x, lane);
  }
}

// kGroup: at least the query heads of a state. kBlocks: on a multiprocessor, as registers allow.
template <StateFormat kFormat, int kThreads, int kGroup, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    DecodeAttentionKernel(const Parameters p, const __grid_constant__ CUtensorMap states) {
  using Piece = Piece<kFormat>;
  constexpr bool kIsInt16 = kFormat == StateFormat::kInt16;
  constexpr int kColumns = Piece::kColumns, kPieces = kPiecesOf<kFormat, kGroup>;
  constexpr int kLanes = kTile / kColumns / kPieces;
  constexpr int kSideBySide = kThreads / kLanes;  // rows
  constexpr int kPass = kPassBytes<kFormat, kThreads, kGroup>;
  constexpr int kWarps = kThreads / 32;
  constexpr int kElementBytes = 16 / kColumns;
  constexpr int kKeys = kMostKeysOf<kFormat, kThreads> / kThreads;  // of a thread
  using KeyRow = KeyRow<kGroup>;
  extern __shared__ __align__(128) char shared[];
  const DecodeAttentionArgs& a = p.a;
  const Layout<kFormat, kThreads, kGroup> layout(a.key_dim);
  KeyRow* const key_rows = reinterpret_cast<KeyRow*>(shared + layout.rows);
  float* const partial = reinterpret_cast<float*>(shared + layout.partial);
  float* const norms = reinterpret_cast<float*>(shared + layout.norms);
  float* const squares = reinterpret_cast<float*>(shared + layout.squares);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + layout.barriers);
  uint64_t* const squares_barrier = barriers + kParts;

  // Offsets from pointers are in 32 bits but for those of slots: half of a block's life may pass
  // before it works on its first row, and much of that is instructions.
  const int id = threadIdx.x, warp = id / 32, lane = id % 32;
  const int tile = RankInCluster(), head = ClusterAlongX();
  const int seq = static_cast<int>(blockIdx.y + blockIdx.z * kRowsAlongY);
  if (a.rows <= kRowsThatOverlap) AllowNext();
  if (seq >= a.rows) return;
  const int group = kGroup == 1 ? 1 : p.group;
  const int kv_head = p.share == 1 ? head : head / p.share;
  const int key_dim = a.key_dim, value_dim = a.value_dim;
  // Columns of the first piece; the second's are kPieceStep further.
  constexpr int kPieceStep = kLanes * kColumns;
  const int column = id % kLanes * kColumns, row0 = id / kLanes;
  bool has_columns[kPieces];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    has_columns[j] = tile * kTile + column + j * kPieceStep < value_dim;
  }
  const int scales_row = (head * p.tiles + tile) * key_dim;
  uint32_t mine = SharedAddress(shared) + row0 * kRowBytes<kFormat> + column * kElementBytes;
  uint32_t my_rows = SharedAddress(key_rows + row0);
  const int passes = layout.part / kPass;  // of a part

  // What the kernel ahead does not touch: slots, state, the gate's weights.
  const int read = a.read_slots[seq], write = a.write_slots[seq];
  const bool shares_squares = a.normalize && p.tiles > 1;
  GateRow gate_rows[kKeys];
  const bool has_gate_rows = a.gate_kind == GateKind::kPerKey;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int k = id + i * kThreads;
    if (has_gate_rows && k < key_dim) gate_rows[i].Load(p, kv_head * key_dim + k);
  }
  if (id == 0) {
    PrefetchMap(states);
    for (unsigned part = 0; part < kParts; ++part) InitBarrier(SharedAddress(barriers + part), 1);
    if (shares_squares) {
      ExpectBytes(squares_barrier, p.tiles * group * static_cast<int>(sizeof(float)));
    }
    FenceBarriers();
    if (read >= 0) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (part >= layout.parts) break;
        const uint32_t barrier = SharedAddress(barriers + part);
        ArriveExpecting(barrier, layout.part);
        CopyBox(SharedAddress(shared) + part * layout.part, states, barrier, tile * kTile,
                part * (layout.part / kRowBytes<kFormat>), head, read);
      }
    }
  }
  if (shares_squares) ArriveAtCluster();
  float scales[kKeys] = {};
  if constexpr (kIsInt16) {
    const float* const from =
        reinterpret_cast<const float*>(static_cast<const char*>(a.state) +
                                       (read < 0 ? 0 : read * a.state_stride) + p.scales_at) +
        scales_row;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int k = id + i * kThreads;
      if (read >= 0 && k < key_dim) scales[i] = __ldcg(from + k);
    }
  }
  if (read < 0) {
    for (int i = 0; i < layout.parts * passes; ++i) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        StoreShared(mine + i * kPass + j * kPieceStep * kElementBytes, Piece::Zeros());
      }
    }
  }
  // Where everything is that comes from the kernel ahead, or goes out at the end.
  constexpr int kHeads = CeilDiv(kGroup, kWarps);  // query heads of a warp, at the end
  const int end_column = tile * kTile + 2 * lane;  // two neighbouring columns of a head to a lane
  const bool has_end = end_column < value_dim;
  const int first_head = head * group;
  int k_at = seq * static_cast<int>(a.k_stride) + kv_head * key_dim + id;
  int q_at = seq * static_cast<int>(a.q_stride) + first_head * key_dim + id;
  int v_at = seq * static_cast<int>(a.v_stride) + kv_head * value_dim + tile * kTile + column;
  int gate_at =
      seq * static_cast<int>(a.output_gate_stride) + (first_head + warp) * value_dim + end_column;
  char* to = static_cast<char*>(a.state) + (write < 0 ? 0 : write * a.state_stride) +
             ((head * key_dim + row0) * value_dim + tile * kTile + column) * kElementBytes;
  const int row_step = kSideBySide * value_dim * kElementBytes;
  Keep(mine), Keep(my_rows), Keep(k_at), Keep(q_at), Keep(v_at), Keep(gate_at), Keep(to);
  // (They come from afar, and wait in registers until the end otherwise.)
  if (a.norm_weight != nullptr && id < kTile / 4) {
    const bool valid = tile * kTile + id * 4 < value_dim;
    CopyAsync(SharedAddress(norms) + id * 16, a.norm_weight + (valid ? tile * kTile + id * 4 : 0),
              valid);
  }
  CommitCopies();
  WaitForPrevious();
  AllowNext();

  // All of it is asked for before any is used, from the L2 cache: this kernel may have begun when
  // that of the layer before had not yet read its own, from the same place.
  uint4 gate_in[2] = {};
  if (has_gate_rows) {
    const uint4* const from = reinterpret_cast<const uint4*>(
        static_cast<const bf16*>(a.gate_in) + seq * static_cast<int>(a.gate_in_stride));
    gate_in[0] = __ldcg(from), gate_in[1] = __ldcg(from + 1);
  }
  uint16_t raw_key[kKeys], raw_query[kKeys][kGroup];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    if (id + i * kThreads >= key_dim) break;
    raw_key[i] = __ldcg(static_cast<const uint16_t*>(a.k) + k_at + i * kThreads);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (g >= group) break;
      raw_query[i][g] =
          __ldcg(static_cast<const uint16_t*>(a.q) + q_at + g * key_dim + i * kThreads);
    }
  }
  RawOf<kColumns> raw_v[kPieces] = {};
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (!has_columns[j]) continue;
    raw_v[j] = __ldcg(reinterpret_cast<const RawOf<kColumns>*>(static_cast<const bf16*>(a.v) +
                                                               v_at + j * kPieceStep));
  }
  uint32_t output_gate[kHeads] = {};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (!has_end || warp + i * kWarps >= group || a.output_gate == nullptr) break;
    output_gate[i] = __ldcg(reinterpret_cast<const uint32_t*>(
        static_cast<const bf16*>(a.output_gate) + gate_at + i * kWarps * value_dim));
  }
  float step_decay = 1;
  if (a.gate_kind == GateKind::kConstant) step_decay = expf(a.decay[head]);
  if (a.gate_kind == GateKind::kScalar) {
    step_decay = expf(__ldcg(a.gate + seq * static_cast<int>(a.gate_stride) + kv_head));
  }

  {
    float in[kRank];
    Widen(gate_in[0], in), Widen(gate_in[1], in + 8);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int k = id + i * kThreads;
      if (k >= key_dim) break;
      const float key = Widen(raw_key[i]);
      float decay = step_decay;
      if (has_gate_rows) {
        float gate = LogSigmoid(gate_rows[i].Product(in)) * p.inverse_normalizer;
        if (p.clamps && gate < p.clamp_min) gate = p.clamp_min;
        decay = exp2f(gate);
      }
      float unit = 1;
      KeyRow row;
      if constexpr (kIsInt16) {
        unit = Piece::Unit(scales[i], decay, key);
        row.decay = unit, row.key = __fdividef(key, unit);
      } else {
        row.decay = decay, row.key = key;
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        row.query[g] = g < group ? Widen(raw_query[i][g]) * unit : 0.0f;
      }
      key_rows[k] = row;
    }
  }
  float v[kPieces][kColumns];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) Widen(raw_v[j], v[j]);
  __syncthreads();

  float o[kGroup][kPieces * kColumns] = {};
  // What a row needs from shared memory; a pass ahead of its arithmetic where registers allow.
  constexpr bool kFetchesAhead = !kIsInt16 && kGroup == 1;
  struct Fetched {
    uint4 state[kPieces];
    KeyRow row;
  };
  const auto fetch = [&](int i, Fetched& f) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      LoadShared(mine + i * kPass + j * kPieceStep * kElementBytes, f.state[j]);
    }
    LoadShared(my_rows + i * kSideBySide * int{sizeof(KeyRow)}, f.row);
  };
  const auto step = [&](int i, const Fetched& f) {
    if (row0 + i * kSideBySide < key_dim) {  // the same for a whole warp
      float s[kPieces][kColumns];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        Piece::Unpack(f.state[j], s[j]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          s[j][c] = kIsInt16 ? fmaf(f.row.key, v[j][c], s[j][c])
                             : fmaf(f.row.decay, s[j][c], f.row.key * v[j][c]);
        }
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            o[g][j * kColumns + c] = fmaf(f.row.query[g], s[j][c], o[g][j * kColumns + c]);
          }
        }
      }
      if constexpr (kIsInt16) {
        // Beyond V there is no integer 0, but bits of 0.
        float size = has_columns[0] ? Piece::Largest(s[0]) : 0.0f;
        if constexpr (kPieces == 2) {
          size = Piece::Larger(size, has_columns[1] ? Piece::Largest(s[1]) : 0.0f);
        }
        size = Piece::Larger(size, Piece::kLeastSize);
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
        __syncwarp();  // every lane has read the key
        if (lane % kLanes == 0) key_rows[row0 + i * kSideBySide].key = size;
      } else {
        if (write >= 0 && has_columns[0]) {
          __stcs(reinterpret_cast<float4*>(to), float4{s[0][0], s[0][1], s[0][2], s[0][3]});
        }
      }
    }
    to += row_step;
  };
#pragma unroll 1
  for (int part = 0; part < layout.parts; ++part) {
    if (read >= 0) WaitBarrier(SharedAddress(barriers + part), 0);
    const int end = (part + 1) * passes;
    Fetched even;
    if constexpr (kFetchesAhead) {
      // (Beyond the part's end its last rows are read again, for nothing.)
      Fetched odd;
      fetch(end - passes, even);
#pragma unroll 1
      for (int i = end - passes; i < end; i += 2) {
        fetch(min(i + 1, end - 1), odd);
        step(i, even);
        fetch(min(i + 2, end - 1), even);
        if (i + 1 < end) step(i + 1, odd);
      }
    } else {
#pragma unroll 1
      for (int i = end - passes; i < end; ++i) fetch(i, even), step(i, even);
    }
  }

#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const int e = SumRows<kPieces * kColumns>(o[g], lane);
    *reinterpret_cast<float2*>(partial + (warp * kGroup + g) * kTile + e / kColumns * kPieceStep +
                               column + e % kColumns) = float2{o[g][0], o[g][1]};
  }
  WaitCopies<0>();
  __syncthreads();
  if constexpr (kIsInt16) {
    float* const scales_to =
        reinterpret_cast<float*>(static_cast<char*>(a.state) +
                                 (write < 0 ? 0 : write * a.state_stride) + p.scales_at) +
        scales_row;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int k = id + i * kThreads;
      if (write < 0 || k >= key_dim) break;
      __stcs(scales_to + k, Piece::Scale(key_rows[k].decay, key_rows[k].key));
    }
  }

  // A warp to a query head.
  if (shares_squares) WaitForCluster();
  float2 x[kHeads] = {};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int g = warp + i * kWarps;
    if (g >= group) break;
    float2 sum = {0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part =
          *reinterpret_cast<const float2*>(partial + (w * kGroup + g) * kTile + 2 * lane);
      sum.x += part.x, sum.y += part.y;
    }
    x[i] = has_end ? float2{sum.x * a.scale, sum.y * a.scale} : float2{0, 0};
    if (!a.normalize) continue;
    const float mine_squared = WarpSum(fmaf(x[i].x, x[i].x, x[i].y * x[i].y));
    if (!shares_squares) {
      if (lane == 0) squares[g * kMostTiles] = mine_squared;
    } else if (lane < p.tiles) {
      SendToRank(squares + g * kMostTiles + tile, squares_barrier, lane, mine_squared);
    }
  }
  if (shares_squares) {
    if (warp < group && lane == 0) WaitBarrier(SharedAddress(squares_barrier), 0);
  }
  __syncwarp();
  const bool is_padding = read < 0 && write < 0;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int g = warp + i * kWarps;
    if (g >= group || !has_end) break;
    float2 y = x[i];
    if (a.normalize) {
      float sum = squares[g * kMostTiles];
      for (int t = 1; t < p.tiles; ++t) sum += squares[g * kMostTiles + t];
      const float factor = rsqrtf(sum * p.inverse_value_dim + a.eps);
      y.x *= factor, y.y *= factor;
    }
    if (a.norm_weight != nullptr) {
      const float2 norm = *reinterpret_cast<const float2*>(norms + 2 * lane);
      y.x *= norm.x, y.y *= norm.y;
    }
    if (a.output_gate != nullptr) {
      float gate[2];
      Widen(output_gate[i], gate);
      y.x *= QuickSilu(gate[0]), y.y *= QuickSilu(gate[1]);
    }
    if (is_padding) y = {0, 0};
    *reinterpret_cast<__nv_bfloat162*>(
        static_cast<bf16*>(a.y) + seq * static_cast<int>(a.y_stride) +
        (first_head + g) * value_dim + end_column) = __floats2bfloat162_rn(y.x, y.y);
  }
}

template <StateFormat kFormat, int kThreads, int kGroup, int kBlocks>
void Launch(Device& device, const Parameters& p) {
  const auto kernel = &DecodeAttentionKernel<kFormat, kThreads, kGroup, kBlocks>;
  GLA_REQUIRES(p.a.key_dim <= (kMostKeysOf<kFormat, kThreads>), "keys that the threads have");
  if (p.tiles > 8) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  constexpr uint64_t kBytes = kRowBytes<kFormat> / kTile;  // of an element
  const auto dim = [](int64_t size) { return static_cast<uint64_t>(size); };
  const uint64_t strides[] = {kBytes * p.a.value_dim, kBytes * p.a.value_dim * p.a.key_dim,
                              dim(p.a.state_stride)};
  const CUtensorMap states = EncodeMap(
      kFormat == StateFormat::kFloat32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                       : CU_TENSOR_MAP_DATA_TYPE_UINT16,
      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, p.a.state,
      {dim(p.a.value_dim), dim(p.a.key_dim), dim(p.a.state_heads), kMostSlots}, strides,
      {kTile, static_cast<uint32_t>(RowsOfPart<kFormat, kThreads, kGroup>(p.a.key_dim)), 1, 1});
  LaunchOverlapped(
      device, kernel,
      {.blocks = dim3(p.tiles * p.a.state_heads, std::min(p.a.rows, kRowsAlongY),
                      CeilDiv(p.a.rows, kRowsAlongY)),
       .threads = kThreads,
       .shared_bytes = static_cast<size_t>(Layout<kFormat, kThreads, kGroup>(p.a.key_dim).total),
       .cluster = static_cast<unsigned>(p.tiles),
       .most_shared = true},
      p, states);
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
  const int64_t widest = std::max({a.q_stride, a.k_stride, a.v_stride, a.gate_in_stride,
                                   a.output_gate_stride, a.gate_stride, a.y_stride});
  GLA_REQUIRES(a.rows * widest < int64_t{1} << 31, "rows whose elements 32 bits count");
  const int tiles = CeilDiv(a.value_dim, kTile);
  const Parameters p = {
      .a = a,
      .share = a.state_heads / a.num_kv_heads,
      .gate_weight =
          a.gate_weight == nullptr ? nullptr : static_cast<const bf16*>(a.gate_weight->data()),
      .scales_at = Int16ScalesAt(a.state_heads, a.key_dim, a.value_dim),
      .inverse_normalizer = 1 / a.gate_normalizer,
      .inverse_value_dim = 1.0f / static_cast<float>(a.value_dim),
      .clamp_min =
          a.gate_clamp_min == nullptr ? 0.0f : *a.gate_clamp_min * std::numbers::log2e_v<float>,
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
