// y = gate sigmoid(gate) up, four neighbours to a thread.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 256;

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) SwiGluKernel(const SwiGluArgs a, int blocks_per_row) {
  WaitForPrevious();
  AllowNext();
  const int64_t row = blockIdx.x / blocks_per_row;
  const int i = 4 * (static_cast<int>(blockIdx.x % blocks_per_row) * kThreads + threadIdx.x);
  const int count = min(a.dim - i, 4);
  if (count <= 0) return;
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + i;
  const T* up = static_cast<const T*>(a.up) + row * a.up_stride + i;
  T* y = static_cast<T*>(a.y) + row * a.y_stride + i;
  if (kAligned && count == 4) {
    const float4 g = LoadFour(gate), u = LoadFour(up);
    StoreFour(y, {Silu(g.x) * u.x, Silu(g.y) * u.y, Silu(g.z) * u.z, Silu(g.w) * u.w});
  } else {
    for (int j = 0; j < count; ++j) y[j] = FromFloat<T>(Silu(ToFloat(gate[j])) * ToFloat(up[j]));
  }
}

}  // namespace

void SwiGlu(Device& device, const SwiGluArgs& a) {
  if (a.rows == 0) return;
  const int blocks_per_row = CeilDiv(a.dim, 4 * kThreads);
  const unsigned grid = GridOf(int64_t{a.rows} * blocks_per_row);
  WithActType(a.dtype, [&]<typename T>() {
    const size_t four = 4 * sizeof(T);
    const bool aligned = IsAligned(a.gate, four) && IsAligned(a.up, four) && IsAligned(a.y, four) &&
                         a.gate_stride % 4 == 0 && a.up_stride % 4 == 0 && a.y_stride % 4 == 0;
    LaunchOverlapped(device, aligned ? SwiGluKernel<T, true> : SwiGluKernel<T, false>,
                     {.blocks = grid, .threads = kThreads}, a, blocks_per_row);
  });
}

}  // namespace gla
