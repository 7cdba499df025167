// The chunkwise form: tiles of 64 tokens, each a handful of small matrix products.
//
// Within a tile, with a_t = exp(gate_t) per key dimension and P(s, t] = a_{s+1} ... a_t:
//   o_t   = scale (sum_{s <= t} A_ts v_s + (q_t P(-1, t]) S_in),   A_ts = <q_t, k_s P(s, t]>
//   S_out = P(-1, 63] S_in + sum_s (k_s P(s, 63])^T v_s
// Every P is made by multiplying decays, never as exp of a difference of sums: no exponent is ever
// positive, a decay of 0 is no special case, and nothing cancels. To share the work, a tile has
// four blocks b of 16 tokens, with D_b the product of all of block b's decays and
//   q^_t = q_t P(block start, t],   k^_s = k_s P(s, block end],
// so that for s in an earlier block A_ts = <q^_t, k^_s D_{b'+1} ... D_{b-1}>, the state meets q^_t
// through D_0 ... D_{b-1}, and it moves on block by block: S = D_b S + sum_{s in b} k^_s^T v_s.
// Pairs within one block walk P up token by token.
//
// One block of threads to a (sequence, state head, 32 columns of V). K is passed in slices of 64.
// All of it is float32 on CUDA cores.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {

constexpr int kChunkTokens = 64;
constexpr int kChunkBlock = 16;    // tokens
constexpr int kChunkBlocks = 4;    // to a tile
constexpr int kChunkKeys = 64;     // K's slice
constexpr int kChunkColumns = 32;  // V's tile
constexpr int kChunkThreads = 256;
constexpr int kChunkPitch = kChunkKeys + 4;  // floats: rows 16 bytes aligned, four banks apart

// In shared memory; the state [padded K][kChunkColumns] comes after it.
struct ChunkTile {
  float q[kChunkTokens][kChunkPitch];  // later q^, and in the end A
  float k[kChunkTokens][kChunkPitch];  // later k^
  float decay[kChunkTokens][kChunkPitch];
  float block_decay[kChunkBlocks][kChunkKeys];  // D
  float v[kChunkTokens][kChunkColumns];
};

inline size_t ChunkSharedBytes(int key_dim) {
  return sizeof(ChunkTile) + size_t{4} * RoundUp(key_dim, kChunkKeys) * kChunkColumns;
}

// `gate` is of the inputs' type T or float32, as `dtype` says.
template <typename T>
__device__ float LoadGate(const void* gate, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(gate)[i];
  return ToFloat(static_cast<const T*>(gate)[i]);
}

// What every step of the kernel needs to know about its place.
struct ChunkPlace {
  int64_t row0;  // the tile's first row
  int tokens;    // of the tile, 1 .. 64
  int state_head, kv_head;
};

// Slice [key0, key0 + 64) of k and the decay, and of q for `query_head` unless that is -1. Absent
// tokens and keys get q = k = 0 and decay 1, which change nothing.
template <typename T>
__device__ void LoadChunkSlice(const LinearAttentionArgs& a, const ChunkPlace& at, int key0,
                               int64_t query_head, ChunkTile& tile) {
#pragma unroll 4
  for (int i = threadIdx.x; i < kChunkTokens * kChunkKeys; i += kChunkThreads) {
    const int t = i / kChunkKeys, c = i % kChunkKeys, key = key0 + c;
    const bool valid = t < at.tokens && key < a.key_dim;
    const int64_t row = at.row0 + t;
    float q = 0, k = 0, gate = 0;
    if (valid) {
      if (query_head >= 0) {
        q = ToFloat(static_cast<const T*>(a.q)[row * a.q_stride + query_head * a.key_dim + key]);
      }
      k = ToFloat(
          static_cast<const T*>(a.k)[row * a.k_stride + int64_t{at.kv_head} * a.key_dim + key]);
      switch (a.gate_kind) {
        case GateKind::kNone:
          break;
        case GateKind::kConstant:
          gate = LoadGate<T>(a.gate, a.gate_dtype, at.state_head);
          break;
        case GateKind::kScalar:
          gate = LoadGate<T>(a.gate, a.gate_dtype, row * a.gate_stride + at.kv_head);
          break;
        case GateKind::kPerKey:
          gate = LoadGate<T>(a.gate, a.gate_dtype,
                             row * a.gate_stride + int64_t{at.kv_head} * a.key_dim + key);
          break;
      }
    }
    tile.q[t][c] = q;
    tile.k[t][c] = k;
    tile.decay[t][c] = expf(gate);
  }
}

