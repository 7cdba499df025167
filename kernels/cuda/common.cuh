// What the files of the CUDA backend share: checks, the device's inside, number types, reductions.
#pragma once

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "kernels/device.h"

namespace gla {

// Prints file, line, expression and reason, and aborts. A CUDA error is sticky: nothing that this
// process could still do on the device would succeed.
[[noreturn]] void Die(const char* file, int line, const char* expression, const char* reason);

// A launch is checked by CUDA_CHECK(cudaGetLastError()) right after it.
#define CUDA_CHECK(expression)                                                 \
  do {                                                                         \
    const cudaError_t error_ = (expression);                                   \
    if (error_ != cudaSuccess) {                                               \
      ::gla::Die(__FILE__, __LINE__, #expression, cudaGetErrorString(error_)); \
    }                                                                          \
  } while (false)

#define CUBLAS_CHECK(expression)                                                     \
  do {                                                                               \
    const cublasStatus_t status_ = (expression);                                     \
    if (status_ != CUBLAS_STATUS_SUCCESS) {                                          \
      ::gla::Die(__FILE__, __LINE__, #expression, cublasLtGetStatusString(status_)); \
    }                                                                                \
  } while (false)

// A violated REQUIRES of kernels.h.
#define GLA_REQUIRES(condition, reason)                                   \
  do {                                                                    \
    if (!(condition)) ::gla::Die(__FILE__, __LINE__, #condition, reason); \
  } while (false)

// What a product's bits depend on beside its inputs; its algorithm, on the range of rows too; see
// matmul.cu.
using MatmulKey = std::array<int64_t, 7>;
constexpr int kMatmulRanges = 4;  // of numbers of rows
using MatmulAlgorithms = std::array<cublasLtMatmulAlgo_t, kMatmulRanges>;

struct Device::Impl {
  static constexpr size_t kSegmentBytes = size_t{4} << 20;
  static constexpr int kNumSegments = 4;

  int ordinal = 0;
  bool poison = false;
  std::string name;
  size_t memory_total = 0;
  size_t max_shared_bytes = 0;  // of one block
  cudaStream_t stream = nullptr;
  // For SideBySide: a stream of lower priority, and the events where it begins and ends.
  cudaStream_t second_stream = nullptr;
  cudaEvent_t forked = nullptr, joined = nullptr;
  // The next launch waits for an event, not only for the launch before it (launch.cuh).
  bool after_event = false;
  cublasLtHandle_t cublas = nullptr;
  // cuBLASLt's kernels count tiles there; sums are never split over it (matmul.cu).
  static constexpr size_t kCublasBytes = 4096;
  void* cublas_workspace = nullptr;
  std::map<MatmulKey, std::optional<MatmulAlgorithms>> matmul_algorithms;

  // A ring of pinned memory that uploads pass through: the host's source is free at once, and the
  // host waits only when it is a whole ring ahead of the device.
  char* staging = nullptr;
  cudaEvent_t segment_copied[kNumSegments] = {};
  int segment = 0;
  size_t segment_used = 0;

  // Makes this the calling thread's current device. Every entry point goes through here or Queue().
  void Use();
};

// The stream to launch on, with the device made current.
inline cudaStream_t Queue(Device& device) {
  device.impl().Use();
  return device.impl().stream;
}

// ---- Numbers ------------------------------------------------------------------------------------

using bf16 = __nv_bfloat16;

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(bf16 x) { return __bfloat162float(x); }
__device__ inline float ToFloat(__half x) { return __half2float(x); }

template <typename T>
__device__ T FromFloat(float x);
template <>
__device__ inline float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 FromFloat<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half FromFloat<__half>(float x) {
  return __float2half_rn(x);
}

__device__ inline float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float Silu(float x) { return x / (1.0f + expf(-x)); }
// The derivative of Silu.
__device__ inline float SiluSlope(float x) {
  const float s = Sigmoid(x);
  return fmaf(x, fmaf(-s, s, s), s);
}

// Four neighbours at once; `p` is aligned to four elements.
__device__ inline float4 LoadFour(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ inline float4 LoadFour(const bf16* p) {
  const uint2 bits = *reinterpret_cast<const uint2*>(p);
  return {__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xFFFF0000u),
          __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xFFFF0000u)};
}
__device__ inline float4 LoadFour(const __half* p) {
  const uint2 bits = *reinterpret_cast<const uint2*>(p);
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&bits.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&bits.y));
  return {low.x, low.y, high.x, high.y};
}
__device__ inline void StoreFour(float* p, float4 x) { *reinterpret_cast<float4*>(p) = x; }
__device__ inline void StoreFour(bf16* p, float4 x) {
  __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(p) = *reinterpret_cast<const uint2*>(pairs);
}
__device__ inline void StoreFour(__half* p, float4 x) {
  __half2 pairs[2] = {__floats2half2_rn(x.x, x.y), __floats2half2_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(p) = *reinterpret_cast<const uint2*>(pairs);
}

template <typename T>
__device__ void LoadFour(const T* p, float (&x)[4]) {
  const float4 four = LoadFour(p);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

// The first `count` (at most four) of four neighbours, zeros after; no alignment needed.
template <typename T>
__device__ float4 LoadUpToFour(const T* p, int count) {
  return {count > 0 ? ToFloat(p[0]) : 0.0f, count > 1 ? ToFloat(p[1]) : 0.0f,
          count > 2 ? ToFloat(p[2]) : 0.0f, count > 3 ? ToFloat(p[3]) : 0.0f};
}

// Calls f.template operator()<T>() with the C++ type of an activation dtype.
template <typename F>
void WithActType(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) return f.template operator()<float>();
  GLA_REQUIRES(dtype == DType::kBFloat16, "activations are float32 or bfloat16");
  f.template operator()<bf16>();
}

// The same for the inputs of the linear-attention operators, which may be float16 too.
template <typename F>
void WithInputType(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f.template operator()<float>();
    case DType::kBFloat16:
      return f.template operator()<bf16>();
    case DType::kFloat16:
      return f.template operator()<__half>();
  }
}

// ---- Reductions: in an order that depends on the block's size only
// --------------------------------

template <typename T>
__device__ T WarpSum(T x) {
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, mask);
  return x;
}

