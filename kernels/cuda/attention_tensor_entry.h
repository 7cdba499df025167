// The chunkwise form on tensor cores, as attention.cu and attention_backward.cu see it: where it
// fits they hand over to it.
#pragma once

#include <cstddef>

#include "kernels/kernels.h"

namespace gla {

// bfloat16, as many key/value heads as query heads, K of 64, 128 or 256, V a multiple of 64, and
// rows aligned to 16 bytes.
inline bool TensorDimsFit(int key_dim, int value_dim) {
  return (key_dim == 64 || key_dim == 128 || key_dim == 256) && value_dim % 64 == 0;
}

bool TensorForwardFits(const LinearAttentionArgs& args);
size_t TensorForwardBytes(const LinearAttentionArgs& args);  // of args.workspace
void TensorForward(Device& device, const LinearAttentionArgs& args);

bool TensorBackwardFits(const LinearAttentionBackwardArgs& args);
size_t TensorBackwardBytes(const LinearAttentionBackwardArgs& args);
void TensorBackward(Device& device, const LinearAttentionBackwardArgs& args);

}  // namespace gla
