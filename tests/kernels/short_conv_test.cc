#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/slots.h"
#include "tests/testing/near.h"

namespace gla {
namespace {

struct Case {
  int channels, width;
  bool bias, silu;
  DType dtype;
};

struct Result {
  std::vector<float> y;      // [rows, y_stride]
  std::vector<float> state;  // [slots, state_stride]
};

constexpr int kXPad = 8, kYPad = 16, kStatePad = 3;

struct Inputs {
  Inputs(const Case& c, int rows, int slots)
      : state_stride((c.width - 1) * c.channels + kStatePad),
        x(Rounded(Normal(size_t(rows) * (c.channels + kXPad), 1, 1), c.dtype)),
        weight(Normal(c.channels * c.width, 1, 2)),
        bias(Normal(c.channels, 1, 3)),
        state(Normal(size_t(slots) * state_stride, 1, 4)) {}

  int state_stride;
  std::vector<float> x, weight, bias, state;
};

Result RunConv(const Case& c, const Inputs& in, const Ragged& seqs, const std::vector<float>& x,
               const std::vector<float>& state) {
  DeviceBuffer dx = UploadAs(x, c.dtype), dw = Upload(in.weight), db = Upload(in.bias);
  DeviceBuffer dstate = Upload(state);
  const size_t y_size = size_t(seqs.num_rows()) * (c.channels + kYPad);
  DeviceBuffer dy = Poisoned(std::max<size_t>(y_size, 1), c.dtype);
  ShortConv(TestDevice(), {.x = dx.data(),
                           .weight = dw.as<float>(),
                           .bias = c.bias ? db.as<float>() : nullptr,
                           .y = dy.data(),
                           .state = dstate.as<float>(),
                           .state_stride = in.state_stride,
                           .seqs = seqs.view(),
                           .channels = c.channels,
                           .width = c.width,
                           .x_stride = c.channels + kXPad,
                           .y_stride = c.channels + kYPad,
                           .silu = c.silu,
                           .dtype = c.dtype});
  return {DownloadAs(dy, y_size, c.dtype), Download<float>(dstate, state.size())};
}

void Check(const Case& c) {
  for (int shift = 0; shift < 5; ++shift) {
    const Ragged seqs({1, 3, 0, 2, 9, 1, 64, 0, 5, 2}, shift, 10 + shift);
    const Inputs in(c, seqs.num_rows(), seqs.num_slots);
    const Result got = RunConv(c, in, seqs, in.x, in.state);
    const int tail = c.width - 1;
    reference::Doubles want;
    std::vector<float> want_state = in.state;
    for (int n = 0; n < seqs.num_seqs(); ++n) {
      std::vector<float> inputs(size_t(tail + seqs.lengths[n]) * c.channels,
                                0.0f);  // state, then x
      if (seqs.read_slots[n] >= 0) {
        std::copy_n(in.state.begin() + size_t(seqs.read_slots[n]) * in.state_stride,
                    tail * c.channels, inputs.begin());
      }
      for (int t = 0; t < seqs.lengths[n]; ++t) {
        std::copy_n(in.x.begin() + size_t(seqs.cu_seqlens[n] + t) * (c.channels + kXPad),
                    c.channels, inputs.begin() + size_t(tail + t) * c.channels);
      }
      for (int t = 0; t < seqs.lengths[n]; ++t) {
        for (int i = 0; i < c.channels; ++i) {
          double sum = c.bias ? in.bias[i] : 0;
          for (int w = 0; w < c.width; ++w) {
            sum += static_cast<double>(in.weight[i * c.width + w]) *
                   inputs[size_t(t + w) * c.channels + i];
          }
          want.push_back(c.silu ? reference::Silu(sum) : sum);
        }
      }
      if (seqs.write_slots[n] >= 0) {  // the last inputs, exactly
        std::copy_n(inputs.end() - tail * c.channels, tail * c.channels,
                    want_state.begin() + size_t(seqs.write_slots[n]) * in.state_stride);
      }
    }
    EXPECT_TRUE(
        IsNear(Columns(got.y, c.channels + kYPad, 0, c.channels), want, RowTolerance(c.dtype)))
        << c.channels << "x" << c.width << " bias " << c.bias << " silu " << c.silu << " shift "
        << shift;
    EXPECT_TRUE(AllNaN(Columns(got.y, c.channels + kYPad, c.channels, kYPad)));
    EXPECT_TRUE(IsSameBits(got.state, want_state)) << "shift " << shift;
  }
}

TEST(ShortConv, EqualsArithmeticAndCarriesItsInputs) {
  for (DType dtype : kActTypes) {
    for (bool bias : {false, true}) {
      for (bool silu : {false, true}) Check({128, 4, bias, silu, dtype});
    }
    for (int width = 1; width <= 8; ++width) Check({20, width, true, true, dtype});
    Check({1, 4, false, true, dtype});
    Check({331, 4, false, true, dtype});
  }
}

TEST(ShortConv, CutAnywhereAndCarriedOnEqualsWhole) {
  for (DType dtype : kActTypes) {
    const Case c = {72, 4, true, true, dtype};
    const int len = 40, stride = c.channels + kXPad, y_stride = c.channels + kYPad;
    const Ragged whole({len}, 0, 1);  // in place
    const Inputs in(c, len, whole.num_slots);
    const Result want = RunConv(c, in, whole, in.x, in.state);
    std::vector<float> state = in.state, y;
    int done = 0;
    for (int piece : {1, 1, 2, 0, 3, 17, 1, 15}) {
      const Ragged part({piece}, 0, 1);
      const std::vector<float> x(in.x.begin() + done * stride,
                                 in.x.begin() + (done + piece) * stride);
      const Result got = RunConv(c, in, part, x, state);
      y.insert(y.end(), got.y.begin(), got.y.end());
      state = got.state;
      done += piece;
    }
    ASSERT_EQ(done, len);
    EXPECT_TRUE(
        IsSameBits(Columns(y, y_stride, 0, c.channels), Columns(want.y, y_stride, 0, c.channels)));
    EXPECT_TRUE(IsSameBits(state, want.state));
  }
}

}  // namespace
}  // namespace gla
