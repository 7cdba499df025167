// Vector helpers of the CPU kernels, compiled once per instruction set.
//
// A kernel file includes Highway's foreach_target.h and then this header; what stands between
// HWY_BEFORE_NAMESPACE and HWY_AFTER_NAMESPACE is compiled for each instruction set, and the best
// one the machine has is chosen at the first call.

// The usual guard, once per instruction set.
#if defined(GLA_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GLA_KERNELS_CPU_SIMD_INL_H_
#undef GLA_KERNELS_CPU_SIMD_INL_H_
#else
#define GLA_KERNELS_CPU_SIMD_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/common.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using OneFloatTag = hn::CappedTag<float, 1>;

template <class D>
HWY_INLINE hn::Vec<D> LoadFloats(D d, const float* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadFloats(D d, const BFloat16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<uint32_t, D> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

template <class D>
HWY_INLINE hn::Vec<D> LoadFloats(D d, const Float16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<uint32_t, D> d32;
  const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p)));
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(d32, 0x8000)));
  const auto size = hn::ShiftLeft<13>(hn::And(bits, hn::Set(d32, 0x7FFF)));
  const auto exponent = hn::And(size, hn::Set(d32, 0x0F800000));
  const auto bias = hn::Set(d32, 112 << 23);
  const auto normal = hn::Add(size, bias);
  // Zero and subnormals: one step of exponent higher, and its hidden one taken away again.
  const auto lowest = hn::Set(d32, 113 << 23);
  const auto small =
      hn::BitCast(d32, hn::Sub(hn::BitCast(d, hn::Add(size, lowest)), hn::BitCast(d, lowest)));
  const auto finite = hn::IfThenElse(hn::Eq(exponent, hn::Zero(d32)), small, normal);
  const auto special = hn::Add(normal, bias);  // infinity, NaN
  const auto wide = hn::IfThenElse(hn::Eq(exponent, hn::Set(d32, 0x0F800000)), special, finite);
  return hn::BitCast(d, hn::Or(sign, wide));
}

template <class D>
HWY_INLINE void StoreFloats([[maybe_unused]] D d, hn::Vec<D> v, float* p) {
  hn::StoreU(v, d, p);
}
template <class D>
HWY_INLINE void StoreFloats([[maybe_unused]] D d, hn::Vec<D> v, BFloat16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::RebindToUnsigned<D> d32;
  const hn::RebindToSigned<D> di32;
  const auto bits = hn::BitCast(d32, v);
  const auto lsb = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
  const auto nearest = hn::Add(bits, hn::Add(lsb, hn::Set(d32, 0x7FFF)));
  const auto quiet_nan = hn::Or(bits, hn::Set(d32, 0x400000));
  const auto is_nan = hn::RebindMask(d32, hn::Ne(v, v));
  const auto high = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet_nan, nearest));
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di32, high)), d16, reinterpret_cast<uint16_t*>(p));
}

template <class D>
HWY_INLINE void StoreFloats([[maybe_unused]] D d, hn::Vec<D> v, Float16* p) {  // FromFloat<Float16>
  const hn::Rebind<uint16_t, D> d16;
  const hn::RebindToSigned<D> d32;
  const auto bits = hn::BitCast(d32, v);
  const auto size = hn::And(bits, hn::Set(d32, 0x7FFFFFFF));
  const auto sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 0x8000));
  const auto special = hn::IfThenElse(hn::Gt(size, hn::Set(d32, 0x7F800000)), hn::Set(d32, 0x7E00),
                                      hn::Set(d32, 0x7C00));
  const auto half = hn::Set(d, 0.5f);
  const auto small =
      hn::Sub(hn::BitCast(d32, hn::Add(hn::BitCast(d, size), half)), hn::BitCast(d32, half));
  const auto lsb = hn::And(hn::ShiftRight<13>(size), hn::Set(d32, 1));
  const auto normal =
      hn::ShiftRight<13>(hn::Add(size, hn::Add(lsb, hn::Set(d32, 0xFFF - 0x38000000))));
  const auto finite = hn::IfThenElse(hn::Lt(size, hn::Set(d32, 0x38800000)), small, normal);
  const auto result = hn::IfThenElse(hn::Lt(size, hn::Set(d32, 0x47800000)), finite, special);
  hn::StoreU(hn::DemoteTo(d16, hn::Or(sign, result)), d16, reinterpret_cast<uint16_t*>(p));
}

// f(d, i): whole vectors from i = 0 on, then single elements, until n. Which of the two an element
// meets depends on its place in the row only, never on the row.
template <class F>
HWY_INLINE void ForVectors(size_t n, const F& f) {
  const FloatTag d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) f(d, i);
  for (; i < n; ++i) f(OneFloatTag(), i);
}

// Sums f(d, i) over [0, n) in a fixed order.
template <class F>
HWY_INLINE float SumVectors(size_t n, const F& f) {
  const FloatTag d;
  const size_t lanes = hn::Lanes(d);
  auto sum0 = hn::Zero(d), sum1 = hn::Zero(d);
  size_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    sum0 = hn::Add(sum0, f(d, i));
    sum1 = hn::Add(sum1, f(d, i + lanes));
  }
  for (; i + lanes <= n; i += lanes) sum0 = hn::Add(sum0, f(d, i));
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(sum0, sum1)));
  for (; i < n; ++i) sum += hn::GetLane(f(OneFloatTag(), i));
  return sum;
}

template <class A, class B>
HWY_INLINE float Dot(const A* a, const B* b, size_t n) {
  return SumVectors(n, [=](auto d, size_t i) HWY_ATTR {
    return hn::Mul(LoadFloats(d, a + i), LoadFloats(d, b + i));
  });
}

// y += factor * x
HWY_INLINE void AddScaled(float factor, const float* x, float* y, size_t n) {
  ForVectors(n, [=](auto d, size_t i) HWY_ATTR {
    hn::StoreU(hn::MulAdd(hn::Set(d, factor), hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, y + i);
  });
}

template <class A, class B>
HWY_INLINE void Convert(const A* from, B* to, size_t n) {
  ForVectors(n,
             [=](auto d, size_t i) HWY_ATTR { StoreFloats(d, LoadFloats(d, from + i), to + i); });
}

// exp(x) for x <= 0 or NaN; 0 below what float32 holds.
template <class D, class V>
HWY_INLINE V ExpOfNegative(D d, V x) {
  // Below -104 the result is 0 anyway; the bound keeps Exp within its range also for -inf.
  const V bounded = hn::IfThenElse(hn::Lt(x, hn::Set(d, -105.0f)), hn::Set(d, -105.0f), x);
  return hn::Exp(d, bounded);
}

template <class D, class V>
HWY_INLINE V Sigmoid(D d, V x) {
  const V one = hn::Set(d, 1.0f);
  const V e = ExpOfNegative(d, hn::Neg(hn::Abs(x)));
  return hn::Div(hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one), hn::Add(one, e));
}

template <class D, class V>
HWY_INLINE V Silu(D d, V x) {
  return hn::Mul(x, Sigmoid(d, x));
}

// The derivative of Silu.
template <class D, class V>
HWY_INLINE V SiluSlope(D d, V x) {
  const V s = Sigmoid(d, x);
  return hn::MulAdd(x, hn::NegMulAdd(s, s, s), s);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#endif  // GLA_KERNELS_CPU_SIMD_INL_H_
