// The chunkwise form's two walks from chunk to chunk; see attention_backward_chunk.cuh.
#pragma once

#include "kernels/cuda/attention_backward.cuh"

namespace gla {

constexpr int kWalkColumns = 32;  // V's tile
constexpr int kWalkKeys = 8;      // a thread's keys, of one column

struct WalkTile {
  float rows[kChunkTokens][kChunkPitch];  // k^ or q^
  float values[kChunkTokens][kWalkColumns];
  float block_decay[kChunkBlocks][kChunkKeys];
};

// Where a block of the walks stands: 64 keys and 32 columns of one state. A thread has one column
// and eight keys.
struct WalkPlace {
  int seq, state_head, kv_head, slice, value0;
  int first_key, column;  // the thread's, of the slice and of V
  int64_t begin, end;     // the sequence's rows
  int first_chunk, chunks;

  __device__ explicit WalkPlace(const BackwardPlan& p) {
    const int tiles_v = CeilDiv(p.value_dim, kWalkColumns);
    value0 = static_cast<int>(blockIdx.x) % tiles_v * kWalkColumns;
    const int rest = blockIdx.x / tiles_v;
    slice = rest % p.slices_k;
    state_head = rest / p.slices_k % p.state_heads;
    seq = rest / p.slices_k / p.state_heads;
    kv_head = state_head / p.states_per_kv;
    first_key = threadIdx.x / kWalkColumns * kWalkKeys;
    column = value0 + threadIdx.x % kWalkColumns;
    begin = p.cu_seqlens[seq], end = p.cu_seqlens[seq + 1];
    first_chunk = p.chunk_offsets[seq], chunks = p.chunk_offsets[seq + 1] - first_chunk;
  }
  __device__ ChunkSpot Chunk(int i) const {
    const int64_t row0 = begin + int64_t{i} * kChunkTokens;
    return {first_chunk + i,
            seq,
            row0,
            static_cast<int>(min(int64_t{kChunkTokens}, end - row0)),
            i == 0,
            i + 1 == chunks};
  }
};

// The thread's elements of a [K, V] state.
__device__ inline void LoadWalk(const BackwardPlan& p, const WalkPlace& at, const float* state,
                                float (&s)[kWalkKeys]) {
#pragma unroll
  for (int i = 0; i < kWalkKeys; ++i) {
    const int key = at.slice * kChunkKeys + at.first_key + i;
    const bool valid = key < p.key_dim && at.column < p.value_dim;
    s[i] = valid ? state[int64_t{key} * p.value_dim + at.column] : 0.0f;
  }
}
__device__ inline void StoreWalk(const BackwardPlan& p, const WalkPlace& at,
                                 const float (&s)[kWalkKeys], float* state) {
#pragma unroll
  for (int i = 0; i < kWalkKeys; ++i) {
    const int key = at.slice * kChunkKeys + at.first_key + i;
    const bool valid = key < p.key_dim && at.column < p.value_dim;
    if (valid) state[int64_t{key} * p.value_dim + at.column] = s[i];
  }
}

// `rows`: of the chunk's first token, the head's first value. Absent ones are 0.
template <typename T>
__device__ void LoadWalkValues(const BackwardPlan& p, const WalkPlace& at, int tokens,
                               const T* rows, int stride, WalkTile& tile) {
  const int column = threadIdx.x % kWalkColumns;
#pragma unroll
  for (int t = threadIdx.x / kWalkColumns; t < kChunkTokens; t += kChunkThreads / kWalkColumns) {
    const bool valid = t < tokens && at.column < p.value_dim;
    tile.values[t][column] = valid ? ToFloat(rows[t * stride + at.column]) : 0.0f;
  }
}

// s = D_b s
__device__ inline void DecayWalk(const WalkPlace& at, const WalkTile& tile, int block,
                                 float (&s)[kWalkKeys]) {
#pragma unroll
  for (int i = 0; i < kWalkKeys; ++i) s[i] *= tile.block_decay[block][at.first_key + i];
}

// s += sum over the block's tokens of rows^T values
__device__ inline void AddWalk(const WalkPlace& at, const WalkTile& tile, int block,
                               float (&s)[kWalkKeys]) {
  const int column = threadIdx.x % kWalkColumns;
#pragma unroll 4
  for (int t = block * kChunkBlock; t < (block + 1) * kChunkBlock; ++t) {
    const float value = tile.values[t][column];
    const float4 low = LoadFour(&tile.rows[t][at.first_key]);
    const float4 high = LoadFour(&tile.rows[t][at.first_key + 4]);
    const float row[kWalkKeys] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kWalkKeys; ++i) s[i] = fmaf(row[i], value, s[i]);
  }
}

