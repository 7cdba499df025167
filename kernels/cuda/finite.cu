// finite[t]: is every value of row t finite?
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    FiniteRowsKernel(const float* x, int32_t* finite, int dim) {
  const int64_t row = blockIdx.x;
  int mine = 1;
  for (int i = threadIdx.x; i < dim; i += kThreads) mine &= isfinite(x[row * dim + i]) ? 1 : 0;
  const int all = __syncthreads_and(mine);
  if (threadIdx.x == 0) finite[row] = all != 0 ? 1 : 0;
}

}  // namespace

void FiniteRows(Device& device, const FiniteRowsArgs& a) {
  if (a.rows == 0) return;
  const cudaStream_t stream = Queue(device);
  FiniteRowsKernel<<<GridOf(a.rows), kThreads, 0, stream>>>(a.x, a.finite, a.dim);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
