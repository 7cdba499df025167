// The backward pass on tensor cores with a gate per key (else: attention_tensor_step.cu). Prepare
// and two Chains give, per tile, q~, k~, A, S before the tile and the gradient dS of S after it.
// Then every tile at once, with dA_ts = scale do_t . v_s for s <= t:
//   dq_t = scale 2^G_t (do_t S^T) + sum_s dA_ts k_s 2^(G_t - G_s)
//   dk_s = 2^(G_C - G_s) (v_s dS^T) + sum_t dA_ts q_t 2^(G_t - G_s)
//   dv   = A^T do + k~ dS
//   dg_t = sum_{t' >= t} (q dq - k dk)_t' + sum over V of S_end dS,
//          S_end dS = 2^G_C (S dS) + k~^T (v dS^T)
// The first terms are products over V, which is passed in tiles of 64 columns; the second ones stay
// within the tile and follow when V is done.
#include "kernels/cuda/attention_tensor.cuh"
#include "kernels/cuda/attention_tensor_entry.h"

namespace gla {
namespace {

struct BackwardProblem {
  TensorProblem p;
  const bf16* d_o;
  const char* states;  // S, d_states: [tiles, H, V / 64] of K x 64
  const char* d_states;
  bf16* dq;
  bf16* dk;
  bf16* dv;
  void* d_gate;  // null: none
};

// Groups of four warps, up to 128 columns of K each: the first half of the groups makes dq and dA,
// the second half dk and dv.
template <int K>
struct BackwardShape {
  static constexpr int kColumns = K < 128 ? K : 128;
  static constexpr int kShares = K / kColumns;  // groups side by side
  static constexpr int kThreads = 2 * kShares * 128;
  static constexpr int kStateBytes = K * kTileRowBytes;
  static constexpr int kStages = K == 256 ? 2 : 1;
  static constexpr int kStageBytes = 2 * kStateBytes + 2 * kTileBytes;  // S, dS, v, do
  static constexpr int kLoopBytes = kStateBytes + 2 * kTileBytes + kStages * kStageBytes;
};

// Which part of dq or dk a thread's group has.
template <int K>
struct Share {
  int group = GroupOfWarps();
  bool is_keys = group >= BackwardShape<K>::kShares;
  int column0 = group % BackwardShape<K>::kShares * BackwardShape<K>::kColumns;
};

// Asks the second-level cache for what the end of the kernel reads: q, k and gates of the tile.
template <int K>
__device__ void PrefetchRows(const TensorProblem& p, const TilePlace& at) {
  const int t = threadIdx.x % kTileTokens, which = threadIdx.x / kTileTokens;
  if (t >= at.tokens || which > 2) return;
  const int64_t row = at.row0 + t, column = int64_t{at.head} * K;
  const char* from = nullptr;
  int bytes = K * 2;
  if (which == 0) {
    from = reinterpret_cast<const char*>(p.q + row * p.q_stride + column);
  } else if (which == 1) {
    from = reinterpret_cast<const char*>(p.k + row * p.k_stride + column);
  } else if (p.gate_kind == GateKind::kPerKey) {
    const int size = p.gate_dtype == DType::kFloat32 ? 4 : 2;
    from = static_cast<const char*>(p.gate) + (row * p.gate_stride + column) * size;
    bytes = K * size;
  }
  if (from == nullptr) return;
  for (int i = 0; i < bytes; i += 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
  }
}

// ---- Within a tile, one decay per key -----------------------------------------------------------

template <int K>
struct KeyBackwardShared {
  static constexpr int kPitch = K + 8;
  static constexpr int kThreads = BackwardShape<K>::kThreads;
  float sums[kTileTokens][kPitch];  // G, later q dq - k dk
  bf16 q[kTileTokens][kPitch];      // later dq
  bf16 k[kTileTokens][kPitch];      // later dk
  bf16 d_scores[kTileTokens][72];   // dA
  // Blocks of 16 tokens: k 2^(G of the block's end - G), but of the last block, and
  // q 2^(G - G of the block's start), but of the first.
  bf16 k_to_end[48][kPitch];
  bf16 q_from_start[48][kPitch];
  float block_decays[4][K];
  float last[K];  // G_C
  float totals[kThreads];
  float state_products[kThreads];  // S dS, in parts of V
  float key_products[4][K];        // k~^T (v dS^T), in blocks
  int is_wide[4];
};

// k_to_end, q_from_start, block_decays, last and is_wide, of G, q and k.
template <int K>
__device__ void PrepareBlocks(KeyBackwardShared<K>& shared) {
  constexpr int kThreads = BackwardShape<K>::kThreads, kPieces = K / 8;
  const int id = threadIdx.x;
#pragma unroll
  for (int i = 0; i < 2 * 48 * kPieces / kThreads; ++i) {
    const int item = id + i * kThreads, c = item % kPieces * 8, row = item / kPieces % 48;
    const bool is_query = item >= 48 * kPieces;
    const int t = is_query ? row + 16 : row;
    const float* const g = &shared.sums[t][c];
    const float* const ref = &shared.sums[is_query ? t / 16 * 16 - 1 : t / 16 * 16 + 15][c];
    float factors[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) factors[e] = Exp2(-fabsf(g[e] - ref[e]));
    const bf16* const from = is_query ? &shared.q[t][c] : &shared.k[t][c];
    bf16* const to = is_query ? &shared.q_from_start[row][c] : &shared.k_to_end[row][c];
    *reinterpret_cast<uint4*>(to) = Scaled(*reinterpret_cast<const uint4*>(from), factors);
  }
  for (int i = id; i < 4 * K; i += kThreads) {
    const int block = i / K, c = i % K;
    const float end = shared.sums[16 * block + 15][c];
    const float start = block == 0 ? 0 : shared.sums[16 * block - 1][c];
    shared.block_decays[block][c] = Exp2(end - start);
    if (shared.sums[16 * block][c] - end > kLargestSpan) shared.is_wide[block] = 1;
    if (block == 3) shared.last[c] = end;
  }
}

// The exact sums for the thread's elements over the other tokens of their block. Rarely called.
template <int K, bool kKeys>
__device__ __noinline__ void ExactSums(const KeyBackwardShared<K>* shared, int column0,
                                       float* sums) {
  for (int i = 0; i < BackwardShape<K>::kColumns / 2; ++i) {
    const int row = SumRow(i % 4), column = column0 + SumColumn(i / 4, i);
    const int first = kKeys ? row + 1 : row / 16 * 16, last = kKeys ? row / 16 * 16 + 15 : row - 1;
    float sum = 0;
    for (int j = first; j <= last; ++j) {
      const float d = ToFloat(kKeys ? shared->d_scores[j][row] : shared->d_scores[row][j]);
      const float x = ToFloat(kKeys ? shared->q[j][column] : shared->k[j][column]);
      sum += d * x * Exp2(-fabsf(shared->sums[row][column] - shared->sums[j][column]));
    }
    sums[i] = sum;
  }
}

// Finishes the 16 rows of block b of dq (kKeys false) or dk (kKeys true), given do S^T or v dS^T:
// its factor, and the sum over the tile's other tokens, before (x = k) or after (x = q). From
// block to block towards b, what has been summed decays by the block and the block's own product
// comes in; then it decays to each row. b's own tokens refer to the middle of its gates, factors
// 2^(+-(G - middle)) on both sides, and in tf32: the gate's gradient is a difference of dq and dk,
// of which bfloat16 factors would leave too little.
template <int K, bool kKeys>
__device__ void FinishRows(const TensorProblem& p, KeyBackwardShared<K>& shared, int column0,
                           bool wants_products, float (&sum)[BackwardShape<K>::kColumns / 2]) {
  constexpr int kColumns = BackwardShape<K>::kColumns, kPitch = K + 8;
  const int b = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, g = lane / 4, c0 = lane % 4;
  const int t0 = 16 * b;
  const bool is_wide = shared.is_wide[b];
  constexpr float kSign = kKeys ? -1.0f : 1.0f;  // of G in the rows' own factor
  // This thread's two rows and pair of columns; 8 columns further for each j.
  const float* const own = &shared.sums[t0 + g][column0 + 2 * c0];
  const auto pair = [](const float* at) { return *reinterpret_cast<const float2*>(at); };

  if (!kKeys) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) sum[i] *= p.scale;
  } else if (wants_products) {
    const bf16* const k = &shared.k[t0 + g][column0 + 2 * c0];
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float2 last = pair(&shared.last[column0 + 2 * c0 + 8 * j]);
      float2 products = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 at = pair(own + half * 8 * kPitch + 8 * j);
        const float2 x =
            UnpackBf16(*reinterpret_cast<const uint32_t*>(k + half * 8 * kPitch + 8 * j));
        products.x = fmaf(x.x * Exp2(last.x - at.x), sum[4 * j + 2 * half], products.x);
        products.y = fmaf(x.y * Exp2(last.y - at.y), sum[4 * j + 2 * half + 1], products.y);
      }
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) {
        products.x += __shfl_xor_sync(0xFFFFFFFFu, products.x, mask);
        products.y += __shfl_xor_sync(0xFFFFFFFFu, products.y, mask);
      }
      if (g == 0) {
        *reinterpret_cast<float2*>(&shared.key_products[b][column0 + 2 * c0 + 8 * j]) = products;
      }
    }
  }

