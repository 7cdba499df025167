#include "kernels/cpu/matmul_dot.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gla {

#if defined(__x86_64__)
namespace {

#define GLA_DOT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

template <int kRows, int kAhead>
GLA_DOT_TARGET void Tile(const BFloat16* __restrict x, int64_t x_stride,
                         const BFloat16* __restrict panel, int pairs, float* __restrict sums) {
  const size_t ahead = kRows > 1 ? size_t{4} * kDotPanelWidth * pairs : kAhead;
  const char* const w = reinterpret_cast<const char*>(panel);
  __m512 acc[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) acc[r][v] = _mm512_setzero_ps();
  }
  for (int k = 0; k < pairs; ++k) {
    __m512bh words[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const char* from = w + size_t{128} * k + 64 * v;
      words[v] = (__m512bh)_mm512_load_si512(from);
      if (ahead > 0) __builtin_prefetch(from + ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int pair;
      std::memcpy(&pair, x + r * x_stride + 2 * k, sizeof(pair));
      const __m512bh xk = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], xk, words[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(sums + (2 * r + v) * 16, acc[r][v]);
  }
}

template <int kRows = kMaxDotRows>
void TileOfRows(int rows, const BFloat16* x, int64_t x_stride, const BFloat16* panel, int pairs,
                bool is_cached, float* sums) {
  if (rows != kRows) {
    if constexpr (kRows > 1)
      TileOfRows<kRows - 1>(rows, x, x_stride, panel, pairs, is_cached, sums);
  } else if (kRows == 1 && !is_cached) {
    Tile<kRows, kStreamAhead>(x, x_stride, panel, pairs, sums);
  } else {
    Tile<kRows, 0>(x, x_stride, panel, pairs, sums);
  }
}

}  // namespace

bool HasDotInstruction() {
  static const bool has = __builtin_cpu_supports("avx512bf16") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return has;
}

void DotTile(int rows, const BFloat16* x, int64_t x_stride, const BFloat16* panel, int pairs,
             bool is_cached, float* sums) {
  GLA_CHECK(rows >= 1 && rows <= kMaxDotRows);
  TileOfRows(rows, x, x_stride, panel, pairs, is_cached, sums);
}

#else

bool HasDotInstruction() { return false; }
void DotTile(int, const BFloat16*, int64_t, const BFloat16*, int, bool, float*) {
  GLA_CHECK(false);
}

#endif

}  // namespace gla
