// The recurrent form: S_t = diag(exp(gate_t)) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t.
//
// One block to a (sequence, state head, tile of V). It reads its [K, tile] of the state once into
// registers, walks the sequence's tokens, and writes the state back once. A state head may serve
// several query heads (grouped heads).
//
// A warp holds 8 kRows rows of K and 16 columns of V: lane = 4 * key_lane + value_lane, where
// value_lane has four neighbouring columns (16 bytes) and key_lane has kRows rows, in runs of four.
// kWarpsV warps stand side by side along V, `warps_k` along K.
//
// o_t needs a sum over K. Its order is fixed by K's own tiling: down a lane's rows, over the eight
// key lanes by shuffles, over the warps through shared memory. None of this knows how many
// sequences or tokens there are, so bits depend on a sequence alone and not on how it is cut into
// calls.
//
// Tokens come in runs ("stages") of up to `stage_tokens`. With loader warps, these fetch stage i +
// 1 and write out the o of stage i - 1 while the others compute stage i; without, every warp does
// both in turn. This changes when things are done, never what.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {

enum class Decay { kNone, kPerStep, kPerKey };  // kConstant is a kPerStep that does not change

struct RecurrentPlan {
  int tiles_v;   // along V, of 16 * kWarpsV columns
  int warps_k;   // along K, of 8 * kRows rows
  int padded_k;  // warps_k * 8 * kRows
  int group;     // query heads that share a state head
  int stage_tokens;
  int compute_threads;
  bool vector_inputs;  // q, k, v and gate allow loads of four neighbours
  bool vector_state;
};

// Shared memory of one stage, in floats from its start. `partial` is o before the sum over warps.
struct StageLayout {
  int k, decay, v, partial, total, partial_width;

  // q [tokens][group][padded_k], k [tokens][padded_k], decay [tokens][padded_k] or [tokens],
  // v [tokens][tile_v], partial [tokens][group][warps_k][partial_width].
  __host__ __device__ StageLayout(const RecurrentPlan& p, int tile_v, bool per_key, bool key_sum)
      : partial_width(tile_v + (key_sum ? 4 : 0)) {
    k = p.stage_tokens * p.group * p.padded_k;
    decay = k + p.stage_tokens * p.padded_k;
    v = decay + (per_key ? p.stage_tokens * p.padded_k : RoundUp(p.stage_tokens, 4));
    partial = v + p.stage_tokens * tile_v;
    total = partial + p.stage_tokens * p.group * p.warps_k * partial_width;
  }
};

// T: of q, k, v and o; Gate: of the gate.
template <typename T, typename Gate, int kRows, int kWarpsV, Decay kDecay, bool kKeySum>
struct Recurrence {
  static constexpr int kTileV = 16 * kWarpsV;

  const LinearAttentionArgs& a;
  const RecurrentPlan& p;
  const StageLayout layout;
  float* shared;
  int state_head, kv_head, value0;

  __device__ float4 Fetch(const T* from, int count) const {
    if (count <= 0) return {0, 0, 0, 0};
    return p.vector_inputs ? LoadFour(from) : LoadUpToFour(from, count);
  }

  // Piece `i` of token `row`: four neighbours of q, k, the decay or v; where they go in `stage`, or
  // -1.
  __device__ int FetchPiece(int i, int t, int64_t row, float4* piece) const {
    const int k_pieces = p.padded_k / 4;
    const int head = i / k_pieces, k = 4 * (i % k_pieces);
    if (head < p.group) {
      const int64_t query_head = int64_t{state_head} * p.group + head;
      const T* q = static_cast<const T*>(a.q) + row * a.q_stride + query_head * a.key_dim + k;
      *piece = Fetch(q, a.key_dim - k);
      return (t * p.group + head) * p.padded_k + k;
    }
    if (head == p.group) {
      const T* key =
          static_cast<const T*>(a.k) + row * a.k_stride + int64_t{kv_head} * a.key_dim + k;
      *piece = Fetch(key, a.key_dim - k);
      return layout.k + t * p.padded_k + k;
    }
    if (kDecay == Decay::kPerKey && head == p.group + 1) {
      const Gate* gate =
          static_cast<const Gate*>(a.gate) + row * a.gate_stride + int64_t{kv_head} * a.key_dim + k;
      float4 g = {0, 0, 0, 0};
      if (a.key_dim > k) g = p.vector_inputs ? LoadFour(gate) : LoadUpToFour(gate, a.key_dim - k);
      *piece = g;  // exp() when all loads are under way
      return layout.decay + t * p.padded_k + k;
    }
    const int column = 4 * (i - (p.group + (kDecay == Decay::kPerKey ? 2 : 1)) * k_pieces);
    const T* v = static_cast<const T*>(a.v) + row * a.v_stride + int64_t{kv_head} * a.value_dim +
                 value0 + column;
    *piece = Fetch(v, a.value_dim - value0 - column);
    return layout.v + t * kTileV + column;
  }

