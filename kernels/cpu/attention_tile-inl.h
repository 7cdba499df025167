// Small matrix products on a strip of a state and a tile of tokens, in registers; and the keys,
// queries and decays of a tile as those products want them.
//
// A strip is 32 columns of a state, [padded_k, 32] with nothing between the rows, so that it stays
// in the first-level cache whatever V is. A tile is kTile tokens of one sequence: 16, or 1 for the
// forms that go token by token. What is missing (tokens, keys, columns) is there as zeros, decays
// as ones, and changes nothing.

// The usual guard, once per instruction set.
#if defined(GLA_KERNELS_CPU_ATTENTION_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GLA_KERNELS_CPU_ATTENTION_TILE_INL_H_
#undef GLA_KERNELS_CPU_ATTENTION_TILE_INL_H_
#else
#define GLA_KERNELS_CPU_ATTENTION_TILE_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "kernels/cpu/attention_common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

constexpr int kStrip = 32;    // columns
constexpr int kMaxTile = 16;  // tokens
constexpr int PaddedKeys(int key_dim) { return (key_dim + 15) / 16 * 16; }
constexpr int NumStrips(int cols) { return (cols + kStrip - 1) / kStrip; }

using TileTag = hn::CappedTag<float, 16>;
using TileVec = hn::Vec<TileTag>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(TileTag()));
constexpr bool kManyRegisters = kLanes >= 16;  // 32 of them

// acc[r][j] += sum over i of a[r a_row + i a_step] b[i b_step + j kLanes]
template <int kRows, int kVecs>
HWY_INLINE void MulAddTile(int n, const float* HWY_RESTRICT a, size_t a_row, size_t a_step,
                           const float* HWY_RESTRICT b, size_t b_step,
                           TileVec (&acc)[kRows][kVecs]) {
  const TileTag d;
  for (int i = 0; i < n; ++i, a += a_step, b += b_step) {
    TileVec row[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) row[j] = hn::LoadU(d, b + j * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const TileVec factor = hn::Set(d, a[r * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) acc[r][j] = hn::MulAdd(factor, row[j], acc[r][j]);
    }
  }
}

// How a [rows, 32] result is cut for the registers.
constexpr int kStripRows = kManyRegisters ? 8 : 4, kStripCols = 2 * kLanes;

// out[t, c] = sum_k x[t, k] s[k, c] + sum_u a[t a_row + u a_step] y[u, c], for t, u < len; `out`
// and `y` are [kMaxTile, 32]. (o from q, S, A, v; dv from k, dS, transposed A, do.)
HWY_INLINE void ReadStrip(int len, int padded_k, const float* x, const float* s, const float* a,
                          size_t a_row, size_t a_step, const float* y, float* out) {
  const TileTag d;
  for (int t = 0; t < len; t += kStripRows) {
    for (int c = 0; c < kStrip; c += kStripCols) {
      TileVec acc[kStripRows][2];
#pragma GCC unroll 16
      for (int r = 0; r < kStripRows; ++r) acc[r][0] = acc[r][1] = hn::Zero(d);
      MulAddTile(padded_k, x + t * padded_k, padded_k, 1, s + c, kStrip, acc);
      if (a != nullptr) MulAddTile(len, a + t * a_row, a_row, a_step, y + c, kStrip, acc);
#pragma GCC unroll 16
      for (int r = 0; r < kStripRows; ++r) {
        hn::StoreU(acc[r][0], d, out + (t + r) * kStrip + c);
        hn::StoreU(acc[r][1], d, out + (t + r) * kStrip + c + kLanes);
      }
    }
  }
}

// s[k, c] = decay[k] s[k, c] + sum_t x[t, k] y[t, c]; decay null: 1.
HWY_INLINE void UpdateStrip(int len, int padded_k, const float* decay, const float* x,
                            const float* y, float* s) {
  const TileTag d;
  for (int k = 0; k < padded_k; k += kStripRows) {
    for (int c = 0; c < kStrip; c += kStripCols) {
      TileVec acc[kStripRows][2];
      float* rows = s + k * kStrip + c;
#pragma GCC unroll 16
      for (int r = 0; r < kStripRows; ++r) {
        acc[r][0] = hn::LoadU(d, rows + r * kStrip);
        acc[r][1] = hn::LoadU(d, rows + r * kStrip + kLanes);
        if (decay == nullptr) continue;
        const TileVec factor = hn::Set(d, decay[k + r]);
        acc[r][0] = hn::Mul(factor, acc[r][0]);
        acc[r][1] = hn::Mul(factor, acc[r][1]);
      }
      MulAddTile(len, x + k, 1, padded_k, y + c, kStrip, acc);
#pragma GCC unroll 16
      for (int r = 0; r < kStripRows; ++r) {
        hn::StoreU(acc[r][0], d, rows + r * kStrip);
        hn::StoreU(acc[r][1], d, rows + r * kStrip + kLanes);
      }
    }
  }
}

// z[k, t] (+)= sum_c s[k, c] y[c, t]; z is [rows, 16], y [32, 16]: the strip's share of q or k
// gradients, of which tokens are the lanes. REQUIRES: rows % 16 == 0.
HWY_INLINE void ContractStrip(int rows, const float* s, const float* y, bool add, float* z) {
  constexpr int kRows = kManyRegisters ? 16 : 4, kVecs = kManyRegisters ? 1 : 2;
  const TileTag d;
  for (int k = 0; k < rows; k += kRows) {
    for (int t = 0; t < kMaxTile; t += kVecs * kLanes) {
      TileVec acc[kRows][kVecs];
      float* out = z + k * kMaxTile + t;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) {
          acc[r][j] = add ? hn::LoadU(d, out + r * kMaxTile + j * kLanes) : hn::Zero(d);
        }
      }
      MulAddTile(kStrip, s + k * kStrip, kStrip, 1, y + t, kMaxTile, acc);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) hn::StoreU(acc[r][j], d, out + r * kMaxTile + j * kLanes);
      }
    }
  }
}

