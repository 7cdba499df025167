// Passes 1 and 2 of the gradients (attention_backward_plan.h): the keys of every tile, and the two
// sweeps over a sequence with a state and with its gradient.

// The usual guard, once per instruction set.
#if defined(GLA_KERNELS_CPU_ATTENTION_BACKWARD_SWEEP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GLA_KERNELS_CPU_ATTENTION_BACKWARD_SWEEP_INL_H_
#undef GLA_KERNELS_CPU_ATTENTION_BACKWARD_SWEEP_INL_H_
#else
#define GLA_KERNELS_CPU_ATTENTION_BACKWARD_SWEEP_INL_H_
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/attention_backward_plan.h"
#include "kernels/cpu/attention_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

// The rows of one sequence, and of its tiles and blocks.
struct SequenceRows {
  SequenceRows(const LinearAttentionBackwardArgs& a, const BackwardPlan& plan, int seq)
      : tile(plan.tile),
        row(a.cu_seqlens[seq]),
        len(a.cu_seqlens[seq + 1] - row),
        num_tiles((len + tile - 1) / tile),
        num_blocks((len + BackwardPlan::kBlock - 1) / BackwardPlan::kBlock),
        first_tile(plan.first_tile(seq, row)),
        first_block(plan.first_block(seq, row)) {}
  int tile_row(int i) const { return row + i * tile; }
  int tile_len(int i) const { return std::min(tile, len - i * tile); }
  int tiles_per_block() const { return BackwardPlan::kBlock / tile; }
  int block_begin(int block) const { return block * tiles_per_block(); }
  int block_end(int block) const { return std::min(num_tiles, (block + 1) * tiles_per_block()); }

  int tile, row, len, num_tiles, num_blocks;
  int64_t first_tile, first_block;
};

inline TileInputs InputsOf(const LinearAttentionBackwardArgs& a) {
  return {a.d_o == nullptr ? nullptr : a.q,
          a.k,
          int64_t{a.num_heads} * a.key_dim,
          int64_t{a.num_kv_heads} * a.key_dim,
          a.key_dim,
          a.scale,
          GateView(a)};
}

// Pass 1 of one block of one state.
template <int kTile, typename T>
void PrepareBlock(const LinearAttentionBackwardArgs& a, const BackwardPlan& plan,
                  const SequenceRows& rows, int block, int state_head) {
  thread_local std::vector<float> memory;
  memory.resize(TileScratch::Size(plan.padded_k));
  const TileScratch scratch(memory.data(), plan.padded_k);
  const TileInputs inputs = InputsOf(a);
  const HeadMap heads(a, state_head);
  for (int i = rows.block_begin(block); i < rows.block_end(block); ++i) {
    const int64_t at = rows.first_tile + i;
    PrepareTile<kTile, T>(inputs, heads, rows.tile_row(i), rows.tile_len(i), scratch,
                          {plan.q_at(at, state_head), plan.keys_at(at, state_head),
                           plan.decay_at(at, state_head), plan.scores_at(at, state_head)});
  }
}

// Pass 2 of the columns of one share of a state.
template <int kTile, typename T>
class Sweep {
 public:
  Sweep(const LinearAttentionBackwardArgs& a, const BackwardPlan& plan, int seq, int state_head,
        int split)
      : a_(a),
        plan_(plan),
        heads_(a, state_head),
        rows_(a, plan, seq),
        head_(state_head),
        split_(split),
        first_group_(plan.groups * split / plan.splits),
        last_group_(plan.groups * (split + 1) / plan.splits),
        state_offset_((int64_t{seq} * a.state_heads + state_head) * a.key_dim * a.value_dim),
        strip_size_(plan.padded_k * kStrip) {
    thread_local std::vector<float> memory;
    const int strips = StripsEnd(last_group_ - 1) - StripsBegin(first_group_);
    const size_t row_size = size_t{kTile} * kStrip;
    const size_t sums = size_t{BackwardPlan::kBlock} * plan.reps * plan.padded_k;
    memory.resize(strips * strip_size_ + (2 * plan.reps + 3) * row_size + sums + plan.padded_k);
    state_ = memory.data();
    rows_of_do_ = state_ + strips * strip_size_;
    columns_ = rows_of_do_ + plan.reps * row_size;
    rows_of_v_ = columns_ + row_size;
    out_ = rows_of_v_ + row_size;
    gate_sums_ = out_ + row_size;
    sums_ = gate_sums_ + plan.padded_k;
  }

