// Pass 3 of the gradients (attention_backward_plan.h): what pairs of tokens of one tile add to dq
// and dk, and the gate's gradient.
//
// Of token t, with S and dS the state before and its gradient after t's tile, dA_ts = do_t . v_s
// and everything times `scale` that q multiplies:
//   dq_t = D(0, t) S do_t + sum_{s < t} dA_ts k_s D(s, t) + dA_tt k_t
//   dk_s = D(s, end) dS v_s + sum_{t > s} dA_ts q_t D(s, t) + dA_ss q_s
// The gate's gradient is decay_t S_{t-1} * dS_t, summed over V: every pair of a write (a key, or
// the state before) and a read (a query, or the gradient after) that has t's decay between them.
// Without the terms dA_tt, which no decay touches, let f_s = k_s (D(s, end) dS v_s) be the reads
// after the tile, and r_t = q_t (the rest of dq_t) - k_t (the rest of dk_t). Then
//   d_gate_t = sum_{u >= t} r_u + sum_{s < t} f_s + c,    c = D(0, end) S * dS
// because a pair inside the tile that starts at or after t is in r once with each sign. c follows
// from w, the sum over V of S times dS at the tile's end, as w - sum_s f_s, and the first token's
// d_gate is the w of the tile before. w starts anew in every block from the two states, so sums
// stay short; at the end of the sequence, where dS is undamped, it is c that is made from the two
// states. What cancels has always been damped by the gate in question, so strong gates keep their
// digits.

// The usual guard, once per instruction set.
#if defined(GLA_KERNELS_CPU_ATTENTION_BACKWARD_GRADIENTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GLA_KERNELS_CPU_ATTENTION_BACKWARD_GRADIENTS_INL_H_
#undef GLA_KERNELS_CPU_ATTENTION_BACKWARD_GRADIENTS_INL_H_
#else
#define GLA_KERNELS_CPU_ATTENTION_BACKWARD_GRADIENTS_INL_H_
#endif

#include <algorithm>
#include <vector>

#include "kernels/cpu/attention_backward_plan.h"
#include "kernels/cpu/attention_backward_sweep-inl.h"
#include "kernels/cpu/attention_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

// y += a x, element by element, and y -= a x.
HWY_INLINE void AddProduct(const float* a, const float* x, float* y, size_t n) {
  ForVectors(n, [=](auto d, size_t i) HWY_ATTR {
    hn::StoreU(hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, y + i);
  });
}
HWY_INLINE void SubtractProduct(const float* a, const float* x, float* y, size_t n) {
  ForVectors(n, [=](auto d, size_t i) HWY_ATTR {
    hn::StoreU(hn::NegMulAdd(hn::LoadU(d, a + i), hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d,
               y + i);
  });
}

// dq[t] += sum_{s < t} dA_ts k_s D(s, t), dk[s] += sum_{t > s} dA_ts q_t D(s, t). `da` is [s, t];
// all keys decay as `pairs` says.
HWY_INLINE void SharedDecayPairs(const float* q, const float* k, const float* da,
                                 const float* pairs, int padded_k, float* dq, float* dk) {
  const TileTag d;
  float damped[kPairs];  // [s, t], s < t
  for (int s = 0; s < kMaxTile; ++s) {
    for (int t = 0; t < kMaxTile; ++t) {
      damped[s * kMaxTile + t] = s < t ? da[s * kMaxTile + t] * pairs[t * kMaxTile + s] : 0.0f;
    }
  }
  const auto multiply = [&](size_t row, size_t step, const float* x, float* y) HWY_ATTR {
    constexpr int kRows = kManyRegisters ? 16 : 8;
    for (int r0 = 0; r0 < kMaxTile; r0 += kRows) {
      for (int i = 0; i < padded_k; i += kLanes) {
        TileVec acc[kRows][1];
        float* out = y + r0 * padded_k + i;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) acc[r][0] = hn::LoadU(d, out + r * padded_k);
        MulAddTile(kMaxTile, damped + r0 * row, row, step, x + i, padded_k, acc);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) hn::StoreU(acc[r][0], d, out + r * padded_k);
      }
    }
  };
  multiply(1, kMaxTile, k, dq);
  multiply(kMaxTile, 1, q, dk);
}

