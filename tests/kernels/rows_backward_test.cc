// The gradients of the kernels that take each row, or each channel, by itself.
#include <algorithm>
#include <cmath>
#include <limits>
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
char* RowOf(const DeviceBuffer& buffer, int64_t row, int64_t stride, DType dtype) {
  return buffer.as<char>() + row * stride * static_cast<int64_t>(SizeOf(dtype));
}

// ---- RmsNormBackward ----------------------------------------------------------------------------

struct NormCase {
  int rows, groups, dim;
  bool weight, gate, normalize;
  DType x_dtype, y_dtype;
};

void CheckNorm(const NormCase& c) {
  SCOPED_TRACE(::testing::Message()
               << c.rows << "x" << c.groups << "x" << c.dim << " weight " << c.weight << " gate "
               << c.gate << " normalize " << c.normalize << " " << NameOf(c.x_dtype) << " to "
               << NameOf(c.y_dtype));
  const int width = c.groups * c.dim, x_stride = width + 8, gate_stride = width + 16;
  const int dy_stride = width + 4, dx_stride = width + 12, dgate_stride = width + 2;
  const auto x = Rounded(Normal(c.rows * x_stride, 3, 1), c.x_dtype);
  const auto gate = Rounded(Normal(c.rows * gate_stride, 4, 2), c.y_dtype);
  const auto dy = Rounded(Normal(c.rows * dy_stride, 1, 4), c.y_dtype);
  const auto weight = Normal(c.dim, 1, 3);
  // Of a single value x / |x| is left, whose slope cancels all but eps.
  const float eps = c.dim == 1 ? 1.0f : 1e-5f;
  DeviceBuffer dev_x = UploadAs(x, c.x_dtype), dev_gate = UploadAs(gate, c.y_dtype);
  DeviceBuffer dev_dy = UploadAs(dy, c.y_dtype), dev_weight = Upload(weight);
  DeviceBuffer dx = Poisoned(c.rows * dx_stride, c.x_dtype);
  DeviceBuffer dgate = Poisoned(c.rows * dgate_stride, c.y_dtype);
  const RmsNormBackwardArgs args = {.x = dev_x.data(),
                                    .weight = c.weight ? dev_weight.as<float>() : nullptr,
                                    .gate = c.gate ? dev_gate.data() : nullptr,
                                    .dy = dev_dy.data(),
                                    .dx = dx.data(),
                                    .dgate = c.gate ? dgate.data() : nullptr,
                                    .rows = c.rows,
                                    .groups = c.groups,
                                    .dim = c.dim,
                                    .x_stride = x_stride,
                                    .gate_stride = gate_stride,
                                    .dy_stride = dy_stride,
                                    .dx_stride = dx_stride,
                                    .dgate_stride = dgate_stride,
                                    .eps = eps,
                                    .normalize = c.normalize,
                                    .x_dtype = c.x_dtype,
                                    .y_dtype = c.y_dtype};
  RmsNormBackward(TestDevice(), args);
  Doubles want_dx, want_dgate;
  for (int i = 0; i < c.rows * c.groups; ++i) {
    const int row = i / c.groups, offset = i % c.groups * c.dim;
    Doubles xs = Slice(x, row * x_stride + offset, c.dim);
    Doubles gates = c.gate ? Slice(gate, row * gate_stride + offset, c.dim) : Doubles();
    const Doubles ws = c.weight ? Slice(weight, 0, c.dim) : Doubles();
    const Doubles dys = Slice(dy, row * dy_stride + offset, c.dim);
    const auto loss = [&] {
      return InnerProduct(reference::RmsNorm(xs, ws, gates, args.eps, c.normalize), dys);
    };
    Append(want_dx, FiniteDifferences(xs, loss));
    Append(want_dgate, FiniteDifferences(gates, loss));
  }
  const auto got_dx = DownloadAs(dx, c.rows * dx_stride, c.x_dtype);
  const auto got_dgate = DownloadAs(dgate, c.rows * dgate_stride, c.y_dtype);
  EXPECT_TRUE(IsNear(Columns(got_dx, dx_stride, 0, width), want_dx, RowTolerance(c.x_dtype)));
  EXPECT_TRUE(AllNaN(Columns(got_dx, dx_stride, width, dx_stride - width)));
  if (c.gate) {
    EXPECT_TRUE(
        IsNear(Columns(got_dgate, dgate_stride, 0, width), want_dgate, RowTolerance(c.y_dtype)));
  }
  EXPECT_TRUE(AllNaN(Columns(got_dgate, dgate_stride, c.gate ? width : 0, dgate_stride - width)));

  // Each row alone gives the same bits.
  for (int row = 0; row < c.rows; row += 3) {
    RmsNormBackwardArgs one = args;
    one.x = RowOf(dev_x, row, x_stride, c.x_dtype);
    if (c.gate) one.gate = RowOf(dev_gate, row, gate_stride, c.y_dtype);
    one.dy = RowOf(dev_dy, row, dy_stride, c.y_dtype);
    DeviceBuffer alone = Poisoned(width, c.x_dtype), gate_alone = Poisoned(width, c.y_dtype);
    one.dx = alone.data();
    if (c.gate) one.dgate = gate_alone.data();
    one.rows = 1;
    RmsNormBackward(TestDevice(), one);
    EXPECT_TRUE(IsSameBits(DownloadAs(alone, width, c.x_dtype),
                           std::vector<float>(got_dx.begin() + row * dx_stride,
                                              got_dx.begin() + row * dx_stride + width)));
    if (!c.gate) continue;
    EXPECT_TRUE(IsSameBits(DownloadAs(gate_alone, width, c.y_dtype),
                           std::vector<float>(got_dgate.begin() + row * dgate_stride,
                                              got_dgate.begin() + row * dgate_stride + width)));
  }
}

