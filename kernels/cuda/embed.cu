// y[t] = table[tokens[t]], as float32, and which tokens those are.
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

__global__ void __launch_bounds__(kThreads)
    ResolveTokensKernel(int32_t* tokens, const int32_t* sampled, int rows) {
  const int row = blockIdx.x * kThreads + threadIdx.x;
  if (row < rows && tokens[row] < 0) tokens[row] = max(sampled[~tokens[row]], 0);
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

void ResolveTokens(Device& device, const ResolveTokensArgs& a) {
  if (a.rows == 0) return;
  const cudaStream_t stream = Queue(device);
  ResolveTokensKernel<<<(a.rows + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
      a.tokens, a.sampled, a.rows);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