// A within blocks. Thread: column s = thread / 4 and every fourth key; diagonal[d] is A_{s+d, s} of
// those keys.
__device__ inline void AddDiagonal(const ChunkTile& tile, float (&diagonal)[kChunkBlock]) {
  const int s = threadIdx.x / 4, tokens = kChunkBlock - s % kChunkBlock;
  for (int c = threadIdx.x % 4; c < kChunkKeys; c += 4) {
    float key = tile.k[s][c];
#pragma unroll
    for (int d = 0; d < kChunkBlock; ++d) {
      if (d >= tokens) break;
      if (d > 0) key *= tile.decay[s + d][c];
      diagonal[d] = fmaf(tile.q[s + d][c], key, diagonal[d]);
    }
  }
}

// q and k become q^ and k^. Thread: block thread / 64 and key thread % 64.
__device__ inline void ScaleChunkSlice(ChunkTile& tile) {
  const int block = threadIdx.x / kChunkKeys, c = threadIdx.x % kChunkKeys;
  const int first = block * kChunkBlock;
  float product = 1;
  for (int i = 0; i < kChunkBlock; ++i) {
    product *= tile.decay[first + i][c];
    tile.q[first + i][c] *= product;
  }
  tile.block_decay[block][c] = product;
  product = 1;
  for (int i = kChunkBlock - 1; i >= 0; --i) {
    tile.k[first + i][c] *= product;
    product *= tile.decay[first + i][c];
  }
}

// A between blocks. Thread: tokens ty + 16 b and columns tx + 16 b'. The pairs (b, b') stand in
// `between` as (1,0) (2,0) (2,1) (3,0) (3,1) (3,2).
__device__ inline void AddBetweenBlocks(const ChunkTile& tile, float (&between)[6]) {
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll 4
  for (int c = 0; c < kChunkKeys; ++c) {
    const float q1 = tile.q[ty + 16][c], q2 = tile.q[ty + 32][c], q3 = tile.q[ty + 48][c];
    const float k0 = tile.k[tx][c], k1 = tile.k[tx + 16][c], k2 = tile.k[tx + 32][c];
    const float d1 = tile.block_decay[1][c], d2 = tile.block_decay[2][c];
    const float k0d1 = k0 * d1;
    between[0] = fmaf(q1, k0, between[0]);
    between[1] = fmaf(q2, k0d1, between[1]);
    between[2] = fmaf(q2, k1, between[2]);
    between[3] = fmaf(q3, k0d1 * d2, between[3]);
    between[4] = fmaf(q3, k1 * d2, between[4]);
    between[5] = fmaf(q3, k2, between[5]);
  }
}

// o += q^ D_0 ... D_{b-1} S_in over this slice. Thread: column thread % 32, tokens thread / 32 + 8
// i.
__device__ inline void AddFromState(const ChunkTile& tile, const float* state,
                                    float (&o)[kChunkTokens / 8]) {
  const int column = threadIdx.x % kChunkColumns, t0 = threadIdx.x / kChunkColumns;
#pragma unroll 4
  for (int c = 0; c < kChunkKeys; ++c) {
    float s = state[c * kChunkColumns + column];
#pragma unroll
    for (int block = 0; block < kChunkBlocks; ++block) {
      o[2 * block] = fmaf(tile.q[t0 + 16 * block][c], s, o[2 * block]);
      o[2 * block + 1] = fmaf(tile.q[t0 + 16 * block + 8][c], s, o[2 * block + 1]);
      s *= tile.block_decay[block][c];
    }
  }
}

// A over q's place; above the diagonal stands nothing of use.
__device__ inline void StoreScores(ChunkTile& tile, const float (&diagonal)[kChunkBlock],
                                   const float (&between)[6]) {
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  tile.q[ty + 16][tx] = between[0];
  tile.q[ty + 32][tx] = between[1];
  tile.q[ty + 32][tx + 16] = between[2];
  tile.q[ty + 48][tx] = between[3];
  tile.q[ty + 48][tx + 16] = between[4];
  tile.q[ty + 48][tx + 32] = between[5];
  const int s = threadIdx.x / 4, tokens = kChunkBlock - s % kChunkBlock;
#pragma unroll
  for (int d = 0; d < kChunkBlock; ++d) {
    float sum = diagonal[d];
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    if (threadIdx.x % 4 == 0 && d < tokens) tile.q[s + d][s] = sum;
  }
}