#pragma unroll 1
  for (int i = 0; i < (kKeys ? 3 - b : b); ++i) {
    const int block = kKeys ? 3 - i : i;
    uint32_t a[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = t0 + g + (e & 1 ? 8 : 0), other = 16 * block + 2 * c0 + (e & 2 ? 8 : 0);
      if constexpr (kKeys) {
        a[e] = PackHalves(shared.d_scores[other][row], shared.d_scores[other + 1][row]);
      } else {
        a[e] = *reinterpret_cast<const uint32_t*>(&shared.d_scores[row][other]);
      }
    }
    const float* const decays = &shared.block_decays[block][column0 + 2 * c0];
    const bf16* const x = kKeys ? &shared.q_from_start[16 * (block - 1)][column0]
                                : &shared.k_to_end[16 * block][column0];
    const uint32_t x_address = SharedAddress(x + lane % 16 * kPitch + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 2) {
      uint32_t y[4];
      LoadTransposed(x_address + j * 16, y);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 d = pair(decays + 8 * (j + n));
        float(&s)[4] = *reinterpret_cast<float(*)[4]>(&sum[4 * (j + n)]);
        s[0] *= d.x, s[1] *= d.y, s[2] *= d.x, s[3] *= d.y;
        const uint32_t y_n[2] = {y[2 * n], y[2 * n + 1]};
        Mma16x8x16(s, a, y_n);
      }
    }
  }

  // To the rows, from the edge of b that faces the others.
  {
    const bool is_start = !kKeys && b == 0;
    const float* const edge = &shared.sums[kKeys ? t0 + 15 : max(t0 - 1, 0)][column0 + 2 * c0];
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      float2 at = pair(edge + 8 * j);
      if (is_start) at = {0, 0};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 to = pair(own + half * 8 * kPitch + 8 * j);
        sum[4 * j + 2 * half] *= Exp2(kSign * (to.x - at.x));
        sum[4 * j + 2 * half + 1] *= Exp2(kSign * (to.y - at.y));
      }
    }
  }

  if (is_wide) {
    float exact[kColumns / 2];
    ExactSums<K, kKeys>(&shared, column0, exact);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) sum[i] += exact[i];
    return;
  }
  uint32_t a[2][4];  // dA or its transpose, without the diagonal, by steps of 8 tokens
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = g + (i & 1 ? 8 : 0), other = c0 + (i & 2 ? 4 : 0) + (i & 4 ? 8 : 0);
    const bf16 score =
        kKeys ? shared.d_scores[t0 + other][t0 + row] : shared.d_scores[t0 + row][t0 + other];
    a[i / 4][i % 4] = row == other ? 0 : __float_as_uint(ToFloat(score));
  }
  const bf16* const x = kKeys ? &shared.q[t0 + c0][column0 + g] : &shared.k[t0 + c0][column0 + g];
  const float* const x_sums = &shared.sums[t0 + c0][column0 + g];
  const float* const x_first = &shared.sums[t0][column0 + g];
  const float* const first = &shared.sums[t0][column0 + 2 * c0];
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const float x_middle = 0.5f * (x_first[8 * j] + x_first[15 * kPitch + 8 * j]);
    float d[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = (8 * half + 4 * i) * kPitch + 8 * j;
        y[i] = ToTf32(ToFloat(x[at]) * Exp2(kSign * (x_middle - x_sums[at])));
      }
      Mma16x8x8(d, a[half], y);
    }
    const float2 from = pair(first + 8 * j), to = pair(first + 15 * kPitch + 8 * j);
    const float2 middle = {0.5f * (from.x + to.x), 0.5f * (from.y + to.y)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 at = pair(own + half * 8 * kPitch + 8 * j);
      float* const s = &sum[4 * j + 2 * half];
      s[0] = fmaf(Exp2(kSign * (at.x - middle.x)), d[2 * half], s[0]);
      s[1] = fmaf(Exp2(kSign * (at.y - middle.y)), d[2 * half + 1], s[1]);
    }
  }
}

