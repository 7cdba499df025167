// The recurrent form of the backward pass: token by token.
//
// Two sweeps, one block to a (sequence, state head, 64 keys, 64 columns of V), whose part of the
// state, or of its gradient, stays in registers. Forward: dq of the block's columns, and S at every
// chunk's end into the workspace. Backward: dk of its columns, dv of its keys, S * C at every
// chunk's end, d_initial_state. Sums over K and V end at the block's edge and go to the workspace;
// three kernels add them up in one order, add what a token gives to itself, and make d_gate: here
// with the sums over all that came before (S) and comes after (C),
//   dgate_u = sum_{t >= u} (q_t * q_t' - k_t * k_t') + sum over V of S * C at the chunk's end.
//
// 128 threads: a warp has 16 keys, lane = 8 * key_lane + value_lane, where key_lane has four
// neighbouring keys and value_lane the columns 4 value_lane + i and 32 + 4 value_lane + i. Tokens
// come in stages through shared memory.
#pragma once

#include "kernels/cuda/attention_backward.cuh"

namespace gla {

constexpr int kSweepThreads = 128;
constexpr int kSweepWarps = kSweepThreads / 32;
constexpr int kSweepDim = 64;  // of keys and of columns
constexpr int kSweepKeys = 4;  // a thread's
constexpr int kSweepColumns = 8;
constexpr int kMaxSweepTokens = 16;  // of a stage; stages are powers of two, so chunks end with one

// Shared memory of a stage, in rows of kSweepDim floats: k, decay, v [tokens], do [tokens][group],
// and backward q [tokens][group] and the warps' dv [tokens][kSweepWarps].
constexpr size_t SweepBytes(int tokens, int group, bool backward) {
  const int rows = 3 + group + (backward ? group + kSweepWarps : 0);
  return sizeof(float) * kSweepDim * tokens * rows;
}

struct Sweep {
  float* k;
  float* decay;
  float* v;
  float* d_o;
  float* q;
  float* dv;
  int seq, state_head, kv_head, slice_k, slice_v;
  int key0, value0;           // the block's first
  int warp, value_lane, row;  // row: the thread's first key, of the block
  int64_t begin;
  int length;

  __device__ Sweep(const BackwardPlan& p, int stage_tokens, float* shared) {
    k = shared;
    decay = k + stage_tokens * kSweepDim;
    v = decay + stage_tokens * kSweepDim;
    d_o = v + stage_tokens * kSweepDim;
    q = d_o + stage_tokens * p.group * kSweepDim;
    dv = q + stage_tokens * p.group * kSweepDim;
    slice_v = static_cast<int>(blockIdx.x) % p.slices_v;
    slice_k = static_cast<int>(blockIdx.x) / p.slices_v % p.slices_k;
    const int rest = static_cast<int>(blockIdx.x) / p.slices_v / p.slices_k;
    state_head = rest % p.state_heads;
    seq = rest / p.state_heads;
    kv_head = state_head / p.states_per_kv;
    key0 = slice_k * kSweepDim, value0 = slice_v * kSweepDim;
    warp = threadIdx.x / 32, value_lane = threadIdx.x % 8;
    row = warp * 16 + threadIdx.x % 32 / 8 * kSweepKeys;
    begin = p.cu_seqlens[seq];
    length = static_cast<int>(p.cu_seqlens[seq + 1] - begin);
  }

  // Column c of the thread, of the block.
  __device__ int Column(int c) const { return 4 * value_lane + c % 4 + c / 4 * 32; }