  // S; dq from it, and the states that d_gate needs.
  void Forward() {
    if (a_.d_o == nullptr && a_.d_gate == nullptr) return;
    ForStrips([&](int strip, float* s) {
      LoadStateStrip(a_.initial_state == nullptr ? nullptr : a_.initial_state + state_offset_,
                     a_.key_dim, a_.value_dim, strip * kStrip, s);
    });
    for (int block = 0; block < rows_.num_blocks; ++block) {
      for (int group = first_group_; group < last_group_; ++group) {
        for (int strip = StripsBegin(group); strip < StripsEnd(group); ++strip) {
          ForwardStrip(block, group, strip);
        }
        if (group == first_group_ || a_.d_o == nullptr) continue;
        for (int i = rows_.block_begin(block); i < rows_.block_end(block); ++i) {
          Add(DqSums(block, group, i), plan_.reps * plan_.keys_size(),
              plan_.dq_at(split_, rows_.first_tile + i, head_));
        }
      }
    }
  }

  // dS; dk and dv from it, and d_initial_state.
  void Backward() {
    ForStrips([&](int strip, float* s) {
      LoadStateStrip(a_.d_final_state == nullptr ? nullptr : a_.d_final_state + state_offset_,
                     a_.key_dim, a_.value_dim, strip * kStrip, s);
    });
    for (int block = rows_.num_blocks - 1; block >= 0; --block) {
      for (int group = first_group_; group < last_group_; ++group) {
        if (a_.d_gate != nullptr) std::fill_n(gate_sums_, plan_.padded_k, 0.0f);
        for (int strip = StripsBegin(group); strip < StripsEnd(group); ++strip) {
          if (a_.d_gate != nullptr) AddGateSums(block, strip);
          BackwardStrip(block, group, strip);
        }
        if (a_.d_gate != nullptr) {
          float* end = plan_.gate_end_at(split_, rows_.first_block + block, head_);
          if (group == first_group_) std::fill_n(end, plan_.padded_k, 0.0f);
          Add(gate_sums_, plan_.padded_k, end);
        }
        if (group == first_group_) continue;
        for (int i = rows_.block_begin(block); i < rows_.block_end(block); ++i) {
          Add(DkSums(block, group, i), plan_.keys_size(),
              plan_.dk_at(split_, rows_.first_tile + i, head_));
        }
      }
    }
    if (a_.d_initial_state == nullptr) return;
    ForStrips([&](int strip, const float* s) {
      StoreStateStrip(s, a_.key_dim, a_.value_dim, strip * kStrip,
                      a_.d_initial_state + state_offset_);
    });
  }

 private:
  int StripsBegin(int group) const { return group * BackwardPlan::kStripsPerGroup; }
  int StripsEnd(int group) const {
    return std::min(plan_.strips, (group + 1) * BackwardPlan::kStripsPerGroup);
  }
  float* StripAt(int strip) const {
    return state_ + int64_t{strip - StripsBegin(first_group_)} * strip_size_;
  }
  template <typename F>
  void ForStrips(const F& f) {
    for (int strip = StripsBegin(first_group_); strip < StripsEnd(last_group_ - 1); ++strip) {
      f(strip, StripAt(strip));
    }
  }
  // Where a group's sums of a tile are made: the first one's in place.
  float* DqSums(int block, int group, int i) const {
    if (group == first_group_) return plan_.dq_at(split_, rows_.first_tile + i, head_);
    return sums_ + (i - rows_.block_begin(block)) * plan_.reps * plan_.keys_size();
  }
  float* DkSums(int block, int group, int i) const {
    if (group == first_group_) return plan_.dk_at(split_, rows_.first_tile + i, head_);
    return sums_ + (i - rows_.block_begin(block)) * plan_.keys_size();
  }
  static void Add(const float* from, size_t n, float* to) { AddScaled(1.0f, from, to, n); }

  int Cols(int strip) const { return std::min(kStrip, a_.value_dim - strip * kStrip); }
  // Where the 32 columns of `array` [T, heads, V] that belong to a tile start.
  const T* Rows(const void* array, int heads, int head, int i, int strip) const {
    return static_cast<const T*>(array) +
           (int64_t{rows_.tile_row(i)} * heads + head) * a_.value_dim + strip * kStrip;
  }
  void LoadV(int i, int strip) {
    LoadTile<kTile>(Rows(a_.v, a_.num_kv_heads, heads_.group, i, strip),
                    int64_t{a_.num_kv_heads} * a_.value_dim, rows_.tile_len(i), Cols(strip), kStrip,
                    1.0f, rows_of_v_);
  }
  float* DoRows(int rep) const { return rows_of_do_ + rep * kTile * kStrip; }
  void LoadDo(int i, int strip) {
    for (int rep = 0; rep < plan_.reps; ++rep) {
      LoadTile<kTile>(Rows(a_.d_o, a_.num_heads, heads_.first + rep, i, strip),
                      int64_t{a_.num_heads} * a_.value_dim, rows_.tile_len(i), Cols(strip), kStrip,
                      1.0f, DoRows(rep));
    }
  }
  // z (+)= state times the tile's rows, transposed.
  void Contract(const float* s, const float* rows, bool add, float* z) {
    if constexpr (kTile > 1) {
      Transpose(rows, kStrip, kTile, kStrip, columns_, kTile);
      rows = columns_;
    }
    ContractStrip<kTile>(plan_.padded_k, s, rows, add, z);
  }