// `sum`: do S^T or v dS^T of the thread's share; `scores`: do v^T of the first group;
// `state_product`: this thread's part of S dS.
template <int K>
__device__ void FinishKeyGates(const BackwardProblem& b, const TilePlace& at, char* raw_shared,
                               float (&sum)[BackwardShape<K>::kColumns / 2],
                               const float (&scores)[32], float state_product) {
  using Shape = BackwardShape<K>;
  auto& shared = *reinterpret_cast<KeyBackwardShared<K>*>(raw_shared);
  const TensorProblem& p = b.p;
  const int id = threadIdx.x;
  const Share<K> share;
  const int column0 = share.column0 + threadIdx.x % 4 * 2;

  LoadQueriesAndKeys<K, Shape::kThreads>(p, at, shared.q, shared.k);
  if (id < 4) shared.is_wide[id] = 0;
  shared.state_products[id] = state_product;
  if (share.group == 0) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int t = SumRow(i), s = SumColumn(i / 4, 0);
      *reinterpret_cast<uint32_t*>(&shared.d_scores[t][s]) =
          PackBf16(s <= t ? p.scale * scores[i] : 0, s + 1 <= t ? p.scale * scores[i + 1] : 0);
    }
  }
  SumKeyGates<K, Shape::kThreads>(p, at, &shared.sums[0][0], K + 8, shared.totals);
  WaitCopies<0>();
  __syncthreads();
  PrepareBlocks<K>(shared);
  __syncthreads();

  if (!share.is_keys) {
    FinishRows<K, false>(p, shared, share.column0, false, sum);
  } else {
    FinishRows<K, true>(p, shared, share.column0, b.d_gate != nullptr, sum);
  }

  if (b.d_gate != nullptr) {
    __syncthreads();  // G makes room for q dq - k dk
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == share.is_keys) {
#pragma unroll
        for (int i = 0; i < Shape::kColumns / 2; i += 2) {
          const int t = SumRow(i % 4), c = column0 + i / 4 * 8;
          float2& product = *reinterpret_cast<float2*>(&shared.sums[t][c]);
          if (!share.is_keys) {
            const float2 q = UnpackBf16(*reinterpret_cast<const uint32_t*>(&shared.q[t][c]));
            product = {q.x * sum[i], q.y * sum[i + 1]};
          } else {
            const float2 k = UnpackBf16(*reinterpret_cast<const uint32_t*>(&shared.k[t][c]));
            product = {fmaf(-k.x, sum[i], product.x), fmaf(-k.y, sum[i + 1], product.y)};
          }
        }
      }
      __syncthreads();
    }
    constexpr int kParts = Shape::kThreads / K, kRows = kTileTokens / kParts;
    const int column = id % K, part = id / K;
    float* const own = &shared.sums[part * kRows][column];
    float running = 0;
