// y = gate sigmoid(gate) up.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/swiglu.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

template <typename T>
void SwiGluOf(const SwiGluArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = static_cast<const T*>(a.gate) + r * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + r * a.up_stride;
    T* y = static_cast<T*>(a.y) + r * a.y_stride;
    ForVectors(a.dim, [=](auto d, size_t i) HWY_ATTR {
      StoreFloats(d, hn::Mul(Silu(d, LoadFloats(d, gate + i)), LoadFloats(d, up + i)), y + i);
    });
  }
}

void SwiGluRows(const SwiGluArgs& a, int64_t begin, int64_t end) {
  WithActType(a.dtype, [&]<typename T>() { SwiGluOf<T>(a, begin, end); });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(SwiGluRows);

void SwiGlu(Device& device, const SwiGluArgs& a) {
  ParallelFor(device, a.rows, a.dim * kExpNs, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(SwiGluRows)(a, begin, end);
  });
}

}  // namespace gla
#endif  // HWY_ONCE