  // Rows [first_row, first_row + tokens) into the stage, by `threads` threads of which this is
  // `id`.
  __device__ void Load(float* stage, int64_t first_row, int tokens, int id, int threads) const {
    constexpr int kBatch = 4;  // loads in flight
    const int pieces =
        (p.group + (kDecay == Decay::kPerKey ? 2 : 1)) * (p.padded_k / 4) + kTileV / 4;
    const int total = tokens * pieces;
    for (int base = id; base < total; base += kBatch * threads) {
      float4 piece[kBatch];
      int to[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = base + j * threads;
        to[j] = -1;
        if (i < total)
          to[j] = FetchPiece(i % pieces, i / pieces, first_row + i / pieces, &piece[j]);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (to[j] < 0) continue;
        if (kDecay == Decay::kPerKey && to[j] >= layout.decay && to[j] < layout.v) {
          piece[j] = {expf(piece[j].x), expf(piece[j].y), expf(piece[j].z), expf(piece[j].w)};
        }
        StoreFour(stage + to[j], piece[j]);
      }
    }
    if constexpr (kDecay == Decay::kPerStep) {
      for (int t = id; t < tokens; t += threads) {
        const float gate = a.gate_kind == GateKind::kConstant
                               ? ToFloat(static_cast<const Gate*>(a.gate)[state_head])
                               : ToFloat(static_cast<const Gate*>(
                                     a.gate)[(first_row + t) * a.gate_stride + kv_head]);
        stage[layout.decay + t] = expf(gate);
      }
    }
  }

  // o of the stage's tokens: the sum over the warps along K, scaled, normalized.
  __device__ void Flush(const float* stage, int64_t first_row, int tokens, int id,
                        int threads) const {
    const int width = layout.partial_width;
    for (int i = id; i < tokens * p.group * kTileV; i += threads) {
      const int column = i % kTileV, item = i / kTileV;  // item: token * group + head
      if (value0 + column >= a.value_dim) continue;
      const float* partial = stage + layout.partial + item * p.warps_k * width;
      float o = partial[column];
      for (int w = 1; w < p.warps_k; ++w) o += partial[w * width + column];
      o *= a.scale;
      if constexpr (kKeySum) {
        float z = partial[kTileV];
        for (int w = 1; w < p.warps_k; ++w) z += partial[w * width + kTileV];
        o /= fmaf(a.scale, z, 1e-10f);
      }
      const int64_t row = first_row + item / p.group;
      const int64_t head = int64_t{state_head} * p.group + item % p.group;
      static_cast<T*>(a.o)[row * a.o_stride + head * a.value_dim + value0 + column] =
          FromFloat<T>(o);
    }
  }
};

// Adds four columns over the eight key lanes, halving the columns a lane still carries: this lane
// gets the sum of column 2 * (lane / 16) + lane / 8 % 2 of its four.
__device__ inline float SumOverKeyLanes(const float (&x)[4], int lane) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const bool high = lane & 16, odd = lane & 8;
  const float s0 = (high ? x[2] : x[0]) + __shfl_xor_sync(kAll, high ? x[0] : x[2], 16);
  const float s1 = (high ? x[3] : x[1]) + __shfl_xor_sync(kAll, high ? x[1] : x[3], 16);
  const float s = (odd ? s1 : s0) + __shfl_xor_sync(kAll, odd ? s0 : s1, 8);
  return s + __shfl_xor_sync(kAll, s, 4);
}

// 96 registers where the state takes 32 of them, so that decoding keeps five blocks of four warps,
// and with them enough loads of states, on each multiprocessor; 128 where it takes 64.
constexpr int MaxRegisters(int rows) { return rows <= 8 ? 96 : 128; }

