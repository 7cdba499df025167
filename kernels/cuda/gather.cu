// y[r] = x[rows[r]].
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    GatherRowsKernel(const float* x, const int32_t* rows, float* y, int dim) {
  const int64_t row = blockIdx.x;
  const float* from = x + int64_t{rows[row]} * dim;
  float* to = y + row * dim;
  for (int i = threadIdx.x; i < dim; i += kThreads) to[i] = from[i];
}

}  // namespace

void GatherRows(Device& device, const GatherRowsArgs& a) {
  if (a.num_rows == 0) return;
  const cudaStream_t stream = Queue(device);
  GatherRowsKernel<<<GridOf(a.num_rows), kThreads, 0, stream>>>(a.x, a.rows, a.y, a.dim);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
