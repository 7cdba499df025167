// How the gradients of linear attention are computed in three passes, and what lies between them in
// the workspace.
//
// Each sequence is cut into blocks of 64 tokens, a block into tiles of 16 (chunkwise) or of one
// token (recurrent), the columns of a state into strips of 32 and groups of four strips.
//
//   1. keys       every block: queries and keys damped to their tile's ends, scores
//   2. sweeps     every state, or each of its groups of columns: forward with S, which gives each
//                 tile's dq as far as it comes from S before the tile; backward with dS, which
//                 gives dv, and dk as far as it comes from dS after the tile
//   3. gradients  every block: what pairs of tokens of one tile add to dq and dk, and d_gate
//
// A group of columns adds its strips up in order and the groups are added in order, whether one
// thread has all of them or each has one, so bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/attention_common.h"
#include "kernels/kernels.h"

namespace gla {

struct BackwardPlan {
  static constexpr int kBlock = 64, kStripColumns = 32, kStripsPerGroup = 4;

  // `workspace` may be null when only bytes() is asked for.
  BackwardPlan(const LinearAttentionBackwardArgs& a, AttentionForm form, int num_threads)
      : tile(form == AttentionForm::kRecurrent ? 1 : 16),
        padded_k((a.key_dim + 15) / 16 * 16),
        strips((a.value_dim + kStripColumns - 1) / kStripColumns),
        groups((strips + kStripsPerGroup - 1) / kStripsPerGroup),
        reps(a.num_heads / std::max(1, a.state_heads)),
        state_heads(a.state_heads),
        num_tiles(a.num_rows / tile + a.num_seqs),
        num_blocks(a.num_rows / kBlock + a.num_seqs) {
    const bool one_each = int64_t{a.num_seqs} * a.state_heads < 2 * int64_t{num_threads};
    splits = one_each ? groups : 1;
    const size_t k = padded_k;
    float* next = static_cast<float*>(a.workspace);
    const auto take = [&](bool wanted, size_t n) {
      if (!wanted) return static_cast<float*>(nullptr);
      n = (n + 15) / 16 * 16;  // 64 bytes
      size += n;
      if (a.workspace == nullptr) return static_cast<float*>(nullptr);
      return (next += n) - n;
    };
    const size_t all_tiles = num_tiles * state_heads;
    const bool has_d_o = a.d_o != nullptr, has_d_gate = a.d_gate != nullptr;
    q = take(has_d_o, all_tiles * reps * tile * k);
    scores = take(has_d_o, all_tiles * reps * tile * tile);
    keys = take(true, all_tiles * tile * k);
    decay = take(a.gate_kind != GateKind::kNone, all_tiles * k);
    dq = take(has_d_o, splits * all_tiles * reps * k * tile);
    dk = take(true, splits * all_tiles * k * tile);
    dv = take(a.state_heads > a.num_kv_heads, size_t(a.num_rows) * state_heads * a.value_dim);
    states = take(has_d_gate, num_blocks * state_heads * strips * k * kStripColumns);
    gate_ends = take(has_d_gate, splits * num_blocks * state_heads * k);
  }
  size_t bytes() const { return size * sizeof(float); }

  // The first tile and the first block of a sequence whose first row is `row`.
  int64_t first_tile(int seq, int row) const { return row / tile + seq; }
  int64_t first_block(int seq, int row) const { return row / kBlock + seq; }

  int64_t keys_size() const { return int64_t{tile} * padded_k; }
  // What belongs to one tile or block and one state; null where there is none of it.
  float* q_at(int64_t i, int head) const { return At(q, i, head, reps * keys_size()); }
  float* scores_at(int64_t i, int head) const { return At(scores, i, head, reps * tile * tile); }
  float* keys_at(int64_t i, int head) const { return At(keys, i, head, keys_size()); }
  float* decay_at(int64_t i, int head) const { return At(decay, i, head, padded_k); }
  float* dq_at(int split, int64_t i, int head) const {
    return At(dq, split * num_tiles + i, head, reps * keys_size());
  }
  float* dk_at(int split, int64_t i, int head) const {
    return At(dk, split * num_tiles + i, head, keys_size());
  }
  float* state_at(int64_t block, int head, int strip) const {
    const int64_t size = int64_t{padded_k} * kStripColumns;
    return At(states, block, head, strips * size) + strip * size;
  }
  float* gate_end_at(int split, int64_t block, int head) const {
    return At(gate_ends, split * num_blocks + block, head, padded_k);
  }
  float* At(float* array, int64_t i, int head, int64_t n) const {
    return array == nullptr ? nullptr : array + (i * state_heads + head) * n;
  }

  int tile, padded_k, strips, groups, splits, reps, state_heads;
  int64_t num_tiles, num_blocks;  // at most; sequences leave some unused
  size_t size = 0;                // floats

  // Of every tile and state:
  float* q;       // [reps, tile, padded_k]: scale q_t D(0, t)
  float* scores;  // [reps, tile, tile]
  float* keys;    // [tile, padded_k]: k_s D(s, end)
  float* decay;   // [padded_k]: D(0, end)
  float* dq;      // [splits] of [reps, padded_k, tile]: S do_t, S before the tile
  float* dk;      // [splits] of [padded_k, tile]: dS v_s, dS after the tile
  float* dv;      // [T, state_heads, V]: each state's share, where several share a value head
  // Of every block and state, for d_gate:
  float* states;     // [strips, padded_k, 32]: S after the block; of a sequence's last block,
                     // S before its last tile
  float* gate_ends;  // [splits] of [padded_k]: the sum over V of that S times dS after the block
};

}  // namespace gla