#pragma unroll 16
    for (int i = kRows - 1; i >= 0; --i) {
      running += own[i * (K + 8)];
      own[i * (K + 8)] = running;
    }
    shared.totals[id] = running;
    __syncthreads();
    float at_end = 0, after = 0;
    for (int i = 0; i < kParts; ++i) {
      at_end += shared.state_products[i * K + column];
      if (i > part) after += shared.totals[i * K + column];
    }
    at_end *= Exp2(shared.last[column]);
    for (int i = 0; i < 4; ++i) at_end += shared.key_products[i][column];
    const int64_t to = (at.row0 + part * kRows) * p.gate_stride + int64_t{at.head} * K + column;
    for (int i = 0; i < min(kRows, at.tokens - part * kRows); ++i) {
      StoreGate(p, b.d_gate, to + i * p.gate_stride, own[i * (K + 8)] + after + at_end);
    }
  }

  // A token's own term, s = t. It cancels in q dq - k dk, so it comes after.
  const float own_scores[2] = {ToFloat(shared.d_scores[SumRow(0)][SumRow(0)]),
                               ToFloat(shared.d_scores[SumRow(2)][SumRow(2)])};
#pragma unroll
  for (int i = 0; i < Shape::kColumns / 2; i += 2) {
    const int t = SumRow(i % 4), c = column0 + i / 4 * 8;
    const bf16* const other = share.is_keys ? &shared.q[t][c] : &shared.k[t][c];
    const float2 x = UnpackBf16(*reinterpret_cast<const uint32_t*>(other));
    sum[i] = fmaf(own_scores[i / 2 % 2], x.x, sum[i]);
    sum[i + 1] = fmaf(own_scores[i / 2 % 2], x.y, sum[i + 1]);
  }
  __syncthreads();
  bf16(*const result)[K + 8] = share.is_keys ? shared.k : shared.q;
