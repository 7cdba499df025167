// The gradient of a feature map's element-wise part, head by head.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/feature_map_backward.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <algorithm>
#include <vector>

#include "kernels/cpu/common.h"
#include "kernels/cpu/feature_map-inl.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

// One head as float32; x, dx (and x2, dx2) [dim], y and dy [out_dim].
struct HeadGradient {
  const float *x, *x2;
  const float* y;  // the bare map of x: kSoftmax2 only
  const float* dy;
  float *dx, *dx2;
};

// dx = dy * slope(d, x)
template <class F>
HWY_INLINE void ScaleBySlope(size_t dim, const HeadGradient& h, const F& slope) {
  ForVectors(dim, [&](auto d, size_t i) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::LoadU(d, h.dy + i), slope(d, hn::LoadU(d, h.x + i))), d, h.dx + i);
  });
}

// y[j * n + i] = r_i r_(i - j - 1), r = relu[x, -x], all indices modulo n = 2 dim.
void DpfpBackward(size_t dim, const HeadGradient& h) {
  const size_t n = 2 * dim;
  const float* x = h.x;
  const auto relu = [=](size_t i) { return std::max(i < dim ? x[i] : -x[i - dim], 0.0f); };
  for (size_t i = 0; i < dim; ++i) {
    // Only one of x and -x is above 0.
    const size_t at = x[i] > 0 ? i : dim + i;
    float sum = 0;
    for (size_t roll = 1; roll <= 4; ++roll) {
      const float* dy = h.dy + (roll - 1) * n;
      const size_t before = (at + 4 * n - roll) % n, after = (at + roll) % n;
      sum += dy[at] * relu(before) + dy[after] * relu(after);
    }
    h.dx[i] = x[i] == 0 ? 0.0f : x[i] > 0 ? sum : -sum;
  }
}

void HeadBackward(FeatureMap map, size_t dim, const HeadGradient& h) {
  switch (map) {
    case FeatureMap::kIdentity:
      return Convert(h.dy, h.dx, dim);
    case FeatureMap::kRelu:
      return ScaleBySlope(dim, h, [](auto d, auto x) HWY_ATTR {
        return hn::IfThenZeroElse(hn::Le(x, hn::Zero(d)), hn::Set(d, 1.0f));
      });
    case FeatureMap::kSquaredRelu:
      return ScaleBySlope(dim, h, [](auto d, auto x) HWY_ATTR {
        const auto relu = hn::Max(x, hn::Zero(d));
        return hn::Add(relu, relu);
      });
    case FeatureMap::kElu:
      return ScaleBySlope(dim, h, [](auto d, auto x) HWY_ATTR {
        const auto zero = hn::Zero(d);
        const auto above = hn::Gt(x, zero);
        const auto below = ExpOfNegative(d, hn::IfThenElse(above, zero, x));
        return hn::IfThenElse(above, hn::Set(d, 1.0f), below);
      });
    case FeatureMap::kSilu:
      return ScaleBySlope(dim, h, [](auto d, auto x) HWY_ATTR { return SiluSlope(d, x); });
    case FeatureMap::kSigmoid:
      return ScaleBySlope(dim, h, [](auto d, auto x) HWY_ATTR {
        const auto s = Sigmoid(d, x);
        return hn::NegMulAdd(s, s, s);
      });
    case FeatureMap::kGelu:  // of x sigmoid(w), w = 2 sqrt(2 / pi) (x + 0.044715 x^3)
      return ScaleBySlope(dim, h, [](auto d, auto v) HWY_ATTR {
        const auto one = hn::Set(d, 1.0f), twice = hn::Set(d, 1.5957691216f);
        // Beyond 20 the slope is 0 or 1 in float32, and x dw would overflow before it vanishes.
        const auto most = hn::Set(d, 20.0f), least = hn::Set(d, -20.0f);
        auto x = hn::IfThenElse(hn::Gt(v, most), most, v);
        x = hn::IfThenElse(hn::Lt(x, least), least, x);
        const auto square = hn::Mul(x, x);
        const auto w = hn::Mul(hn::Mul(x, twice), hn::MulAdd(square, hn::Set(d, 0.044715f), one));
        const auto dw = hn::Mul(twice, hn::MulAdd(square, hn::Set(d, 3 * 0.044715f), one));
        const auto s = Sigmoid(d, w);
        return hn::MulAdd(hn::NegMulAdd(s, s, s), hn::Mul(x, dw), s);
      });
    case FeatureMap::kProduct:
      return ForVectors(dim, [&](auto d, size_t i) HWY_ATTR {
        const auto dy = hn::LoadU(d, h.dy + i);
        hn::StoreU(hn::Mul(dy, hn::LoadU(d, h.x2 + i)), d, h.dx + i);
        hn::StoreU(hn::Mul(dy, hn::LoadU(d, h.x + i)), d, h.dx2 + i);
      });
    case FeatureMap::kSoftmax2: {  // y (dy - sum(dy y)) for the exponents 2 x and -2 x
      const float mean = Dot(h.dy, h.y, 2 * dim);
      return ForVectors(dim, [&](auto d, size_t i) HWY_ATTR {
        const auto m = hn::Set(d, mean);
        const auto up = hn::Mul(hn::LoadU(d, h.y + i), hn::Sub(hn::LoadU(d, h.dy + i), m));
        const auto down =
            hn::Mul(hn::LoadU(d, h.y + dim + i), hn::Sub(hn::LoadU(d, h.dy + dim + i), m));
        const auto half = hn::Sub(up, down);
        hn::StoreU(hn::Add(half, half), d, h.dx + i);
      });
    }
    case FeatureMap::kDpfp:
      return DpfpBackward(dim, h);
  }
}

