// The element-wise part of a feature map, head by head.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/feature_map.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <vector>

#include "kernels/cpu/common.h"
#include "kernels/cpu/feature_map-inl.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

template <typename T>
void FeatureMapOf(const FeatureMapArgs& a, int64_t begin, int64_t end) {
  thread_local std::vector<float> scratch;
  scratch.resize(2 * a.dim + a.out_dim);
  float* x = scratch.data();
  float* x2 = x + a.dim;
  float* y = x2 + a.dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / a.heads, head = i % a.heads;
    const int64_t from = row * a.x_stride + head * a.dim;
    Convert(static_cast<const T*>(a.x) + from, x, a.dim);
    if (a.map == FeatureMap::kProduct) Convert(static_cast<const T*>(a.x2) + from, x2, a.dim);
    MapHead(a.map, a.dim, x, x2, y);
    if (a.normalize) {
      const float sum =
          SumVectors(a.out_dim, [=](auto d, size_t c) HWY_ATTR { return hn::LoadU(d, y + c); });
      ForVectors(a.out_dim, [=](auto d, size_t c) HWY_ATTR {
        hn::StoreU(hn::Div(hn::LoadU(d, y + c), hn::Set(d, sum + 1e-4f)), d, y + c);
      });
    }
    Convert(y, static_cast<T*>(a.y) + row * a.y_stride + head * a.out_dim, a.out_dim);
  }
}

void FeatureMapHeads(const FeatureMapArgs& a, int64_t begin, int64_t end) {
  WithActType(a.dtype, [&]<typename T>() { FeatureMapOf<T>(a, begin, end); });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(FeatureMapHeads);

void ApplyFeatureMap(Device& device, const FeatureMapArgs& a) {
  const int factor = a.map == FeatureMap::kSoftmax2 ? 2 : a.map == FeatureMap::kDpfp ? 8 : 1;
  GLA_CHECK(a.out_dim == factor * a.dim);
  GLA_CHECK((a.map == FeatureMap::kProduct) == (a.x2 != nullptr));
  ParallelFor(device, int64_t{a.rows} * a.heads, a.out_dim * kExpNs,
              [&](int64_t begin, int64_t end) {
                HWY_DYNAMIC_DISPATCH(FeatureMapHeads)(a, begin, end);
              });
}

}  // namespace gla
#endif  // HWY_ONCE
