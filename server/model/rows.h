// Rows of activations in device memory.
#pragma once

#include <cstdint>

#include "kernels/device.h"

namespace gla {

// Rows of activations, or a block of their columns.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;  // elements
  DType dtype = DType::kFloat32;

  Rows Columns(int64_t first) const { return {At(first), stride, dtype}; }
  Rows From(int64_t row) const { return {At(row * stride), stride, dtype}; }

 private:
  void* At(int64_t elements) const {
    return static_cast<char*>(data) + elements * static_cast<int64_t>(SizeOf(dtype));
  }
};

}  // namespace gla