// ---- Moving -------------------------------------------------------------------------------------

// to[c, r] = from[r, c] of a [rows, cols] block. REQUIRES: rows % 4 == 0, cols % 4 == 0.
HWY_INLINE void Transpose(const float* from, size_t from_stride, int rows, int cols, float* to,
                          size_t to_stride) {
  for (int r = 0; r < rows; r += 4) {
    for (int c = 0; c < cols; c += 4) {
      const float* block = from + r * from_stride + c;
      float* out = to + c * to_stride + r;
#if HWY_TARGET == HWY_SCALAR
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) out[j * to_stride + i] = block[i * from_stride + j];
      }
#else
      const hn::FixedTag<float, 4> d;
      const auto r0 = hn::LoadU(d, block), r1 = hn::LoadU(d, block + from_stride);
      const auto r2 = hn::LoadU(d, block + 2 * from_stride);
      const auto r3 = hn::LoadU(d, block + 3 * from_stride);
      const auto low01 = hn::InterleaveLower(d, r0, r1), high01 = hn::InterleaveUpper(d, r0, r1);
      const auto low23 = hn::InterleaveLower(d, r2, r3), high23 = hn::InterleaveUpper(d, r2, r3);
      hn::StoreU(hn::ConcatLowerLower(d, low23, low01), d, out);
      hn::StoreU(hn::ConcatUpperUpper(d, low23, low01), d, out + to_stride);
      hn::StoreU(hn::ConcatLowerLower(d, high23, high01), d, out + 2 * to_stride);
      hn::StoreU(hn::ConcatUpperUpper(d, high23, high01), d, out + 3 * to_stride);
#endif
    }
  }
}

template <typename T>
HWY_INLINE void LoadScaled(const T* from, float scale, float* to, size_t n) {
  ForVectors(n, [=](auto d, size_t i) HWY_ATTR {
    hn::StoreU(hn::Mul(LoadFloats(d, from + i), hn::Set(d, scale)), d, to + i);
  });
}

// [kMaxTile, padded] float32 from `len` rows of `n`; zeros where there is nothing.
template <typename T>
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
  std::fill_n(to, (kMaxTile - len) * padded, 0.0f);
}

// Columns [c, c + 32) of a [K, V] state, and back.
HWY_INLINE void LoadStateStrip(const float* state, int key_dim, int value_dim, int c,
                               float* strip) {
  const int n = std::min(kStrip, value_dim - c);
  const int padded = PaddedKeys(key_dim);
  if (state == nullptr || n < kStrip || padded > key_dim) std::fill_n(strip, padded * kStrip, 0.0f);
  if (state == nullptr) return;
  for (int k = 0; k < key_dim; ++k) {
    std::memcpy(strip + k * kStrip, state + static_cast<int64_t>(k) * value_dim + c,
                sizeof(float) * n);
  }
}
HWY_INLINE void StoreStateStrip(const float* strip, int key_dim, int value_dim, int c,
                                float* state) {
  const int n = std::min(kStrip, value_dim - c);
  for (int k = 0; k < key_dim; ++k) {
    std::memcpy(state + static_cast<int64_t>(k) * value_dim + c, strip + k * kStrip,
                sizeof(float) * n);
  }
}

// ---- Decays -------------------------------------------------------------------------------------