// The same where every key has its own decay: the products are walked token by token.
HWY_INLINE void PerKeyPairs(const float* q, const float* k, const float* da, const float* decay,
                            int len, int padded_k, float* dq, float* dk) {
  const TileTag d;
  TileVec x[kMaxTile];
  for (int i = 0; i < padded_k; i += kLanes) {
    for (int t = 0; t < len; ++t) {  // x[s] = k_s D(s, t)
      const int at = t * padded_k + i;
      const TileVec step = hn::LoadU(d, decay + at);
      TileVec sum = hn::LoadU(d, dq + at);
      for (int s = 0; s < t; ++s) {
        x[s] = hn::Mul(x[s], step);
        sum = hn::MulAdd(hn::Set(d, da[s * kMaxTile + t]), x[s], sum);
      }
      hn::StoreU(sum, d, dq + at);
      x[t] = hn::LoadU(d, k + at);
    }
    for (int s = len - 1; s >= 0; --s) {  // x[t] = q_t D(s, t)
      const int at = s * padded_k + i;
      TileVec sum = hn::LoadU(d, dk + at);
      for (int t = s + 1; t < len; ++t) {
        sum = hn::MulAdd(hn::Set(d, da[s * kMaxTile + t]), x[t], sum);
      }
      hn::StoreU(sum, d, dk + at);
      const TileVec step = hn::LoadU(d, decay + at);
      for (int t = s + 1; t < len; ++t) x[t] = hn::Mul(x[t], step);
      x[s] = hn::Mul(hn::LoadU(d, q + at), step);
    }
  }
}

// Pass 3 of one block of one key/value head.
template <int kTile, typename T>
class BlockGradients {
 public:
  BlockGradients(const LinearAttentionBackwardArgs& a, const BackwardPlan& plan,
                 const SequenceRows& rows, int block, int group)
      : a_(a),
        plan_(plan),
        rows_(rows),
        block_(block),
        group_(group),
        keys_(kTile * plan.padded_k),
        gate_(a) {
    thread_local std::vector<float> memory;
    const size_t keys = keys_, k = plan.padded_k;
    memory.resize(9 * keys + 2 * k + 2 * kPairs + size_t{kTile} * plan.strips * kStrip +
                  2 * kTile * kStrip);
    float* next = memory.data();
    const auto take = [&next](size_t n) { return (next += n) - n; };
    q_ = take(keys), k_raw_ = take(keys), decay_ = take(keys), dq_ = take(keys), dk_ = take(keys);
    dk_inside_ = take(keys), dk_after_ = take(keys), r_ = take(keys), sums_ = take(keys);
    w_ = take(k), c_ = take(k), pairs_ = take(kPairs), da_ = take(kPairs);
    v_ = take(size_t{kTile} * plan.strips * kStrip);
    do_ = take(kTile * kStrip), columns_ = take(kTile * kStrip);
  }

  void Run() {
    for (int i = rows_.block_end(block_) - 1; i >= rows_.block_begin(block_); --i) {
      std::fill_n(dk_, keys_, 0.0f);
      const int shared = a_.state_heads / a_.num_kv_heads;
      for (int state = group_ * shared; state < (group_ + 1) * shared; ++state) {
        RunState(i, HeadMap(a_, state));
      }
      StoreRows(i, dk_, static_cast<T*>(a_.dk), a_.num_kv_heads, group_, 1.0f);
      if (plan_.dv != nullptr) AddUpDv(i);
    }
  }

 private:
  template <typename Out>
  void StoreRows(int i, const float* from, Out* to, int heads, int head, float scale) {
    for (int t = 0; t < rows_.tile_len(i); ++t) {
      const int64_t row = rows_.tile_row(i) + t;
      Out* out = to + (row * heads + head) * a_.key_dim;
      const float* in = from + t * plan_.padded_k;
      ForVectors(a_.key_dim, [=](auto d, size_t j) HWY_ATTR {
        StoreFloats(d, hn::Mul(hn::LoadU(d, in + j), hn::Set(d, scale)), out + j);
      });
    }
  }

  // One tile of one state.
  void RunState(int i, const HeadMap& heads) {
    const int len = rows_.tile_len(i), padded_k = plan_.padded_k;
    const int64_t stride = int64_t{a_.num_kv_heads} * a_.key_dim;
    LoadTile<kTile>(static_cast<const T*>(a_.k) + rows_.tile_row(i) * stride + group_ * a_.key_dim,
                    stride, len, a_.key_dim, padded_k, 1.0f, k_raw_);
    const bool gated = gate_.kind != GateKind::kNone;
    if (gated) LoadDecays<kTile>(gate_, rows_.tile_row(i), len, heads, a_.key_dim, decay_);
    std::fill_n(dk_inside_, keys_, 0.0f);
    std::fill_n(r_, keys_, 0.0f);
    if (a_.d_o != nullptr) {
      if (kTile > 1 && gate_.kind != GateKind::kPerKey) {
        PairDecays(gated ? decay_ : nullptr, len, padded_k, pairs_);
      }
      LoadV(i);
      for (int rep = 0; rep < heads.reps; ++rep) RunHead(i, heads, rep);
    } else {
      std::fill_n(q_, keys_, 0.0f);  // no gradient reaches q
      for (int rep = 0; rep < heads.reps; ++rep) {
        StoreRows(i, q_, static_cast<T*>(a_.dq), a_.num_heads, heads.first + rep, 1.0f);
      }
    }
    LoadSums(i, heads.state_head, plan_.dk, 1, 0, dk_after_);
    if (kTile > 1 && gated) DampToEnd(decay_, len, padded_k, dk_after_);
    AddScaled(1.0f, dk_inside_, dk_, keys_);
    AddScaled(1.0f, dk_after_, dk_, keys_);
    if (a_.d_gate != nullptr) GateGradient(i, heads);
  }

