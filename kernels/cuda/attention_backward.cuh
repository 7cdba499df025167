// What both forms of the backward pass share: the workspace, chunks of sequences, the gate's
// gradient.
//
// Chunks are 64 tokens counted from each sequence's first. At a chunk's end stand S, the state
// after its last token, and C ("carry"), the gradient that reaches this S from later tokens and
// from d_final_state. Within a chunk nothing else of the other tokens is needed.
//
// The gate's gradient. What goes from token s to a later t (k_s, decays, q_t, and v_s . do_t)
// passes the decays of s + 1 ... t and has a share in their gradients; so has what starts in the
// state before the chunk, or ends in C. Hence, with q_t' and k_t' those parts of dq_t and dk_t that
// come from the chunk's other tokens,
//   dgate_u = sum_{t >= u} (q_t * q_t' - k_t * k_t') + sum_{t >= u} (from the state before, to t)
//             + sum_{s < u} (from s, to C) + (from the state before, to C).
// What a token gives to itself is left out of q' and k', where it would stand on both sides: with
// strong gates it is nearly all there is, and nothing would remain of the difference.
#pragma once

#include "kernels/cuda/attention_chunk.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {

constexpr int kScoresOfChunk = kChunkTokens * kChunkTokens;

// Everything a kernel of the backward pass needs. Workspace that a call does not use is null.
struct BackwardPlan : LinearAttentionBackwardArgs {
  int group;                                   // query heads that share a state head
  int states_per_kv;                           // state heads that share a key/value head
  int q_stride, k_stride, o_stride, v_stride;  // elements from row to row
  int slices_k;                                // of 64 keys
  int slices_v;                                // of 64 values
  int max_chunks;                              // not fewer than there are
  // Recurrent form: `states` has, for a sequence's last chunk, S before the last token's own
  // k^T v. Otherwise last chunks are left out.
  bool last_state_used;

  int32_t* chunk_offsets;  // [N + 1]: chunks of the sequences before
  float* states;           // [max_chunks, state_heads, K, V]: S at their ends
  float* gate_sums;        // [slices_k, T, G]: d_gate of each slice of keys, when it is per head

  // Chunkwise form.
  float* carries;   // [max_chunks, state_heads, K, V]: C; not of a sequence's last chunk
  float* scores;    // [max_chunks, H, 64, 64]: scale q_t . k_s with decays, 0 where s > t
  float* d_scores;  // the same of scale do_t . v_s, without decays

  // Recurrent form: sums over one slice of V, or of K.
  float* dq_sums;        // [slices_v, T, H, K]: dq_t without what token t gives to itself
  float* dk_sums;        // [slices_v, T, state_heads, K]: dk_t without that
  float* boundary_sums;  // [slices_v, max_chunks, state_heads, K]: S * C
  float* dv_sums;        // [slices_k, T, state_heads, V]
  float* self_scores;    // [T, H]: scale do_t . v_t
};

// ---- Chunks -------------------------------------------------------------------------------------

// One block; each thread counts the chunks of a run of sequences.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    ChunkOffsetsKernel(const int32_t* cu_seqlens, int num_seqs, int32_t* offsets) {
  __shared__ int counts[kThreads];
  const int thread = threadIdx.x, run = CeilDiv(num_seqs, kThreads);
  const int begin = min(thread * run, num_seqs), end = min(begin + run, num_seqs);
  const auto chunks_of = [&](int n) {
    return CeilDiv(cu_seqlens[n + 1] - cu_seqlens[n], kChunkTokens);
  };
  int count = 0;
  for (int n = begin; n < end; ++n) count += chunks_of(n);
  counts[thread] = count;
  __syncthreads();
  int offset = 0;
  for (int i = 0; i < thread; ++i) offset += counts[i];
  for (int n = begin; n < end; ++n) {
    offsets[n] = offset;
    offset += chunks_of(n);
  }
  if (thread == kThreads - 1) offsets[num_seqs] = offset;
}

struct ChunkSpot {
  int chunk;         // of all sequences' chunks
  int seq;           // whose it is
  int64_t row0;      // its first row
  int tokens;        // 1 .. 64
  bool first, last;  // of its sequence
};

