// dx = dy (1 - exp(normalizer y)) / normalizer, 0 where y is clamped.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gate_backward.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

template <typename T>
void GateBackwardOf(const LogSigmoidGateBackwardArgs& a, int64_t begin, int64_t end) {
  const float normalizer = a.normalizer;
  const bool clamps = a.clamp_min != nullptr;
  const float bound = clamps ? *a.clamp_min : 0.0f;
  for (int64_t r = begin; r < end; ++r) {
    const float* y = a.y + r * a.dim;
    const float* dy = a.dy + r * a.dim;
    T* dx = static_cast<T*>(a.dx) + r * a.dim;
    ForVectors(a.dim, [=](auto d, size_t i) HWY_ATTR {
      const auto gate = hn::LoadU(d, y + i), n = hn::Set(d, normalizer);
      // Expm1 keeps what 1 - exp() would lose where the gate is open; -105 keeps it in its range.
      const auto log_sigmoid = hn::Mul(gate, n);
      const auto low = hn::Set(d, -105.0f);
      const auto bounded = hn::IfThenElse(hn::Lt(log_sigmoid, low), low, log_sigmoid);
      auto slope = hn::Div(hn::Neg(hn::Expm1(d, bounded)), n);
      if (clamps) slope = hn::IfThenZeroElse(hn::Le(gate, hn::Set(d, bound)), slope);
      StoreFloats(d, hn::Mul(hn::LoadU(d, dy + i), slope), dx + i);
    });
  }
}

void GateBackwardRows(const LogSigmoidGateBackwardArgs& a, int64_t begin, int64_t end) {
  WithActType(a.dx_dtype, [&]<typename T>() { GateBackwardOf<T>(a, begin, end); });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(GateBackwardRows);

void LogSigmoidGateBackward(Device& device, const LogSigmoidGateBackwardArgs& a) {
  ParallelFor(device, a.rows, a.dim * 2 * kExpNs, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(GateBackwardRows)(a, begin, end);
  });
}

}  // namespace gla
#endif  // HWY_ONCE