  void ForwardStrip(int block, int group, int strip) {
    float* s = StripAt(strip);
    const auto save = [&] {
      std::memcpy(plan_.state_at(rows_.first_block + block, head_, strip), s,
                  sizeof(float) * strip_size_);
    };
    for (int i = rows_.block_begin(block); i < rows_.block_end(block); ++i) {
      const int64_t at = rows_.first_tile + i;
      if (a_.d_gate != nullptr && i == rows_.num_tiles - 1) save();
      if (a_.d_o != nullptr) {
        LoadDo(i, strip);
        for (int rep = 0; rep < plan_.reps; ++rep) {
          Contract(s, DoRows(rep), strip > StripsBegin(group),
                   DqSums(block, group, i) + rep * plan_.keys_size());
        }
      }
      if (i == rows_.num_tiles - 1) break;  // nobody reads the state after it
      LoadV(i, strip);
      UpdateStrip(rows_.tile_len(i), plan_.padded_k, plan_.decay_at(at, head_),
                  plan_.keys_at(at, head_), rows_of_v_, s);
    }
    if (a_.d_gate != nullptr && block < rows_.num_blocks - 1) save();
  }

  void AddGateSums(int block, int strip) {
    const float* saved = plan_.state_at(rows_.first_block + block, head_, strip);
    const float* s = StripAt(strip);
    for (int k = 0; k < a_.key_dim; ++k) {
      gate_sums_[k] += Dot(saved + k * kStrip, s + k * kStrip, kStrip);
    }
  }

  void BackwardStrip(int block, int group, int strip) {
    float* s = StripAt(strip);
    for (int i = rows_.block_end(block) - 1; i >= rows_.block_begin(block); --i) {
      const int64_t at = rows_.first_tile + i;
      const int len = rows_.tile_len(i);
      LoadV(i, strip);
      Contract(s, rows_of_v_, strip > StripsBegin(group), DkSums(block, group, i));
      if (a_.d_o != nullptr) LoadDo(i, strip);
      // Scores are [t, s]; dv_s sums over t.
      ReadStrip<kTile>(len, plan_.padded_k, plan_.keys_at(at, head_), s,
                       a_.d_o == nullptr ? 0 : plan_.reps, plan_.scores_at(at, head_), 1, kTile,
                       rows_of_do_, out_);
      StoreDv(i, strip);
      if (i == 0 && a_.d_initial_state == nullptr) break;  // nobody reads dS before it
      const float* decay = plan_.decay_at(at, head_);
      if (a_.d_o == nullptr) {
        if (decay != nullptr) {
          UpdateStrip(0, plan_.padded_k, decay, plan_.keys_at(at, head_), rows_of_v_, s);
        }
        continue;
      }
      for (int rep = 0; rep < plan_.reps; ++rep) {
        UpdateStrip(len, plan_.padded_k, rep == 0 ? decay : nullptr,
                    plan_.q_at(at, head_) + rep * plan_.keys_size(), DoRows(rep), s);
      }
    }
  }

  void StoreDv(int i, int strip) {
    const int heads = plan_.dv != nullptr ? plan_.state_heads : a_.num_kv_heads;
    const int head = plan_.dv != nullptr ? head_ : heads_.group;
    for (int t = 0; t < rows_.tile_len(i); ++t) {
      const int64_t to =
          (int64_t{rows_.tile_row(i) + t} * heads + head) * a_.value_dim + strip * kStrip;
      const float* row = out_ + t * kStrip;
      if (plan_.dv != nullptr) {
        std::memcpy(plan_.dv + to, row, sizeof(float) * Cols(strip));
      } else {
        Convert(row, static_cast<T*>(a_.dv) + to, Cols(strip));
      }
    }
  }

  const LinearAttentionBackwardArgs& a_;
  const BackwardPlan& plan_;
  const HeadMap heads_;
  const SequenceRows rows_;
  const int head_, split_, first_group_, last_group_;
  const int64_t state_offset_;  // in initial_state and its like
  const int strip_size_;
  float* state_;       // [strips, padded_k, 32]: S, then dS
  float* rows_of_do_;  // [reps, kTile, 32]
  float* rows_of_v_;   // [kTile, 32]
  float* columns_;     // [32, kTile]
  float* out_;         // [kTile, 32]
  float* gate_sums_;   // [padded_k]
  float* sums_;        // [tiles in a block] of a group's dq or dk
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#endif  // GLA_KERNELS_CPU_ATTENTION_BACKWARD_SWEEP_INL_H_
