// y[t] = table[tokens[t]], as float32.
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    EmbedKernel(const int32_t* tokens, const T* table, float* y, int dim) {
  const int64_t row = blockIdx.x;
  const T* from = table + int64_t{tokens[row]} * dim;
  float* to = y + row * dim;
  for (int i = threadIdx.x; i < dim; i += kThreads) to[i] = ToFloat(from[i]);
}

}  // namespace

void Embed(Device& device, const EmbedArgs& a) {
  if (a.rows == 0) return;
  const cudaStream_t stream = Queue(device);
  const auto launch = [&]<typename T>() {
    EmbedKernel<<<GridOf(a.rows), kThreads, 0, stream>>>(a.tokens, static_cast<const T*>(a.table),
                                                         a.y, a.dim);
  };
  if (a.table_dtype == DType::kFloat32) launch.operator()<float>();
  if (a.table_dtype == DType::kBFloat16) launch.operator()<bf16>();
  if (a.table_dtype == DType::kFloat16) launch.operator()<__half>();
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
