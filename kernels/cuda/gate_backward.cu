// dx = dy (1 - exp(normalizer y)) / normalizer, 0 where y is clamped.
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 256;

struct Clamp {
  bool on;
  float min;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    LogSigmoidGateBackwardKernel(const LogSigmoidGateBackwardArgs a, Clamp clamp) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= int64_t{a.rows} * a.dim) return;
  const float gate = a.y[i];
  // expm1f keeps what 1 - expf() would lose where the gate is open.
  float slope = -expm1f(gate * a.normalizer) / a.normalizer;
  if (clamp.on && gate <= clamp.min) slope = 0;
  static_cast<T*>(a.dx)[i] = FromFloat<T>(a.dy[i] * slope);
}

}  // namespace

void LogSigmoidGateBackward(Device& device, const LogSigmoidGateBackwardArgs& a) {
  const int64_t count = int64_t{a.rows} * a.dim;
  if (count == 0) return;
  const cudaStream_t stream = Queue(device);
  const Clamp clamp = {a.clamp_min != nullptr, a.clamp_min == nullptr ? 0.0f : *a.clamp_min};
  const unsigned grid = GridOf(CeilDiv(count, int64_t{kThreads}));
  WithActType(a.dx_dtype, [&]<typename T>() {
    LogSigmoidGateBackwardKernel<T><<<grid, kThreads, 0, stream>>>(a, clamp);
  });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
