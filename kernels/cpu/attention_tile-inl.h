// The keys, queries and decays of one tile of tokens, as the products of attention_strip-inl.h want
// them.

// The usual guard, once per instruction set.
#if defined(GLA_KERNELS_CPU_ATTENTION_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GLA_KERNELS_CPU_ATTENTION_TILE_INL_H_
#undef GLA_KERNELS_CPU_ATTENTION_TILE_INL_H_
#else
#define GLA_KERNELS_CPU_ATTENTION_TILE_INL_H_
#endif

#include <algorithm>

#include "kernels/cpu/attention_common.h"
#include "kernels/cpu/attention_strip-inl.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

// ---- Loading ------------------------------------------------------------------------------------

template <typename T>
HWY_INLINE void LoadScaled(const T* from, float scale, float* to, size_t n) {
  ForVectors(n, [=](auto d, size_t i) HWY_ATTR {
    hn::StoreU(hn::Mul(LoadFloats(d, from + i), hn::Set(d, scale)), d, to + i);
  });
}

// [kTile, padded] float32 from `len` rows of `n`; zeros where there is nothing.
template <int kTile, typename T>
HWY_INLINE void LoadTile(const T* from, int64_t stride, int len, int n, int padded, float scale,
                         float* to) {
  for (int t = 0; t < len; ++t, to += padded) {
    if (scale == 1.0f) {
      Convert(from + t * stride, to, n);
    } else {
      LoadScaled(from + t * stride, scale, to, n);
    }
    std::fill_n(to + n, padded - n, 0.0f);
  }
  std::fill_n(to, (kTile - len) * padded, 0.0f);
}

// The log decays of one row; constant and scalar gates are the same for each of the K keys.
// REQUIRES: the gate kind is not kNone.
HWY_INLINE void LoadGates(const GateView& gate, int64_t row, const HeadMap& heads, int key_dim,
                          float* gates) {
  WithStoredType(gate.dtype, [&]<typename T>() {
    const T* from = static_cast<const T*>(gate.data);
    if (gate.kind == GateKind::kPerKey) {
      Convert(from + row * gate.stride + static_cast<int64_t>(heads.group) * key_dim, gates,
              key_dim);
    } else {
      const int64_t at =
          gate.kind == GateKind::kConstant ? heads.state_head : row * gate.stride + heads.group;
      std::fill_n(gates, key_dim, ToFloat(from[at]));
    }
  });
}

HWY_INLINE void ExpInPlace(float* x, size_t n) {
  ForVectors(n, [=](auto d, size_t i)
                    HWY_ATTR { hn::StoreU(ExpOfNegative(d, hn::LoadU(d, x + i)), d, x + i); });
}

// exp(gate) of `len` rows from `row` on, [kTile, padded_k]; ones where there is nothing.
template <int kTile>
HWY_INLINE void LoadDecays(const GateView& gate, int64_t row, int len, const HeadMap& heads,
                           int key_dim, float* decay) {
  const int padded = PaddedKeys(key_dim);
  for (int t = 0; t < len; ++t, decay += padded) {
    if (gate.kind == GateKind::kPerKey) {
      LoadGates(gate, row + t, heads, key_dim, decay);
      ExpInPlace(decay, key_dim);
    } else {
      LoadGates(gate, row + t, heads, 1, decay);
      ExpInPlace(decay, 1);
      std::fill_n(decay + 1, key_dim - 1, decay[0]);
    }
    std::fill_n(decay + key_dim, padded - key_dim, 1.0f);
  }
  std::fill_n(decay, (kTile - len) * padded, 1.0f);
}

// ---- Damping ------------------------------------------------------------------------------------
//
// D(s, t) is the product of the decays of the tokens after s up to t, D(0, t) and D(s, end) those
// from the tile's start and to its end. Products are made by multiplying, never from sums of gates:
// no exponent is ever positive, nothing is divided, a gate of minus infinity is no special case.

