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
#include <algorithm>
#include <limits>

#include "kernels/cuda/attention_tensor.cuh"
#include "kernels/cuda/attention_tensor_entry.h"
#include "kernels/cuda/tensor_map.h"

namespace gla {
namespace {

struct BackwardProblem {
  CUtensorMap q, k, v, d_o;  // boxes of 64 tokens x 64 columns
  TensorProblem p;
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
  static constexpr int kStateBytes = K * kTileRowBytes;  // as many as a tile's q or k
  // Two stages of S, v and do. dS has two where they fit, else one between them.
  static constexpr int kGradientStages = K == 256 ? 2 : 1;
  static constexpr int kInputBytes = kStateBytes + 2 * kTileBytes;
  static constexpr int kStageStep = kInputBytes + kStateBytes;
  static constexpr size_t kBytes =
      1024 + kStateBytes + 2 * kTileBytes + 2 * kInputBytes + kGradientStages * kStateBytes;
};

// Which part of dq or dk a thread's group has.
template <int K>
struct Share {
  int group = GroupOfWarps();
  bool is_keys = group >= BackwardShape<K>::kShares;
  int column0 = group % BackwardShape<K>::kShares * BackwardShape<K>::kColumns;
};

// ---- Within a tile ------------------------------------------------------------------------------

// By block of 16 tokens and key. With L, e, m as in prepare (attention_tensor.cu), q and k of a
// block refer to its middle:
//   qd_t = q_t 2^(L_t - m)    kd_s = k_s 2^(m - L_s)
// or, where its gates span more than kLargestSpan, q to its start and k to its end. Sums over pairs
// t > s are then sums of dA_ts kd_s or dA_ts qd_t, and factors per block and key. dq and dk are
// made of the same rounded qd and kd, so q dq and k dk cancel in the gate's gradient.
template <int K>
struct FinishShared {
  static constexpr int kThreads = BackwardShape<K>::kThreads;
  float decay[4][K];         // 2^e
  float from_start[4][K];    // 2^(what q refer to)
  float to_end[4][K];        // 2^(e - what k refer to)
  float key_products[4][K];  // k~^T (v dS^T), in blocks
  // S dS in parts of V; sums of q dq - k dk in parts of the tile.
  float state_products[kThreads], totals[kThreads];
  static_assert(kThreads >= 2 * K);
};

// Where things stand when V is done: what FinishRows reads and writes beside its sums.
template <int K>
struct FinishPlace {
  const TensorProblem& p;
  const TilePlace& at;
  FinishShared<K>& shared;  // in the place of k~
  int* is_wide;             // [4][K / 64]
  char* d_scores;           // dA, a tile, in the place of A
  char* q;                  // then qd, kd
  char* k;
  float (*products)[K + 8];  // q dq - k dk, without tokens' own terms
  char* factors[K / 64];     // 2^(L - m), tiles
  bool wants_products;
};

// The tables, and qd and kd in place of q and k. `meet`: before any of it is written.
template <int K, typename F>
__device__ void ReferRows(const FinishPlace<K>& place, const F& meet) {
  const TensorProblem& p = place.p;
  const int id = threadIdx.x, c = id % (K / 2) * 2, own = id / (K / 2);  // keys and block
  float2 sums[16];
  if (id < 2 * K) {
    SumGatePairs(p, (place.at.row0 + 16 * own) * p.gate_stride + int64_t{place.at.head} * K + c,
                 place.at.tokens - 16 * own, sums);
  }
  meet();
  if (id >= 2 * K) return;
  const float2 first = sums[0], last = sums[15];
  const bool wide =
      __any_sync(0xFFFFFFFFu, first.x - last.x > kLargestSpan || first.y - last.y > kLargestSpan);
  if (id % 32 == 0) place.is_wide[own * (K / 64) + c / 64] = wide;
  const float2 middle = {0.5f * (first.x + last.x), 0.5f * (first.y + last.y)};
  const float2 q_ref = wide ? float2{0, 0} : middle, k_ref = wide ? last : middle;
  const auto store = [&](float(&table)[4][K], float2 x) {
    *reinterpret_cast<float2*>(&table[own][c]) = x;
  };
  store(place.shared.decay, Exp2(last));
  store(place.shared.from_start, Exp2(q_ref));
  store(place.shared.to_end, Exp2(float2{last.x - k_ref.x, last.y - k_ref.y}));
  char* factors = place.factors[0];
#pragma unroll
  for (int i = 1; i < K / 64; ++i) {
    if (c / 64 == i) factors = place.factors[i];
  }
  const int tile = c / 64 * kTileBytes;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 l = sums[i];
    const int at = TileElement(16 * own + i, c % 64);
    uint32_t& q_pair = *reinterpret_cast<uint32_t*>(place.q + tile + at);
    uint32_t& k_pair = *reinterpret_cast<uint32_t*>(place.k + tile + at);
    const float2 factor = Exp2(float2{l.x - q_ref.x, l.y - q_ref.y});
    q_pair = PackBf16(Product(UnpackBf16(q_pair), factor));
    k_pair = PackBf16(Product(UnpackBf16(k_pair), Exp2(float2{k_ref.x - l.x, k_ref.y - l.y})));
    *reinterpret_cast<uint32_t*>(factors + at) = PackBf16(factor);
  }
}

// q (kKeys false) or k of a row of the tile; 0 beyond its tokens.
template <int K, bool kKeys>
__device__ float RowElement(const TensorProblem& p, const TilePlace& at, int row, int column) {
  if (row >= at.tokens) return 0;
  const bf16* const from =
      kKeys ? p.k + (at.row0 + row) * p.k_stride : p.q + (at.row0 + row) * p.q_stride;
  return ToFloat(from[int64_t{at.head} * K + column]);
}

// For the thread's elements in half of its columns, where a block's gates span too much: the exact
// sums over the other tokens of the block, and the decay between the row and the block's edge that
// qd or kd refer to. Rarely called.
template <int K, bool kKeys>
__device__ __noinline__ void ExactSums(const TensorProblem& p, TilePlace at, const char* d_scores,
                                       int first_column, float* sums, float* decays) {
  for (int i = 0; i < BackwardShape<K>::kColumns / 4; ++i) {
    const int row = SumRow(i % 4), column = first_column + SumColumn(i / 4, i);
    const int64_t gates = at.row0 * p.gate_stride + int64_t{at.head} * K + column;
    const auto gate = [&](int t) {
      return t < at.tokens ? BoundedGate(p.Gate(gates + t * p.gate_stride)) : 0.0f;
    };
    float sum = 0, between = kKeys ? 0 : gate(row);
    for (int j = kKeys ? row + 1 : row - 1; j >= 0 && j / 16 == row / 16; j += kKeys ? 1 : -1) {
      if (kKeys) between += gate(j);
      const bf16 d = *reinterpret_cast<const bf16*>(
          d_scores + (kKeys ? TileElement(j, row) : TileElement(row, j)));
      sum += ToFloat(d) * RowElement<K, !kKeys>(p, at, j, column) * Exp2(between);
      if (!kKeys) between += gate(j);
    }
    sums[i] = sum, decays[i] = Exp2(between);
  }
}

// The first kCount to the end.
template <int kCount, int N>
__device__ void Rotate(float (&x)[N]) {
  float y[N];
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = x[(i + kCount) % N];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = y[i];
}

// Finishes the 16 rows of block b of dq (kKeys false) or dk (kKeys true), given do S^T or v dS^T:
// its factor, and the sum over the tile's other tokens, before (x = k) or after (x = q). From
// block to block towards b, what has been summed decays by the block and the block's own product
// comes in; then it decays to each row. Two groups, of dq and dk, meet half way, when each takes
// the columns that the other has left, because both add to the products.
template <int K, bool kKeys>
__device__ void FinishRows(const FinishPlace<K>& place, int column0,
                           float (&sum)[BackwardShape<K>::kColumns / 2]) {
  constexpr int kColumns = BackwardShape<K>::kColumns;
  const FinishShared<K>& shared = place.shared;
  const TensorProblem& p = place.p;
  const int b = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, g = lane / 4, c0 = lane % 4 * 2;
  const int t0 = 16 * b;
  const char* const own_rows = kKeys ? place.k : place.q;
  const char* const other_rows = kKeys ? place.q : place.k;
  const auto pair_of = [&](const float(&table)[4][K], int block, int column) {
    return *reinterpret_cast<const float2*>(&table[block][column]);
  };

  // dA or its transpose: this block's rows, by other blocks
  const uint32_t scores = SharedAddress(place.d_scores);
  const auto load_scores = [&](int block, uint32_t(&a)[4]) {
    if constexpr (kKeys) {
      const int row = 16 * block + lane / 16 * 8 + lane % 8;
      LoadTransposed(scores + TilePiece(row, 2 * b + lane / 8 % 2), a);
    } else {
      LoadMatrix(scores + TilePiece(t0 + lane % 16, 2 * block + lane / 16), a);
    }
  };
  uint32_t a[3][4];  // of the blocks in the order of the way towards b
  const int others = kKeys ? 3 - b : b;
  const auto other_block = [](int i) { return kKeys ? 3 - i : i; };
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (i < others) load_scores(other_block(i), a[i]);
  }
  uint32_t own_a[4];
  load_scores(b, own_a);
  const uint32_t off_diagonal = g == c0 ? 0xFFFF0000u : g == c0 + 1 ? 0x0000FFFFu : 0xFFFFFFFFu;
  own_a[0] &= off_diagonal, own_a[3] &= off_diagonal;
  float own_scores[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = t0 + g + 8 * half;
    own_scores[half] =
        ToFloat(*reinterpret_cast<const bf16*>(place.d_scores + TileElement(row, row)));
  }

