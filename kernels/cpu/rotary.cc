// Rotary position embedding in place: the pair (i, i + K/2) turns by position * base^(-2 i / K).
#include <cmath>
#include <numbers>
#include <vector>

#include "kernels/cpu/common.h"
#include "kernels/kernels.h"

namespace gla {
namespace {

// In double, because a session's positions have no bound: at position 10^6 a float32 angle is wrong
// by several hundredths.
void SinCosOf(int64_t position, const std::vector<double>& frequencies, bool inverse,
              float* cosines, float* sines) {
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double angle = static_cast<double>(position) * frequencies[i];
    cosines[i] = static_cast<float>(std::cos(angle));
    sines[i] = static_cast<float>(inverse ? -std::sin(angle) : std::sin(angle));
  }
}

template <typename T>
void Rotate(T* x, int half, const float* cosines, const float* sines) {
  for (int i = 0; i < half; ++i) {
    const float low = ToFloat(x[i]), high = ToFloat(x[i + half]);
    x[i] = FromFloat<T>(low * cosines[i] - high * sines[i]);
    x[i + half] = FromFloat<T>(high * cosines[i] + low * sines[i]);
  }
}

}  // namespace

void Rotary(Device& device, const RotaryArgs& a) {
  GLA_CHECK(a.dim % 2 == 0);
  const int half = a.dim / 2;
  std::vector<double> frequencies(half);
  for (int i = 0; i < half; ++i) {
    frequencies[i] = std::pow(a.base, -2.0 * i / a.dim);
    if (a.bfloat16_frequencies) {
      frequencies[i] = ToFloat(FromFloat<BFloat16>(static_cast<float>(frequencies[i])));
    }
  }
  WithActType(a.dtype, [&]<typename T>() {
    ParallelFor(device, a.rows, half * 40.0 + a.heads * a.dim, [&](int64_t begin, int64_t end) {
      std::vector<float> cosines(half), sines(half);
      for (int64_t t = begin; t < end; ++t) {
        SinCosOf(a.positions[t], frequencies, a.inverse, cosines.data(), sines.data());
        T* row = static_cast<T*>(a.x) + t * a.x_stride;
        for (int h = 0; h < a.heads; ++h) {
          Rotate(row + h * a.dim, half, cosines.data(), sines.data());
        }
      }
    });
  });
}

}  // namespace gla