// x[t] *= D(0, t)
HWY_INLINE void DampFromStart(const float* decay, int len, int padded_k, float* x) {
  const TileTag d;
  for (int i = 0; i < padded_k; i += kLanes) {
    TileVec product = hn::Set(d, 1.0f);
    for (int at = i; at < len * padded_k; at += padded_k) {
      product = hn::Mul(product, hn::LoadU(d, decay + at));
      hn::StoreU(hn::Mul(product, hn::LoadU(d, x + at)), d, x + at);
    }
  }
}
// x[t] *= D(t, end)
HWY_INLINE void DampToEnd(const float* decay, int len, int padded_k, float* x) {
  const TileTag d;
  for (int i = 0; i < padded_k; i += kLanes) {
    TileVec product = hn::Set(d, 1.0f);
    for (int at = (len - 1) * padded_k + i; at >= 0; at -= padded_k) {
      hn::StoreU(hn::Mul(product, hn::LoadU(d, x + at)), d, x + at);
      product = hn::Mul(product, hn::LoadU(d, decay + at));
    }
  }
}
// all = D(0, end)
HWY_INLINE void DecayOfTile(const float* decay, int len, int padded_k, float* all) {
  const TileTag d;
  for (int i = 0; i < padded_k; i += kLanes) {
    TileVec product = hn::Set(d, 1.0f);
    for (int at = i; at < len * padded_k; at += padded_k) {
      product = hn::Mul(product, hn::LoadU(d, decay + at));
    }
    hn::StoreU(product, d, all + i);
  }
}

// ---- Pairs of tokens of one tile ----------------------------------------------------------------

constexpr int kPairs = kMaxTile * kMaxTile;

// pairs[t, s] = D(s, t) for s <= t, else 0, of decays that all keys share (column 0 of `decay`), or
// of none (null).
HWY_INLINE void PairDecays(const float* decay, int len, int padded_k, float* pairs) {
  std::fill_n(pairs, kPairs, 0.0f);
  for (int t = 0; t < len; ++t) {
    float* row = pairs + t * kMaxTile;
    for (int s = 0; s < t; ++s) {
      row[s] = decay == nullptr ? 1.0f : row[s - kMaxTile] * decay[t * padded_k];
    }
    row[t] = 1.0f;
  }
}

// scores[t, s] = q_t . k_s pairs[t, s]
HWY_INLINE void SharedDecayScores(const float* q, const float* k, const float* pairs, int padded_k,
                                  float* transposed_k, float* scores) {
  constexpr int kRows = kManyRegisters ? 8 : 4, kVecs = kManyRegisters ? 1 : 2;
  const TileTag d;
  Transpose(k, padded_k, kMaxTile, padded_k, transposed_k, kMaxTile);
  for (int t = 0; t < kMaxTile; t += kRows) {
    for (int s = 0; s < kMaxTile; s += kVecs * kLanes) {
      TileVec acc[kRows][kVecs];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) acc[r][j] = hn::Zero(d);
      }
      MulAddTile(padded_k, q + t * padded_k, padded_k, 1, transposed_k + s, kMaxTile, acc);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) {
          const int at = (t + r) * kMaxTile + s + j * kLanes;
          hn::StoreU(hn::Mul(acc[r][j], hn::LoadU(d, pairs + at)), d, scores + at);
        }
      }
    }
  }
}