template <typename T>
void FeatureMapBackwardOf(const FeatureMapBackwardArgs& a, int64_t begin, int64_t end) {
  thread_local std::vector<float> scratch;
  scratch.resize(4 * a.dim + 2 * a.out_dim);
  float* x = scratch.data();
  float* x2 = x + a.dim;
  float* dx = x2 + a.dim;
  float* dx2 = dx + a.dim;
  float* y = dx2 + a.dim;
  float* dy = y + a.out_dim;
  const size_t out_dim = a.out_dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / a.heads, head = i % a.heads;
    const int64_t from = row * a.x_stride + head * a.dim, to = row * a.dx_stride + head * a.dim;
    Convert(static_cast<const T*>(a.x) + from, x, a.dim);
    if (a.x2 != nullptr) Convert(static_cast<const T*>(a.x2) + from, x2, a.dim);
    Convert(static_cast<const T*>(a.dy) + row * a.dy_stride + head * a.out_dim, dy, a.out_dim);
    if (a.normalize || a.map == FeatureMap::kSoftmax2) MapHead(a.map, a.dim, x, x2, y);
    if (a.normalize) {
      const float sum =
          SumVectors(out_dim, [=](auto d, size_t c) HWY_ATTR { return hn::LoadU(d, y + c); });
      const float divisor = sum + 1e-4f;
      const float mean = Dot(dy, y, out_dim) / divisor;
      ForVectors(out_dim, [=](auto d, size_t c) HWY_ATTR {
        const auto across = hn::Sub(hn::LoadU(d, dy + c), hn::Set(d, mean));
        hn::StoreU(hn::Div(across, hn::Set(d, divisor)), d, dy + c);
      });
    }
    HeadBackward(a.map, a.dim, {x, x2, y, dy, dx, dx2});
    Convert(dx, static_cast<T*>(a.dx) + to, a.dim);
    if (a.dx2 != nullptr) Convert(dx2, static_cast<T*>(a.dx2) + to, a.dim);
  }
}

void FeatureMapBackwardHeads(const FeatureMapBackwardArgs& a, int64_t begin, int64_t end) {
  WithActType(a.dtype, [&]<typename T>() { FeatureMapBackwardOf<T>(a, begin, end); });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(FeatureMapBackwardHeads);

void FeatureMapBackward(Device& device, const FeatureMapBackwardArgs& a) {
  const int factor = a.map == FeatureMap::kSoftmax2 ? 2 : a.map == FeatureMap::kDpfp ? 8 : 1;
  GLA_CHECK(a.out_dim == factor * a.dim);
  GLA_CHECK((a.map == FeatureMap::kProduct) == (a.x2 != nullptr));
  GLA_CHECK((a.map == FeatureMap::kProduct) == (a.dx2 != nullptr));
  ParallelFor(device, int64_t{a.rows} * a.heads, a.out_dim * 2 * kExpNs,
              [&](int64_t begin, int64_t end) {
                HWY_DYNAMIC_DISPATCH(FeatureMapBackwardHeads)(a, begin, end);
              });
}

}  // namespace gla
#endif  // HWY_ONCE