  // Sixteen columns at a time: the next ones' sums come to the front of `sum` (from where this
  // group begins), what is finished goes to its end. Unrolled, it would not fit the instruction
  // cache.
  constexpr int kSteps = kColumns / 16, kHalf = kColumns / 2, kFirst = kKeys ? kHalf / 2 : 0;
  Rotate<kFirst>(sum);
  const auto first_of = [](int step) { return (2 * kFirst + 16 * step) % kColumns; };
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    const int column = column0 + first_of(step);
    const bool is_second = step >= kSteps / 2;
    const bool wide = place.is_wide[b * (K / 64) + column / 64];
    if (step == kSteps / 2 && place.wants_products) {
      asm volatile("bar.sync %0, 256;" ::"r"(2 + column0 / kColumns) : "memory");
    }
    const int tile = column / 64 * kTileBytes;
    const char* factors = place.factors[0];
#pragma unroll
    for (int i = 1; i < K / 64; ++i) {
      if (column / 64 == i) factors = place.factors[i];
    }
    // 16 rows of 16 columns of the others
    const uint32_t x_address =
        SharedAddress(other_rows) + tile + TilePiece(lane % 16, column % 64 / 8 + lane / 16);
    float part[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) part[i / 4][i % 4] = kKeys ? sum[i] : sum[i] * p.scale;
    // pairs of the thread's rows, at its own columns
    const auto pair_at = [&](const char* rows, int n, int half) {
      return UnpackBf16(*reinterpret_cast<const uint32_t*>(
          rows + TileElement(t0 + g + 8 * half, column % 64 + 8 * n) + 2 * c0));
    };
    if (kKeys && place.wants_products) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int at = column + 8 * n + c0;
        float2 factor = pair_of(shared.to_end, b, at);
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          if (i < others) factor = Product(factor, pair_of(shared.decay, other_block(i), at));
        }
        float2 products = {0, 0};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 x = pair_at(own_rows + tile, n, half);
          products.x = fmaf(x.x, factor.x * part[n][2 * half], products.x);
          products.y = fmaf(x.y, factor.y * part[n][2 * half + 1], products.y);
        }
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) {
          products.x += __shfl_xor_sync(0xFFFFFFFFu, products.x, mask);
          products.y += __shfl_xor_sync(0xFFFFFFFFu, products.y, mask);
        }
        if (g == 0) *reinterpret_cast<float2*>(&place.shared.key_products[b][at]) = products;
      }
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (i >= others) continue;
      const int block = other_block(i);
      uint32_t y[4];
      LoadTransposed(x_address + block * (16 * kTileRowBytes), y);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float d[4] = {};
        const uint32_t y_n[2] = {y[2 * n], y[2 * n + 1]};
        Mma16x8x16(d, a[i], y_n);
        const int at = column + 8 * n + c0;
        const float2 decay = pair_of(shared.decay, block, at);
        const float2 edge = pair_of(kKeys ? shared.from_start : shared.to_end, block, at);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          part[n][e] = fmaf(e % 2 == 0 ? edge.x : edge.y, d[e],
                            (e % 2 == 0 ? decay.x : decay.y) * part[n][e]);
        }
      }
    }
    uint32_t y[4];
    LoadTransposed(x_address + b * (16 * kTileRowBytes), y);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float d[4] = {};
      const uint32_t y_n[2] = {y[2 * n], y[2 * n + 1]};
      if (!wide) Mma16x8x16(d, own_a, y_n);
      const int at = column + 8 * n + c0;
      const float2 edge = pair_of(kKeys ? shared.to_end : shared.from_start, b, at);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 total = {fmaf(edge.x, part[n][2 * half], d[2 * half]),
                              fmaf(edge.y, part[n][2 * half + 1], d[2 * half + 1])};
        if (place.wants_products) {
          const float2 x = pair_at(own_rows + tile, n, half);
          float2& product = *reinterpret_cast<float2*>(&place.products[t0 + g + 8 * half][at]);
          const float2 before = is_second ? product : float2{0, 0};
          constexpr float kSign = kKeys ? -1.0f : 1.0f;
          product = {fmaf(kSign * x.x, total.x, before.x), fmaf(kSign * x.y, total.y, before.y)};
        }
        float2 factor = pair_at(factors, n, half);
        if (kKeys) factor = {Reciprocal(factor.x), Reciprocal(factor.y)};
        // A token's own term, s = t, cancels in q dq - k dk and is left out there.
        float2 x = pair_at(other_rows + tile, n, half);
        if (wide) x = {0, 0}, factor = {1, 1};
        sum[4 * n + 2 * half] = factor.x * fmaf(own_scores[half], x.x, total.x);
        sum[4 * n + 2 * half + 1] = factor.y * fmaf(own_scores[half], x.y, total.y);
      }
    }
    Rotate<8>(sum);
    if (wide && step % (kSteps / 2) == kSteps / 2 - 1) {  // half of the columns stand at the end
      const int first_column = column0 + first_of(step) / kHalf * kHalf;
      float exact[kHalf / 2], decays[kHalf / 2];
      ExactSums<K, kKeys>(p, place.at, place.d_scores, first_column, exact, decays);
#pragma unroll
      for (int i = 0; i < kHalf / 2; ++i) {
        const int row = SumRow(i % 4), at = first_column + SumColumn(i / 4, i);
        const float own_term = own_scores[i / 2 % 2] * RowElement<K, !kKeys>(p, place.at, row, at);
        sum[kHalf / 2 + i] = fmaf(decays[i], sum[kHalf / 2 + i], exact[i] + own_term);
        if (place.wants_products) {
          place.products[row][at] +=
              (kKeys ? -1.0f : 1.0f) * RowElement<K, kKeys>(p, place.at, row, at) * exact[i];
        }
      }
    }
  }
  Rotate<kFirst>(sum);  // by half, so back again
}

