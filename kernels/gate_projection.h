// A GateProjection in two steps, where a backend has no kernel for it. For */gate.* only.
#pragma once

#include "kernels/kernels.h"

namespace gla {

inline void ProductThenGate(Device& device, const GateProjectionArgs& a) {
  const PackedWeight& w = *a.weight;
  Matmul(device, {.x = a.x,
                  .weight = a.weight,
                  .y = a.y,
                  .rows = a.rows,
                  .x_stride = a.x_stride,
                  .y_stride = w.out(),
                  .x_dtype = a.x_dtype,
                  .y_dtype = DType::kFloat32});
  LogSigmoidGate(device, {.x = a.y,
                          .bias = a.bias,
                          .y = a.y,
                          .rows = a.rows,
                          .dim = w.out(),
                          .normalizer = a.normalizer,
                          .clamp_min = a.clamp_min});
}

}  // namespace gla
