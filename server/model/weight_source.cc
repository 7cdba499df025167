#include "model/weight_source.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "base/status_macros.h"

namespace gla {
namespace {

float FromHalf(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  const uint32_t wide = exponent == 0x1f ? 0xffu : exponent - 15 + 127;
  return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

float FromBFloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

uint16_t ToBFloat16(float x) {  // x is finite
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

HostMatrix AsMatrix(const void* data, DType dtype, absl::Span<const int64_t> shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  const int64_t rows = shape.size() > 1 ? shape[0] : 1;
  return {data, dtype, static_cast<int>(rows), static_cast<int>(rows == 0 ? 0 : count / rows)};
}

// The output function of SplitMix64 (Steele, Lea, Flood 2014).
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t HashName(const std::string& name) {
  uint64_t hash = 0;
  for (const char c : name) hash = Mix(hash + static_cast<unsigned char>(c) + 1);
  return hash;
}

bool EndsWith(const std::string& text, const char* suffix) {
  const size_t size = std::strlen(suffix);
  return text.size() >= size && text.compare(text.size() - size, size, suffix) == 0;
}

}  // namespace

absl::StatusOr<HostWeight> CheckpointSource::Get(const std::string& name,
                                                 absl::Span<const int64_t> shape) {
  GLA_ASSIGN_OR_RETURN(const TensorView* tensor, checkpoint_.Weight(name, shape));
  return HostWeight{AsMatrix(tensor->data, WeightDType(*tensor), shape), {}};
}

absl::StatusOr<HostWeight> RandomWeightSource::Get(const std::string& name,
                                                   absl::Span<const int64_t> shape) {
  HostWeight weight;
  weight.matrix = AsMatrix(nullptr, DType::kBFloat16, shape);
  const int64_t count = int64_t{weight.matrix.rows} * weight.matrix.cols;
  weight.generated.resize(count);
  weight.matrix.data = weight.generated.data();

  const bool is_bias = EndsWith(name, ".bias");
  const bool is_vector = shape.size() == 1 && !is_bias;
  // Uniform in [-a, a) has variance a^2 / 3.
  const float amplitude =
      shape.size() == 1 ? 0.1f : std::sqrt(3.0f / static_cast<float>(weight.matrix.cols));
  const float mean = is_vector ? 1.0f : 0.0f;
  const float scale = amplitude * 0x1p-31f;
  const uint64_t key = Mix(seed_ ^ HashName(name));
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = static_cast<int32_t>(Mix(key + i * 0x9e3779b97f4a7c15u) >> 32);
    weight.generated[i] = ToBFloat16(mean + scale * static_cast<float>(bits));
  }
  return weight;
}

std::vector<uint8_t> ConvertWeight(const HostMatrix& matrix, DType dtype) {
  const size_t count = static_cast<size_t>(matrix.rows) * matrix.cols;
  std::vector<uint8_t> bytes(count * SizeOf(dtype));
  if (bytes.empty()) return bytes;
  if (matrix.dtype == dtype) {
    std::memcpy(bytes.data(), matrix.data, bytes.size());
    return bytes;
  }
  const auto* halves = static_cast<const uint16_t*>(matrix.data);
  const auto* floats = static_cast<const float*>(matrix.data);
  for (size_t i = 0; i < count; ++i) {
    const float value = matrix.dtype == DType::kFloat32    ? floats[i]
                        : matrix.dtype == DType::kBFloat16 ? FromBFloat16(halves[i])
                                                           : FromHalf(halves[i]);
    if (dtype == DType::kFloat32) {
      std::memcpy(&bytes[4 * i], &value, 4);
    } else {
      const uint16_t rounded = ToBFloat16(value);
      std::memcpy(&bytes[2 * i], &rounded, 2);
    }
  }
  return bytes;
}

}  // namespace gla
