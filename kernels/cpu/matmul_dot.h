// Products of bfloat16 pairs, where the machine has an instruction for them (AVX-512 BF16).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/common.h"

namespace gla {

// Outputs of a panel that DotTile reads: two vectors of 16 (matmul.cc: the packed weight).
inline constexpr int kDotPanelWidth = 32;
inline constexpr int kMaxDotRows = 8;

bool HasDotInstruction();

// sums [rows, 32] = x [rows, 2 * pairs] times a panel [pairs, 32] of words of two neighbours along
// k. Each sum is one chain over the pairs: its bits do not depend on `rows`, which is in
// [1, kMaxDotRows].
// REQUIRES: HasDotInstruction().
void DotTile(int rows, const BFloat16* x, int64_t x_stride, const BFloat16* panel, int pairs,
             float* sums);

}  // namespace gla
