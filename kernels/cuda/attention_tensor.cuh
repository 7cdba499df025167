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

#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor.cuh"
#include "kernels/kernels.h"

namespace gla {

constexpr int kMultiprocessors = 132;
constexpr int kTileTokens = 64;
constexpr int kUncutTiles = 8;  // of a sequence that is not worth cutting
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
  // A long sequence is cut into so many segments, or fewer of `least_segment_tiles`; one of
  // `long_tiles` into twice as many.
  int segment_goal, least_segment_tiles, long_tiles;
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
    if (tiles <= kUncutTiles) return kUncutTiles;
    const int each = CeilDiv(tiles, tiles < long_tiles ? segment_goal : 2 * segment_goal);
    return each < least_segment_tiles ? least_segment_tiles : each;
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

constexpr int kFewSeqs = 32;  // whose tiles every warp can find by itself

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
  // The same by whole warps, for up to kFewSeqs sequences, before tile_begin and segment_begin are
  // there: the first block leaves them for the kernels behind this one.
  __device__ bool FindFirst(const TensorProblem& p, int64_t block) {
    const int lane = threadIdx.x % 32;
    const bool has_seq = lane < p.num_seqs;
    const int row_begin = has_seq ? p.cu_seqlens[lane] : 0;
    const int row_end = has_seq ? p.cu_seqlens[lane + 1] : 0;
    const auto sum_to = [&](int x) {
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, x, step);
        if (lane >= step) x += other;
      }
      return x;
    };
    const int tiles = CeilDiv(row_end - row_begin, kTileTokens), tiles_end = sum_to(tiles);
    if (block == 0 && threadIdx.x < 32) {
      const int segments = sum_to(has_seq ? max(1, CeilDiv(tiles, p.SegmentTiles(tiles))) : 0);
      if (lane == 0) p.tile_begin[0] = p.segment_begin[0] = 0;
      if (has_seq) p.tile_begin[lane + 1] = tiles_end, p.segment_begin[lane + 1] = segments;
    }
    const int tile = static_cast<int>(block / p.heads);
    head = static_cast<int>(block % p.heads);
    index = block;
    const uint32_t ends_after = __ballot_sync(0xFFFFFFFFu, tiles_end > tile);
    if (ends_after == 0) return false;
    seq = __ffs(ends_after) - 1;
    const int before = tile - __shfl_sync(0xFFFFFFFFu, tiles_end - tiles, seq);
    row0 = __shfl_sync(0xFFFFFFFFu, row_begin, seq) + int64_t{kTileTokens} * before;
    tokens =
        static_cast<int>(min(int64_t{kTileTokens}, __shfl_sync(0xFFFFFFFFu, row_end, seq) - row0));
    return true;
  }
};

// The tiles [begin, end) of a sequence that a walk's block has: of segment `item`, or where the
// problem is not segmented, all of sequence `item`.
struct SegmentPlace {
  int seq, first_tile, num_tiles;  // of the sequence
  int each;                        // tiles of its segments
  int begin, end;                  // counted from first_tile
  bool is_last;                    // of its segments

  // False for items beyond the last one.
  __device__ bool Find(const TensorProblem& p, int item) {
    seq = p.is_segmented ? FindSequence(p.segment_begin, p.num_seqs, item) : item;
    if (seq < 0) return false;
    first_tile = p.tile_begin[seq], num_tiles = p.tile_begin[seq + 1] - first_tile;
    each = p.SegmentTiles(num_tiles);
    begin = p.is_segmented ? (item - p.segment_begin[seq]) * each : 0;
    end = p.is_segmented ? min(num_tiles, begin + each) : num_tiles;
    is_last = end == num_tiles;
    return true;
  }
};

// ---- Cumulative gates of a tile -----------------------------------------------------------------

__device__ inline float BoundedGate(float gate) {
  const float g = gate * kLog2E;
  return g < kSmallestGate ? kSmallestGate : g;  // NaN stays
}

// Per key: log2 decays of two neighbouring keys, summed along 16 tokens of which `tokens` are
// there.
template <typename T>
__device__ void SumGatePairs(const T* from, int64_t stride, int tokens, float2 (&sums)[16]) {
  using Pair = std::conditional_t<sizeof(T) == 4, float2, uint32_t>;
  Pair pairs[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    pairs[i] = Pair{};
    if (i < tokens) pairs[i] = *reinterpret_cast<const Pair*>(from);
    from += stride;
  }
  float2 sum = {0, 0};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float2 g;
    if constexpr (sizeof(T) == 4) {
      g = pairs[i];
    } else {
      g = UnpackBf16(pairs[i]);
    }
    sum.x += BoundedGate(g.x), sum.y += BoundedGate(g.y);
    sums[i] = sum;
  }
}
// From element `from` of the gates on.
__device__ inline void SumGatePairs(const TensorProblem& p, int64_t from, int tokens,
                                    float2 (&sums)[16]) {
  if (p.gate_dtype == DType::kFloat32) {
    SumGatePairs(static_cast<const float*>(p.gate) + from, p.gate_stride, tokens, sums);
  } else {
    SumGatePairs(static_cast<const bf16*>(p.gate) + from, p.gate_stride, tokens, sums);
  }
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

// Blocks that begin together and do the same, memory first, then arithmetic, want the memory
// together and leave it together. So of the first `wave` blocks, all that run at once, four parts
// begin `cycles` apart, where at least three waves follow one another.
__device__ inline void Stagger(int wave, int cycles) {
  if (blockIdx.x >= wave || gridDim.x < 3 * wave) return;
  const int part = (blockIdx.x / kMultiprocessors * 2 + blockIdx.x) % 4;
  const int64_t begin = clock64();
  while (clock64() - begin < part * cycles) {
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
  const char* keys = nullptr;  // q~ or k~
  CUtensorMap raw_keys = {};   // StepStarts: q or k, [T, H, K], boxes of 64 tokens x 64 columns
  CUtensorMap values = {};     // [T, H, V], likewise
  bool backwards;
  States initial;          // zero where there is none
  States final;            // dropped where there is none
  char* states = nullptr;  // out: [tiles, H, V / 64] of K x 64: before (backwards: after) each tile
};
// Two chains at once, forwards and backwards, keep twice the copies under way.
struct Chains {
  ChainArgs of[2];
  int count;                     // 1: forwards only
  const float* gates = nullptr;  // StepStarts: G, [tiles, H, 64]
};
void Chain(Device& device, const TensorProblem& p, const Chains& chains);
// For p.is_segmented: the segments' start states, in p.starts.
void SegmentStarts(Device& device, const TensorProblem& p, const Chains& chains);
// The same of raw_keys, for one decay per step, or none.
void StepStarts(Device& device, const TensorProblem& p, const Chains& chains);

// The backward pass where the gate is not per key, and V is 64, 128, 256 or 512
// (attention_tensor_step.cu).
inline bool TensorStepDimsFit(int value_dim) {
  return value_dim == 64 || value_dim == 128 || value_dim == 256 || value_dim == 512;
}
size_t TensorStepBackwardBytes(const TensorProblem& p, bool wants_gate);
void TensorStepBackward(Device& device, const TensorProblem& p,
                        const LinearAttentionBackwardArgs& args);

}  // namespace gla
