// The chunkwise form on tensor cores, for bfloat16: what forward and backward share.
//
// Notation of kernels/README.md: within a tile of 64 tokens, G_t is the sum of log2 decays from the
// tile's start to t, G_C the last one. Prepare makes, per tile and head, in parallel,
//   q~_t = scale q_t 2^G_t    k~_s = k_s 2^(G_C - G_s)    D = 2^G_C
//   A_ts = scale sum_k q_t k_s 2^(G_t - G_s), s <= t
// and the state then moves from tile to tile by S = D S + k~^T v (Chain), its gradient backwards by
// dS = D dS + q~^T do: the same kernel. Every exponent is <= 0 but in the 16 x 16 blocks on the
// diagonal of A, whose factors are referred to the middle of the block and guarded.
//
// A sequence is cut into segments (SegmentTiles), whose start states are found by a first pass and
// a scan, so that one long sequence fills the device. The cuts depend on the sequence alone, so its
// bits do too.
//
// Workspace holds tiles (tensor.cuh) as images: what a consumer copies to shared memory as it is.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor.cuh"
#include "kernels/kernels.h"

namespace gla {

constexpr int kTileTokens = 64;
constexpr int kSegmentTiles = 32;  // of a segment, where no goal is set
// With a goal: the shortest segment, and sequences that are not worth cutting.
constexpr int kLeastSegmentTiles = 4;
constexpr int kUncutTiles = 8;
constexpr int kTileBytes = kTileTokens * kTileRowBytes;
constexpr float kLog2E = 1.4426950408889634f;
// A decay below 2^-151 is 0 in float32; sums of gates keep their precision with this bound.
constexpr float kSmallestGate = -151.0f;
// Largest G_first - G_last of a block of 16 tokens for factors 2^(+-half of it) in bfloat16.
constexpr float kLargestSpan = 200.0f;

// States outside of the workspace: sequence n's is at base + (slots ? slots[n] : n) * stride, all
// heads, [H, K, V] float32. A null base or a negative slot: none.
struct States {
  float* base = nullptr;
  const int32_t* slots = nullptr;
  int64_t stride = 0;

  __device__ float* Of(int seq) const {
    if (base == nullptr) return nullptr;
    const int64_t slot = slots == nullptr ? seq : slots[seq];
    return slot < 0 ? nullptr : base + slot * stride;
  }
};

struct TensorProblem {
  const bf16* q;
  const bf16* k;
  const bf16* v;
  GateKind gate_kind;
  const void* gate;
  DType gate_dtype;
  int64_t q_stride, k_stride, v_stride, gate_stride;
  const int32_t* cu_seqlens;
  int num_seqs, num_rows, max_len;
  int heads, key_dim, value_dim;
  float scale;
  // A long sequence is cut into about so many segments; 0: into segments of kSegmentTiles.
  int segment_goal;
  // Whether the chains run segment by segment, from start states that were found before; otherwise
  // sequence by sequence.
  bool is_segmented;
  int64_t max_segments;  // of all sequences, where is_segmented

  // Workspace.
  int32_t* tile_begin;     // [N + 1]: sequence n has tiles [tile_begin[n], tile_begin[n + 1])
  int32_t* segment_begin;  // [N + 1], likewise; every sequence has at least one
  char* queries;           // q~: [tiles, H, K / 64] tiles
  char* keys;              // k~: the same
  char* scores;            // A: [tiles, H] tiles
  float* decays;           // D: [tiles, H, K]
  // By direction of the chain, forwards and backwards.
  float* starts[2];          // [segments, H, K, V]: local end states, then start states
  float* segment_decays[2];  // [segments, H, K]

  // Upper bounds, known without looking at cu_seqlens.
  __host__ __device__ int64_t max_tiles() const { return num_rows / kTileTokens + num_seqs; }
  // Tiles of each segment of a sequence of `tiles` but the last.
  __host__ __device__ int SegmentTiles(int tiles) const {
    if (segment_goal == 0) return kSegmentTiles;
    if (tiles <= kUncutTiles) return kUncutTiles;
    const int each = CeilDiv(tiles, segment_goal);
    return each < kLeastSegmentTiles ? kLeastSegmentTiles : each;
  }
  __device__ float Gate(int64_t index) const {
    if (gate_dtype == DType::kFloat32) return static_cast<const float*>(gate)[index];
    return ToFloat(static_cast<const bf16*>(gate)[index]);
  }
};

// The sequence that `item` belongs to, by the starts [0, num_seqs] of their items; -1 past the end.
__device__ inline int FindSequence(const int32_t* begin, int num_seqs, int item) {
  if (item >= begin[num_seqs]) return -1;
  int low = 0, high = num_seqs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (begin[middle] <= item) {
      low = middle;
    } else {
      high = middle;
    }
  }
  // sequences without items have the start of the next one
  return low;
}