// ---- The products over V ------------------------------------------------------------------------

// A block to a (tile, head).
template <int K>
__global__ void __launch_bounds__(BackwardShape<K>::kThreads, K == 256 ? 1 : 2)
    BackwardKernel(const __grid_constant__ BackwardProblem b) {
  using Shape = BackwardShape<K>;
  constexpr int kThreads = Shape::kThreads, kColumns = Shape::kColumns;
  extern __shared__ __align__(1024) char raw_shared[];
  const uint32_t header = SharedAddress(raw_shared);
  if (header % 1024 != 0) __trap();
  const auto full = [&](int tile) { return header + 8 * (tile % 2); };
  constexpr int kGradientStages = Shape::kGradientStages;
  const auto gradient_full = [&](int tile) { return header + 16 + 8 * (tile % kGradientStages); };
  const uint32_t rows_full = header + 32;
  char* const keys = raw_shared + 1024;  // k~
  char* const scores = keys + Shape::kStateBytes;
  char* const result = scores + kTileBytes;  // dv
  char* const stages = result + kTileBytes;
  const TensorProblem& p = b.p;
  WaitForPrevious();
  AllowNext();
  Stagger(kMultiprocessors * (K == 256 ? 1 : 2), 3750 * (p.value_dim / 64));
  TilePlace at;
  if (!at.Find(p, blockIdx.x)) return;
  const int id = threadIdx.x;
  const Share<K> share;
  const int value_tiles = p.value_dim / 64;
  const int64_t value_stride = int64_t{p.heads} * p.value_dim;
  const int64_t values = at.row0 * value_stride + int64_t{at.head} * p.value_dim;
  const auto stage_of = [&](int tile) { return stages + tile % 2 * Shape::kStageStep; };
  const auto gradient_of = [&](int tile) {
    return stages + Shape::kInputBytes + tile % kGradientStages * Shape::kStageStep;
  };
  // q and k come where the last tile of V leaves a stage free.
  char* const q = stage_of(value_tiles);
  char* const k = q + Shape::kStateBytes;
  static_assert(2 * Shape::kStateBytes <=
                (kGradientStages == 2 ? Shape::kStageStep : Shape::kInputBytes));

  // By one thread.
  const auto load_gradient = [&](int tile) {
    const uint32_t barrier = gradient_full(tile);
    ArriveExpecting(barrier, Shape::kStateBytes);
    CopyBulk(SharedAddress(gradient_of(tile)),
             b.d_states + (at.index * value_tiles + tile) * Shape::kStateBytes, Shape::kStateBytes,
             barrier);
  };
  const auto load = [&](int tile) {
    uint32_t to = SharedAddress(stage_of(tile));
    const uint32_t barrier = full(tile);
    const int row = static_cast<int>(at.row0), column = at.head * p.value_dim + 64 * tile;
    ArriveExpecting(barrier, Shape::kInputBytes + (tile > 0 ? 0 : Shape::kStateBytes + kTileBytes));
    CopyBulk(to, b.states + (at.index * value_tiles + tile) * Shape::kStateBytes,
             Shape::kStateBytes, barrier);
    to += Shape::kStateBytes;
    CopyBox(to, b.v, barrier, column, row);
    CopyBox(to + kTileBytes, b.d_o, barrier, column, row);
  };
  const auto load_rows = [&] {
    ArriveExpecting(rows_full, 2 * Shape::kStateBytes);
#pragma unroll
    for (int i = 0; i < K / 64; ++i) {
      const int row = static_cast<int>(at.row0), column = at.head * K + 64 * i;
      CopyBox(SharedAddress(q) + i * kTileBytes, b.q, rows_full, column, row);
      CopyBox(SharedAddress(k) + i * kTileBytes, b.k, rows_full, column, row);
    }
  };
  // What follows a sequence belongs to others, who may have NaN there. Ends in this thread.
  const auto clear_rows = [&](char* tiles, int count) {
    for (int i = 0; i < count; ++i) {
      for (int j = at.tokens * kTileRowBytes + id * 16; j < kTileBytes; j += kThreads * 16) {
        *reinterpret_cast<uint4*>(tiles + i * kTileBytes + j) = {0, 0, 0, 0};
      }
    }
  };
  if (id == 0) {
    for (int i = 0; i < 5; ++i) InitBarrier(header + 8 * i, 1);
    FenceBarriers();
    load(0);
    CopyBulk(SharedAddress(keys), p.keys + at.index * Shape::kStateBytes, Shape::kStateBytes,
             full(0));
    CopyBulk(SharedAddress(scores), p.scores + at.index * kTileBytes, kTileBytes, full(0));
    load_gradient(0);
    if (value_tiles > 1) {
      load(1);
      if (kGradientStages == 2) load_gradient(1);
    } else {
      load_rows();
    }
  }
  __syncthreads();
  {
    const int size = p.gate_dtype == DType::kFloat32 ? 4 : 2;
    const char* const gates =
        static_cast<const char*>(p.gate) + (at.row0 * p.gate_stride + int64_t{at.head} * K) * size;
    for (int i = id; i < at.tokens * (K * size / 128); i += kThreads) {
      const int row = i / (K * size / 128), piece = i % (K * size / 128);
      asm volatile(
          "prefetch.global.L2 [%0];" ::"l"(gates + row * p.gate_stride * size + piece * 128));
    }
  }
  float sum[kColumns / 2];  // do S^T, or v dS^T
  float other[32];          // of the first group: do v^T; of the first one of keys: a tile of dv
  float state_product = 0;
  for (int tile = 0; tile < value_tiles; ++tile) {
    char* const state = stage_of(tile);
    char* const d_state = gradient_of(tile);
    char* const v = state + Shape::kStateBytes;
    char* const d_o = v + kTileBytes;
    WaitBarrier(full(tile), tile / 2 & 1);
    WaitBarrier(gradient_full(tile), tile / kGradientStages & 1);
    if (at.tokens < kTileTokens) {
      clear_rows(v, 2);
      FenceShared();
    }
    __syncthreads();  // also: dv has left its place

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
    FenceShared();
    __syncthreads();  // nobody reads the stage any more, and at last neither k~ nor A
    if (id == 0) {
      if (kGradientStages == 1 && tile + 1 < value_tiles) load_gradient(tile + 1);
      if (tile + 2 < value_tiles) {
        load(tile + 2);
        if (kGradientStages == 2) load_gradient(tile + 2);
      } else if (tile + 2 == value_tiles) {
        load_rows();
      }
    }
    StoreTile<kThreads>(b.dv + values + 64 * tile, value_stride, result, at.tokens, id);
  }

  // q dq - k dk comes in the place of the last stage and dS, the factors where there is room.
  const bool wants_gate = b.d_gate != nullptr;
  constexpr int kProductsBytes = RoundUp(kTileTokens * (K + 8) * 4, 1024);
  static_assert(sizeof(FinishShared<K>) <= Shape::kStateBytes);
  static_assert(kProductsBytes + (K > 64 ? kTileBytes : 0) <= Shape::kStageStep);
  static_assert(K <= 128 || 2 * Shape::kStateBytes + 2 * kTileBytes <= Shape::kStageStep);
  char* const last_stage = kGradientStages == 1 && value_tiles % 2 == 0
                               ? gradient_of(value_tiles - 1)
                               : stage_of(value_tiles - 1);
  FinishPlace<K> place = {.p = p,
                          .at = at,
                          .shared = *reinterpret_cast<FinishShared<K>*>(keys),
                          .is_wide = reinterpret_cast<int*>(raw_shared) + 16,
                          .d_scores = scores,
                          .q = q,
                          .k = k,
                          .products = reinterpret_cast<float(*)[K + 8]>(last_stage),
                          .factors = {},
                          .wants_products = wants_gate};
  FinishShared<K>& shared = place.shared;
#pragma unroll
  for (int i = 0; i < K / 64; ++i) {
    place.factors[i] = i == 0   ? result
                       : i == 1 ? last_stage + kProductsBytes
                                : q + 2 * Shape::kStateBytes + (i - 2) * kTileBytes;
  }
  shared.state_products[id] = state_product;
  if (share.group == 0) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int t = SumRow(i), s = SumColumn(i / 4, 0);
      *reinterpret_cast<uint32_t*>(scores + TileElement(t, s)) =
          PackBf16(s <= t ? p.scale * other[i] : 0, s + 1 <= t ? p.scale * other[i + 1] : 0);
    }
  }
  ReferRows<K>(place, [&] {
    WaitBarrier(rows_full, 0);
    if (at.tokens < kTileTokens) clear_rows(q, 2 * (K / 64));
    __syncthreads();  // also: dv has left its place
  });
  __syncthreads();
  if (!share.is_keys) {
    FinishRows<K, false>(place, share.column0, sum);
  } else {
    FinishRows<K, true>(place, share.column0, sum);
  }
  __syncthreads();

  char* const rows = (share.is_keys ? k : q) + share.column0 / 64 * kTileBytes;
