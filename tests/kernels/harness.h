// What the kernel tests share: a device with poisoned memory, and tensors that go to it and back.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "kernels/kernels.h"

namespace gla {

// The device of all kernel tests. Every allocation is filled with NaN.
inline Device& TestDevice() {
  static const std::unique_ptr<Device> device = [] {
    std::string error;
    auto opened = Device::Open({.num_threads = 3, .poison = true}, &error);
    if (opened == nullptr) std::fprintf(stderr, "%s\n", error.c_str()), std::abort();
    return opened;
  }();
  return *device;
}

inline bool OnCuda() { return std::string(Device::backend()) == "cuda"; }

inline uint16_t ToBf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float FromBf16(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

inline uint16_t ToF16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | 0x7E00;
  const double size = std::abs(static_cast<double>(x));
  if (size >= 65520) return sign | 0x7C00;  // halfway to what would be the next number
  if (size == 0) return sign;
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // log2 of the last place
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  // Units from 1024 on carry into the exponent, and 2048 of them once more.
  return static_cast<uint16_t>(sign | (((unit + 24) << 10) + units));
}
inline float FromF16(uint16_t x) {
  const int exponent = x >> 10 & 31, mantissa = x & 1023;
  float size = std::ldexp(static_cast<float>(mantissa + (exponent > 0 ? 1024 : 0)),
                          std::max(exponent, 1) - 25);
  if (exponent == 31) size = mantissa > 0 ? NAN : INFINITY;
  return (x & 0x8000) != 0 ? -size : size;
}

inline uint16_t ToNarrow(float x, DType dtype) {
  return dtype == DType::kBFloat16 ? ToBf16(x) : ToF16(x);
}
inline float FromNarrow(uint16_t x, DType dtype) {
  return dtype == DType::kBFloat16 ? FromBf16(x) : FromF16(x);
}

// `values` as `dtype` holds them.
inline std::vector<float> Rounded(std::vector<float> values, DType dtype) {
  if (dtype != DType::kFloat32) {
    for (float& x : values) x = FromNarrow(ToNarrow(x, dtype), dtype);
  }
  return values;
}

inline std::vector<float> Uniform(size_t n, float low, float high, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> distribution(low, high);
  std::vector<float> values(n);
  for (float& x : values) x = distribution(random);
  return values;
}
inline std::vector<float> Normal(size_t n, float deviation, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(n);
  for (float& x : values) x = distribution(random);
  return values;
}

template <typename T>
DeviceBuffer Upload(const std::vector<T>& values) {
  DeviceBuffer buffer(TestDevice(), values.size() * sizeof(T));
  TestDevice().Upload(buffer.data(), values.data(), values.size() * sizeof(T));
  return buffer;
}
template <typename T>
std::vector<T> Download(const DeviceBuffer& buffer, size_t n) {
  std::vector<T> values(n);
  TestDevice().Download(values.data(), buffer.data(), n * sizeof(T));
  return values;
}

inline DeviceBuffer UploadAs(const std::vector<float>& values, DType dtype) {
  if (dtype == DType::kFloat32) return Upload(values);
  std::vector<uint16_t> narrow(values.size());
  for (size_t i = 0; i < values.size(); ++i) narrow[i] = ToNarrow(values[i], dtype);
  return Upload(narrow);
}
inline std::vector<float> DownloadAs(const DeviceBuffer& buffer, size_t n, DType dtype) {
  if (dtype == DType::kFloat32) return Download<float>(buffer, n);
  const std::vector<uint16_t> narrow = Download<uint16_t>(buffer, n);
  std::vector<float> values(n);
  for (size_t i = 0; i < n; ++i) values[i] = FromNarrow(narrow[i], dtype);
  return values;
}

inline DeviceBuffer Poisoned(size_t n, DType dtype) {
  return DeviceBuffer(TestDevice(), n * SizeOf(dtype));
}

// Columns [first, first + count) of the rows of a [rows, stride] array.
inline std::vector<float> Columns(const std::vector<float>& from, size_t stride, size_t first,
                                  size_t count) {
  std::vector<float> result;
  for (size_t row = 0; row + stride <= from.size(); row += stride) {
    result.insert(result.end(), from.begin() + row + first, from.begin() + row + first + count);
  }
  return result;
}
inline bool AllNaN(const std::vector<float>& values) {
  for (float x : values) {
    if (!std::isnan(x)) return false;
  }
  return true;
}

// Both activation types, and how far a result may be from arithmetic (RMS ratio).
inline constexpr DType kActTypes[] = {DType::kFloat32, DType::kBFloat16};
inline double RowTolerance(DType dtype) { return dtype == DType::kFloat32 ? 1e-6 : 0.004; }
// The linear-attention operators also take float16.
inline constexpr DType kAttentionTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
inline double StateTolerance(DType dtype) { return dtype == DType::kFloat32 ? 1e-4 : 0.005; }

}  // namespace gla