// Keys [i, i + kVecs kLanes) of: scores[t, s] += sum_k q_t k_s D(s, t). The product is walked up
// token by token, in registers.
template <int kVecs>
HWY_INLINE void WalkScores(const float* q, const float* k, const float* decay, int len,
                           int padded_k, int i, float* scores) {
  const TileTag d;
  for (int s = 0; s < len; ++s) {
    TileVec x[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) x[j] = hn::LoadU(d, k + s * padded_k + i + j * kLanes);
    for (int t = s; t < len; ++t) {
      const float* row = q + t * padded_k + i;
      TileVec sum = hn::Zero(d);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        if (t > s) x[j] = hn::Mul(x[j], hn::LoadU(d, decay + t * padded_k + i + j * kLanes));
        sum = hn::MulAdd(x[j], hn::LoadU(d, row + j * kLanes), sum);
      }
      scores[t * kMaxTile + s] += hn::GetLane(hn::SumOfLanes(d, sum));
    }
  }
}
HWY_INLINE void PerKeyScores(const float* q, const float* k, const float* decay, int len,
                             int padded_k, float* scores) {
  std::fill_n(scores, kPairs, 0.0f);
  constexpr int kMost = kManyRegisters ? 8 : 4;
  int i = 0;
  for (; i + kMost * kLanes <= padded_k; i += kMost * kLanes) {
    WalkScores<kMost>(q, k, decay, len, padded_k, i, scores);
  }
  for (; i + 2 * kLanes <= padded_k; i += 2 * kLanes) {
    WalkScores<2>(q, k, decay, len, padded_k, i, scores);
  }
  for (; i < padded_k; i += kLanes) WalkScores<1>(q, k, decay, len, padded_k, i, scores);
}

// ---- All of it ----------------------------------------------------------------------------------

struct TileInputs {
  const void* q;  // null: queries and scores are not wanted
  const void* k;
  int64_t q_stride, k_stride;
  int key_dim;
  float scale;
  GateView gate;
};
struct TileKeys {
  float* q;       // [reps, kTile, padded_k]: scale q_t D(0, t)
  float* k;       // [kTile, padded_k]: k_s D(s, end)
  float* decay;   // [padded_k]: D(0, end); untouched without a gate
  float* scores;  // [reps, kTile, kTile]: scale sum_k q_t k_s D(s, t) for s <= t, else 0
};
struct TileScratch {
  static constexpr size_t Size(int padded_k) { return 2 * size_t{kMaxTile} * padded_k + kPairs; }
  TileScratch(float* memory, int padded_k)
      : decay(memory),
        transposed_k(decay + kMaxTile * padded_k),
        pairs(transposed_k + kMaxTile * padded_k) {}
  float *decay, *transposed_k, *pairs;
};

// Tokens [row, row + len) of one state, len <= kTile.
template <int kTile, typename T>
HWY_INLINE void PrepareTile(const TileInputs& in, const HeadMap& heads, int64_t row, int len,
                            const TileScratch& w, const TileKeys& out) {
  const int K = in.key_dim, padded_k = PaddedKeys(K);
  const bool gated = in.gate.kind != GateKind::kNone, per_key = in.gate.kind == GateKind::kPerKey;
  LoadTile<kTile>(static_cast<const T*>(in.k) + row * in.k_stride + heads.group * K, in.k_stride,
                  len, K, padded_k, 1.0f, out.k);
  if (gated) {
    LoadDecays<kTile>(in.gate, row, len, heads, K, w.decay);
    DecayOfTile(w.decay, len, padded_k, out.decay);
  }
  if (in.q != nullptr) {
    if (kTile > 1 && !per_key) PairDecays(gated ? w.decay : nullptr, len, padded_k, w.pairs);
    for (int rep = 0; rep < heads.reps; ++rep) {
      float* q = out.q + rep * kTile * padded_k;
      float* scores = out.scores + rep * kTile * kTile;
      LoadTile<kTile>(static_cast<const T*>(in.q) + row * in.q_stride + (heads.first + rep) * K,
                      in.q_stride, len, K, padded_k, in.scale, q);
      if constexpr (kTile == 1) {
        *scores = Dot(q, out.k, padded_k);
      } else if (per_key) {
        PerKeyScores(q, out.k, w.decay, len, padded_k, scores);
      } else {
        SharedDecayScores(q, out.k, w.pairs, padded_k, w.transposed_k, scores);
      }
      if (gated) DampFromStart(w.decay, len, padded_k, q);
    }
  }
  if (kTile > 1 && gated) DampToEnd(w.decay, len, padded_k, out.k);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#endif  // GLA_KERNELS_CPU_ATTENTION_TILE_INL_H_