#pragma unroll
  for (int i = 0; i < kColumns / 2; i += 2) {
    const int c = SumColumn(i / 4, 0);
    *reinterpret_cast<uint32_t*>(rows + c / 64 * kTileBytes + TileElement(SumRow(i), c % 64)) =
        PackBf16(sum[i], sum[i + 1]);
  }
  constexpr int kParts = kThreads / K, kRows = kTileTokens / kParts;
  const int column = id % K, part = id / K;
  float own[kRows];
  if (wants_gate) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      own[i] = place.products[part * kRows + i][column];
      total += own[i];
    }
    shared.totals[id] = total;
  }
  __syncthreads();
  bf16* const out = (share.is_keys ? b.dk : b.dq) + (at.row0 * p.heads + at.head) * K;
#pragma unroll
  for (int i = 0; i < kColumns / 64; ++i) {
    StoreTile<128>(out + share.column0 + 64 * i, int64_t{p.heads} * K, rows + i * kTileBytes,
                   at.tokens, id % 128);
  }
  if (!wants_gate) return;
  float sum_from = 0;  // what is there at the tile's end, then from each token on
  for (int i = 0; i < kParts; ++i) sum_from += shared.state_products[i * K + column];
  for (int i = 0; i < 4; ++i) sum_from *= shared.decay[i][column];
  for (int i = 0; i < 4; ++i) sum_from += shared.key_products[i][column];
  for (int i = part + 1; i < kParts; ++i) sum_from += shared.totals[i * K + column];
  const int tokens = at.tokens - part * kRows;
  const int64_t end =
      (at.row0 + part * kRows + kRows) * p.gate_stride + int64_t{at.head} * K + column;
  const auto store = [&](auto* to) {
#pragma unroll
    for (int i = kRows - 1; i >= 0; --i) {
      to -= p.gate_stride;
      sum_from += own[i];
      if (i < tokens) *to = FromFloat<std::remove_reference_t<decltype(*to)>>(sum_from);
    }
  };
  if (p.gate_dtype == DType::kFloat32) {
    store(static_cast<float*>(b.d_gate) + end);
  } else {
    store(static_cast<bf16*>(b.d_gate) + end);
  }
}