// A block's tile and head.
struct TilePlace {
  int seq, head, tokens;  // tokens: 1 .. 64
  int64_t row0, index;    // index: tile * H + head

  // False for blocks beyond the last tile.
  __device__ bool Find(const TensorProblem& p, int64_t block) {
    const int tile = static_cast<int>(block / p.heads);
    head = static_cast<int>(block % p.heads);
    index = block;
    seq = FindSequence(p.tile_begin, p.num_seqs, tile);
    if (seq < 0) return false;
    row0 = p.cu_seqlens[seq] + int64_t{kTileTokens} * (tile - p.tile_begin[seq]);
    tokens = static_cast<int>(min(int64_t{kTileTokens}, p.cu_seqlens[seq + 1] - row0));
    return true;
  }
};

// A tile's q and k, absent tokens zero; not waited for.
template <int K, int kThreads>
__device__ void LoadQueriesAndKeys(const TensorProblem& p, const TilePlace& at, bf16 (*q)[K + 8],
                                   bf16 (*k)[K + 8]) {
  constexpr int kPieces = K / 8, kRows = kThreads / kPieces;
  const int row = threadIdx.x / kPieces, c = threadIdx.x % kPieces * 8;
  const bf16* const from_q = p.q + at.row0 * p.q_stride + int64_t{at.head} * K + c;
  const bf16* const from_k = p.k + at.row0 * p.k_stride + int64_t{at.head} * K + c;
  const uint32_t to_q = SharedAddress(&q[row][c]), to_k = SharedAddress(&k[row][c]);
#pragma unroll
  for (int i = 0; i < kTileTokens / kRows; ++i) {
    const bool valid = row + i * kRows < at.tokens;
    const int64_t t = valid ? row + i * kRows : 0;
    CopyAsync(to_q + i * kRows * (K + 8) * 2, from_q + t * p.q_stride, valid);
    CopyAsync(to_k + i * kRows * (K + 8) * 2, from_k + t * p.k_stride, valid);
  }
  CommitCopies();
}

// ---- Cumulative gates of a tile -----------------------------------------------------------------

__device__ inline float BoundedGate(float gate) {
  const float g = gate * kLog2E;
  return g < kSmallestGate ? kSmallestGate : g;  // NaN stays
}