  // The thread's elements of a [K, V] state.
  __device__ void LoadState(const BackwardPlan& p, const float* state,
                            float (&s)[kSweepKeys][kSweepColumns]) const {
#pragma unroll
    for (int i = 0; i < kSweepKeys; ++i) {
#pragma unroll
      for (int c = 0; c < kSweepColumns; ++c) {
        const int key = key0 + row + i, column = value0 + Column(c);
        const bool valid = key < p.key_dim && column < p.value_dim;
        s[i][c] = valid ? state[int64_t{key} * p.value_dim + column] : 0.0f;
      }
    }
  }
  __device__ void StoreState(const BackwardPlan& p, const float (&s)[kSweepKeys][kSweepColumns],
                             float* state) const {
#pragma unroll
    for (int i = 0; i < kSweepKeys; ++i) {
#pragma unroll
      for (int c = 0; c < kSweepColumns; ++c) {
        const int key = key0 + row + i, column = value0 + Column(c);
        const bool valid = key < p.key_dim && column < p.value_dim;
        if (valid) state[int64_t{key} * p.value_dim + column] = s[i][c];
      }
    }
  }
};

// `tokens` rows of 64 elements from `from` to `to`, times `factor`; the first `count` of a row
// exist, the others are 0.
template <typename T>
__device__ void LoadSweepRows(const T* from, int stride, int tokens, int count, float factor,
                              float* to, int to_stride) {
#pragma unroll 4
  for (int i = threadIdx.x; i < tokens * kSweepDim; i += kSweepThreads) {
    const int t = i / kSweepDim, c = i % kSweepDim;
    to[t * to_stride + c] = c < count ? factor * ToFloat(from[t * stride + c]) : 0.0f;
  }
}

// The stage's k, decay, v, scale do, and backward q.
template <typename T>
__device__ void LoadSweep(const BackwardPlan& p, const Sweep& at, int64_t row0, int tokens,
                          bool backward) {
  const int keys = p.key_dim - at.key0, values = p.value_dim - at.value0;
  LoadSweepRows(RowOf<T>(p.k, row0, p.num_kv_heads, at.kv_head, p.key_dim) + at.key0, p.k_stride,
                tokens, keys, 1, at.k, kSweepDim);
  LoadSweepRows(RowOf<T>(p.v, row0, p.num_kv_heads, at.kv_head, p.value_dim) + at.value0,
                p.v_stride, tokens, values, 1, at.v, kSweepDim);
  const GatePlace gate(p, at.state_head);
#pragma unroll 4
  for (int i = threadIdx.x; i < tokens * kSweepDim; i += kSweepThreads) {
    const int t = i / kSweepDim, c = i % kSweepDim;
    float x = 0;
    if (c < keys && p.gate_kind != GateKind::kNone) {
      x = LoadGate<T>(p.gate, p.gate_dtype,
                      gate.first + (row0 + t) * gate.stride + (at.key0 + c) * gate.key_stride);
    }
    at.decay[i] = expf(x);
  }
  for (int g = 0; p.d_o != nullptr && g < p.group; ++g) {
    const int head = at.state_head * p.group + g;
    LoadSweepRows(RowOf<T>(p.d_o, row0, p.num_heads, head, p.value_dim) + at.value0, p.o_stride,
                  tokens, values, p.scale, at.d_o + g * kSweepDim, p.group * kSweepDim);
    if (!backward) continue;
    LoadSweepRows(RowOf<T>(p.q, row0, p.num_heads, head, p.key_dim) + at.key0, p.q_stride, tokens,
                  keys, 1, at.q + g * kSweepDim, p.group * kSweepDim);
  }
}

// A thread's columns of a row in shared memory.
__device__ inline void LoadSweepColumns(const Sweep& at, const float* row,
                                        float (&x)[kSweepColumns]) {
  const float4 low = LoadFour(row + 4 * at.value_lane);
  const float4 high = LoadFour(row + 4 * at.value_lane + 32);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// sum[i] = sum over the thread's columns of s[i] times x
__device__ inline void DotSweepColumns(const float (&s)[kSweepKeys][kSweepColumns],
                                       const float (&x)[kSweepColumns], float (&sum)[kSweepKeys]) {
#pragma unroll
  for (int i = 0; i < kSweepKeys; ++i) {
    sum[i] = 0;
#pragma unroll
    for (int c = 0; c < kSweepColumns; ++c) sum[i] = fmaf(s[i][c], x[c], sum[i]);
  }
}

// Adds four keys' sums over the eight value lanes, halving the keys a lane still carries, and
// stores them at to[row + i] of the block's keys. Lanes 2 j and 2 j + 1 end with key j.
__device__ inline void StoreSumOverValueLanes(const BackwardPlan& p, const Sweep& at,
                                              const float (&x)[kSweepKeys], float* to) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const bool high = at.value_lane & 4, odd = at.value_lane & 2;
  const float s0 = (high ? x[2] : x[0]) + __shfl_xor_sync(kAll, high ? x[0] : x[2], 4);
  const float s1 = (high ? x[3] : x[1]) + __shfl_xor_sync(kAll, high ? x[1] : x[3], 4);
  float s = (odd ? s1 : s0) + __shfl_xor_sync(kAll, odd ? s0 : s1, 2);
  s += __shfl_xor_sync(kAll, s, 1);
  const int key = at.row + (high ? 2 : 0) + (odd ? 1 : 0);
  if (at.value_lane % 2 == 0 && at.key0 + key < p.key_dim) to[key] = s;
}

// Adds eight columns' sums over the four key lanes of a warp; each lane stores two columns.
__device__ inline void StoreSumOverKeyLanes(const Sweep& at, const float (&x)[kSweepColumns],
                                            float* to) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const bool high = threadIdx.x & 16, odd = threadIdx.x & 8;
  float half[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    half[c] = (high ? x[c + 4] : x[c]) + __shfl_xor_sync(kAll, high ? x[c] : x[c + 4], 16);
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float sum =
        (odd ? half[c + 2] : half[c]) + __shfl_xor_sync(kAll, odd ? half[c] : half[c + 2], 8);
    to[at.Column((high ? 4 : 0) + (odd ? 2 : 0) + c)] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kSweepThreads)
    ForwardSweepKernel(const BackwardPlan p, int stage_tokens) {
  extern __shared__ __align__(16) float shared[];
  const Sweep at(p, stage_tokens, shared);
  float s[kSweepKeys][kSweepColumns] = {};
  if (p.initial_state != nullptr) {
    at.LoadState(p, StateOf(p, p.initial_state, at.seq, at.state_head), s);
  }
  for (int start = 0; start < at.length; start += stage_tokens) {
    const int tokens = min(stage_tokens, at.length - start);
    const int64_t chunk = p.chunk_offsets[at.seq] + start / kChunkTokens;
    __syncthreads();  // the stage before is used up
    LoadSweep<T>(p, at, at.begin + start, tokens, false);
    __syncthreads();
    for (int t = 0; t < tokens; ++t) {
      float decays[kSweepKeys], keys[kSweepKeys];
      LoadFour(at.decay + t * kSweepDim + at.row, decays);
      LoadFour(at.k + t * kSweepDim + at.row, keys);
#pragma unroll
      for (int i = 0; i < kSweepKeys; ++i) {
#pragma unroll
        for (int c = 0; c < kSweepColumns; ++c) s[i][c] *= decays[i];
      }
      float x[kSweepColumns];
      for (int g = 0; p.d_o != nullptr && g < p.group; ++g) {
        LoadSweepColumns(at, at.d_o + (t * p.group + g) * kSweepDim, x);
        float sum[kSweepKeys];
        DotSweepColumns(s, x, sum);
        const int64_t row = int64_t{at.slice_v} * p.num_rows + at.begin + start + t;
        const int head = at.state_head * p.group + g;
        StoreSumOverValueLanes(p, at, sum,
                               RowOf(p.dq_sums, row, p.num_heads, head, p.key_dim) + at.key0);
      }
      if (p.last_state_used && start + t + 1 == at.length) {
        at.StoreState(p, s, StateOf(p, p.states, chunk, at.state_head));
      }
      LoadSweepColumns(at, at.v + t * kSweepDim, x);
#pragma unroll
      for (int i = 0; i < kSweepKeys; ++i) {
#pragma unroll
        for (int c = 0; c < kSweepColumns; ++c) s[i][c] = fmaf(keys[i], x[c], s[i][c]);
      }
    }
    const int done = start + tokens;
    if (p.states != nullptr && done % kChunkTokens == 0 && done < at.length) {
      at.StoreState(p, s, StateOf(p, p.states, chunk, at.state_head));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kSweepThreads)
    BackwardSweepKernel(const BackwardPlan p, int stage_tokens) {
  extern __shared__ __align__(16) float shared[];
  const Sweep at(p, stage_tokens, shared);
  float s[kSweepKeys][kSweepColumns] = {};  // C, then dS
  if (p.d_final_state != nullptr) {
    at.LoadState(p, StateOf(p, p.d_final_state, at.seq, at.state_head), s);
  }
  const int stages = CeilDiv(at.length, stage_tokens);
  for (int stage = stages - 1; stage >= 0; --stage) {
    const int start = stage * stage_tokens, tokens = min(stage_tokens, at.length - start);
    const int done = start + tokens;
    const bool last = done == at.length;
    if (p.states != nullptr && (last ? p.last_state_used : done % kChunkTokens == 0)) {
      const int64_t chunk = p.chunk_offsets[at.seq] + start / kChunkTokens;
      const float* state = StateOf(p, p.states, chunk, at.state_head);
      float end[kSweepKeys][kSweepColumns], sum[kSweepKeys] = {};
      at.LoadState(p, state, end);
#pragma unroll
      for (int i = 0; i < kSweepKeys; ++i) {
#pragma unroll
        for (int c = 0; c < kSweepColumns; ++c) sum[i] = fmaf(end[i][c], s[i][c], sum[i]);
      }
      const int64_t sum_row = int64_t{at.slice_v} * p.max_chunks + chunk;
      StoreSumOverValueLanes(
          p, at, sum,
          RowOf(p.boundary_sums, sum_row, p.state_heads, at.state_head, p.key_dim) + at.key0);
    }
    __syncthreads();  // the stage before is used up
    LoadSweep<T>(p, at, at.begin + start, tokens, true);
    __syncthreads();
    for (int t = tokens - 1; t >= 0; --t) {
      const int64_t row = at.begin + start + t;
      float x[kSweepColumns], sum[kSweepKeys];
      LoadSweepColumns(at, at.v + t * kSweepDim, x);
      DotSweepColumns(s, x, sum);
      const int64_t sum_row = int64_t{at.slice_v} * p.num_rows + row;
      StoreSumOverValueLanes(
          p, at, sum, RowOf(p.dk_sums, sum_row, p.state_heads, at.state_head, p.key_dim) + at.key0);
      for (int g = 0; p.d_o != nullptr && g < p.group; ++g) {
        LoadSweepColumns(at, at.d_o + (t * p.group + g) * kSweepDim, x);
        float queries[kSweepKeys];
        LoadFour(at.q + (t * p.group + g) * kSweepDim + at.row, queries);
#pragma unroll
        for (int i = 0; i < kSweepKeys; ++i) {
#pragma unroll
          for (int c = 0; c < kSweepColumns; ++c) s[i][c] = fmaf(queries[i], x[c], s[i][c]);
        }
      }
      float decays[kSweepKeys], keys[kSweepKeys];
      LoadFour(at.decay + t * kSweepDim + at.row, decays);
      LoadFour(at.k + t * kSweepDim + at.row, keys);
#pragma unroll
      for (int c = 0; c < kSweepColumns; ++c) {
        x[c] = keys[0] * s[0][c];
#pragma unroll
        for (int i = 1; i < kSweepKeys; ++i) x[c] = fmaf(keys[i], s[i][c], x[c]);
      }
      StoreSumOverKeyLanes(at, x, at.dv + (t * kSweepWarps + at.warp) * kSweepDim);
#pragma unroll
      for (int i = 0; i < kSweepKeys; ++i) {
#pragma unroll
        for (int c = 0; c < kSweepColumns; ++c) s[i][c] *= decays[i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * kSweepDim; i += kSweepThreads) {
      const int t = i / kSweepDim, c = i % kSweepDim;
      if (at.value0 + c >= p.value_dim) continue;
      const float* dv = at.dv + t * kSweepWarps * kSweepDim + c;
      float sum = dv[0];
      for (int w = 1; w < kSweepWarps; ++w) sum += dv[w * kSweepDim];
      const int64_t row = int64_t{at.slice_k} * p.num_rows + at.begin + start + t;
      RowOf(p.dv_sums, row, p.state_heads, at.state_head, p.value_dim)[at.value0 + c] = sum;
    }
  }
  if (p.d_initial_state != nullptr) {
    at.StoreState(p, s, StateOf(p, p.d_initial_state, at.seq, at.state_head));
  }
}

// scale do_t . v_t of every token and query head: a warp to each.
template <typename T>
__global__ void __launch_bounds__(256) SelfScoresKernel(const BackwardPlan p) {
  const int64_t item = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (item >= int64_t{p.num_rows} * p.num_heads) return;
  const int64_t row = item / p.num_heads;
  const int kv_head = static_cast<int>(item % p.num_heads) / (p.num_heads / p.num_kv_heads);
  const T* d_o = static_cast<const T*>(p.d_o) + item * p.value_dim;
  const T* v = RowOf<T>(p.v, row, p.num_kv_heads, kv_head, p.value_dim);
  float sum = 0;
  for (int c = threadIdx.x % 32; c < p.value_dim; c += 32) {
    sum = fmaf(ToFloat(d_o[c]), ToFloat(v[c]), sum);
  }
  sum = WarpSum(sum);
  if (threadIdx.x % 32 == 0) p.self_scores[item] = p.scale * sum;
}

// dq, dk and d_gate from the sweeps' sums. One block to a chunk, a key/value head and 64 keys.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads, 2) KeySumsKernel(const BackwardPlan p) {
  __shared__ GateShared gate;
  const int slice = blockIdx.x % p.slices_k;
  const int kv_head = blockIdx.x / p.slices_k % p.num_kv_heads;
  ChunkSpot at;
  if (!FindChunk(p, blockIdx.x / p.slices_k / p.num_kv_heads, &at)) return;
  const KeyColumn col(p, slice);
  const int state_stride = p.state_heads * p.key_dim;

  // x is q_t * q_t' - k_t * k_t', `boundary` is S * C. A sequence's last token gives C to no gate:
  // in S * C it is left out, and here too.
  float k[kChunkBlock], dk[kChunkBlock] = {}, x[kChunkBlock] = {}, boundary = 0;
  LoadColumn(RowOf<T>(p.k, at.row0, p.num_kv_heads, kv_head, p.key_dim), p.k_stride, at, col, k);
  const auto add_slices = [&](const float* sums, int stride, float(&total)[kChunkBlock]) {
    for (int v = 0; v < p.slices_v; ++v) {
      float one[kChunkBlock];
      LoadColumn(sums + int64_t{v} * p.num_rows * stride, stride, at, col, one);
#pragma unroll
      for (int i = 0; i < kChunkBlock; ++i) total[i] += one[i];
    }
  };

  for (int state = 0; state < p.states_per_kv; ++state) {
    const int state_head = kv_head * p.states_per_kv + state;
    float sum[kChunkBlock] = {};
    add_slices(RowOf(p.dk_sums, at.row0, p.state_heads, state_head, p.key_dim), state_stride, sum);
#pragma unroll
    for (int i = 0; i < kChunkBlock; ++i) {
      dk[i] += sum[i];
      const bool ends = at.last && col.token0 + i == at.tokens - 1;
      if (!ends) x[i] = fmaf(-k[i], sum[i], x[i]);
    }
    if (p.d_gate != nullptr && col.valid && (!at.last || p.last_state_used)) {
      for (int v = 0; v < p.slices_v; ++v) {
        const int64_t sum_row = int64_t{v} * p.max_chunks + at.chunk;
        boundary += RowOf(p.boundary_sums, sum_row, p.state_heads, state_head, p.key_dim)[col.key];
      }
    }
    for (int g = 0; g < p.group; ++g) {
      const int head = state_head * p.group + g;
#pragma unroll
      for (int i = 0; i < kChunkBlock; ++i) sum[i] = 0;
      if (p.d_o != nullptr) {
        float q[kChunkBlock];
        LoadColumn(RowOf<T>(p.q, at.row0, p.num_heads, head, p.key_dim), p.q_stride, at, col, q);
        add_slices(RowOf(p.dq_sums, at.row0, p.num_heads, head, p.key_dim), p.q_stride, sum);
#pragma unroll
        for (int i = 0; i < kChunkBlock; ++i) {
          const int t = col.token0 + i;
          const float self =
              t < at.tokens ? p.self_scores[(at.row0 + t) * p.num_heads + head] : 0.0f;
          x[i] = fmaf(q[i], sum[i], x[i]);
          sum[i] = fmaf(self, k[i], sum[i]);
          dk[i] = fmaf(self, q[i], dk[i]);
        }
      }
      StoreColumn(RowOf(static_cast<T*>(p.dq), at.row0, p.num_heads, head, p.key_dim), p.q_stride,
                  at, col, sum);
    }
  }
  StoreColumn(RowOf(static_cast<T*>(p.dk), at.row0, p.num_kv_heads, kv_head, p.key_dim), p.k_stride,
              at, col, dk);
  if (p.d_gate != nullptr) {
#pragma unroll
    for (int i = kChunkBlock - 2; i >= 0; --i) x[i] += x[i + 1];
    gate.to_earlier[col.block][col.c] = x[0];
    gate.to_later[col.block][col.c] = 0;
    StoreGateGradient<T>(p, at, kv_head, slice, col, x, boundary, gate);
  }
}

// dv from the sweeps' sums.
template <typename T>
__global__ void __launch_bounds__(256) ValueSumsKernel(const BackwardPlan p) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= int64_t{p.num_rows} * p.num_kv_heads * p.value_dim) return;
  const int64_t head = i / p.value_dim * p.states_per_kv;  // row and state head
  const int64_t of_slice = int64_t{p.num_rows} * p.state_heads * p.value_dim;
  const float* from = p.dv_sums + head * p.value_dim + i % p.value_dim;
  float sum = 0;
  for (int state = 0; state < p.states_per_kv; ++state) {
    for (int slice = 0; slice < p.slices_k; ++slice) {
      sum += from[slice * of_slice + int64_t{state} * p.value_dim];
    }
  }
  static_cast<T*>(p.dv)[i] = FromFloat<T>(sum);
}

}  // namespace gla
