// y = max(log(sigmoid(x + bias)) / normalizer, clamp_min).
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 256;

struct Clamp {
  bool on;
  float min;
};

__global__ void __launch_bounds__(kThreads)
    LogSigmoidGateKernel(const LogSigmoidGateArgs a, Clamp clamp) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= int64_t{a.rows} * a.dim) return;
  float x = a.x[i];
  if (a.bias != nullptr) x += a.bias[i % a.dim];
  // log(sigmoid(x)) = min(x, 0) - log(1 + exp(-|x|)): no overflow, full precision at both ends.
  // A selection and not fminf, fmaxf: those would swallow a NaN.
  float gate = ((x > 0 ? 0.0f : x) - log1pf(expf(-fabsf(x)))) / a.normalizer;
  if (clamp.on && gate < clamp.min) gate = clamp.min;
  a.y[i] = gate;
}

}  // namespace

void LogSigmoidGate(Device& device, const LogSigmoidGateArgs& a) {
  if (a.rows == 0) return;
  const cudaStream_t stream = Queue(device);
  const Clamp clamp = {a.clamp_min != nullptr, a.clamp_min == nullptr ? 0.0f : *a.clamp_min};
  const unsigned grid = GridOf(CeilDiv(int64_t{a.rows} * a.dim, int64_t{kThreads}));
  LogSigmoidGateKernel<<<grid, kThreads, 0, stream>>>(a, clamp);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