// S at the end of every chunk but the last.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads, 2) StateWalkKernel(const BackwardPlan p) {
  __shared__ WalkTile tile;
  const WalkPlace at(p);
  const KeyColumn col(p, at.slice);
  float s[kWalkKeys] = {};
  if (p.initial_state != nullptr) {
    LoadWalk(p, at, StateOf(p, p.initial_state, at.seq, at.state_head), s);
  }
  for (int i = 0; i + 1 < at.chunks; ++i) {
    const ChunkSpot chunk = at.Chunk(i);
    float k[kChunkBlock], decay[kChunkBlock];
    LoadColumn(RowOf<T>(p.k, chunk.row0, p.num_kv_heads, at.kv_head, p.key_dim), p.k_stride, chunk,
               col, k);
    LoadDecays<T>(p, chunk, at.state_head, col, decay);
    __syncthreads();  // the tile before is used up
    DampKeys(col, k, decay, tile.rows, tile.block_decay);
    LoadWalkValues(p, at, chunk.tokens,
                   RowOf<T>(p.v, chunk.row0, p.num_kv_heads, at.kv_head, p.value_dim), p.v_stride,
                   tile);
    __syncthreads();
    for (int block = 0; block < kChunkBlocks; ++block) {
      DecayWalk(at, tile, block, s);
      AddWalk(at, tile, block, s);
    }
    StoreWalk(p, at, s, StateOf(p, p.states, chunk.chunk, at.state_head));
  }
}

// C at the end of every chunk but the last, and d_initial_state.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads, 2) CarryWalkKernel(const BackwardPlan p) {
  __shared__ WalkTile tile;
  const WalkPlace at(p);
  const KeyColumn col(p, at.slice);
  float s[kWalkKeys] = {};
  if (p.d_final_state != nullptr) {
    LoadWalk(p, at, StateOf(p, p.d_final_state, at.seq, at.state_head), s);
  }
  for (int i = at.chunks - 1; i >= 0; --i) {
    const ChunkSpot chunk = at.Chunk(i);
    if (!chunk.last) StoreWalk(p, at, s, StateOf(p, p.carries, chunk.chunk, at.state_head));
    if (chunk.first && p.d_initial_state == nullptr) return;
    float decay[kChunkBlock];
    LoadDecays<T>(p, chunk, at.state_head, col, decay);
    if (p.d_o == nullptr) {
      float product = 1;
#pragma unroll
      for (int j = 0; j < kChunkBlock; ++j) product *= decay[j];
      __syncthreads();
      tile.block_decay[col.block][col.c] = product;
      __syncthreads();
      for (int block = kChunkBlocks - 1; block >= 0; --block) DecayWalk(at, tile, block, s);
      continue;
    }
    float total[kWalkKeys] = {};
    for (int g = 0; g < p.group; ++g) {
      const int head = at.state_head * p.group + g;
      float q[kChunkBlock];
      LoadColumn(RowOf<T>(p.q, chunk.row0, p.num_heads, head, p.key_dim), p.q_stride, chunk, col,
                 q);
#pragma unroll
      for (int j = 0; j < kChunkBlock; ++j) q[j] *= p.scale;
      __syncthreads();
      DampQueries(col, q, decay, tile.rows, tile.block_decay);
      LoadWalkValues(p, at, chunk.tokens,
                     RowOf<T>(p.d_o, chunk.row0, p.num_heads, head, p.value_dim), p.o_stride, tile);
      __syncthreads();
      for (int block = kChunkBlocks - 1; block >= 0; --block) {
        // D_b C + the block's own; C comes in with the first head
        DecayWalk(at, tile, block, s);
        AddWalk(at, tile, block, s);
      }
#pragma unroll
      for (int j = 0; j < kWalkKeys; ++j) total[j] += s[j], s[j] = 0;
    }
#pragma unroll
    for (int j = 0; j < kWalkKeys; ++j) s[j] = total[j];
  }
  if (p.d_initial_state != nullptr) {
    StoreWalk(p, at, s, StateOf(p, p.d_initial_state, at.seq, at.state_head));
  }
}

}  // namespace gla