TEST(RmsNormBackward, EqualsFiniteDifferencesWithEveryOption) {
  for (DType x_dtype : kActTypes) {
    for (DType y_dtype : kActTypes) {
      for (int mask = 0; mask < 8; ++mask) {
        CheckNorm({4, 5, 64, (mask & 1) != 0, (mask & 2) != 0, (mask & 4) != 0, x_dtype, y_dtype});
      }
      CheckNorm({40, 1, 48, true, false, true, x_dtype, y_dtype});
      CheckNorm({2, 1, 1021, true, true, true, x_dtype, y_dtype});
      CheckNorm({3, 3, 100, true, true, true, x_dtype, y_dtype});
      CheckNorm({1, 1, 1, true, false, true, x_dtype, y_dtype});
    }
  }
}

TEST(RmsNormBackward, LargeGatesNeitherOverflowNorVanish) {
  const std::vector<float> x = {1, 1, 1, 1}, gate = {-1000, 1000, -30, 0}, dy = {1, 1, 1, 1};
  DeviceBuffer dev_x = Upload(x), dev_gate = Upload(gate), dev_dy = Upload(dy);
  DeviceBuffer dx = Poisoned(4, DType::kFloat32), dgate = Poisoned(4, DType::kFloat32);
  RmsNormBackward(TestDevice(), {.x = dev_x.data(),
                                 .gate = dev_gate.data(),
                                 .dy = dev_dy.data(),
                                 .dx = dx.data(),
                                 .dgate = dgate.data(),
                                 .rows = 1,
                                 .groups = 1,
                                 .dim = 4,
                                 .x_stride = 4,
                                 .gate_stride = 4,
                                 .dy_stride = 4,
                                 .dx_stride = 4,
                                 .dgate_stride = 4,
                                 .eps = 0,
                                 .normalize = false,
                                 .x_dtype = DType::kFloat32,
                                 .y_dtype = DType::kFloat32});
  const auto gates = Download<float>(dgate, 4), xs = Download<float>(dx, 4);
  EXPECT_EQ(gates[0], 0);
  EXPECT_EQ(gates[1], 1);
  EXPECT_NEAR(gates[2], -29 * std::exp(-30.0), 1e-17);
  EXPECT_EQ(gates[3], 0.5f);
  EXPECT_NEAR(xs[0], 0, 1e-30);
  EXPECT_EQ(xs[1], 1000);
}

// ---- LogSigmoidGateBackward ---------------------------------------------------------------------