#pragma unroll
  for (int i = 0; i < Shape::kColumns / 2; i += 2) {
    *reinterpret_cast<uint32_t*>(&result[SumRow(i % 4)][column0 + i / 4 * 8]) =
        PackBf16(sum[i], sum[i + 1]);
  }
  __syncthreads();
  bf16* const out = share.is_keys ? b.dk : b.dq;
  constexpr int kHalf = Shape::kThreads / 2;
  for (int i = id % kHalf; i < at.tokens * (K / 8); i += kHalf) {
    const int t = i / (K / 8), c = i % (K / 8) * 8;
    *reinterpret_cast<uint4*>(out + ((at.row0 + t) * p.heads + at.head) * K + c) =
        *reinterpret_cast<const uint4*>(&result[t][c]);
  }
}

// ---- The products over V ------------------------------------------------------------------------

template <int K>
constexpr size_t BackwardBytes() {
  const int finish = static_cast<int>(sizeof(KeyBackwardShared<K>));
  return 1024 + (finish > BackwardShape<K>::kLoopBytes ? finish : BackwardShape<K>::kLoopBytes);
}

// A block to a (tile, head).
template <int K>
__global__ void __launch_bounds__(BackwardShape<K>::kThreads, K == 256 ? 1 : 2)
    BackwardKernel(const BackwardProblem b) {
  using Shape = BackwardShape<K>;
  constexpr int kThreads = Shape::kThreads, kColumns = Shape::kColumns;
  extern __shared__ __align__(16) char raw_shared[];
  char* const shared = AlignedShared(raw_shared);
  char* const keys = shared;  // k~
  char* const scores = keys + Shape::kStateBytes;
  char* const result = scores + kTileBytes;  // dv
  char* const stages = result + kTileBytes;
  const TensorProblem& p = b.p;
  TilePlace at;
  if (!at.Find(p, blockIdx.x)) return;
  const int id = threadIdx.x;
  const Share<K> share;
  const int value_tiles = p.value_dim / 64;
  const int64_t value_stride = int64_t{p.heads} * p.value_dim;
  const int64_t values = at.row0 * value_stride + int64_t{at.head} * p.value_dim;

  const auto load = [&](int tile) {
    if (tile < value_tiles) {
      char* const stage = stages + tile % Shape::kStages * Shape::kStageBytes;
      const int64_t image = (at.index * value_tiles + tile) * Shape::kStateBytes;
      CopyLinear<Shape::kStateBytes, kThreads>(stage, b.states + image, id);
      CopyLinear<Shape::kStateBytes, kThreads>(stage + Shape::kStateBytes, b.d_states + image, id);
      CopyTile<kThreads>(stage + 2 * Shape::kStateBytes, p.v + values + 64 * tile, value_stride,
                         at.tokens, id);
      CopyTile<kThreads>(stage + 2 * Shape::kStateBytes + kTileBytes, b.d_o + values + 64 * tile,
                         value_stride, at.tokens, id);
    }
    CommitCopies();
  };

  CopyLinear<Shape::kStateBytes, kThreads>(keys, p.keys + at.index * Shape::kStateBytes, id);
  CopyLinear<kTileBytes, kThreads>(scores, p.scores + at.index * kTileBytes, id);
  load(0);
  PrefetchRows<K>(p, at);
  float sum[kColumns / 2];  // do S^T, or v dS^T
  float other[32];          // of the first group: do v^T; of the first one of keys: a tile of dv
  float state_product = 0;
  for (int tile = 0; tile < value_tiles; ++tile) {
    char* const state = stages + tile % Shape::kStages * Shape::kStageBytes;
    char* const d_state = state + Shape::kStateBytes;
    char* const v = d_state + Shape::kStateBytes;
    char* const d_o = v + kTileBytes;
    if constexpr (Shape::kStages > 1) {
      load(tile + 1);
      WaitCopies<1>();
    } else {
      if (tile > 0) load(tile);
      WaitCopies<0>();
    }
    FenceShared();
    __syncthreads();

    BeginProducts();
    if (!share.is_keys) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Wgmma<kColumns, kAlongColumns, kAlongColumns>(
            sum, TileOperand<kAlongColumns>(d_o, i),
            TileOperand<kAlongColumns>(state + share.column0 * kTileRowBytes, i),
            tile > 0 || i > 0);
      }
      if (share.column0 == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Wgmma<64, kAlongColumns, kAlongColumns>(other, TileOperand<kAlongColumns>(d_o, i),
                                                  TileOperand<kAlongColumns>(v, i),
                                                  tile > 0 || i > 0);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Wgmma<kColumns, kAlongColumns, kAlongColumns>(
            sum, TileOperand<kAlongColumns>(v, i),
            TileOperand<kAlongColumns>(d_state + share.column0 * kTileRowBytes, i),
            tile > 0 || i > 0);
      }
      if (share.column0 == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Wgmma<64, kAlongRows, kAlongRows>(other, TileOperand<kAlongRows>(scores, i),
                                            TileOperand<kAlongRows>(d_o, i), i > 0);
        }
#pragma unroll
        for (int i = 0; i < K / 16; ++i) {
          Wgmma<64, kAlongColumns, kAlongRows>(
              other, TileOperand<kAlongColumns>(keys + i / 4 * kTileBytes, i % 4),
              TileOperand<kAlongRows>(d_state, i));
        }
      }
    }
    CommitProducts();
    if (b.d_gate != nullptr) {  // S dS while the products run
      constexpr int kParts = kThreads / K, kPieces = 8 / kParts;
      const int row = id % K, part = id / K;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int at_piece = TilePiece(row, part * kPieces + i);
        const uint4 x = *reinterpret_cast<const uint4*>(state + at_piece);
        const uint4 y = *reinterpret_cast<const uint4*>(d_state + at_piece);
        const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 s = UnpackBf16(xs[e]), d = UnpackBf16(ys[e]);
          state_product = fmaf(s.x, d.x, fmaf(s.y, d.y, state_product));
        }
      }
    }
    WaitProducts<0>();
    if (share.is_keys && share.column0 == 0) {
#pragma unroll
      for (int i = 0; i < 32; i += 2) {
        *reinterpret_cast<uint32_t*>(result + TileElement(SumRow(i), SumColumn(i / 4, 0))) =
            PackBf16(other[i], other[i + 1]);
      }
    }
    __syncthreads();  // also: nobody reads the stage any more
    StoreTile<kThreads>(b.dv + values + 64 * tile, value_stride, result, at.tokens, id);
  }
  __syncthreads();

  FinishKeyGates<K>(b, at, shared, sum, other, state_product);
}

