// Products of bfloat16 pairs, where the machine has an instruction for them (AVX-512 BF16).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/common.h"

namespace gla {

// Outputs of a panel that DotTile reads: two vectors of 16 (matmul.cc: the packed weight).
inline constexpr int kDotPanelWidth = 32;
inline constexpr int kMaxDotRows = 8;

// What one row that streams a weight from memory fetches ahead, in bytes: the processor's own
// prefetchers do not keep up everywhere (kernels/README.md).
inline constexpr int kStreamAhead = 6144;

bool HasDotInstruction();

// sums [rows, 32] = x [rows, 2 * pairs] times a panel [pairs, 32] of words of two neighbours along
// k. Each sum is one chain over the pairs: its bits do not depend on `rows`, which is in
// [1, kMaxDotRows]. is_cached: the weight is so small that it stays in a cache.
// REQUIRES: HasDotInstruction().
void DotTile(int rows, const BFloat16* x, int64_t x_stride, const BFloat16* panel, int pairs,
             bool is_cached, float* sums);

}  // namespace gla
