// The chunkwise form of the backward pass. With the words of attention_chunk.cuh (P: products of
// decays, D_b, q^ and k^) and of attention_backward.cuh (S, C; S_in: S before the chunk), in each
// chunk, s and t two of its tokens:
//   A_ts  = scale <q_t, k_s P(s, t]>,   B_ts = scale do_t . v_s             for s <= t
//   dv_s  = sum_{t >= s} A_ts do_t + (k_s P(s, end]) C
//   dq_t  = sum_{s <= t} B_ts k_s P(s, t] + scale P(start, t] (S_in do_t)
//   dk_s  = sum_{t >= s} B_ts q_t P(s, t] + P(s, end] (C v_s)
// and from chunk to chunk S = P(start, end] S_in + sum_s (k_s P(s, end])^T v_s, forward, and
// C_in = P(start, end] C + scale sum_t (q_t P(start, t])^T do_t, backward. As in the forward pass
// every P is a product of decays, between blocks of 16 tokens by q^, k^ and D, within a block token
// by token.
//
// Four kernels: two walk the chunks of each sequence and leave S and C in the workspace; then, all
// chunks at once, one computes A and B, one dv, one dq, dk and d_gate. K and V are cut into slices
// of 64, so any K and V go. All of it is float32 on CUDA cores, and every sum has one order.
#pragma once

#include "kernels/cuda/attention_backward.cuh"

