// y = max(log(sigmoid(x + bias)) / normalizer, clamp_min).
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gate.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/gate_projection.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

void GateRows(const LogSigmoidGateArgs& a, int64_t begin, int64_t end) {
  const float* bias = a.bias;
  const float normalizer = a.normalizer;
  for (int64_t r = begin; r < end; ++r) {
    const float* x = a.x + r * a.dim;
    float* y = a.y + r * a.dim;
    ForVectors(a.dim, [=, &a](auto d, size_t i) HWY_ATTR {
      auto v = hn::LoadU(d, x + i);
      if (bias != nullptr) v = hn::Add(v, hn::LoadU(d, bias + i));
      // log(sigmoid(v)) = min(v, 0) - log(1 + exp(-|v|)): no overflow, full precision at both ends.
      const auto tail = hn::Log1p(d, ExpOfNegative(d, hn::Neg(hn::Abs(v))));
      auto gate = hn::Sub(hn::IfThenElse(hn::Gt(v, hn::Zero(d)), hn::Zero(d), v), tail);
      gate = hn::Div(gate, hn::Set(d, normalizer));
      if (a.clamp_min != nullptr) {
        const auto bound = hn::Set(d, *a.clamp_min);
        gate = hn::IfThenElse(hn::Lt(gate, bound), bound, gate);
      }
      hn::StoreU(gate, d, y + i);
    });
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(GateRows);

void LogSigmoidGate(Device& device, const LogSigmoidGateArgs& a) {
  ParallelFor(device, a.rows, a.dim * 3 * kExpNs, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(GateRows)(a, begin, end);
  });
}

void GateProjection(Device& device, const GateProjectionArgs& a) { ProductThenGate(device, a); }

}  // namespace gla
#endif  // HWY_ONCE