__device__ inline float WarpMax(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, mask));
  return x;
}

// The sum over a block of kThreads, in every thread. `shared` holds kThreads / 32 values.
template <int kThreads, typename T>
__device__ T BlockSum(T x, T* shared) {
  x = WarpSum(x);
  __syncthreads();  // `shared` may still be read by an earlier call
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = shared[0];
  for (int w = 1; w < kThreads / 32; ++w) sum += shared[w];
  return sum;
}

// ---- Sizes --------------------------------------------------------------------------------------

template <typename T>
__host__ __device__ constexpr T CeilDiv(T a, T b) {
  return (a + b - 1) / b;
}
template <typename T>
__host__ __device__ constexpr T RoundUp(T a, T b) {
  return CeilDiv(a, b) * b;
}

// Elements from row to row of a PackedWeight: rows start at 16 bytes, zeros after `in`.
inline int64_t WeightStride(int in, DType dtype) {
  return RoundUp<int64_t>(in, 16 / static_cast<int64_t>(SizeOf(dtype)));
}

// More than 48 KiB of a block's shared memory, static arrays included, must be asked for.
template <typename Kernel>
void AllowShared(Kernel* kernel, size_t bytes) {
  if (bytes <= size_t{40} << 10) return;  // 8 KiB are enough for those
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)));
}

// Of one-dimensional grids: x goes to 2^31 - 1, y and z stop at 65535.
inline unsigned GridOf(int64_t blocks) {
  GLA_REQUIRES(blocks > 0 && blocks < (int64_t{1} << 31), "the grid of one launch");
  return static_cast<unsigned>(blocks);
}

inline bool IsAligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace gla