TEST(LogSigmoidGateBackward, EqualsFiniteDifferencesWithAndWithoutClamp) {
  const int rows = 9, dim = 52, count = rows * dim;
  const auto x = Normal(count, 4, 1), dy = Normal(count, 1, 2);
  const float clamp = -0.25f;
  DeviceBuffer dev_x = Upload(x), y = Poisoned(count, DType::kFloat32);
  for (const float* bound : {static_cast<const float*>(nullptr), &clamp}) {
    for (float normalizer : {16.0f, 1.0f, 0.1f}) {
      LogSigmoidGate(TestDevice(), {.x = dev_x.as<float>(),
                                    .y = y.as<float>(),
                                    .rows = rows,
                                    .dim = dim,
                                    .normalizer = normalizer,
                                    .clamp_min = bound});
      Doubles xs(x.begin(), x.end()), want(count);
      for (int i = 0; i < count; ++i) {
        Doubles one = {xs[i]};
        want[i] = FiniteDifferences(
            one, [&] { return dy[i] * reference::LogSigmoidGate(one[0], normalizer, bound); })[0];
      }
      for (DType dtype : kActTypes) {
        DeviceBuffer dev_dy = Upload(dy), dx = Poisoned(count, dtype);
        LogSigmoidGateBackwardArgs args = {.y = y.as<float>(),
                                           .dy = dev_dy.as<float>(),
                                           .dx = dx.data(),
                                           .rows = rows,
                                           .dim = dim,
                                           .normalizer = normalizer,
                                           .clamp_min = bound,
                                           .dx_dtype = dtype};
        LogSigmoidGateBackward(TestDevice(), args);
        const auto got = DownloadAs(dx, count, dtype);
        EXPECT_TRUE(IsNear(got, want, RowTolerance(dtype)))
            << "normalizer " << normalizer << " clamp " << (bound != nullptr);
        if (dtype != DType::kFloat32) continue;
        args.dx = dev_dy.data();  // in place
        LogSigmoidGateBackward(TestDevice(), args);
        EXPECT_TRUE(IsSameBits(Download<float>(dev_dy, count), got));
      }
    }
  }
}

TEST(LogSigmoidGateBackward, IsPreciseAtBothEndsAndZeroWhereClamped) {
  // Forward of x: about -exp(-x) and about x, both over 16.
  const std::vector<float> x = {20, -20, 80, -1e30f, 0}, dy = {1, 1, 1, 1, 1};
  const float clamp = -1;
  DeviceBuffer dev_x = Upload(x), dev_dy = Upload(dy);
  DeviceBuffer y = Poisoned(5, DType::kFloat32), dx = Poisoned(5, DType::kFloat32);
  const auto run = [&](const float* bound) {
    LogSigmoidGate(TestDevice(), {.x = dev_x.as<float>(),
                                  .y = y.as<float>(),
                                  .rows = 1,
                                  .dim = 5,
                                  .normalizer = 16,
                                  .clamp_min = bound});
    LogSigmoidGateBackward(TestDevice(), {.y = y.as<float>(),
                                          .dy = dev_dy.as<float>(),
                                          .dx = dx.data(),
                                          .rows = 1,
                                          .dim = 5,
                                          .normalizer = 16,
                                          .clamp_min = bound,
                                          .dx_dtype = DType::kFloat32});
    return Download<float>(dx, 5);
  };
  const auto open = run(nullptr);
  for (int i = 0; i < 5; ++i) {
    const double want = 1 / (1 + std::exp(static_cast<double>(x[i]))) / 16;
    EXPECT_NEAR(open[i], want, 1e-6 * want) << x[i];
  }
  const auto clamped = run(&clamp);
  EXPECT_EQ(clamped[1], 0);
  EXPECT_EQ(clamped[3], 0);
  EXPECT_EQ(clamped[4], open[4]);
}

// ---- FeatureMapBackward -------------------------------------------------------------------------

struct MapCase {
  FeatureMap map;
  DType dtype;
  int dim;
  bool normalize;
};