// Log2 decays of a tile to sums[t * pitch + c], all loads under way at once. Absent tokens do not
// decay. REQUIRES: the gates' rows are 16-byte aligned.
template <int K, int kThreads, typename T>
__device__ void LoadKeyGates(const TensorProblem& p, const TilePlace& at, float* sums, int pitch) {
  constexpr int kEach = 16 / sizeof(T), kPieces = K / kEach;  // of a row
  constexpr int kRows = kThreads / kPieces, kItems = kTileTokens / kRows;
  const int row = threadIdx.x / kPieces, c = threadIdx.x % kPieces * kEach;
  const T* const from =
      static_cast<const T*>(p.gate) + (at.row0 + row) * p.gate_stride + int64_t{at.head} * K + c;
  uint4 pieces[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    pieces[i] = {0, 0, 0, 0};
    if (row + i * kRows < at.tokens) {
      pieces[i] = *reinterpret_cast<const uint4*>(from + i * kRows * p.gate_stride);
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    float* const to = sums + (row + i * kRows) * pitch + c;
    const T* const gates = reinterpret_cast<const T*>(&pieces[i]);
#pragma unroll
    for (int j = 0; j < kEach; j += 4) {
      StoreFour(to + j, {BoundedGate(ToFloat(gates[j])), BoundedGate(ToFloat(gates[j + 1])),
                         BoundedGate(ToFloat(gates[j + 2])), BoundedGate(ToFloat(gates[j + 3]))});
    }
  }
}

// Per key: sums[t * pitch + c] = G of token t and key c; `totals` holds [kThreads / K][K]. Ends
// with a barrier.
template <int K, int kThreads>
__device__ void SumKeyGates(const TensorProblem& p, const TilePlace& at, float* sums, int pitch,
                            float* totals) {
  if (p.gate_dtype == DType::kFloat32) {
    LoadKeyGates<K, kThreads, float>(p, at, sums, pitch);
  } else {
    LoadKeyGates<K, kThreads, bf16>(p, at, sums, pitch);
  }
  __syncthreads();
  constexpr int kParts = kThreads / K, kRows = kTileTokens / kParts;
  const int column = threadIdx.x % K, part = threadIdx.x / K;
  float* const own = sums + part * kRows * pitch + column;
  float sum = 0;
#pragma unroll 16
  for (int i = 0; i < kRows; ++i) {
    sum += own[i * pitch];
    own[i * pitch] = sum;
  }
  totals[part * K + column] = sum;
  __syncthreads();
  if (part > 0) {
    float before = totals[column];
    for (int i = 1; i < part; ++i) before += totals[i * K + column];
#pragma unroll 16
    for (int i = 0; i < kRows; ++i) own[i * pitch] += before;
  }
  __syncthreads();
}

// Per step (or constant, or none): G of tokens 2 lane and 2 lane + 1, by a warp.
__device__ inline float2 StepGateSums(const TensorProblem& p, const TilePlace& at, int lane) {
  float g[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    g[i] = 0;
    if (t >= at.tokens || p.gate_kind == GateKind::kNone) continue;
    const int64_t index =
        p.gate_kind == GateKind::kConstant ? at.head : (at.row0 + t) * p.gate_stride + at.head;
    g[i] = BoundedGate(p.Gate(index));
  }
  float sum = g[0] + g[1];
  for (int step = 1; step < 32; step *= 2) {
    const float other = __shfl_up_sync(0xFFFFFFFFu, sum, step);
    if (lane >= step) sum += other;
  }
  return {sum - g[1], sum};
}

// The same to sums[t], by the first warp. Ends with a barrier.
__device__ inline void SumStepGates(const TensorProblem& p, const TilePlace& at, float* sums) {
  if (threadIdx.x < 32) {
    const float2 pair = StepGateSums(p, at, threadIdx.x);
    sums[2 * threadIdx.x] = pair.x, sums[2 * threadIdx.x + 1] = pair.y;
  }
  __syncthreads();
}

// One element of a gate's gradient, in the gate's type.
__device__ inline void StoreGate(const TensorProblem& p, void* gates, int64_t index, float x) {
  if (p.gate_dtype == DType::kFloat32) {
    static_cast<float*>(gates)[index] = x;
  } else {
    static_cast<bf16*>(gates)[index] = FromFloat<bf16>(x);
  }
}

// Shared memory for tiles must be a multiple of 1024 from its start.
__device__ inline char* AlignedShared(char* shared) {
  const uint32_t address = SharedAddress(shared);
  return shared + ((1024 - (address & 1023)) & 1023);
}

// Calls f.template operator()<K>() for the key dimensions that these kernels are made for.
template <typename F>
void WithKeyDim(int key_dim, const F& f) {
  switch (key_dim) {
    case 64:
      return f.template operator()<64>();
    case 128:
      return f.template operator()<128>();
    case 256:
      return f.template operator()<256>();
  }
  GLA_REQUIRES(false, "a key dimension of 64, 128 or 256");
}

// Rows that allow 16-byte pieces; null is aligned.
inline bool AllowsPieces(const void* data, int64_t stride, DType dtype) {
  return IsAligned(data, 16) && stride * SizeOf(dtype) % 16 == 0;
}

// Places the shared part of the workspace from `memory` on, for one chain or for both, and returns
// its bytes (memory null: only counts).
size_t PlaceWorkspace(TensorProblem& p, int num_chains, char* memory);

// tile_begin and segment_begin.
void FindTiles(Device& device, const TensorProblem& p);
// The same, then q~, k~, D and A of every tile.
void Prepare(Device& device, const TensorProblem& p);

// S = D S + keys^T values from tile to tile, for k~ and v; or backwards, for q~ and do.
struct ChainArgs {
  const char* keys;    // q~ or k~
  const bf16* values;  // [T, H, V]
  int64_t value_stride;
  bool backwards;
  States initial;          // zero where there is none
  States final;            // dropped where there is none
  char* states = nullptr;  // out: [tiles, H, V / 64] of K x 64: before (backwards: after) each tile
};
// Two chains at once, forwards and backwards, keep twice the copies under way.
struct Chains {
  ChainArgs of[2];
  int count;  // 1: forwards only
};
void Chain(Device& device, const TensorProblem& p, const Chains& chains);
// For p.is_segmented, from each segment's own contribution to its start state, in p.starts.
void ScanSegments(Device& device, const TensorProblem& p, const Chains& chains);

// The backward pass where the gate is not per key, and V is 64, 128, 256 or 512
// (attention_tensor_step.cu).
inline bool TensorStepDimsFit(int value_dim) {
  return value_dim == 64 || value_dim == 128 || value_dim == 256 || value_dim == 512;
}
size_t TensorStepBackwardBytes(const TensorProblem& p, bool wants_gate);
void TensorStepBackward(Device& device, const TensorProblem& p,
                        const LinearAttentionBackwardArgs& args);

}  // namespace gla