// The log decays of one row; constant and scalar gates are the same for each of the K keys.
// REQUIRES: the gate kind is not kNone.
HWY_INLINE void LoadGates(const GateView& gate, int64_t row, const HeadMap& heads, int key_dim,
                          float* gates) {
  WithStoredType(gate.dtype, [&]<typename T>() {
    const T* from = static_cast<const T*>(gate.data);
    if (gate.kind == GateKind::kPerKey) {
      from += row * gate.stride + static_cast<int64_t>(heads.group) * key_dim;
      Convert(from, gates, key_dim);
    } else {
      from += gate.kind == GateKind::kConstant ? heads.state_head : row * gate.stride + heads.group;
      std::fill_n(gates, key_dim, ToFloat(*from));
    }
  });
}

HWY_INLINE void ExpInPlace(float* x, size_t n) {
  ForVectors(n, [=](auto d, size_t i)
                    HWY_ATTR { hn::StoreU(ExpOfNegative(d, hn::LoadU(d, x + i)), d, x + i); });
}

// exp(gate) of `len` rows from `row` on, [kMaxTile, padded_k].
HWY_INLINE void LoadDecays(const GateView& gate, int64_t row, int len, const HeadMap& heads,
                           int key_dim, float* decay) {
  const int padded = PaddedKeys(key_dim);
  std::fill_n(decay, kMaxTile * padded, 1.0f);
  for (int t = 0; t < len; ++t, decay += padded) {
    if (gate.kind == GateKind::kPerKey) {
      LoadGates(gate, row + t, heads, key_dim, decay);
      ExpInPlace(decay, key_dim);
    } else {
      LoadGates(gate, row + t, heads, 1, decay);
      ExpInPlace(decay, 1);
      std::fill_n(decay + 1, key_dim - 1, decay[0]);
    }
  }
}

// The products of decays that carry a row to an end of its tile. They are made by multiplying,
// never from sums of gates: no exponent is ever positive and a gate of minus infinity is no special
// case. x[t] *= prod of decay[u], u <= t; `all` = the product of the whole tile.
HWY_INLINE void DampFromStart(const float* decay, int len, int padded_k, float* x, float* all) {
  const TileTag d;
  for (int i = 0; i < padded_k; i += kLanes) {
    TileVec product = hn::Set(d, 1.0f);
    for (int t = 0; t < len; ++t) {
      const int at = t * padded_k + i;
      product = hn::Mul(product, hn::LoadU(d, decay + at));
      hn::StoreU(hn::Mul(product, hn::LoadU(d, x + at)), d, x + at);
    }
    if (all != nullptr) hn::StoreU(product, d, all + i);
  }
}
// x[t] *= prod of decay[u], u > t.
HWY_INLINE void DampToEnd(const float* decay, int len, int padded_k, float* x) {
  const TileTag d;
  for (int i = 0; i < padded_k; i += kLanes) {
    TileVec product = hn::Set(d, 1.0f);
    for (int t = len - 1; t >= 0; --t) {
      const int at = t * padded_k + i;
      hn::StoreU(hn::Mul(product, hn::LoadU(d, x + at)), d, x + at);
      product = hn::Mul(product, hn::LoadU(d, decay + at));
    }
  }
}

// ---- Pairs of tokens of one tile ----------------------------------------------------------------

// w[t, s] = prod of decay[u], s < u <= t, for s <= t, else 0; of decays that all keys share (column
// 0 of `decay`), or of none (null).
HWY_INLINE void PairDecays(const float* decay, int len, int padded_k, float* w) {
  std::fill_n(w, kMaxTile * kMaxTile, 0.0f);
  for (int t = 0; t < len; ++t) {
    float* row = w + t * kMaxTile;
    for (int s = 0; s < t; ++s) {
      row[s] = decay == nullptr ? 1.0f : row[s - kMaxTile] * decay[t * padded_k];
    }
    row[t] = 1.0f;
  }
}

// scores[t, s] = sum_k q[t, k] k[s, k] w[t, s], [16, 16].
HWY_INLINE void SharedDecayScores(const float* q, const float* k, const float* w, int padded_k,
                                  float* transposed_k, float* scores) {
  Transpose(k, padded_k, kMaxTile, padded_k, transposed_k, kMaxTile);
  const TileTag d;
  constexpr int kRows = kManyRegisters ? 8 : 4, kVecs = kManyRegisters ? 1 : 2;
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
          hn::StoreU(hn::Mul(acc[r][j], hn::LoadU(d, w + at)), d, scores + at);
        }
      }
    }
  }
}

// Keys [i, i + kVecs kLanes) of: scores[t, s] += sum_k q[t, k] k[s, k] (prod of decay[u, k], s < u
// <= t). The product is walked up token by token, in registers.
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
  std::fill_n(scores, kMaxTile * kMaxTile, 0.0f);
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

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#endif  // GLA_KERNELS_CPU_ATTENTION_TILE_INL_H_