// False when there are fewer chunks.
__device__ inline bool FindChunk(const BackwardPlan& p, int chunk, ChunkSpot* at) {
  if (chunk >= p.chunk_offsets[p.num_seqs]) return false;
  int low = 0, high = p.num_seqs;  // the last sequence with an offset <= chunk is not empty
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (p.chunk_offsets[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int index = chunk - p.chunk_offsets[low];
  const int64_t end = p.cu_seqlens[low + 1];
  at->chunk = chunk;
  at->seq = low;
  at->row0 = p.cu_seqlens[low] + int64_t{index} * kChunkTokens;
  at->tokens = static_cast<int>(min(int64_t{kChunkTokens}, end - at->row0));
  at->first = index == 0;
  at->last = chunk + 1 == p.chunk_offsets[low + 1];
  return true;
}

// [K, V] of `state_head` in item `i` of an array of [state_heads, K, V].
template <typename Float>
__device__ Float* StateOf(const BackwardPlan& p, Float* states, int64_t i, int state_head) {
  return states + (i * p.state_heads + state_head) * p.key_dim * p.value_dim;
}

// S before a chunk's first token, C after its last; null where they are zero.
__device__ inline const float* StateBefore(const BackwardPlan& p, const ChunkSpot& at,
                                           int state_head) {
  if (!at.first) return StateOf(p, p.states, at.chunk - 1, state_head);
  return p.initial_state == nullptr ? nullptr : StateOf(p, p.initial_state, at.seq, state_head);
}
__device__ inline const float* CarryAfter(const BackwardPlan& p, const ChunkSpot& at,
                                          int state_head) {
  if (!at.last) return StateOf(p, p.carries, at.chunk, state_head);
  return p.d_final_state == nullptr ? nullptr : StateOf(p, p.d_final_state, at.seq, state_head);
}

// Row `row` of one head of a [T, heads, dim] tensor.
template <typename T>
__device__ T* RowOf(T* x, int64_t row, int heads, int head, int dim) {
  return x + (row * heads + head) * dim;
}
template <typename T>
__device__ const T* RowOf(const void* x, int64_t row, int heads, int head, int dim) {
  return RowOf(static_cast<const T*>(x), row, heads, head, dim);
}

// ---- A thread's part of 64 tokens and 64 keys ---------------------------------------------------

// 256 threads: the 16 tokens of one block, at one key.
struct KeyColumn {
  int block, token0;  // token0: the block's first, of the chunk
  int c, key;         // of the slice, of K
  bool valid;         // the key exists

  __device__ KeyColumn(const BackwardPlan& p, int slice)
      : block(threadIdx.x / kChunkKeys),
        token0(block * kChunkBlock),
        c(threadIdx.x % kChunkKeys),
        key(slice * kChunkKeys + c),
        valid(key < p.key_dim) {}
};

// `rows`: of the chunk's first token, the head's first key; `stride` elements from row to row.
// Absent tokens and keys are 0.
template <typename T>
__device__ void LoadColumn(const T* rows, int stride, const ChunkSpot& at, const KeyColumn& col,
                           float (&x)[kChunkBlock]) {
#pragma unroll
  for (int i = 0; i < kChunkBlock; ++i) {
    const int t = col.token0 + i;
    x[i] = col.valid && t < at.tokens ? ToFloat(rows[t * stride + col.key]) : 0.0f;
  }
}

template <typename T>
__device__ void StoreColumn(T* rows, int stride, const ChunkSpot& at, const KeyColumn& col,
                            const float (&x)[kChunkBlock]) {
#pragma unroll
  for (int i = 0; i < kChunkBlock; ++i) {
    const int t = col.token0 + i;
    if (col.valid && t < at.tokens) rows[t * stride + col.key] = FromFloat<T>(x[i]);
  }
}

// Where a state head's gates are: element first + row * stride + key * key_stride.
struct GatePlace {
  int64_t first;
  int stride, key_stride;

  __device__ GatePlace(const BackwardPlan& p, int state_head) {
    const int kv_head = state_head / p.states_per_kv;
    first = kv_head, stride = p.num_kv_heads, key_stride = 0;
    if (p.gate_kind == GateKind::kConstant) first = state_head, stride = 0;
    if (p.gate_kind == GateKind::kPerKey) {
      first *= p.key_dim, stride *= p.key_dim, key_stride = 1;
    }
  }
};

// The column's exp(gate) of a state head; 1 for absent tokens and keys.
template <typename T>
__device__ void LoadDecays(const BackwardPlan& p, const ChunkSpot& at, int state_head,
                           const KeyColumn& col, float (&decay)[kChunkBlock]) {
  const GatePlace place(p, state_head);
  const int64_t from = place.first + at.row0 * place.stride + col.key * place.key_stride;
  const auto load = [&](const auto* gates) {
#pragma unroll
    for (int i = 0; i < kChunkBlock; ++i) {
      const int t = col.token0 + i;
      decay[i] = col.valid && t < at.tokens ? ToFloat(gates[from + t * place.stride]) : 0.0f;
    }
  };
  if (p.gate_kind == GateKind::kNone) {
#pragma unroll
    for (int i = 0; i < kChunkBlock; ++i) decay[i] = 0;
  } else if (p.gate_dtype == DType::kFloat32) {
    load(static_cast<const float*>(p.gate));
  } else {
    load(static_cast<const T*>(p.gate));
  }
#pragma unroll
  for (int i = 0; i < kChunkBlock; ++i) decay[i] = expf(decay[i]);
}

// k^ and D, q^ and D, of the thread's column.
__device__ inline void DampKeys(const KeyColumn& col, const float (&k)[kChunkBlock],
                                const float (&decay)[kChunkBlock], float (*rows)[kChunkPitch],
                                float (*block_decay)[kChunkKeys]) {
  float product = 1;
#pragma unroll
  for (int i = kChunkBlock - 1; i >= 0; --i) {
    rows[col.token0 + i][col.c] = k[i] * product;
    product *= decay[i];
  }
  block_decay[col.block][col.c] = product;
}
__device__ inline void DampQueries(const KeyColumn& col, const float (&q)[kChunkBlock],
                                   const float (&decay)[kChunkBlock], float (*rows)[kChunkPitch],
                                   float (*block_decay)[kChunkKeys]) {
  float product = 1;
#pragma unroll
  for (int i = 0; i < kChunkBlock; ++i) {
    product *= decay[i];
    rows[col.token0 + i][col.c] = q[i] * product;
  }
  block_decay[col.block][col.c] = product;
}

// ---- The gate's gradient ------------------------------------------------------------------------

struct GateShared {
  float to_earlier[kChunkBlocks][kChunkKeys];  // what a block gives to tokens of earlier blocks
  float to_later[kChunkBlocks][kChunkKeys];    // ... of later blocks
  float heads[kChunkThreads / 32][kChunkBlock];
};

// `x`: d_gate of the thread's tokens but for what other blocks of tokens have in it, which stands
// in `shared`, and what all tokens have, `everywhere`; 0 for an absent key. Writes d_gate, or this
// slice's share of it into gate_sums. All threads of the block call it.
template <typename T>
__device__ void StoreGateGradient(const BackwardPlan& p, const ChunkSpot& at, int kv_head,
                                  int slice, const KeyColumn& col, float (&x)[kChunkBlock],
                                  float everywhere, GateShared& shared) {
  __syncthreads();
  float others = everywhere;
  for (int b = kChunkBlocks - 1; b > col.block; --b) others += shared.to_earlier[b][col.c];
  for (int b = 0; b < col.block; ++b) others += shared.to_later[b][col.c];
#pragma unroll
  for (int i = 0; i < kChunkBlock; ++i) x[i] += others;

  if (p.gate_kind == GateKind::kPerKey) {
    const int64_t from = (at.row0 * p.num_kv_heads + kv_head) * p.key_dim;
    if (p.gate_dtype == DType::kFloat32) {
      StoreColumn(static_cast<float*>(p.d_gate) + from, p.k_stride, at, col, x);
    } else {
      StoreColumn(static_cast<T*>(p.d_gate) + from, p.k_stride, at, col, x);
    }
    return;
  }
  const int warp = threadIdx.x / 32;  // two warps to a block of tokens
#pragma unroll
  for (int i = 0; i < kChunkBlock; ++i) {
    const float sum = WarpSum(x[i]);
    if (threadIdx.x % 32 == 0) shared.heads[warp][i] = sum;
  }
  __syncthreads();
  const int t = threadIdx.x;
  if (t < at.tokens) {
    const int first_warp = t / kChunkBlock * 2, i = t % kChunkBlock;
    p.gate_sums[(int64_t{slice} * p.num_rows + at.row0 + t) * p.num_kv_heads + kv_head] =
        shared.heads[first_warp][i] + shared.heads[first_warp + 1][i];
  }
}

// d_gate of heads: the sum over the slices of keys.
template <typename T>
__global__ void __launch_bounds__(256) GateGradientKernel(const BackwardPlan p) {
  const int64_t items = int64_t{p.num_rows} * p.num_kv_heads;
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= items) return;
  float sum = 0;
  for (int slice = 0; slice < p.slices_k; ++slice) sum += p.gate_sums[slice * items + i];
  if (p.gate_dtype == DType::kFloat32) {
    static_cast<float*>(p.d_gate)[i] = sum;
  } else {
    static_cast<T*>(p.d_gate)[i] = FromFloat<T>(sum);
  }
}

}  // namespace gla
