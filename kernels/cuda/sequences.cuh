// Which sequence a row belongs to.
#pragma once

#include <cstdint>

namespace gla {

// The sequence that owns `row`; empty sequences own none.
__device__ inline int SequenceOf(const int32_t* cu_seqlens, int num_seqs, int row) {
  int low = 0, high = num_seqs;  // cu_seqlens[low] <= row < cu_seqlens[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu_seqlens[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace gla