BackwardProblem ProblemOf(const LinearAttentionBackwardArgs& a) {
  BackwardProblem b{};
  TensorProblem& p = b.p;
  p.q = static_cast<const bf16*>(a.q);
  p.k = static_cast<const bf16*>(a.k);
  p.v = static_cast<const bf16*>(a.v);
  p.gate_kind = a.gate_kind;
  p.gate = a.gate;
  p.gate_dtype = a.gate_dtype;
  p.q_stride = p.k_stride = int64_t{a.num_heads} * a.key_dim;
  p.v_stride = int64_t{a.num_heads} * a.value_dim;
  p.gate_stride = a.gate_kind == GateKind::kPerKey ? p.k_stride : a.num_heads;
  p.cu_seqlens = a.cu_seqlens;
  p.num_seqs = a.num_seqs, p.num_rows = a.num_rows, p.max_len = a.max_len;
  p.heads = a.num_heads, p.key_dim = a.key_dim, p.value_dim = a.value_dim;
  p.scale = a.scale;
  p.is_segmented = p.max_len > kTileTokens * kSegmentTiles;
  if (p.is_segmented) {
    p.max_segments = p.num_rows / (kTileTokens * kSegmentTiles) + p.num_seqs;
  }
  b.d_o = static_cast<const bf16*>(a.d_o);
  b.dq = static_cast<bf16*>(a.dq);
  b.dk = static_cast<bf16*>(a.dk);
  b.dv = static_cast<bf16*>(a.dv);
  b.d_gate = a.d_gate;
  return b;
}

