// The int16 format of a state's row piece, see StateFormat in kernels.h.
#pragma once

#include "kernels/cuda/common.cuh"

namespace gla {

struct Int16Scale {
  float scale, inverse;

  // `bits`: of the largest absolute value. As integers, NaN > infinity > numbers.
  __device__ static Int16Scale Of(uint32_t bits) {
    if (bits >= 0x7F800000u) return {__uint_as_float(0x7FC00000u), 0};
    const float largest = __uint_as_float(bits);
    if (largest < 0x1p-100f) return {0, 0};
    return {__fdiv_rn(largest, 32767.0f), __fdiv_rn(32767.0f, largest)};
  }
  // NaN becomes 0.
  __device__ int Round(float x) const { return __float2int_rn(x * inverse); }
};

}  // namespace gla
