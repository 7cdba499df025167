// Small matrix products on a strip of a state, in registers.
//
// A strip is 32 columns of a state, [padded_k, 32] with nothing between the rows, so that it stays
// in the first-level cache whatever V is. It meets the tokens of one sequence in tiles of kTile:
// 16, or 1 for the forms that go token by token. What is missing (keys beyond K up to padded_k,
// columns beyond V, tokens beyond the sequence) is there as zeros and changes nothing.

// The usual guard, once per instruction set.
#if defined(GLA_KERNELS_CPU_ATTENTION_STRIP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GLA_KERNELS_CPU_ATTENTION_STRIP_INL_H_
#undef GLA_KERNELS_CPU_ATTENTION_STRIP_INL_H_
#else
#define GLA_KERNELS_CPU_ATTENTION_STRIP_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "kernels/cpu/simd-inl.h"

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

// The sums of the lanes of four vectors.
HWY_INLINE void SumLanesOf4(TileVec a, TileVec b, TileVec c, TileVec d, float* out) {
#if HWY_TARGET == HWY_SCALAR
  out[0] = hn::GetLane(a), out[1] = hn::GetLane(b), out[2] = hn::GetLane(c),
  out[3] = hn::GetLane(d);
#else
  const TileTag tag;
  const hn::RepartitionToWide<hn::RebindToUnsigned<TileTag> > pairs;
  const auto ab =
      hn::BitCast(pairs, hn::Add(hn::InterleaveLower(tag, a, b), hn::InterleaveUpper(tag, a, b)));
  const auto cd =
      hn::BitCast(pairs, hn::Add(hn::InterleaveLower(tag, c, d), hn::InterleaveUpper(tag, c, d)));
  // Each 128-bit block now holds the sums of its own lanes.
  const auto blocks = hn::Add(hn::BitCast(tag, hn::InterleaveLower(pairs, ab, cd)),
                              hn::BitCast(tag, hn::InterleaveUpper(pairs, ab, cd)));
  const hn::FixedTag<float, 4> quad;
  HWY_ALIGN float all[kLanes];
  hn::Store(blocks, tag, all);
  auto sum = hn::Load(quad, all);
  for (int i = 4; i < kLanes; i += 4) sum = hn::Add(sum, hn::Load(quad, all + i));
  hn::StoreU(sum, quad, out);
#endif
}

// out[t, c] = sum_k x[t, k] s[k, c] + sum_p sum_u a[p][t a_row + u a_step] y[p][u, c], t, u < len;
// a is [pairs, kTile, kTile], y [pairs, kTile, 32], out [kTile, 32]. (o from q, S, A, v; dv from k,
// dS, transposed A, do.)
template <int kTile>
HWY_INLINE void ReadStrip(int len, int padded_k, const float* x, const float* s, int pairs,
                          const float* a, size_t a_row, size_t a_step, const float* y, float* out) {
  const TileTag d;
  if constexpr (kTile == 1) {  // four chains of every fourth key
    for (int c = 0; c < kStrip; c += kStripCols) {
      TileVec acc[4][2];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) acc[r][0] = acc[r][1] = hn::Zero(d);
      for (int k = 0; k < padded_k; k += 4) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const float* row = s + (k + r) * kStrip + c;
          const TileVec factor = hn::Set(d, x[k + r]);
          acc[r][0] = hn::MulAdd(factor, hn::LoadU(d, row), acc[r][0]);
          acc[r][1] = hn::MulAdd(factor, hn::LoadU(d, row + kLanes), acc[r][1]);
        }
      }
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        TileVec sum = hn::Add(hn::Add(acc[0][j], acc[1][j]), hn::Add(acc[2][j], acc[3][j]));
        for (int p = 0; p < pairs; ++p) {
          sum = hn::MulAdd(hn::Set(d, a[p]), hn::LoadU(d, y + p * kStrip + c + j * kLanes), sum);
        }
        hn::StoreU(sum, d, out + c + j * kLanes);
      }
    }
    return;
  }
  for (int t = 0; t < len; t += kStripRows) {
    for (int c = 0; c < kStrip; c += kStripCols) {
      TileVec acc[kStripRows][2];
#pragma GCC unroll 16
      for (int r = 0; r < kStripRows; ++r) acc[r][0] = acc[r][1] = hn::Zero(d);
      MulAddTile(padded_k, x + t * padded_k, padded_k, 1, s + c, kStrip, acc);
      for (int p = 0; p < pairs; ++p) {
        MulAddTile(len, a + p * kTile * kTile + t * a_row, a_row, a_step,
                   y + p * kTile * kStrip + c, kStrip, acc);
      }
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

// z[k, t] (+)= sum_c s[k, c] y[c, t]; z is [rows, kTile], y [32, kTile]: the strip's share of the
// gradients of q or k, of which tokens are the lanes. REQUIRES: rows % 16 == 0.
template <int kTile>
HWY_INLINE void ContractStrip(int rows, const float* s, const float* y, bool add, float* z) {
  constexpr int kRows = kManyRegisters ? 16 : 4, kVecs = kManyRegisters ? 1 : 2;
  const TileTag d;
  if constexpr (kTile == 1) {
    for (int k = 0; k < rows; k += 4) {
      TileVec sum[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        sum[r] = hn::Zero(d);
        for (int c = 0; c < kStrip; c += kLanes) {
          sum[r] = hn::MulAdd(hn::LoadU(d, s + (k + r) * kStrip + c), hn::LoadU(d, y + c), sum[r]);
        }
      }
      float sums[4];
      SumLanesOf4(sum[0], sum[1], sum[2], sum[3], sums);
      for (int r = 0; r < 4; ++r) z[k + r] = add ? z[k + r] + sums[r] : sums[r];
    }
    return;
  }
  for (int k = 0; k < rows; k += kRows) {
    for (int t = 0; t < kTile; t += kVecs * kLanes) {
      TileVec acc[kRows][kVecs];
      float* out = z + k * kTile + t;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) {
          acc[r][j] = add ? hn::LoadU(d, out + r * kTile + j * kLanes) : hn::Zero(d);
        }
      }
      MulAddTile(kStrip, s + k * kStrip, kStrip, 1, y + t, kTile, acc);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) hn::StoreU(acc[r][j], d, out + r * kTile + j * kLanes);
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

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#endif  // GLA_KERNELS_CPU_ATTENTION_STRIP_INL_H_