int64_t StateImageBytes(const TensorProblem& p) {
  return p.max_tiles() * p.heads * p.value_dim / 64 * p.key_dim * kTileRowBytes;
}

}  // namespace

bool TensorBackwardFits(const LinearAttentionBackwardArgs& a) {
  bool aligned = true;
  for (const void* data :
       {a.q, a.k, a.v, a.d_o, static_cast<const void*>(a.dq), static_cast<const void*>(a.dk),
        static_cast<const void*>(a.dv), a.gate}) {
    aligned = aligned && IsAligned(data, 16);
  }
  return a.dtype == DType::kBFloat16 && a.d_o != nullptr && aligned &&
         a.num_kv_heads == a.num_heads && a.state_heads == a.num_heads &&
         TensorDimsFit(a.key_dim, a.value_dim) &&
         (a.gate_kind == GateKind::kPerKey || TensorStepDimsFit(a.value_dim)) &&
         IsAligned(a.initial_state, 16) && IsAligned(a.d_final_state, 16) &&
         IsAligned(a.d_initial_state, 16);
}

size_t TensorBackwardBytes(const LinearAttentionBackwardArgs& a) {
  BackwardProblem b = ProblemOf(a);
  if (a.gate_kind != GateKind::kPerKey) return TensorStepBackwardBytes(b.p, a.d_gate != nullptr);
  return PlaceWorkspace(b.p, 2, nullptr) + 2 * StateImageBytes(b.p);
}

void TensorBackward(Device& device, const LinearAttentionBackwardArgs& a) {
  const cudaStream_t stream = Queue(device);
  BackwardProblem b = ProblemOf(a);
  TensorProblem& p = b.p;
  if (a.gate_kind != GateKind::kPerKey) return TensorStepBackward(device, p, a);
  char* const workspace = static_cast<char*>(a.workspace);
  char* const states = workspace + PlaceWorkspace(p, 2, workspace);
  char* const d_states = states + StateImageBytes(p);
  b.states = states, b.d_states = d_states;
  const int64_t stride = int64_t{p.heads} * p.key_dim * p.value_dim;
  Prepare(device, p);
  Chains chains = {.count = 2};
  chains.of[0] = {.keys = p.keys,
                  .values = p.v,
                  .value_stride = p.v_stride,
                  .backwards = false,
                  .initial = {const_cast<float*>(a.initial_state), nullptr, stride},
                  .final = {},
                  .states = states};
  chains.of[1] = {.keys = p.queries,
                  .values = b.d_o,
                  .value_stride = p.v_stride,
                  .backwards = true,
                  .initial = {const_cast<float*>(a.d_final_state), nullptr, stride},
                  .final = {a.d_initial_state, nullptr, stride},
                  .states = d_states};
  Chain(device, p, chains);
  WithKeyDim(p.key_dim, [&]<int K>() {
    AllowShared(BackwardKernel<K>, BackwardBytes<K>());
    BackwardKernel<K><<<GridOf(p.max_tiles() * p.heads), BackwardShape<K>::kThreads,
                        BackwardBytes<K>(), stream>>>(b);
  });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
