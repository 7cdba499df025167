// Rotary position embedding in place: the pair (i, i + K/2) turns by position * base^(-2 i / K).
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 128;

// One block to a row. The angle is found in double, because a session's positions have no bound: at
// position 10^6 a float32 angle is wrong by several hundredths. Each thread shares it among heads.
template <typename T>
__global__ void __launch_bounds__(kThreads) RotaryKernel(const RotaryArgs a) {
  WaitForPrevious();
  AllowNext();
  const int64_t row = blockIdx.x;
  const int half = a.dim / 2;
  const double position = static_cast<double>(a.positions[row]);
  for (int i = threadIdx.x; i < half; i += kThreads) {
    double frequency = pow(static_cast<double>(a.base), -2.0 * i / a.dim);
    if (a.bfloat16_frequencies) {
      frequency = ToFloat(FromFloat<bf16>(static_cast<float>(frequency)));
    }
    double sine, cosine;
    sincos(position * frequency, &sine, &cosine);
    const float c = static_cast<float>(cosine), s = static_cast<float>(a.inverse ? -sine : sine);
    T* x = static_cast<T*>(a.x) + row * a.x_stride + i;
    for (int h = 0; h < a.heads; ++h, x += a.dim) {
      const float low = ToFloat(x[0]), high = ToFloat(x[half]);
      x[0] = FromFloat<T>(low * c - high * s);
      x[half] = FromFloat<T>(high * c + low * s);
    }
  }
}

}  // namespace

void Rotary(Device& device, const RotaryArgs& a) {
  GLA_REQUIRES(a.dim % 2 == 0, "pairs of dimensions");
  if (a.rows == 0) return;
  WithActType(a.dtype, [&]<typename T>() {
    LaunchOverlapped(device, RotaryKernel<T>, {.blocks = GridOf(a.rows), .threads = kThreads}, a);
  });
}

}  // namespace gla
