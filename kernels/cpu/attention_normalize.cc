// What the normalized operator needs around the recurrence: columns copied and converted, and the
// gradient of the quotient.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_normalize.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <algorithm>

#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

template <typename X, typename Y>
void CopyBlocksOf(const CopyColumnsArgs& a, int64_t block, int64_t begin, int64_t end) {
  const int64_t blocks = (a.cols + block - 1) / block;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / blocks, col = i % blocks * block;
    const int64_t n = std::min(block, a.cols - col);
    Y* y = static_cast<Y*>(a.y) + row * a.y_stride + col;
    if (a.x == nullptr) {
      const float value = a.value;
      ForVectors(n, [=](auto d, size_t c) HWY_ATTR { StoreFloats(d, hn::Set(d, value), y + c); });
    } else {
      Convert(static_cast<const X*>(a.x) + row * a.x_stride + col, y, n);
    }
  }
}

// One item is a block of columns of one row.
void CopyBlocks(const CopyColumnsArgs& a, int64_t block, int64_t begin, int64_t end) {
  WithStoredType(a.x_dtype, [&]<typename X>() {
    WithStoredType(a.y_dtype, [&]<typename Y>() { CopyBlocksOf<X, Y>(a, block, begin, end); });
  });
}

template <typename T>
void QuotientGradientOf(const QuotientGradientArgs& a, int64_t begin, int64_t end) {
  const size_t dim = a.dim;
  for (int64_t r = begin; r < end; ++r) {
    const T* d_o = static_cast<const T*>(a.d_o) + r * a.dim;
    float* sums = a.sums + r * (int64_t{a.dim} + 1);
    const float inverse = 1 / (sums[dim] + 1e-10f);
    sums[dim] = -Dot(d_o, sums, dim) * inverse * inverse;
    ForVectors(dim, [=](auto d, size_t c) HWY_ATTR {
      hn::StoreU(hn::Mul(LoadFloats(d, d_o + c), hn::Set(d, inverse)), d, sums + c);
    });
  }
}

void QuotientGradientRows(const QuotientGradientArgs& a, int64_t begin, int64_t end) {
  WithStoredType(a.dtype, [&]<typename T>() { QuotientGradientOf<T>(a, begin, end); });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(CopyBlocks);
HWY_EXPORT(QuotientGradientRows);

void CopyColumns(Device& device, const CopyColumnsArgs& a) {
  const int64_t block = std::clamp<int64_t>(a.cols, 1, 4096);
  const int64_t items = a.rows * ((a.cols + block - 1) / block);
  const double item_ns = static_cast<double>(block) * kCopyNs;
  ParallelFor(device, items, item_ns, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(CopyBlocks)(a, block, begin, end);
  });
}

void QuotientGradient(Device& device, const QuotientGradientArgs& a) {
  ParallelFor(device, a.rows, 3 * a.dim * kCopyNs, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(QuotientGradientRows)(a, begin, end);
  });
}

}  // namespace gla
#endif  // HWY_ONCE