  // One tile of one query head: dq, and its share of dk and r.
  void RunHead(int i, const HeadMap& heads, int rep) {
    const int len = rows_.tile_len(i), padded_k = plan_.padded_k, head = heads.first + rep;
    const int64_t stride = int64_t{a_.num_heads} * a_.key_dim;
    LoadTile<kTile>(static_cast<const T*>(a_.q) + rows_.tile_row(i) * stride + head * a_.key_dim,
                    stride, len, a_.key_dim, padded_k, a_.scale, q_);
    PairScores(i, head);
    LoadSums(i, heads.state_head, plan_.dq, heads.reps, rep, dq_);
    if (gate_.kind != GateKind::kNone) DampFromStart(decay_, len, padded_k, dq_);
    if constexpr (kTile > 1) {
      if (gate_.kind == GateKind::kPerKey) {
        PerKeyPairs(q_, k_raw_, da_, decay_, len, padded_k, dq_, dk_inside_);
      } else {
        SharedDecayPairs(q_, k_raw_, da_, pairs_, padded_k, dq_, dk_inside_);
      }
    }
    if (a_.d_gate != nullptr) AddProduct(q_, dq_, r_, keys_);
    for (int t = 0; t < len; ++t) {
      const float own = da_[t * kTile + t];
      AddScaled(own, k_raw_ + t * padded_k, dq_ + t * padded_k, padded_k);
      AddScaled(own, q_ + t * padded_k, dk_ + t * padded_k, padded_k);
    }
    StoreRows(i, dq_, static_cast<T*>(a_.dq), a_.num_heads, head, a_.scale);
  }

  void LoadV(int i) {
    if (kTile == 1) return;
    const int64_t stride = int64_t{a_.num_kv_heads} * a_.value_dim;
    for (int strip = 0; strip < plan_.strips; ++strip) {
      LoadTile<kTile>(static_cast<const T*>(a_.v) + rows_.tile_row(i) * stride +
                          group_ * a_.value_dim + strip * kStrip,
                      stride, rows_.tile_len(i), std::min(kStrip, a_.value_dim - strip * kStrip),
                      kStrip, 1.0f, v_ + strip * kTile * kStrip);
    }
  }

  // da[s, t] = v_s . do_t
  void PairScores(int i, int head) {
    const int64_t stride = int64_t{a_.num_heads} * a_.value_dim;
    const T* from =
        static_cast<const T*>(a_.d_o) + rows_.tile_row(i) * stride + head * a_.value_dim;
    if constexpr (kTile == 1) {
      const int64_t row = int64_t{rows_.tile_row(i)} * a_.num_kv_heads + group_;
      da_[0] = Dot(from, static_cast<const T*>(a_.v) + row * a_.value_dim, a_.value_dim);
    } else {
      for (int strip = 0; strip < plan_.strips; ++strip) {
        LoadTile<kTile>(from + strip * kStrip, stride, rows_.tile_len(i),
                        std::min(kStrip, a_.value_dim - strip * kStrip), kStrip, 1.0f, do_);
        Transpose(do_, kStrip, kTile, kStrip, columns_, kTile);
        ContractStrip<kTile>(kTile, v_ + strip * kTile * kStrip, columns_, strip > 0, da_);
      }
    }
  }

  // Part `part` of a tile's [parts, padded_k, kTile] sums of pass 2, as [kTile, padded_k].
  void LoadSums(int i, int state_head, float* array, int parts, int part, float* to) {
    const int64_t size = parts * int64_t{keys_};
    const float* first = plan_.At(array, rows_.first_tile + i, state_head, size) + part * keys_;
    const int64_t split_size = plan_.num_tiles * plan_.state_heads * size;
    float* sums = kTile == 1 ? to : sums_;
    std::copy_n(first, keys_, sums);
    for (int split = 1; split < plan_.splits; ++split) {
      AddScaled(1.0f, first + split * split_size, sums, keys_);
    }
    if (kTile > 1) Transpose(sums, kTile, plan_.padded_k, kTile, to, plan_.padded_k);
  }

