// Causal depthwise convolution over each sequence, its last inputs carried in a state.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/short_conv.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <algorithm>

#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

constexpr int kMaxWidth = 8;
constexpr int kBlock = 64;  // channels at a time

// Channels [c0, c0 + n) of sequence `seq`. A window of the last `width` inputs slides over the
// rows.
template <typename T>
void ConvBlock(const ShortConvArgs& a, int seq, int c0, int n) {
  const int width = a.width, tail = a.width - 1;
  const int32_t read = a.seqs.read_slots[seq], write = a.seqs.write_slots[seq];
  float weight[kMaxWidth][kBlock], window[kMaxWidth][kBlock];  // window[w]: input t - tail + w
  for (int w = 0; w < width; ++w) {
    for (int c = 0; c < n; ++c) weight[w][c] = a.weight[(c0 + c) * width + w];
  }
  for (int w = 0; w < tail; ++w) {
    if (read < 0) {
      std::fill_n(window[w], n, 0.0f);
    } else {
      Convert(a.state + read * a.state_stride + static_cast<int64_t>(w) * a.channels + c0,
              window[w], n);
    }
  }
  const float* bias = a.bias == nullptr ? nullptr : a.bias + c0;
  const bool silu = a.silu;
  for (int64_t t = a.seqs.cu_seqlens[seq]; t < a.seqs.cu_seqlens[seq + 1]; ++t) {
    Convert(static_cast<const T*>(a.x) + t * a.x_stride + c0, window[tail], n);
    T* y = static_cast<T*>(a.y) + t * a.y_stride + c0;
    ForVectors(n, [&](auto d, size_t c) HWY_ATTR {
      auto sum = bias == nullptr ? hn::Zero(d) : hn::LoadU(d, bias + c);
      for (int w = 0; w < width; ++w) {
        sum = hn::MulAdd(hn::LoadU(d, weight[w] + c), hn::LoadU(d, window[w] + c), sum);
      }
      if (silu) sum = Silu(d, sum);
      StoreFloats(d, sum, y + c);
    });
    for (int w = 0; w < tail; ++w) Convert(window[w + 1], window[w], n);
  }
  if (write < 0) return;
  for (int w = 0; w < tail; ++w) {
    Convert(window[w], a.state + write * a.state_stride + static_cast<int64_t>(w) * a.channels + c0,
            n);
  }
}

void ConvBlocks(const ShortConvArgs& a, int64_t begin, int64_t end) {
  const int blocks = (a.channels + kBlock - 1) / kBlock;
  for (int64_t i = begin; i < end; ++i) {
    const int seq = static_cast<int>(i / blocks), c0 = static_cast<int>(i % blocks) * kBlock;
    WithActType(a.dtype,
                [&]<typename T>() { ConvBlock<T>(a, seq, c0, std::min(kBlock, a.channels - c0)); });
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(ConvBlocks);

void ShortConv(Device& device, const ShortConvArgs& a) {
  GLA_CHECK(a.width >= 1 && a.width <= 8);
  const int64_t items = int64_t{a.seqs.num_seqs} * ((a.channels + 63) / 64);
  const double rows = static_cast<double>(a.seqs.num_rows) / std::max(1, a.seqs.num_seqs);
  ParallelFor(device, items, 64 * (1 + rows), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(ConvBlocks)(a, begin, end);
  });
}

}  // namespace gla
#endif  // HWY_ONCE