constexpr int kLeastSegmentTiles = 32;  // a start state costs as much as some tiles

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
  // Segments that fill the device when a sequence is alone.
  p.segment_goal = std::max(1, 128 / (p.heads * (p.value_dim / 64)));
  p.least_segment_tiles = kLeastSegmentTiles;
  p.long_tiles = std::numeric_limits<int>::max();
  p.is_segmented = p.max_len > kTileTokens * kLeastSegmentTiles;
  if (p.is_segmented) {
    p.max_segments =
        std::min(int64_t{p.num_seqs} * p.segment_goal,
                 int64_t{p.num_rows} / (kTileTokens * kLeastSegmentTiles) + p.num_seqs);
  }
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
  BackwardProblem b = ProblemOf(a);
  TensorProblem& p = b.p;
  if (a.gate_kind != GateKind::kPerKey) return TensorStepBackward(device, p, a);
  const auto map_of = [&](const void* data, int dim) {
    return TilesOf(data, p.num_rows, p.heads, dim, int64_t{p.heads} * dim);
  };
  b.q = map_of(p.q, p.key_dim), b.k = map_of(p.k, p.key_dim);
  b.v = map_of(p.v, p.value_dim), b.d_o = map_of(a.d_o, p.value_dim);
  char* const workspace = static_cast<char*>(a.workspace);
  char* const states = workspace + PlaceWorkspace(p, 2, workspace);
  char* const d_states = states + StateImageBytes(p);
  b.states = states, b.d_states = d_states;
  const int64_t stride = int64_t{p.heads} * p.key_dim * p.value_dim;
  Prepare(device, p);
  Chains chains = {.count = 2};
  chains.of[0] = {.keys = p.keys,
                  .values = b.v,
                  .backwards = false,
                  .initial = {const_cast<float*>(a.initial_state), nullptr, stride},
                  .final = {},
                  .states = states};
  chains.of[1] = {.keys = p.queries,
                  .values = b.d_o,
                  .backwards = true,
                  .initial = {const_cast<float*>(a.d_final_state), nullptr, stride},
                  .final = {a.d_initial_state, nullptr, stride},
                  .states = d_states};
  Chain(device, p, chains);
  WithKeyDim(p.key_dim, [&]<int K>() {
    using Shape = BackwardShape<K>;
    LaunchOverlapped(device, BackwardKernel<K>,
                     {.blocks = GridOf(p.max_tiles() * p.heads),
                      .threads = Shape::kThreads,
                      .shared_bytes = Shape::kBytes},
                     b);
  });
}

}  // namespace gla