  void GateGradient(int i, const HeadMap& heads) {
    const int len = rows_.tile_len(i), padded_k = plan_.padded_k;
    SubtractProduct(k_raw_, dk_inside_, r_, keys_);
    float* f = dk_after_;
    ForVectors(keys_, [f, k = k_raw_](auto d, size_t j) HWY_ATTR {
      hn::StoreU(hn::Mul(hn::LoadU(d, f + j), hn::LoadU(d, k + j)), d, f + j);
    });
    if (i == rows_.block_end(block_) - 1) {
      const float* end = plan_.gate_end_at(0, rows_.first_block + block_, heads.state_head);
      std::copy_n(end, padded_k, w_);
      for (int split = 1; split < plan_.splits; ++split) {
        AddScaled(1.0f, plan_.gate_end_at(split, rows_.first_block + block_, heads.state_head), w_,
                  padded_k);
      }
    }
    if (i == rows_.num_tiles - 1) {
      DecayOfTile(decay_, len, padded_k, c_);
      ForVectors(padded_k, [c = c_, w = w_](auto d, size_t j) HWY_ATTR {
        hn::StoreU(hn::Mul(hn::LoadU(d, c + j), hn::LoadU(d, w + j)), d, c + j);
      });
    } else {
      std::copy_n(w_, padded_k, c_);
      for (int s = 0; s < len; ++s) AddScaled(-1.0f, f + s * padded_k, c_, padded_k);
    }
    // r[t] becomes d_gate: first sum_{u >= t} r_u, then the rest.
    for (int t = len - 2; t >= 0; --t) {
      AddScaled(1.0f, r_ + (t + 1) * padded_k, r_ + t * padded_k, padded_k);
    }
    for (int t = 0; t < len; ++t) {
      AddScaled(1.0f, c_, r_ + t * padded_k, padded_k);
      AddScaled(1.0f, f + t * padded_k, c_, padded_k);
    }
    std::copy_n(r_, padded_k, w_);
    StoreGate(i);
  }

  void StoreGate(int i) {
    WithStoredType(gate_.dtype, [&]<typename Gate>() {
      Gate* to = static_cast<Gate*>(a_.d_gate);
      if (gate_.kind == GateKind::kPerKey) {
        StoreRows(i, r_, to, a_.num_kv_heads, group_, 1.0f);
        return;
      }
      for (int t = 0; t < rows_.tile_len(i); ++t) {
        const float* row = r_ + t * plan_.padded_k;
        const float sum = SumVectors(
            a_.key_dim, [=](auto d, size_t j) HWY_ATTR { return hn::LoadU(d, row + j); });
        to[(int64_t{rows_.tile_row(i)} + t) * a_.num_kv_heads + group_] = FromFloat<Gate>(sum);
      }
    });
  }

  // Several states share a value head: dv is the sum of their shares.
  void AddUpDv(int i) {
    const int shared = a_.state_heads / a_.num_kv_heads;
    for (int t = 0; t < rows_.tile_len(i); ++t) {
      const int64_t row = rows_.tile_row(i) + t;
      float* first = plan_.dv + (row * a_.state_heads + group_ * shared) * a_.value_dim;
      for (int j = 1; j < shared; ++j) {
        AddScaled(1.0f, first + j * a_.value_dim, first, a_.value_dim);
      }
      Convert(first, static_cast<T*>(a_.dv) + (row * a_.num_kv_heads + group_) * a_.value_dim,
              a_.value_dim);
    }
  }

  const LinearAttentionBackwardArgs& a_;
  const BackwardPlan& plan_;
  const SequenceRows& rows_;
  const int block_, group_;
  const int keys_;  // kTile padded_k
  const GateView gate_;
  float *q_, *k_raw_, *decay_;    // [kTile, padded_k], q times scale
  float *dq_, *dk_;               // dq without `scale`
  float *dk_inside_, *dk_after_;  // dk from other tokens of the tile, from dS after it
  float *r_, *sums_;
  float *w_, *c_;  // [padded_k]
  float *pairs_, *da_;
  float *v_, *do_, *columns_;  // [strips, kTile, 32], [kTile, 32], [32, kTile]
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#endif  // GLA_KERNELS_CPU_ATTENTION_BACKWARD_GRADIENTS_INL_H_