void CheckMap(const MapCase& c) {
  SCOPED_TRACE(::testing::Message() << "map " << static_cast<int>(c.map) << " dim " << c.dim
                                    << " normalize " << c.normalize << " " << NameOf(c.dtype));
  const int rows = 6, heads = 3, dim = c.dim;
  const bool has_x2 = c.map == FeatureMap::kProduct;
  const int factor = c.map == FeatureMap::kSoftmax2 ? 2 : c.map == FeatureMap::kDpfp ? 8 : 1;
  const int out_dim = factor * dim, x_stride = heads * dim + 8, dy_stride = heads * out_dim + 4;
  const int dx_stride = heads * dim + 12;
  // Positive where the sum divides, so that it stays clear of zero.
  const auto values = [&](uint32_t seed) {
    const size_t n = static_cast<size_t>(rows) * x_stride;
    return Rounded(c.normalize ? Uniform(n, 0.1f, 2, seed) : Normal(n, 2, seed), c.dtype);
  };
  const auto x = values(1), x2 = values(2);
  const auto dy = Rounded(Normal(rows * dy_stride, 1, 3), c.dtype);
  DeviceBuffer dev_x = UploadAs(x, c.dtype), dev_x2 = UploadAs(x2, c.dtype);
  DeviceBuffer dev_dy = UploadAs(dy, c.dtype);
  DeviceBuffer dx = Poisoned(rows * dx_stride, c.dtype), dx2 = Poisoned(rows * dx_stride, c.dtype);
  const FeatureMapBackwardArgs args = {.map = c.map,
                                       .x = dev_x.data(),
                                       .x2 = has_x2 ? dev_x2.data() : nullptr,
                                       .dy = dev_dy.data(),
                                       .dx = dx.data(),
                                       .dx2 = has_x2 ? dx2.data() : nullptr,
                                       .rows = rows,
                                       .heads = heads,
                                       .dim = dim,
                                       .out_dim = out_dim,
                                       .x_stride = x_stride,
                                       .dy_stride = dy_stride,
                                       .dx_stride = dx_stride,
                                       .normalize = c.normalize,
                                       .dtype = c.dtype};
  FeatureMapBackward(TestDevice(), args);
  Doubles want, want2;
  for (int i = 0; i < rows * heads; ++i) {
    Doubles xs = Slice(x, (i / heads) * x_stride + (i % heads) * dim, dim);
    Doubles x2s = Slice(x2, (i / heads) * x_stride + (i % heads) * dim, dim);
    const Doubles dys = Slice(dy, (i / heads) * dy_stride + (i % heads) * out_dim, out_dim);
    const auto loss = [&] {
      return InnerProduct(reference::Map(c.map, xs, x2s, c.normalize), dys);
    };
    Append(want, FiniteDifferences(xs, loss));
    if (has_x2) Append(want2, FiniteDifferences(x2s, loss));
  }
  const double tolerance = c.dtype == DType::kFloat32 ? 2e-6 : 0.004;
  const auto got = DownloadAs(dx, rows * dx_stride, c.dtype);
  const auto got2 = DownloadAs(dx2, rows * dx_stride, c.dtype);
  EXPECT_TRUE(IsNear(Columns(got, dx_stride, 0, heads * dim), want, tolerance));
  EXPECT_TRUE(AllNaN(Columns(got, dx_stride, heads * dim, 12)));
  if (has_x2) {
    EXPECT_TRUE(IsNear(Columns(got2, dx_stride, 0, heads * dim), want2, tolerance));
  }
  FeatureMapBackwardArgs one = args;  // a row alone gives the same bits
  one.x = RowOf(dev_x, 4, x_stride, c.dtype);
  if (has_x2) one.x2 = RowOf(dev_x2, 4, x_stride, c.dtype);
  one.dy = RowOf(dev_dy, 4, dy_stride, c.dtype);
  DeviceBuffer alone = Poisoned(heads * dim, c.dtype);
  one.dx = alone.data();
  one.rows = 1;
  FeatureMapBackward(TestDevice(), one);
  EXPECT_TRUE(IsSameBits(
      DownloadAs(alone, heads * dim, c.dtype),
      std::vector<float>(got.begin() + 4 * dx_stride, got.begin() + 4 * dx_stride + heads * dim)));
}