namespace gla {

// ---- A and B ------------------------------------------------------------------------------------

// 64 rows and 64 values from `value0`; absent ones are 0.
template <typename T>
__device__ void LoadValueTile(const T* rows, int stride, int tokens, int value0, int value_dim,
                              float (*tile)[kChunkPitch]) {
#pragma unroll 8
  for (int i = threadIdx.x; i < kChunkTokens * kChunkKeys; i += kChunkThreads) {
    const int t = i / kChunkKeys, v = i % kChunkKeys;
    const bool valid = t < tokens && value0 + v < value_dim;
    tile[t][v] = valid ? ToFloat(rows[t * stride + value0 + v]) : 0.0f;
  }
}

// One block to a chunk and a query head. `inputs` are the plan's, as LoadChunkSlice wants them.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads, 2)
    ScoresKernel(const BackwardPlan p, const LinearAttentionArgs inputs) {
  extern __shared__ __align__(16) char shared_bytes[];
  ChunkTile& tile = *reinterpret_cast<ChunkTile*>(shared_bytes);
  const int head = blockIdx.x % p.num_heads;
  ChunkSpot at;
  if (!FindChunk(p, blockIdx.x / p.num_heads, &at)) return;
  const int state_head = head / p.group, kv_head = state_head / p.states_per_kv;
  const ChunkPlace place = {at.row0, at.tokens, state_head, kv_head};
  const int64_t to = (int64_t{at.chunk} * p.num_heads + head) * kScoresOfChunk;

  float diagonal[kChunkBlock] = {}, between[6] = {};
  for (int slice = 0; slice < p.slices_k; ++slice) {
    __syncthreads();
    LoadChunkSlice<T>(inputs, place, slice * kChunkKeys, head, tile);
    __syncthreads();
    AddDiagonal(tile, diagonal);
    __syncthreads();
    ScaleChunkSlice(tile);
    __syncthreads();
    AddBetweenBlocks(tile, between);
  }
  __syncthreads();
  StoreScores(tile, diagonal, between);
  __syncthreads();
  for (int i = threadIdx.x; i < kScoresOfChunk; i += kChunkThreads) {
    const int t = i / kChunkTokens, s = i % kChunkTokens;
    p.scores[to + i] = s <= t ? p.scale * tile.q[t][s] : 0.0f;
  }

  // B. Thread: tokens ty + 16 i and columns tx + 16 j; above the diagonal of blocks stands nothing.
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float b[kChunkBlocks][kChunkBlocks] = {};
  for (int slice = 0; slice < p.slices_v; ++slice) {
    __syncthreads();
    LoadValueTile(RowOf<T>(p.d_o, at.row0, p.num_heads, head, p.value_dim), p.o_stride, at.tokens,
                  slice * kChunkKeys, p.value_dim, tile.q);
    LoadValueTile(RowOf<T>(p.v, at.row0, p.num_kv_heads, kv_head, p.value_dim), p.v_stride,
                  at.tokens, slice * kChunkKeys, p.value_dim, tile.k);
    __syncthreads();
#pragma unroll 2
    for (int c = 0; c < kChunkKeys; c += 4) {
      float4 d_o[kChunkBlocks], v[kChunkBlocks];
#pragma unroll
      for (int i = 0; i < kChunkBlocks; ++i) {
        d_o[i] = LoadFour(&tile.q[ty + 16 * i][c]);
        v[i] = LoadFour(&tile.k[tx + 16 * i][c]);
      }
#pragma unroll
      for (int i = 0; i < kChunkBlocks; ++i) {
#pragma unroll
        for (int j = 0; j <= i; ++j) {
          b[i][j] = fmaf(d_o[i].x, v[j].x, b[i][j]);
          b[i][j] = fmaf(d_o[i].y, v[j].y, b[i][j]);
          b[i][j] = fmaf(d_o[i].z, v[j].z, b[i][j]);
          b[i][j] = fmaf(d_o[i].w, v[j].w, b[i][j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kChunkBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kChunkBlocks; ++j) {
      const int t = ty + 16 * i, s = tx + 16 * j;
      p.d_scores[to + t * kChunkTokens + s] = s <= t ? p.scale * b[i][j] : 0.0f;
    }
  }
}

// ---- dv -----------------------------------------------------------------------------------------

struct ValueTile {
  float rows[kChunkTokens][kChunkPitch];    // k P(s, end], or A
  float values[kChunkTokens][kChunkPitch];  // C, or do
  float block_decay[kChunkBlocks][kChunkKeys];
};

// One block to a chunk, a key/value head and 64 columns of V. Thread: tokens 4 ty + i and columns
// 4 tx + j.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads, 2) ValueGradientKernel(const BackwardPlan p) {
  __shared__ ValueTile tile;
  const int value0 = static_cast<int>(blockIdx.x) % p.slices_v * kChunkKeys;
  const int kv_head = blockIdx.x / p.slices_v % p.num_kv_heads;
  ChunkSpot at;
  if (!FindChunk(p, blockIdx.x / p.slices_v / p.num_kv_heads, &at)) return;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float dv[4][4] = {};

  for (int state = 0; state < p.states_per_kv; ++state) {
    const int state_head = kv_head * p.states_per_kv + state;
    const float* carry = CarryAfter(p, at, state_head);
    for (int slice = 0; carry != nullptr && slice < p.slices_k; ++slice) {
      const KeyColumn col(p, slice);
      float k[kChunkBlock], decay[kChunkBlock];
      LoadColumn(RowOf<T>(p.k, at.row0, p.num_kv_heads, kv_head, p.key_dim), p.k_stride, at, col,
                 k);
      LoadDecays<T>(p, at, state_head, col, decay);
      __syncthreads();
      DampKeys(col, k, decay, tile.rows, tile.block_decay);
      LoadValueTile(carry + int64_t{slice} * kChunkKeys * p.value_dim, p.value_dim,
                    p.key_dim - slice * kChunkKeys, value0, p.value_dim, tile.values);
      __syncthreads();
      float product = 1;
      for (int b = col.block + 1; b < kChunkBlocks; ++b) product *= tile.block_decay[b][col.c];
#pragma unroll
      for (int i = 0; i < kChunkBlock; ++i) tile.rows[col.token0 + i][col.c] *= product;
      __syncthreads();
#pragma unroll 2
      for (int c = 0; c < kChunkKeys; c += 4) {
        float row[4][4], value[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          LoadFour(&tile.rows[4 * ty + i][c], row[i]);
          LoadFour(&tile.values[c + i][4 * tx], value[i]);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) dv[i][j] = fmaf(row[i][m], value[m][j], dv[i][j]);
          }
        }
      }
    }
    for (int g = 0; p.d_o != nullptr && g < p.group; ++g) {
      const int head = state_head * p.group + g;
      const float* scores = p.scores + (int64_t{at.chunk} * p.num_heads + head) * kScoresOfChunk;
      __syncthreads();
#pragma unroll 8
      for (int i = threadIdx.x; i < kScoresOfChunk; i += kChunkThreads) {
        tile.rows[i / kChunkTokens][i % kChunkTokens] = scores[i];
      }
      LoadValueTile(RowOf<T>(p.d_o, at.row0, p.num_heads, head, p.value_dim), p.o_stride, at.tokens,
                    value0, p.value_dim, tile.values);
      __syncthreads();
#pragma unroll 4
      for (int t = 4 * ty; t < kChunkTokens; ++t) {
        float row[4], value[4];
        LoadFour(&tile.rows[t][4 * ty], row);
        LoadFour(&tile.values[t][4 * tx], value);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) dv[i][j] = fmaf(row[i], value[j], dv[i][j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int s = 4 * ty + i, v = value0 + 4 * tx + j;
      if (s >= at.tokens || v >= p.value_dim) continue;
      static_cast<T*>(p.dv)[((at.row0 + s) * p.num_kv_heads + kv_head) * p.value_dim + v] =
          FromFloat<T>(dv[i][j]);
    }
  }
}

// ---- dq, dk and d_gate --------------------------------------------------------------------------

constexpr int kDotColumns = 32;  // of V at a time
constexpr int kDotPitch = kDotColumns + 4;

struct KeyTile {
  union {
    struct {
      float q[kChunkTokens][kChunkPitch];         // q^
      float k[kChunkTokens][kChunkPitch];         // k^
      float by_query[kChunkTokens][kChunkPitch];  // B_ts at [t][s]
      float by_key[kChunkTokens][kChunkPitch];    // B_ts at [s][t]
    } inside;
    struct {
      float rows[kChunkTokens][kDotPitch];  // do or v
      float state[kChunkKeys][kDotPitch];   // S_in or C
    } outside;
  };
  float block_decay[kChunkBlocks][kChunkKeys];
  // Each touched by the thread of its column only: registers are short.
  float dk[kChunkTokens][kChunkKeys];
  float d_gate[kChunkTokens][kChunkKeys];  // see StoreGateGradient
  float boundary[kChunkKeys];              // from S_in to C
  GateShared gate;

  // D_from ... D_{to-1} at column c.
  __device__ float Decay(int from, int to, int c) const {
    float product = 1;
    for (int b = from; b < to; ++b) product *= block_decay[b][c];
    return product;
  }
};

// sum[i] = <rows of the thread's token i, the state's row of its key>. `rows`: of the chunk's first
// token, the head's first value; `state`: of the slice's first key.
template <typename T>
__device__ void DotRowsWithState(const BackwardPlan& p, const ChunkSpot& at, const KeyColumn& col,
                                 const T* rows, int stride, const float* state, KeyTile& tile,
                                 float (&sum)[kChunkBlock]) {
  const int keys = p.key_dim - (col.key - col.c);
  for (int value0 = 0; value0 < p.value_dim; value0 += kDotColumns) {
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < kChunkTokens * kDotColumns; i += kChunkThreads) {
      const int r = i / kDotColumns, c = i % kDotColumns, v = value0 + c;
      const bool valid = v < p.value_dim;
      tile.outside.rows[r][c] = valid && r < at.tokens ? ToFloat(rows[r * stride + v]) : 0.0f;
      tile.outside.state[r][c] = valid && r < keys ? state[int64_t{r} * p.value_dim + v] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kDotColumns; v += 4) {
      const float4 s = LoadFour(&tile.outside.state[col.c][v]);
#pragma unroll
      for (int i = 0; i < kChunkBlock; ++i) {
        const float4 row = LoadFour(&tile.outside.rows[col.token0 + i][v]);
        sum[i] = fmaf(row.x, s.x, sum[i]);
        sum[i] = fmaf(row.y, s.y, sum[i]);
        sum[i] = fmaf(row.z, s.z, sum[i]);
        sum[i] = fmaf(row.w, s.w, sum[i]);
      }
    }
  }
}

// boundary[c] += sum over V of S_in * C, decayed all through the chunk, of each key of the slice: a
// warp to a key.
__device__ inline void AddBoundary(const float* before, const float* carry, int keys, int value_dim,
                                   KeyTile& tile) {
  for (int c = threadIdx.x / 32; c < min(keys, kChunkKeys); c += kChunkThreads / 32) {
    float sum = 0;
    for (int v = threadIdx.x % 32; v < value_dim; v += 32) {
      sum = fmaf(before[int64_t{c} * value_dim + v], carry[int64_t{c} * value_dim + v], sum);
    }
    sum = WarpSum(sum);
    if (threadIdx.x % 32 == 0) tile.boundary[c] += sum * tile.Decay(0, kChunkBlocks, c);
  }
}

__device__ inline void LoadSixteen(const float* from, float (&x)[kChunkBlock]) {
#pragma unroll
  for (int i = 0; i < kChunkBlock; i += 4) {
    const float4 four = LoadFour(from + i);
    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
  }
}

// sum[i] += weights of row `r` at the thread's tokens, times x
__device__ inline void AddWeighted(const float (*weights)[kChunkPitch], int r, int token0, float x,
                                   float (&sum)[kChunkBlock]) {
  float w[kChunkBlock];
  LoadSixteen(&weights[r][token0], w);
#pragma unroll
  for (int i = 0; i < kChunkBlock; ++i) sum[i] = fmaf(w[i], x, sum[i]);
}

// One block to a chunk, a key/value head and 64 keys. Thread: see KeyColumn.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads, 2) KeyGradientKernel(const BackwardPlan p) {
  extern __shared__ __align__(16) char shared_bytes[];
  KeyTile& tile = *reinterpret_cast<KeyTile*>(shared_bytes);
  const int slice = blockIdx.x % p.slices_k;
  const int kv_head = blockIdx.x / p.slices_k % p.num_kv_heads;
  ChunkSpot at;
  if (!FindChunk(p, blockIdx.x / p.slices_k / p.num_kv_heads, &at)) return;
  const KeyColumn col(p, slice);
  const int64_t state_offset = int64_t{slice} * kChunkKeys * p.value_dim;

  float k[kChunkBlock];
  const auto dk = [&](int i) -> float& { return tile.dk[col.token0 + i][col.c]; };
  const auto d_gate = [&](int i) -> float& { return tile.d_gate[col.token0 + i][col.c]; };
  float& to_earlier = tile.gate.to_earlier[col.block][col.c];
  float& to_later = tile.gate.to_later[col.block][col.c];
  to_earlier = to_later = 0;
#pragma unroll
  for (int i = 0; i < kChunkBlock; ++i) dk(i) = d_gate(i) = 0;
  LoadColumn(RowOf<T>(p.k, at.row0, p.num_kv_heads, kv_head, p.key_dim), p.k_stride, at, col, k);
  if (threadIdx.x < kChunkKeys) tile.boundary[threadIdx.x] = 0;

  for (int state = 0; state < p.states_per_kv; ++state) {
    const int state_head = kv_head * p.states_per_kv + state;
    float decay[kChunkBlock];
    LoadDecays<T>(p, at, state_head, col, decay);
    float product = 1;
#pragma unroll
    for (int i = 0; i < kChunkBlock; ++i) product *= decay[i];
    __syncthreads();
    tile.block_decay[col.block][col.c] = product;
    __syncthreads();

    const float* before = StateBefore(p, at, state_head);
    if (before != nullptr) before += state_offset;
    if (const float* carry = CarryAfter(p, at, state_head); carry != nullptr) {
      carry += state_offset;
      float sum[kChunkBlock] = {};
      DotRowsWithState(p, at, col, RowOf<T>(p.v, at.row0, p.num_kv_heads, kv_head, p.value_dim),
                       p.v_stride, carry, tile, sum);
      product = tile.Decay(col.block + 1, kChunkBlocks, col.c);
#pragma unroll
      for (int i = kChunkBlock - 1; i >= 0; --i) {
        sum[i] *= product;
        product *= decay[i];
      }
      float to_next = 0;
#pragma unroll
      for (int i = 0; i < kChunkBlock; ++i) {
        dk(i) += sum[i];
        d_gate(i) += to_next;
        to_next = fmaf(k[i], sum[i], to_next);
      }
      to_later += to_next;
      if (p.d_gate != nullptr && before != nullptr) {
        AddBoundary(before, carry, p.key_dim - slice * kChunkKeys, p.value_dim, tile);
      }
    }

    for (int g = 0; g < p.group; ++g) {
      const int head = state_head * p.group + g;
      T* dq = RowOf(static_cast<T*>(p.dq), at.row0, p.num_heads, head, p.key_dim);
      float sum[kChunkBlock] = {};
      if (p.d_o == nullptr) {
        StoreColumn(dq, p.q_stride, at, col, sum);
        continue;
      }
      if (before != nullptr) {
        DotRowsWithState(p, at, col, RowOf<T>(p.d_o, at.row0, p.num_heads, head, p.value_dim),
                         p.o_stride, before, tile, sum);
        const float w = p.scale * tile.Decay(0, col.block, col.c);
#pragma unroll
        for (int i = 0; i < kChunkBlock; ++i) sum[i] *= w;
      }
      float q[kChunkBlock];
      LoadColumn(RowOf<T>(p.q, at.row0, p.num_heads, head, p.key_dim), p.q_stride, at, col, q);
      const float* d_scores =
          p.d_scores + (int64_t{at.chunk} * p.num_heads + head) * kScoresOfChunk;
      __syncthreads();
      DampQueries(col, q, decay, tile.inside.q, tile.block_decay);
      DampKeys(col, k, decay, tile.inside.k, tile.block_decay);
#pragma unroll 8
      for (int i = threadIdx.x; i < kScoresOfChunk; i += kChunkThreads) {
        const int t = i / kChunkTokens, s = i % kChunkTokens;
        tile.inside.by_query[t][s] = tile.inside.by_key[s][t] = d_scores[i];
      }
      __syncthreads();

      for (int b = 0; b < col.block; ++b) {
        const float w = tile.Decay(b + 1, col.block, col.c);
#pragma unroll 2
        for (int s = b * kChunkBlock; s < (b + 1) * kChunkBlock; ++s) {
          AddWeighted(tile.inside.by_key, s, col.token0, tile.inside.k[s][col.c] * w, sum);
        }
      }
      product = 1;
#pragma unroll
      for (int i = 0; i < kChunkBlock; ++i) {
        product *= decay[i];
        float b[kChunkBlock], near = 0;
        LoadSixteen(&tile.inside.by_query[col.token0 + i][col.token0], b);
#pragma unroll
        for (int j = 0; j < i; ++j) near = fmaf(b[j], k[j], near) * decay[j + 1];
        sum[i] = fmaf(product, sum[i], near);
      }
      float to_previous = 0;
#pragma unroll
      for (int i = kChunkBlock - 1; i >= 0; --i) {
        to_previous = fmaf(q[i], sum[i], to_previous);
        d_gate(i) += to_previous;
        const float self = tile.inside.by_query[col.token0 + i][col.token0 + i];
        sum[i] = fmaf(self, k[i], sum[i]);
        dk(i) = fmaf(self, q[i], dk(i));
      }
      to_earlier += to_previous;
      StoreColumn(dq, p.q_stride, at, col, sum);

#pragma unroll
      for (int i = 0; i < kChunkBlock; ++i) sum[i] = 0;
      for (int b = kChunkBlocks - 1; b > col.block; --b) {
        const float w = tile.Decay(col.block + 1, b, col.c);
#pragma unroll 2
        for (int t = b * kChunkBlock; t < (b + 1) * kChunkBlock; ++t) {
          AddWeighted(tile.inside.by_query, t, col.token0, tile.inside.q[t][col.c] * w, sum);
        }
      }
      product = 1, to_previous = 0;
#pragma unroll
      for (int i = kChunkBlock - 1; i >= 0; --i) {
        float b[kChunkBlock], near = 0;
        LoadSixteen(&tile.inside.by_key[col.token0 + i][col.token0], b);
#pragma unroll
        for (int j = kChunkBlock - 1; j > i; --j) near = fmaf(b[j], q[j], near) * decay[j];
        const float d = fmaf(product, sum[i], near);
        dk(i) += d;
        to_previous = fmaf(-k[i], d, to_previous);
        d_gate(i) += to_previous;
        product *= decay[i];
      }
      to_earlier += to_previous;
    }
  }
  float out[kChunkBlock];
#pragma unroll
  for (int i = 0; i < kChunkBlock; ++i) out[i] = dk(i);
  StoreColumn(RowOf(static_cast<T*>(p.dk), at.row0, p.num_kv_heads, kv_head, p.key_dim), p.k_stride,
              at, col, out);
  if (p.d_gate != nullptr) {
#pragma unroll
    for (int i = 0; i < kChunkBlock; ++i) out[i] = d_gate(i);
    __syncthreads();
    StoreGateGradient<T>(p, at, kv_head, slice, col, out, tile.boundary[col.c], tile.gate);
  }
}

}  // namespace gla
