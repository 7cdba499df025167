// What the files of the CPU backend share: checks, 16-bit numbers, the device's inside.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <unordered_map>

#include "kernels/cpu/thread_pool.h"
#include "kernels/device.h"

// Aborts with file, line and expression: a violated REQUIRES of kernels.h.
#define GLA_CHECK(condition)                                                             \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)

namespace gla {

struct BFloat16 {
  uint16_t bits;
};
static_assert(sizeof(BFloat16) == 2);

inline float ToFloat(float x) { return x; }
inline float ToFloat(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

struct Float16 {
  uint16_t bits;
};
inline float ToFloat(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31, mantissa = x.bits & 0x3FF;
  if (exponent == 0) {  // zero and subnormal
    const float value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wide << 23 | mantissa << 13);
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <typename T>
T FromFloat(float x);
template <>
inline float FromFloat<float>(float x) {
  return x;
}
template <>
inline BFloat16 FromFloat<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = std::isnan(x) ? bits | 0x400000u : bits + 0x7FFFu + ((bits >> 16) & 1);
  return {static_cast<uint16_t>(rounded >> 16)};
}
template <>
inline Float16 FromFloat<Float16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  uint32_t half;
  if (size >= 0x47800000) {  // 65536 and above, infinity, NaN
    half = size > 0x7F800000 ? 0x7E00 : 0x7C00;
  } else if (size < 0x38800000) {  // below 2^-14; 1/2 has the last place of float16's subnormals
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3F000000;
  } else {
    half = (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// Calls f.template operator()<T>() with the C++ type of an activation dtype.
template <typename F>
void WithActType(DType dtype, const F& f) {
  GLA_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16);
  if (dtype == DType::kFloat32) {
    f.template operator()<float>();
  } else {
    f.template operator()<BFloat16>();
  }
}

// As WithActType, float16 too: what checkpoints store and the linear-attention operators take.
template <typename F>
void WithStoredType(DType dtype, const F& f) {
  if (dtype == DType::kFloat16) {
    f.template operator()<Float16>();
  } else {
    WithActType(dtype, f);
  }
}

struct Device::Impl {
  explicit Impl(int num_threads) : pool(num_threads) {}

  ThreadPool pool;
  std::string name;
  bool poison = false;
  size_t memory_total = 0;
  size_t allocated = 0;
  std::unordered_map<void*, size_t> sizes;  // of what Allocate() gave
};

// f(begin, end) over [0, n), shared among the device's threads when it is worth it.
template <typename F>
void ParallelFor(Device& device, int64_t n, double item_ns, const F& f) {
  device.impl().pool.ParallelFor(n, item_ns, f);
}

// Rough costs for `item_ns`, of one element.
inline constexpr double kCopyNs = 0.1;  // load, a few operations, store
inline constexpr double kExpNs = 0.8;   // with an exponential
inline constexpr double kMulAddNs = 0.05;

}  // namespace gla