TEST(FeatureMapBackward, EqualsFiniteDifferencesForEveryMap) {
  for (FeatureMap map :
       {FeatureMap::kIdentity, FeatureMap::kRelu, FeatureMap::kElu, FeatureMap::kSilu,
        FeatureMap::kSigmoid, FeatureMap::kSquaredRelu, FeatureMap::kGelu, FeatureMap::kProduct,
        FeatureMap::kSoftmax2, FeatureMap::kDpfp}) {
    for (DType dtype : kActTypes) {
      for (int dim : {60, 16, 3}) {
        for (bool normalize : {false, true}) CheckMap({map, dtype, dim, normalize});
      }
    }
  }
}

TEST(FeatureMapBackward, LargeValuesGiveFiniteSlopes) {
  const std::vector<float> x = {-3e38f, -200, 0, 200, 3e38f}, dy = {1, 1, 1, 1, 1};
  DeviceBuffer dev_x = Upload(x), dev_dy = Upload(dy);
  const auto slopes = [&](FeatureMap map) {
    DeviceBuffer dx = Poisoned(5, DType::kFloat32);
    FeatureMapBackward(TestDevice(), {.map = map,
                                      .x = dev_x.data(),
                                      .dy = dev_dy.data(),
                                      .dx = dx.data(),
                                      .rows = 1,
                                      .heads = 1,
                                      .dim = 5,
                                      .out_dim = 5,
                                      .x_stride = 5,
                                      .dy_stride = 5,
                                      .dx_stride = 5,
                                      .dtype = DType::kFloat32});
    return Download<float>(dx, 5);
  };
  const std::vector<float> steps = {0, 0, 0.5f, 1, 1};
  EXPECT_TRUE(IsNear(slopes(FeatureMap::kGelu), steps, 1e-6));
  EXPECT_TRUE(IsNear(slopes(FeatureMap::kSilu), steps, 1e-6));
  EXPECT_TRUE(IsNear(slopes(FeatureMap::kSigmoid), Doubles{0, 0, 0.25, 0, 0}, 1e-6));
  EXPECT_TRUE(IsNear(slopes(FeatureMap::kElu), Doubles{0, 0, 1, 1, 1}, 1e-6));
  EXPECT_TRUE(IsNear(slopes(FeatureMap::kRelu), Doubles{0, 0, 0, 1, 1}, 0));
}

// ---- Gradients that need no kernel of their own -------------------------------------------------

TEST(Rotary, TurnedBackIsItsGradient) {
  const std::vector<int64_t> positions = {0, 1, 77, 100000, 3000000000};
  const int rows = static_cast<int>(positions.size()), heads = 2, dim = 20, width = heads * dim;
  const auto x = Normal(rows * width, 1, 1);
  for (DType dtype : kActTypes) {
    const auto dy = Rounded(Normal(rows * width, 1, 2), dtype);
    DeviceBuffer dev_dy = UploadAs(dy, dtype), dev_positions = Upload(positions);
    Rotary(TestDevice(), {.x = dev_dy.data(),
                          .positions = dev_positions.as<int64_t>(),
                          .rows = rows,
                          .heads = heads,
                          .dim = dim,
                          .x_stride = width,
                          .inverse = true,
                          .dtype = dtype});
    Doubles xs(x.begin(), x.end());
    const auto loss = [&] {
      double sum = 0;
      for (int i = 0; i < rows * heads; ++i) {
        for (int j = 0; j < dim / 2; ++j) {
          const double angle =
              static_cast<double>(positions[i / heads]) * std::pow(10000.0, -2.0 * j / dim);
          const int low = i * dim + j, high = low + dim / 2;
          sum += dy[low] * (xs[low] * std::cos(angle) - xs[high] * std::sin(angle));
          sum += dy[high] * (xs[high] * std::cos(angle) + xs[low] * std::sin(angle));
        }
      }
      return sum;
    };
    EXPECT_TRUE(IsNear(DownloadAs(dev_dy, rows * width, dtype), FiniteDifferences(xs, loss),
                       RowTolerance(dtype)));
  }
}

