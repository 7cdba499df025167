// The gradients of y = x r weight swish(gate), r = 1 / sqrt(mean(x^2) + eps), for x and the gate.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norm_backward.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <cmath>

#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

template <typename X, typename Y>
void RmsNormBackwardOf(const RmsNormBackwardArgs& a, int64_t begin, int64_t end) {
  const size_t dim = a.dim;
  const float* weight = a.weight;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / a.groups, offset = i % a.groups * a.dim;
    const X* x = static_cast<const X*>(a.x) + row * a.x_stride + offset;
    const Y* dy = static_cast<const Y*>(a.dy) + row * a.dy_stride + offset;
    const Y* gate =
        a.gate == nullptr ? nullptr : static_cast<const Y*>(a.gate) + row * a.gate_stride + offset;
    X* dx = static_cast<X*>(a.dx) + row * a.dx_stride + offset;
    // The gradient of x r: what is before it in the product, computed for the mean and again.
    const auto arriving = [=](auto d, size_t c) HWY_ATTR {
      auto u = LoadFloats(d, dy + c);
      if (weight != nullptr) u = hn::Mul(u, hn::LoadU(d, weight + c));
      if (gate != nullptr) u = hn::Mul(u, Silu(d, LoadFloats(d, gate + c)));
      return u;
    };
    float scale = 1, along = 0;  // along: r^2 mean(x u)
    if (a.normalize) {
      scale = 1 / std::sqrt(Dot(x, x, dim) / static_cast<float>(dim) + a.eps);
      const float sum = SumVectors(dim, [=](auto d, size_t c) HWY_ATTR {
        return hn::Mul(LoadFloats(d, x + c), arriving(d, c));
      });
      along = scale * scale * sum / static_cast<float>(dim);
    }
    ForVectors(dim, [=](auto d, size_t c) HWY_ATTR {
      const auto across = hn::NegMulAdd(LoadFloats(d, x + c), hn::Set(d, along), arriving(d, c));
      StoreFloats(d, hn::Mul(across, hn::Set(d, scale)), dx + c);
    });
    if (gate == nullptr) continue;
    Y* dgate = static_cast<Y*>(a.dgate) + row * a.dgate_stride + offset;
    ForVectors(dim, [=](auto d, size_t c) HWY_ATTR {
      auto v = hn::Mul(LoadFloats(d, dy + c), hn::Mul(LoadFloats(d, x + c), hn::Set(d, scale)));
      if (weight != nullptr) v = hn::Mul(v, hn::LoadU(d, weight + c));
      StoreFloats(d, hn::Mul(v, SiluSlope(d, LoadFloats(d, gate + c))), dgate + c);
    });
  }
}

void RmsNormBackwardRows(const RmsNormBackwardArgs& a, int64_t begin, int64_t end) {
  WithActType(a.x_dtype, [&]<typename X>() {
    WithActType(a.y_dtype, [&]<typename Y>() { RmsNormBackwardOf<X, Y>(a, begin, end); });
  });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(RmsNormBackwardRows);

void RmsNormBackward(Device& device, const RmsNormBackwardArgs& a) {
  GLA_CHECK((a.gate == nullptr) == (a.dgate == nullptr));
  const double item_ns = a.dim * (a.gate == nullptr ? 4 * kCopyNs : 3 * kExpNs + kCopyNs);
  ParallelFor(device, int64_t{a.rows} * a.groups, item_ns, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(RmsNormBackwardRows)(a, begin, end);
  });
}

}  // namespace gla
#endif  // HWY_ONCE