template <typename T, typename Gate, int kRows, int kWarpsV, Decay kDecay, bool kKeySum>
__global__ void __maxnreg__(MaxRegisters(kRows))
    RecurrentKernel(const LinearAttentionArgs a, const RecurrentPlan p) {
  extern __shared__ __align__(16) float shared[];
  constexpr int kTileV = 16 * kWarpsV;
  const int seq = blockIdx.x / p.tiles_v / a.state_heads;
  const int state_head = blockIdx.x / p.tiles_v % a.state_heads;
  const int value0 = static_cast<int>(blockIdx.x % p.tiles_v) * kTileV;
  const int64_t begin = a.seqs.cu_seqlens[seq];
  const int length = a.seqs.cu_seqlens[seq + 1] - static_cast<int>(begin);
  const int read = a.seqs.read_slots[seq], write = a.seqs.write_slots[seq];
  if (length == 0 && (write < 0 || write == read)) return;

  const Recurrence<T, Gate, kRows, kWarpsV, kDecay, kKeySum> r = {
      a,      p,          StageLayout(p, kTileV, kDecay == Decay::kPerKey, kKeySum),
      shared, state_head, state_head / (a.state_heads / a.num_kv_heads),
      value0};
  const int threads = blockDim.x, id = threadIdx.x;
  const bool computes = id < p.compute_threads;
  const bool has_loaders = threads > p.compute_threads;
  const bool loads = !computes || !has_loaders;
  const int load_id = has_loaders ? id - p.compute_threads : id;
  const int load_threads = has_loaders ? threads - p.compute_threads : threads;

  const int warp = id / 32, lane = id % 32;
  const int warp_v = warp % kWarpsV, warp_k = warp / kWarpsV;
  const int key0 = warp_k * 8 * kRows + lane / 4 * 4;  // row j of run i: key0 + 32 * i + j
  const int tile_column = warp_v * 16 + lane % 4 * 4;
  const int columns = min(a.value_dim - value0 - tile_column, 4);
  const int64_t head_offset = int64_t{state_head} * a.key_dim * a.value_dim + value0 + tile_column;

  float state[kRows][4] = {};
  float key_sum[kRows] = {};
  if (computes && read >= 0) {
    const float* from = a.state + read * a.state_stride + head_offset;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int k = key0 + i / 4 * 32 + i % 4;
      if (k >= a.key_dim || columns <= 0) continue;
      const float* row = from + int64_t{k} * a.value_dim;
      float4 s;
      if (p.vector_state) {
        s = __ldcs(reinterpret_cast<const float4*>(row));
      } else {
        s = LoadUpToFour(row, columns);
      }
      state[i][0] = s.x, state[i][1] = s.y, state[i][2] = s.z, state[i][3] = s.w;
    }
    if constexpr (kKeySum) {
      const float* z = a.key_sum_state + read * a.state_stride + int64_t{r.kv_head} * a.key_dim;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int k = key0 + i / 4 * 32 + i % 4;
        if (k < a.key_dim) key_sum[i] = z[k];
      }
    }
  }

  const int stages = CeilDiv(length, p.stage_tokens);
  const auto tokens_of = [&](int i) { return min(p.stage_tokens, length - i * p.stage_tokens); };
  const auto first_of = [&](int i) { return begin + int64_t{i} * p.stage_tokens; };
  const auto stage_of = [&](int i) { return shared + i % 2 * r.layout.total; };

  if (stages > 0) r.Load(stage_of(0), first_of(0), tokens_of(0), id, threads);
  __syncthreads();
  for (int stage = 0; stage < stages; ++stage) {
    if (loads) {
      // Stage i - 1 gives its inputs' place to stage i + 1, its partial sums are read now and
      // written again only after the next barrier.
      if (stage + 1 < stages) {
        r.Load(stage_of(stage + 1), first_of(stage + 1), tokens_of(stage + 1), load_id,
               load_threads);
      }
      if (stage > 0) {
        r.Flush(stage_of(stage - 1), first_of(stage - 1), tokens_of(stage - 1), load_id,
                load_threads);
      }
    }
    if (computes) {
      float* const s = stage_of(stage);
      const int tokens = tokens_of(stage);
      for (int t = 0; t < tokens; ++t) {
        const float4 v4 = LoadFour(s + r.layout.v + t * kTileV + tile_column);
        const float v[4] = {v4.x, v4.y, v4.z, v4.w};
        const float* keys = s + r.layout.k + t * p.padded_k + key0;
        float step_decay = 1;
        if constexpr (kDecay == Decay::kPerStep) step_decay = s[r.layout.decay + t];
#pragma unroll
        for (int run = 0; run < kRows / 4; ++run) {
          const float4 k4 = LoadFour(keys + 32 * run);
          const float k[4] = {k4.x, k4.y, k4.z, k4.w};
          float decay[4] = {step_decay, step_decay, step_decay, step_decay};
          if constexpr (kDecay == Decay::kPerKey) {
            const float4 d4 = LoadFour(s + r.layout.decay + t * p.padded_k + key0 + 32 * run);
            decay[0] = d4.x, decay[1] = d4.y, decay[2] = d4.z, decay[3] = d4.w;
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float(&row)[4] = state[4 * run + j];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              if constexpr (kDecay == Decay::kNone) {
                row[c] = fmaf(k[j], v[c], row[c]);
              } else {
                row[c] = fmaf(decay[j], row[c], k[j] * v[c]);
              }
            }
            if constexpr (kKeySum) key_sum[4 * run + j] += k[j];
          }
        }
        for (int head = 0; head < p.group; ++head) {
          const float* queries = s + (t * p.group + head) * p.padded_k + key0;
          float o[4] = {}, z = 0;
#pragma unroll
          for (int run = 0; run < kRows / 4; ++run) {
            const float4 q4 = LoadFour(queries + 32 * run);
            const float q[4] = {q4.x, q4.y, q4.z, q4.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
              for (int c = 0; c < 4; ++c) o[c] = fmaf(q[j], state[4 * run + j][c], o[c]);
              if constexpr (kKeySum) z = fmaf(q[j], key_sum[4 * run + j], z);
            }
          }
          float* partial = s + r.layout.partial +
                           ((t * p.group + head) * p.warps_k + warp_k) * r.layout.partial_width;
          const float sum = SumOverKeyLanes(o, lane);
          if ((lane & 4) == 0) {
            partial[tile_column + (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0)] = sum;
          }
          if constexpr (kKeySum) {
            for (int mask = 4; mask < 32; mask *= 2) z += __shfl_xor_sync(0xFFFFFFFFu, z, mask);
            if (warp_v == 0 && lane == 0) partial[kTileV] = z;
          }
        }
      }
    }
    __syncthreads();
  }

  if (computes && write >= 0) {
    float* to = a.state + write * a.state_stride + head_offset;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int k = key0 + i / 4 * 32 + i % 4;
      if (k >= a.key_dim || columns <= 0) continue;
      float* row = to + int64_t{k} * a.value_dim;
      if (p.vector_state) {
        __stcs(reinterpret_cast<float4*>(row),
               float4{state[i][0], state[i][1], state[i][2], state[i][3]});
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (c < columns) row[c] = state[i][c];
        }
      }
    }
  }
  if (stages > 0) {
    r.Flush(stage_of(stages - 1), first_of(stages - 1), tokens_of(stages - 1), id, threads);
  }
}

// z_t = z_{t-1} + k_t, stored. A launch of its own, after RecurrentKernel, whose blocks all read
// the z that this one overwrites. The same additions in the same order as there.
template <typename T>
__global__ void __launch_bounds__(256) KeySumKernel(const LinearAttentionArgs a) {
  const int seq = blockIdx.x;
  const int read = a.seqs.read_slots[seq], write = a.seqs.write_slots[seq];
  if (write < 0) return;
  for (int i = threadIdx.x; i < a.num_kv_heads * a.key_dim; i += 256) {
    float z = read < 0 ? 0.0f : a.key_sum_state[read * a.state_stride + i];
    const T* key = static_cast<const T*>(a.k) + i;  // heads stand side by side
#pragma unroll 8
    for (int64_t t = a.seqs.cu_seqlens[seq]; t < a.seqs.cu_seqlens[seq + 1]; ++t) {
      z += ToFloat(key[t * a.k_stride]);
    }
    a.key_sum_state[write * a.state_stride + i] = z;
  }
}

}  // namespace gla