TEST(Matmul, WithTheTransposedWeightIsTheGradientOfItsInput) {
  const int rows = 7, in = 20, out = 36;
  const auto x = Normal(rows * in, 1, 1);
  for (DType dtype : kActTypes) {
    const auto w = Rounded(Normal(out * in, 0.3f, 2), dtype);
    const auto dy = Rounded(Normal(rows * out, 1, 3), dtype);
    std::vector<float> transposed(w.size());
    for (int o = 0; o < out; ++o) {
      for (int i = 0; i < in; ++i) transposed[i * out + o] = w[o * in + i];
    }
    const PackedWeight packed(TestDevice(), {{transposed.data(), DType::kFloat32, in, out}}, dtype);
    DeviceBuffer dev_dy = UploadAs(dy, dtype), dx = Poisoned(rows * in, DType::kFloat32);
    Matmul(TestDevice(), {.x = dev_dy.data(),
                          .weight = &packed,
                          .y = dx.data(),
                          .rows = rows,
                          .x_stride = out,
                          .y_stride = in,
                          .x_dtype = dtype,
                          .y_dtype = DType::kFloat32});
    Doubles want;
    for (int r = 0; r < rows; ++r) {
      std::vector<float> row(x.begin() + r * in, x.begin() + (r + 1) * in);
      Doubles xs(row.begin(), row.end());
      Append(want, FiniteDifferences(xs, [&] {
               double sum = 0;
               for (int o = 0; o < out; ++o) {
                 for (int i = 0; i < in; ++i) sum += dy[r * out + o] * w[o * in + i] * xs[i];
               }
               return sum;
             }));
    }
    EXPECT_TRUE(IsNear(Download<float>(dx, rows * in), want, 1e-6));
  }
}

// ---- All ----------------------------------------------------------------------------------------

TEST(RowsBackward, NoRowsIsNoWork) {
  Device& device = TestDevice();
  const DType f32 = DType::kFloat32;
  RmsNormBackward(device, {.x = nullptr,
                           .dy = nullptr,
                           .dx = nullptr,
                           .rows = 0,
                           .groups = 2,
                           .dim = 4,
                           .x_stride = 8,
                           .dy_stride = 8,
                           .dx_stride = 8,
                           .eps = 1,
                           .x_dtype = f32,
                           .y_dtype = f32});
  LogSigmoidGateBackward(device, {.y = nullptr,
                                  .dy = nullptr,
                                  .dx = nullptr,
                                  .rows = 0,
                                  .dim = 4,
                                  .normalizer = 16,
                                  .dx_dtype = f32});
  FeatureMapBackward(device, {.map = FeatureMap::kRelu,
                              .x = nullptr,
                              .dy = nullptr,
                              .dx = nullptr,
                              .rows = 0,
                              .heads = 2,
                              .dim = 4,
                              .out_dim = 4,
                              .x_stride = 8,
                              .dy_stride = 8,
                              .dx_stride = 8,
                              .dtype = f32});
  device.Synchronize();
}

TEST(RowsBackward, NaNIsNotHidden) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> x = {1, 2, 3, 4}, dy = {1, nan, 1, 1};
  DeviceBuffer dev_x = Upload(x), dev_dy = Upload(dy), dx = Poisoned(4, DType::kFloat32);
  const float clamp = -1;
  DeviceBuffer gate = Upload(std::vector<float>{-0.5f, -0.5f, nan, -2});
  LogSigmoidGateBackward(TestDevice(), {.y = gate.as<float>(),
                                        .dy = dev_dy.as<float>(),
                                        .dx = dx.data(),
                                        .rows = 1,
                                        .dim = 4,
                                        .normalizer = 1,
                                        .clamp_min = &clamp,
                                        .dx_dtype = DType::kFloat32});
  auto got = Download<float>(dx, 4);
  EXPECT_FALSE(std::isnan(got[0]));
  EXPECT_TRUE(std::isnan(got[1]));
  EXPECT_TRUE(std::isnan(got[2]));
  EXPECT_EQ(got[3], 0);
  RmsNormBackward(TestDevice(), {.x = dev_x.data(),
                                 .dy = dev_dy.data(),
                                 .dx = dx.data(),
                                 .rows = 1,
                                 .groups = 1,
                                 .dim = 4,
                                 .x_stride = 4,
                                 .dy_stride = 4,
                                 .dx_stride = 4,
                                 .eps = 0,
                                 .x_dtype = DType::kFloat32,
                                 .y_dtype = DType::kFloat32});
  EXPECT_TRUE(AllNaN(Download<float>(dx, 4)));
}

}  // namespace
}  // namespace gla