// S = D_b S + sum of k^_s^T v_s, block by block, over this slice. Thread: column thread % 32, keys
// thread / 32 * 8 + i.
__device__ inline void AdvanceState(const ChunkTile& tile, float* state) {
  const int column = threadIdx.x % kChunkColumns, c0 = threadIdx.x / kChunkColumns * 8;
  float s[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] = state[(c0 + i) * kChunkColumns + column];
  for (int block = 0; block < kChunkBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] *= tile.block_decay[block][c0 + i];
#pragma unroll 4
    for (int t = block * kChunkBlock; t < (block + 1) * kChunkBlock; ++t) {
      const float v = tile.v[t][column];
      const float4 low = LoadFour(&tile.k[t][c0]), high = LoadFour(&tile.k[t][c0 + 4]);
      const float k[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) s[i] = fmaf(k[i], v, s[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) state[(c0 + i) * kChunkColumns + column] = s[i];
}

template <typename T>
__global__ void __launch_bounds__(kChunkThreads, 2)
    ChunkKernel(const LinearAttentionArgs a, int tiles_v) {
  extern __shared__ __align__(16) char shared_bytes[];
  ChunkTile& tile = *reinterpret_cast<ChunkTile*>(shared_bytes);
  float* state = reinterpret_cast<float*>(shared_bytes + sizeof(ChunkTile));
  const int seq = blockIdx.x / tiles_v / a.state_heads;
  const int value0 = static_cast<int>(blockIdx.x % tiles_v) * kChunkColumns;
  ChunkPlace at;
  at.state_head = blockIdx.x / tiles_v % a.state_heads;
  at.kv_head = at.state_head / (a.state_heads / a.num_kv_heads);
  const int group = a.num_heads / a.state_heads;
  const int64_t begin = a.seqs.cu_seqlens[seq], end = a.seqs.cu_seqlens[seq + 1];
  const int read = a.seqs.read_slots[seq], write = a.seqs.write_slots[seq];
  if (begin == end && (write < 0 || write == read)) return;

  const int padded_k = RoundUp(a.key_dim, kChunkKeys);
  const int64_t head_offset = int64_t{at.state_head} * a.key_dim * a.value_dim + value0;
  for (int i = threadIdx.x; i < padded_k * kChunkColumns; i += kChunkThreads) {
    const int key = i / kChunkColumns, column = i % kChunkColumns;
    const bool valid = read >= 0 && key < a.key_dim && value0 + column < a.value_dim;
    state[i] =
        valid ? a.state[read * a.state_stride + head_offset + int64_t{key} * a.value_dim + column]
              : 0.0f;
  }

  const int column = threadIdx.x % kChunkColumns, t0 = threadIdx.x / kChunkColumns;
  for (at.row0 = begin; at.row0 < end; at.row0 += kChunkTokens) {
    at.tokens = static_cast<int>(min(int64_t{kChunkTokens}, end - at.row0));
    __syncthreads();  // the tile before is used up
    for (int t = t0; t < kChunkTokens; t += kChunkThreads / kChunkColumns) {
      const bool valid = t < at.tokens && value0 + column < a.value_dim;
      const T* v = static_cast<const T*>(a.v) + (at.row0 + t) * a.v_stride +
                   int64_t{at.kv_head} * a.value_dim + value0 + column;
      tile.v[t][column] = valid ? ToFloat(*v) : 0.0f;
    }
    for (int g = 0; g < group; ++g) {
      const int64_t query_head = int64_t{at.state_head} * group + g;
      float diagonal[kChunkBlock] = {}, between[6] = {}, o[kChunkTokens / 8] = {};
      for (int key0 = 0; key0 < padded_k; key0 += kChunkKeys) {
        __syncthreads();
        LoadChunkSlice<T>(a, at, key0, query_head, tile);
        __syncthreads();
        AddDiagonal(tile, diagonal);
        __syncthreads();
        ScaleChunkSlice(tile);
        __syncthreads();
        AddBetweenBlocks(tile, between);
        AddFromState(tile, state + key0 * kChunkColumns, o);
      }
      __syncthreads();
      StoreScores(tile, diagonal, between);
      __syncthreads();
      // s <= t is a bound and not a mask: a later token's NaN must not reach an earlier one.
#pragma unroll
      for (int i = 0; i < kChunkTokens / 8; ++i) {
        const int t = t0 + 8 * i;
        if (t >= at.tokens || value0 + column >= a.value_dim) continue;
        for (int s = 0; s <= t; ++s) o[i] = fmaf(tile.q[t][s], tile.v[s][column], o[i]);
        static_cast<T*>(
            a.o)[(at.row0 + t) * a.o_stride + query_head * a.value_dim + value0 + column] =
            FromFloat<T>(a.scale * o[i]);
      }
    }
    for (int key0 = 0; key0 < padded_k; key0 += kChunkKeys) {
      __syncthreads();
      LoadChunkSlice<T>(a, at, key0, -1, tile);
      __syncthreads();
      ScaleChunkSlice(tile);
      __syncthreads();
      AdvanceState(tile, state + key0 * kChunkColumns);
    }
  }

  if (write < 0) return;
  __syncthreads();
  for (int i = threadIdx.x; i < a.key_dim * kChunkColumns; i += kChunkThreads) {
    const int key = i / kChunkColumns, c = i % kChunkColumns;
    if (value0 + c >= a.value_dim) continue;
    a.state[write * a.state_stride + head_offset + int64_t{key} * a.value_dim + c] = state[i];
  }
}

}  // namespace gla
