#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/testing/finite_differences.h"
#include "tests/testing/near.h"

namespace gla {
namespace {

using reference::Doubles;

Doubles Slice(const std::vector<float>& from, size_t first, size_t count) {
  return {from.begin() + first, from.begin() + first + count};
}
void Append(Doubles& to, const Doubles& more) { to.insert(to.end(), more.begin(), more.end()); }

struct ConvCase {
  int channels, width;
  bool bias, silu, initial, d_final, d_initial;
  DType dtype;
};
void PrintTo(const ConvCase& c, std::ostream* out) {
  *out << c.channels << "x" << c.width << " bias " << c.bias << " silu " << c.silu << " initial "
       << c.initial << " d_final " << c.d_final << " d_initial " << c.d_initial << " "
       << NameOf(c.dtype);
}

constexpr int kXPad = 8, kDyPad = 4, kDxPad = 12;

struct ConvData {
  ConvData(const ConvCase& c, const std::vector<int>& lengths) {
    cu_seqlens = {0};
    for (int length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
    rows = cu_seqlens.back();
    state_size = lengths.size() * (c.width - 1) * c.channels;
    x = Rounded(Normal(size_t(rows) * (c.channels + kXPad), 1, 1), c.dtype);
    dy = Rounded(Normal(size_t(rows) * (c.channels + kDyPad), 1, 2), c.dtype);
    weight = Normal(c.channels * c.width, 0.7f, 3);
    bias = Normal(c.channels, 1, 4);
    initial = Normal(state_size, 1, 5);
    d_final = Normal(state_size, 1, 6);
  }
  std::vector<int32_t> cu_seqlens;
  int rows;
  size_t state_size;
  std::vector<float> x, dy, weight, bias, initial, d_final;
};

struct ConvGradients {
  std::vector<float> dx;         // [rows, channels]
  std::vector<float> d_initial;  // [N, width - 1, channels]
};

ConvGradients RunConv(const ConvCase& c, const ConvData& in) {
  const size_t states = std::max<size_t>(in.state_size, 1);
  const size_t dx_size = size_t(in.rows) * (c.channels + kDxPad);
  DeviceBuffer x = UploadAs(in.x, c.dtype), dy = UploadAs(in.dy, c.dtype);
  DeviceBuffer weight = Upload(in.weight), bias = Upload(in.bias);
  DeviceBuffer initial = Upload(in.initial), d_final = Upload(in.d_final);
  DeviceBuffer cu = Upload(in.cu_seqlens), dx = Poisoned(dx_size, c.dtype);
  DeviceBuffer d_initial = Poisoned(states, DType::kFloat32);
  ShortConvBackward(TestDevice(), {.x = x.data(),
                                   .weight = weight.as<float>(),
                                   .bias = c.bias ? bias.as<float>() : nullptr,
                                   .initial_state = c.initial ? initial.as<float>() : nullptr,
                                   .dy = dy.data(),
                                   .d_final_state = c.d_final ? d_final.as<float>() : nullptr,
                                   .dx = dx.data(),
                                   .d_initial_state = c.d_initial ? d_initial.as<float>() : nullptr,
                                   .cu_seqlens = cu.as<int32_t>(),
                                   .num_seqs = static_cast<int>(in.cu_seqlens.size()) - 1,
                                   .num_rows = in.rows,
                                   .channels = c.channels,
                                   .width = c.width,
                                   .x_stride = c.channels + kXPad,
                                   .dy_stride = c.channels + kDyPad,
                                   .dx_stride = c.channels + kDxPad,
                                   .silu = c.silu,
                                   .dtype = c.dtype});
  const auto got = DownloadAs(dx, dx_size, c.dtype);
  EXPECT_TRUE(AllNaN(Columns(got, c.channels + kDxPad, c.channels, kDxPad)));
  return {Columns(got, c.channels + kDxPad, 0, c.channels),
          Download<float>(d_initial, in.state_size)};
}

void CheckConv(const ConvCase& c) {
  SCOPED_TRACE(::testing::PrintToString(c));
  const ConvData in(c, {1, 3, 0, 2, 9, 1, 20, 0, 5, 2});
  const ConvGradients got = RunConv(c, in);
  const int tail = c.width - 1, num_seqs = static_cast<int>(in.cu_seqlens.size()) - 1;
  const size_t carried = size_t(tail) * c.channels;
  Doubles want_dx, want_initial;
  for (int n = 0; n < num_seqs; ++n) {
    Doubles inputs(carried, 0.0), dys;  // the state's, then x
    if (c.initial) inputs = Slice(in.initial, n * carried, carried);
    for (int t = in.cu_seqlens[n]; t < in.cu_seqlens[n + 1]; ++t) {
      Append(inputs, Slice(in.x, size_t(t) * (c.channels + kXPad), c.channels));
      Append(dys, Slice(in.dy, size_t(t) * (c.channels + kDyPad), c.channels));
    }
    const Doubles d_final =
        c.d_final ? Slice(in.d_final, n * carried, carried) : Doubles(carried, 0.0);
    const auto gradient = FiniteDifferences(inputs, [&] {
      const Doubles y = reference::ShortConv(
          inputs, in.weight, c.bias ? in.bias : std::vector<float>(), c.channels, c.width, c.silu);
      return InnerProduct(y, dys) +
             InnerProduct(d_final, Doubles(inputs.end() - carried, inputs.end()));
    });
    want_initial.insert(want_initial.end(), gradient.begin(), gradient.begin() + carried);
    want_dx.insert(want_dx.end(), gradient.begin() + carried, gradient.end());
  }
  EXPECT_TRUE(IsNear(got.dx, want_dx, RowTolerance(c.dtype)));
  if (c.d_initial) {
    EXPECT_TRUE(IsNear(got.d_initial, want_initial, 1e-6));
  } else {
    EXPECT_TRUE(AllNaN(got.d_initial));
  }
}

TEST(ShortConvBackward, EqualsFiniteDifferencesWithEveryOption) {
  for (int mask = 0; mask < 32; ++mask) {
    const auto bit = [&](int i) { return (mask >> i & 1) != 0; };
    CheckConv({5, 4, bit(0), bit(1), bit(2), bit(3), bit(4), DType::kFloat32});
  }
  for (DType dtype : kActTypes) {
    for (int width = 1; width <= 8; ++width) {
      CheckConv({3, width, true, true, true, true, true, dtype});
    }
    CheckConv({83, 3, true, true, true, true, true, dtype});
  }
}

TEST(ShortConvBackward, ASequenceIsTheSameAloneAndInAnyBatch) {
  for (DType dtype : kActTypes) {
    const ConvCase c = {70, 4, true, true, true, true, true, dtype};
    const std::vector<int> lengths = {1, 9, 0, 64, 2};
    const ConvData all(c, lengths);
    const ConvGradients together = RunConv(c, all);
    const size_t carried = size_t(c.width - 1) * c.channels;
    for (size_t n = 0; n < lengths.size(); ++n) {
      ConvData one = all;
      one.cu_seqlens = {0, lengths[n]};
      one.rows = lengths[n];
      one.state_size = carried;
      const auto cut = [&](const std::vector<float>& from, size_t stride) {
        return std::vector<float>(from.begin() + all.cu_seqlens[n] * stride,
                                  from.begin() + all.cu_seqlens[n + 1] * stride);
      };
      one.x = cut(all.x, c.channels + kXPad);
      one.dy = cut(all.dy, c.channels + kDyPad);
      one.initial.assign(all.initial.begin() + n * carried,
                         all.initial.begin() + (n + 1) * carried);
      one.d_final.assign(all.d_final.begin() + n * carried,
                         all.d_final.begin() + (n + 1) * carried);
      const ConvGradients alone = RunConv(c, one);
      EXPECT_TRUE(IsSameBits(alone.dx, cut(together.dx, c.channels)));
      EXPECT_TRUE(IsSameBits(alone.d_initial,
                             std::vector<float>(together.d_initial.begin() + n * carried,
                                                together.d_initial.begin() + (n + 1) * carried)));
    }
  }
}

TEST(ShortConvBackward, NoRowsIsNoWork) {
  ShortConvBackward(TestDevice(), {.x = nullptr,
                                   .weight = nullptr,
                                   .dy = nullptr,
                                   .dx = nullptr,
                                   .cu_seqlens = nullptr,
                                   .num_seqs = 0,
                                   .num_rows = 0,
                                   .channels = 4,
                                   .width = 4,
                                   .x_stride = 4,
                                   .dy_stride = 4,
                                   .dx_stride = 4,
                                   .dtype = DType::kFloat32});
  TestDevice().Synchronize();
}

}  // namespace
}  // namespace gla
