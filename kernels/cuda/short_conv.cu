// Causal depthwise convolution over each sequence, its last inputs carried in a state.
//
// Two launches: all outputs (a thread to each row and channel), then the states. The second may
// write in place what the first one reads, whichever blocks the first one was cut into.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sequences.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxWidth = 8;

// Input `t` of channel c, counted from the sequence's first row in this call; t >= -(width - 1).
template <typename T>
__device__ float InputAt(const ShortConvArgs& a, int seq, int64_t first_row, int64_t t, int c) {
  if (t >= 0) return ToFloat(static_cast<const T*>(a.x)[(first_row + t) * a.x_stride + c]);
  const int slot = a.seqs.read_slots[seq];
  if (slot < 0) return 0.0f;
  return a.state[slot * a.state_stride + (t + a.width - 1) * a.channels + c];
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    ShortConvKernel(const ShortConvArgs a, int blocks_per_row) {
  WaitForPrevious();
  AllowNext();
  const int row = blockIdx.x / blocks_per_row;
  const int c = static_cast<int>(blockIdx.x % blocks_per_row) * kThreads + threadIdx.x;
  if (c >= a.channels) return;
  const int seq = SequenceOf(a.seqs.cu_seqlens, a.seqs.num_seqs, row);
  const int64_t first_row = a.seqs.cu_seqlens[seq];
  float sum = a.bias == nullptr ? 0.0f : a.bias[c];
  for (int w = 0; w < a.width; ++w) {
    const float x = InputAt<T>(a, seq, first_row, row - first_row - (a.width - 1) + w, c);
    sum = fmaf(a.weight[int64_t{c} * a.width + w], x, sum);
  }
  static_cast<T*>(a.y)[row * a.y_stride + c] = FromFloat<T>(a.silu ? Silu(sum) : sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    ShortConvStateKernel(const ShortConvArgs a, int blocks_per_seq) {
  WaitForPrevious();
  AllowNext();
  const int seq = blockIdx.x / blocks_per_seq;
  const int c = static_cast<int>(blockIdx.x % blocks_per_seq) * kThreads + threadIdx.x;
  const int slot = a.seqs.write_slots[seq];
  if (c >= a.channels || slot < 0) return;
  const int64_t first_row = a.seqs.cu_seqlens[seq];
  const int64_t length = a.seqs.cu_seqlens[seq + 1] - first_row;
  const int tail = a.width - 1;
  float last[kMaxWidth];  // read whole before the first write: the slots may be the same
#pragma unroll
  for (int j = 0; j < kMaxWidth; ++j) {
    if (j < tail) last[j] = InputAt<T>(a, seq, first_row, length - tail + j, c);
  }
  float* state = a.state + slot * a.state_stride + c;
#pragma unroll
  for (int j = 0; j < kMaxWidth; ++j) {
    if (j < tail) state[int64_t{j} * a.channels] = last[j];
  }
}

}  // namespace

void ShortConv(Device& device, const ShortConvArgs& a) {
  GLA_REQUIRES(a.width >= 1 && a.width <= kMaxWidth, "the convolution's width is 1 to 8");
  if (a.seqs.num_seqs == 0) return;
  const int blocks = CeilDiv(a.channels, kThreads);
  WithActType(a.dtype, [&]<typename T>() {
    if (a.seqs.num_rows > 0) {
      const unsigned grid = GridOf(int64_t{a.seqs.num_rows} * blocks);
      LaunchOverlapped(device, ShortConvKernel<T>, {.blocks = grid, .threads = kThreads}, a,
                       blocks);
    }
    const unsigned grid = GridOf(int64_t{a.seqs.num_seqs} * blocks);
    LaunchOverlapped(device, ShortConvStateKernel<T>, {.blocks = grid, .threads = kThreads}, a,
                     blocks);
  });
}

}  // namespace gla
