// The gradient of the causal depthwise convolution, for its rows and the inputs carried into them.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/short_conv_backward.cc"
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

// Channels [c0, c0 + n) of sequence `seq`. A window of the last `width` inputs slides over the rows
// and with it the sums of their gradients: an input's is done when it leaves.
template <typename T>
void ConvBackwardBlock(const ShortConvBackwardArgs& a, int seq, int c0, int n) {
  const int width = a.width, tail = a.width - 1;
  const int64_t first = a.cu_seqlens[seq], len = a.cu_seqlens[seq + 1] - first;
  const auto state_at = [&](auto* states, int64_t j) {
    return states + (int64_t{seq} * tail + j) * a.channels + c0;
  };
  float weight[kMaxWidth][kBlock], window[kMaxWidth][kBlock], sums[kMaxWidth][kBlock];
  for (int w = 0; w < width; ++w) {
    for (int c = 0; c < n; ++c) weight[w][c] = a.weight[(c0 + c) * width + w];
  }
  for (int w = 0; w < tail; ++w) {
    std::fill_n(sums[w], n, 0.0f);
    if (a.initial_state == nullptr) {
      std::fill_n(window[w], n, 0.0f);
    } else {
      Convert(state_at(a.initial_state, w), window[w], n);
    }
  }
  // The gradient of the input `s` rows after the first one in this call.
  const auto store = [&](int64_t s, const float* gradient) {
    if (s >= 0) {
      Convert(gradient, static_cast<T*>(a.dx) + (first + s) * a.dx_stride + c0, n);
    } else if (a.d_initial_state != nullptr) {
      Convert(gradient, state_at(a.d_initial_state, s + tail), n);
    }
  };
  const float* bias = a.bias == nullptr ? nullptr : a.bias + c0;
  const bool silu = a.silu;
  for (int64_t t = 0; t < len; ++t) {
    Convert(static_cast<const T*>(a.x) + (first + t) * a.x_stride + c0, window[tail], n);
    std::fill_n(sums[tail], n, 0.0f);
    const T* dy = static_cast<const T*>(a.dy) + (first + t) * a.dy_stride + c0;
    ForVectors(n, [&](auto d, size_t c) HWY_ATTR {
      auto dp = LoadFloats(d, dy + c);
      if (silu) {
        auto p = bias == nullptr ? hn::Zero(d) : hn::LoadU(d, bias + c);
        for (int w = 0; w < width; ++w) {
          p = hn::MulAdd(hn::LoadU(d, weight[w] + c), hn::LoadU(d, window[w] + c), p);
        }
        dp = hn::Mul(dp, SiluSlope(d, p));
      }
      for (int w = 0; w < width; ++w) {
        const auto sum = hn::LoadU(d, sums[w] + c);
        hn::StoreU(hn::MulAdd(hn::LoadU(d, weight[w] + c), dp, sum), d, sums[w] + c);
      }
    });
    store(t - tail, sums[0]);
    for (int w = 0; w < tail; ++w) {
      Convert(window[w + 1], window[w], n);
      Convert(sums[w + 1], sums[w], n);
    }
  }
  for (int w = 0; w < tail; ++w) {  // what is left is the final state
    if (a.d_final_state != nullptr) AddScaled(1.0f, state_at(a.d_final_state, w), sums[w], n);
    store(len - tail + w, sums[w]);
  }
}

void ConvBackwardBlocks(const ShortConvBackwardArgs& a, int64_t begin, int64_t end) {
  const int blocks = (a.channels + kBlock - 1) / kBlock;
  for (int64_t i = begin; i < end; ++i) {
    const int seq = static_cast<int>(i / blocks), c0 = static_cast<int>(i % blocks) * kBlock;
    WithActType(a.dtype, [&]<typename T>() {
      ConvBackwardBlock<T>(a, seq, c0, std::min(kBlock, a.channels - c0));
    });
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(ConvBackwardBlocks);

void ShortConvBackward(Device& device, const ShortConvBackwardArgs& a) {
  GLA_CHECK(a.width >= 1 && a.width <= 8);
  const int64_t items = int64_t{a.num_seqs} * ((a.channels + 63) / 64);
  const double rows = static_cast<double>(a.num_rows) / std::max(1, a.num_seqs);
  ParallelFor(device, items, 64 * (1 + 2 * rows), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(ConvBackwardBlocks)(a, begin, end);
  });
}

}  // namespace gla
#endif  // HWY_ONCE
