// The kernels that take each row by itself.
#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/testing/near.h"

namespace gla {
namespace {

using reference::Doubles;
constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(Embed, PicksRowsOfTheTable) {
  const int vocab = 37, dim = 20;
  const std::vector<int32_t> tokens = {0, 36, 5, 5, 17};
  for (DType dtype : kActTypes) {
    const auto table = Rounded(Normal(vocab * dim, 1, 1), dtype);
    DeviceBuffer dtable = UploadAs(table, dtype), dtokens = Upload(tokens);
    DeviceBuffer y = Poisoned(tokens.size() * dim, DType::kFloat32);
    Embed(TestDevice(), {.tokens = dtokens.as<int32_t>(),
                         .table = dtable.data(),
                         .y = y.as<float>(),
                         .rows = static_cast<int>(tokens.size()),
                         .dim = dim,
                         .table_dtype = dtype});
    std::vector<float> want;
    for (int token : tokens) {
      want.insert(want.end(), table.begin() + token * dim, table.begin() + (token + 1) * dim);
    }
    EXPECT_TRUE(IsSameBits(Download<float>(y, want.size()), want));
  }
}

TEST(GatherRows, PicksRows) {
  const int dim = 33;
  const auto x = Normal(50 * dim, 1, 2);
  const std::vector<int32_t> rows = {49, 0, 7, 7};
  DeviceBuffer dx = Upload(x), drows = Upload(rows),
               y = Poisoned(rows.size() * dim, DType::kFloat32);
  GatherRows(TestDevice(), {.x = dx.as<float>(),
                            .rows = drows.as<int32_t>(),
                            .y = y.as<float>(),
                            .num_rows = static_cast<int>(rows.size()),
                            .dim = dim});
  std::vector<float> want;
  for (int r : rows) want.insert(want.end(), x.begin() + r * dim, x.begin() + (r + 1) * dim);
  EXPECT_TRUE(IsSameBits(Download<float>(y, want.size()), want));
}

TEST(FiniteRows, OneValueDecidesAboutItsRowAlone) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const int dim : {1, 33, 256, 1000}) {
    const int rows = 70;
    auto x = Normal(rows * dim, 1, 3);
    std::vector<int32_t> want(rows, 1);
    for (int t = 0; t < rows; t += 3) {
      x[t * dim + (t * 7) % dim] = t % 9 == 0 ? nan : t % 9 == 3 ? kInf : -kInf;
      want[t] = 0;
    }
    x[1 * dim] = std::numeric_limits<float>::max();
    x[2 * dim] = std::numeric_limits<float>::denorm_min();
    DeviceBuffer dx = Upload(x), dfinite = Poisoned(rows, DType::kFloat32);
    FiniteRows(TestDevice(),
               {.x = dx.as<float>(), .finite = dfinite.as<int32_t>(), .rows = rows, .dim = dim});
    EXPECT_EQ(Download<int32_t>(dfinite, rows), want) << dim;
  }
}

// ---- RmsNorm ------------------------------------------------------------------------------------

struct NormCase {
  int rows, groups, dim;
  bool weight, gate, normalize;
  DType x_dtype, y_dtype;
};

void CheckNorm(const NormCase& c) {
  const int width = c.groups * c.dim, x_stride = width + 8, gate_stride = width + 16;
  const int y_stride = width + 4;
  const auto x = Rounded(Normal(c.rows * x_stride, 3, 1), c.x_dtype);
  const auto gate = Rounded(Normal(c.rows * gate_stride, 4, 2), c.y_dtype);
  const auto weight = Normal(c.dim, 1, 3);
  DeviceBuffer dx = UploadAs(x, c.x_dtype), dgate = UploadAs(gate, c.y_dtype);
  DeviceBuffer dweight = Upload(weight), dy = Poisoned(c.rows * y_stride, c.y_dtype);
  const RmsNormArgs args = {.x = dx.data(),
                            .weight = c.weight ? dweight.as<float>() : nullptr,
                            .gate = c.gate ? dgate.data() : nullptr,
                            .y = dy.data(),
                            .rows = c.rows,
                            .groups = c.groups,
                            .dim = c.dim,
                            .x_stride = x_stride,
                            .gate_stride = c.gate ? gate_stride : 0,
                            .y_stride = y_stride,
                            .eps = 1e-5f,
                            .normalize = c.normalize,
                            .x_dtype = c.x_dtype,
                            .y_dtype = c.y_dtype};
  RmsNorm(TestDevice(), args);
  Doubles want;
  for (int i = 0; i < c.rows * c.groups; ++i) {
    const int row = i / c.groups, group = i % c.groups;
    const float* from = x.data() + row * x_stride + group * c.dim;
    double squares = 0;
    for (int j = 0; j < c.dim; ++j) squares += static_cast<double>(from[j]) * from[j];
    const double scale = c.normalize ? 1 / std::sqrt(squares / c.dim + 1e-5) : 1;
    for (int j = 0; j < c.dim; ++j) {
      double v = from[j] * scale * (c.weight ? weight[j] : 1);
      if (c.gate) v *= reference::Silu(gate[row * gate_stride + group * c.dim + j]);
      want.push_back(v);
    }
  }
  const auto y = DownloadAs(dy, c.rows * y_stride, c.y_dtype);
  EXPECT_TRUE(IsNear(Columns(y, y_stride, 0, width), want, RowTolerance(c.y_dtype)))
      << c.rows << "x" << c.groups << "x" << c.dim << " weight " << c.weight << " gate " << c.gate
      << " normalize " << c.normalize << " " << NameOf(c.x_dtype) << " to " << NameOf(c.y_dtype);
  EXPECT_TRUE(AllNaN(Columns(y, y_stride, width, y_stride - width)));

  // Each row alone gives the same bits.
  for (int row = 0; row < c.rows; row += 3) {
    RmsNormArgs one = args;
    one.x = dx.as<char>() + size_t(row) * x_stride * SizeOf(c.x_dtype);
    if (c.gate) one.gate = dgate.as<char>() + size_t(row) * gate_stride * SizeOf(c.y_dtype);
    DeviceBuffer alone = Poisoned(width, c.y_dtype);
    one.y = alone.data();
    one.rows = 1;
    RmsNorm(TestDevice(), one);
    EXPECT_TRUE(IsSameBits(
        DownloadAs(alone, width, c.y_dtype),
        std::vector<float>(y.begin() + row * y_stride, y.begin() + row * y_stride + width)));
  }
}

TEST(RmsNorm, EqualsArithmeticWithEveryOption) {
  for (DType x_dtype : kActTypes) {
    for (DType y_dtype : kActTypes) {
      for (int mask = 0; mask < 8; ++mask) {
        CheckNorm({7, 5, 64, (mask & 1) != 0, (mask & 2) != 0, (mask & 4) != 0, x_dtype, y_dtype});
      }
      CheckNorm({40, 1, 256, true, false, true, x_dtype, y_dtype});
      CheckNorm({3, 1, 1021, true, false, true, x_dtype, y_dtype});
      CheckNorm({3, 3, 100, true, true, true, x_dtype, y_dtype});
      CheckNorm({2, 2, 640, true, true, true, x_dtype, y_dtype});
      CheckNorm({1, 1, 1, true, false, true, x_dtype, y_dtype});
    }
  }
}

TEST(RmsNorm, LargeGatesNeitherOverflowNorVanish) {
  const std::vector<float> x = {1, 1, 1, 1}, gate = {-1000, 1000, -30, 0};
  DeviceBuffer dx = Upload(x), dgate = Upload(gate), dy = Poisoned(4, DType::kFloat32);
  RmsNorm(TestDevice(), {.x = dx.data(),
                         .gate = dgate.data(),
                         .y = dy.data(),
                         .rows = 1,
                         .groups = 1,
                         .dim = 4,
                         .x_stride = 4,
                         .gate_stride = 4,
                         .y_stride = 4,
                         .eps = 0,
                         .x_dtype = DType::kFloat32,
                         .y_dtype = DType::kFloat32});
  const auto y = Download<float>(dy, 4);
  EXPECT_NEAR(y[0], 0, 1e-30);
  EXPECT_FLOAT_EQ(y[1], 1000);
  EXPECT_NEAR(y[2], -30 * std::exp(-30.0), 1e-17);
  EXPECT_EQ(y[3], 0);
}

// ---- SwiGlu -------------------------------------------------------------------------------------

TEST(SwiGlu, EqualsArithmetic) {
  for (DType dtype : kActTypes) {
    for (int dim : {1, 60, 768}) {
      const int rows = 5, stride = 2 * dim + 8, y_stride = dim + 8;
      const auto both = Rounded(Normal(rows * stride, 4, 1), dtype);
      DeviceBuffer dx = UploadAs(both, dtype), dy = Poisoned(rows * y_stride, dtype);
      SwiGlu(TestDevice(), {.gate = dx.data(),
                            .up = dx.as<char>() + dim * SizeOf(dtype),
                            .y = dy.data(),
                            .rows = rows,
                            .dim = dim,
                            .gate_stride = stride,
                            .up_stride = stride,
                            .y_stride = y_stride,
                            .dtype = dtype});
      Doubles want;
      for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < dim; ++i) {
          want.push_back(reference::Silu(both[r * stride + i]) * both[r * stride + dim + i]);
        }
      }
      const auto y = DownloadAs(dy, rows * y_stride, dtype);
      EXPECT_TRUE(IsNear(Columns(y, y_stride, 0, dim), want, RowTolerance(dtype))) << dim;
      EXPECT_TRUE(AllNaN(Columns(y, y_stride, dim, 8)));
    }
  }
}

// ---- LogSigmoidGate -----------------------------------------------------------------------------

TEST(LogSigmoidGate, EqualsArithmeticWithAndWithoutBiasAndClamp) {
  const int rows = 9, dim = 52;
  auto x = Normal(rows * dim, 6, 1);
  x[0] = -500, x[1] = 500, x[2] = 0, x[3] = -1e30f, x[4] = 1e30f;
  const auto bias = Normal(dim, 2, 2);
  const float clamp = -0.25f;
  DeviceBuffer dx = Upload(x), dbias = Upload(bias);
  for (bool with_bias : {false, true}) {
    for (bool with_clamp : {false, true}) {
      for (float normalizer : {16.0f, 1.0f, 0.1f}) {
        DeviceBuffer dy = Poisoned(rows * dim, DType::kFloat32);
        LogSigmoidGate(TestDevice(), {.x = dx.as<float>(),
                                      .bias = with_bias ? dbias.as<float>() : nullptr,
                                      .y = dy.as<float>(),
                                      .rows = rows,
                                      .dim = dim,
                                      .normalizer = normalizer,
                                      .clamp_min = with_clamp ? &clamp : nullptr});
        const auto y = Download<float>(dy, rows * dim);
        for (int i = 0; i < rows * dim; ++i) {
          const double v = static_cast<double>(x[i]) + (with_bias ? bias[i % dim] : 0);
          double want = (std::min(v, 0.0) - std::log1p(std::exp(-std::abs(v)))) / normalizer;
          if (with_clamp) want = std::max<double>(want, clamp);
          ASSERT_NEAR(y[i], want, 3e-6 * std::abs(want) + 1e-37) << "x " << v;
        }
      }
    }
  }
}

TEST(LogSigmoidGate, WorksInPlace) {
  const auto x = Normal(100, 3, 3);
  DeviceBuffer a = Upload(x), b = Poisoned(100, DType::kFloat32);
  const auto run = [&](float* y) {
    LogSigmoidGate(TestDevice(),
                   {.x = a.as<float>(), .y = y, .rows = 4, .dim = 25, .normalizer = 16});
  };
  run(b.as<float>());
  run(a.as<float>());
  EXPECT_TRUE(IsSameBits(Download<float>(a, 100), Download<float>(b, 100)));
}

TEST(GateProjection, EqualsArithmeticForEveryWidth) {
  const float clamp = -0.25f;
  for (const int in : {1, 5, 16, 64, 65, 200}) {
    for (const int rows : {1, 8, 21}) {
      for (DType dtype : kActTypes) {
        const int out = 133, stride = (in + 7) / 8 * 8 + 8;
        const auto x = Rounded(Normal(rows * stride, 1, 1), dtype);
        const auto weight = Rounded(Normal(out * in, 1, 2), dtype);
        const auto bias = Normal(out, 2, 3);
        DeviceBuffer dx = UploadAs(x, dtype), dbias = Upload(bias);
        const PackedWeight packed(TestDevice(), {{.data = weight.data(), .rows = out, .cols = in}},
                                  dtype);
        for (const bool with_bias_and_clamp : {false, true}) {
          DeviceBuffer dy = Poisoned(rows * out, DType::kFloat32);
          GateProjection(TestDevice(), {.x = dx.data(),
                                        .weight = &packed,
                                        .bias = with_bias_and_clamp ? dbias.as<float>() : nullptr,
                                        .y = dy.as<float>(),
                                        .rows = rows,
                                        .x_stride = stride,
                                        .x_dtype = dtype,
                                        .normalizer = 16,
                                        .clamp_min = with_bias_and_clamp ? &clamp : nullptr});
          const auto y = Download<float>(dy, rows * out);
          for (int r = 0; r < rows; ++r) {
            for (int c = 0; c < out; ++c) {
              double sum = with_bias_and_clamp ? bias[c] : 0, size = std::abs(sum);
              for (int i = 0; i < in; ++i) {
                const double term = static_cast<double>(x[r * stride + i]) * weight[c * in + i];
                sum += term, size += std::abs(term);
              }
              const double want =
                  reference::LogSigmoidGate(sum, 16, with_bias_and_clamp ? &clamp : nullptr);
              ASSERT_NEAR(y[r * out + c], want, 1e-6 * (1 + size) / 16) << in << " x " << rows;
            }
          }
        }
      }
    }
  }
}

TEST(GateProjection, ARowsBitsDependOnThatRowAlone) {
  const int in = 16, out = 512, rows = 37;
  for (DType dtype : kActTypes) {
    const auto x = Normal(rows * in, 1, 1), weight = Normal(out * in, 1, 2);
    DeviceBuffer dx = UploadAs(x, dtype);
    const PackedWeight packed(TestDevice(), {{.data = weight.data(), .rows = out, .cols = in}},
                              dtype);
    const auto run = [&](int first, int count) {
      DeviceBuffer dy = Poisoned(count * out, DType::kFloat32);
      GateProjection(TestDevice(), {.x = dx.as<char>() + first * in * SizeOf(dtype),
                                    .weight = &packed,
                                    .y = dy.as<float>(),
                                    .rows = count,
                                    .x_stride = in,
                                    .x_dtype = dtype,
                                    .normalizer = 16});
      return Download<float>(dy, count * out);
    };
    const auto all = run(0, rows);
    for (int r = 0; r < rows; ++r) {
      EXPECT_TRUE(IsSameBits(run(r, 1), {all.begin() + r * out, all.begin() + (r + 1) * out})) << r;
    }
  }
}

// ---- Feature maps -------------------------------------------------------------------------------

TEST(FeatureMap, EqualsArithmeticForEveryMap) {
  const FeatureMap maps[] = {FeatureMap::kIdentity, FeatureMap::kRelu,    FeatureMap::kElu,
                             FeatureMap::kSilu,     FeatureMap::kSigmoid, FeatureMap::kSquaredRelu,
                             FeatureMap::kGelu,     FeatureMap::kProduct, FeatureMap::kSoftmax2,
                             FeatureMap::kDpfp};
  const int rows = 6, heads = 3;
  for (FeatureMap map : maps) {
    for (DType dtype : kActTypes) {
      for (int dim : {60, 16, 1}) {
        for (bool normalize : {false, true}) {
          const int factor = map == FeatureMap::kSoftmax2 ? 2 : map == FeatureMap::kDpfp ? 8 : 1;
          const int out_dim = factor * dim, x_stride = heads * dim + 8,
                    y_stride = heads * out_dim + 8;
          // Positive where the sum divides, so that it stays clear of zero.
          auto x = normalize ? Uniform(rows * x_stride, 0.1f, 2, 1) : Normal(rows * x_stride, 2, 1);
          x = Rounded(x, dtype);
          auto x2 =
              normalize ? Uniform(rows * x_stride, 0.1f, 2, 2) : Normal(rows * x_stride, 2, 2);
          x2 = Rounded(x2, dtype);
          DeviceBuffer dx = UploadAs(x, dtype), dx2 = UploadAs(x2, dtype);
          DeviceBuffer dy = Poisoned(rows * y_stride, dtype);
          FeatureMapArgs args = {.map = map,
                                 .x = dx.data(),
                                 .x2 = map == FeatureMap::kProduct ? dx2.data() : nullptr,
                                 .y = dy.data(),
                                 .rows = rows,
                                 .heads = heads,
                                 .dim = dim,
                                 .out_dim = out_dim,
                                 .x_stride = x_stride,
                                 .y_stride = y_stride,
                                 .normalize = normalize,
                                 .dtype = dtype};
          ApplyFeatureMap(TestDevice(), args);
          Doubles want;
          for (int i = 0; i < rows * heads; ++i) {
            const size_t from = (i / heads) * x_stride + (i % heads) * dim;
            const Doubles y = reference::Map(map, Doubles(&x[from], &x[from] + dim),
                                             Doubles(&x2[from], &x2[from] + dim), normalize);
            want.insert(want.end(), y.begin(), y.end());
          }
          const auto y = DownloadAs(dy, rows * y_stride, dtype);
          EXPECT_TRUE(IsNear(Columns(y, y_stride, 0, heads * out_dim), want,
                             dtype == DType::kFloat32 ? 2e-6 : 0.004))
              << "map " << static_cast<int>(map) << " dim " << dim << " normalize " << normalize;
          EXPECT_TRUE(AllNaN(Columns(y, y_stride, heads * out_dim, 8)));
          if (factor == 1) {  // in place
            args.y = dx.data();
            args.y_stride = x_stride;
            ApplyFeatureMap(TestDevice(), args);
            EXPECT_TRUE(IsSameBits(
                Columns(DownloadAs(dx, rows * x_stride, dtype), x_stride, 0, heads * dim),
                Columns(y, y_stride, 0, heads * dim)));
          }
        }
      }
    }
  }
}

TEST(FeatureMap, Softmax2OfLargeValuesIsFinite) {
  const std::vector<float> x = {300, -400, 0, 1};
  DeviceBuffer dx = Upload(x), dy = Poisoned(8, DType::kFloat32);
  ApplyFeatureMap(TestDevice(), {.map = FeatureMap::kSoftmax2,
                                 .x = dx.data(),
                                 .y = dy.data(),
                                 .rows = 1,
                                 .heads = 1,
                                 .dim = 4,
                                 .out_dim = 8,
                                 .x_stride = 4,
                                 .y_stride = 8,
                                 .dtype = DType::kFloat32});
  EXPECT_TRUE(IsNear(Download<float>(dy, 8), Doubles{0, 0, 0, 0, 0, 1, 0, 0}, 1e-6));
}

// ---- Rotary -------------------------------------------------------------------------------------

TEST(Rotary, TurnsPairsByTheirPosition) {
  const std::vector<int64_t> positions = {0, 1, 2, 77, 2047, 100000, 3000000000};
  const int rows = static_cast<int>(positions.size()), heads = 3;
  for (DType dtype : kActTypes) {
    for (int dim : {2, 60, 64}) {
      const int stride = heads * dim + 8;
      const auto x = Rounded(Normal(rows * stride, 1, 1), dtype);
      DeviceBuffer dx = UploadAs(x, dtype), dpositions = Upload(positions);
      Rotary(TestDevice(), {.x = dx.data(),
                            .positions = dpositions.as<int64_t>(),
                            .rows = rows,
                            .heads = heads,
                            .dim = dim,
                            .x_stride = stride,
                            .dtype = dtype});
      Doubles want(x.begin(), x.end());
      for (int t = 0; t < rows; ++t) {
        for (int h = 0; h < heads; ++h) {
          for (int i = 0; i < dim / 2; ++i) {
            const double angle =
                static_cast<double>(positions[t]) * std::pow(10000.0, -2.0 * i / dim);
            const int low = t * stride + h * dim + i, high = low + dim / 2;
            want[low] = x[low] * std::cos(angle) - x[high] * std::sin(angle);
            want[high] = x[high] * std::cos(angle) + x[low] * std::sin(angle);
          }
        }
      }
      EXPECT_TRUE(IsNear(DownloadAs(dx, rows * stride, dtype), want, RowTolerance(dtype))) << dim;
    }
  }
}

TEST(Rows, NoRowsIsNoWork) {
  Device& device = TestDevice();
  const DType f32 = DType::kFloat32;
  Embed(
      device,
      {.tokens = nullptr, .table = nullptr, .y = nullptr, .rows = 0, .dim = 4, .table_dtype = f32});
  GatherRows(device, {.x = nullptr, .rows = nullptr, .y = nullptr, .num_rows = 0, .dim = 4});
  FiniteRows(device, {.x = nullptr, .finite = nullptr, .rows = 0, .dim = 4});
  RmsNorm(device, {.x = nullptr,
                   .y = nullptr,
                   .rows = 0,
                   .groups = 2,
                   .dim = 4,
                   .x_stride = 8,
                   .y_stride = 8,
                   .eps = 1,
                   .x_dtype = f32,
                   .y_dtype = f32});
  SwiGlu(device, {.gate = nullptr,
                  .up = nullptr,
                  .y = nullptr,
                  .rows = 0,
                  .dim = 4,
                  .gate_stride = 4,
                  .up_stride = 4,
                  .y_stride = 4,
                  .dtype = f32});
  LogSigmoidGate(device, {.x = nullptr, .y = nullptr, .rows = 0, .dim = 4, .normalizer = 16});
  const std::vector<float> one = {1};
  const PackedWeight weight(device, {{.data = one.data(), .rows = 1, .cols = 1}}, f32);
  GateProjection(device, {.x = nullptr,
                          .weight = &weight,
                          .y = nullptr,
                          .rows = 0,
                          .x_stride = 1,
                          .x_dtype = f32,
                          .normalizer = 16});
  ApplyFeatureMap(device, {.map = FeatureMap::kRelu,
                           .x = nullptr,
                           .y = nullptr,
                           .rows = 0,
                           .heads = 2,
                           .dim = 4,
                           .out_dim = 4,
                           .x_stride = 8,
                           .y_stride = 8,
                           .dtype = f32});
  Rotary(device, {.x = nullptr,
                  .positions = nullptr,
                  .rows = 0,
                  .heads = 2,
                  .dim = 4,
                  .x_stride = 8,
                  .dtype = f32});
  device.Synchronize();
}

TEST(ResolveTokens, ReplacesOnlyWhatIsBelowZero) {
  const std::vector<int32_t> sampled = {11, -1, 13, 0};
  const DeviceBuffer dsampled = Upload(sampled);
  std::vector<int32_t> tokens = {~2, 5, ~1, 0, ~0, ~3, ~2}, want = {13, 5, 0, 0, 11, 0, 13};
  for (int i = 0; i < 600; ++i) {
    tokens.push_back(i % 3 == 0 ? ~0 : i);
    want.push_back(i % 3 == 0 ? 11 : i);
  }
  const DeviceBuffer dtokens = Upload(tokens);
  ResolveTokens(TestDevice(), {.tokens = dtokens.as<int32_t>(),
                               .sampled = dsampled.as<int32_t>(),
                               .rows = static_cast<int>(tokens.size())});
  EXPECT_EQ(Download<int32_t>(dtokens, want.size()), want);
}

TEST(Rows, NaNAndInfinityAreNotHidden) {
  const std::vector<float> x = {std::nanf(""), kInf, 1, 1};
  DeviceBuffer dx = Upload(x), dy = Poisoned(4, DType::kFloat32),
               dbf16 = Poisoned(4, DType::kBFloat16);
  SwiGlu(TestDevice(), {.gate = dx.data(),
                        .up = dx.data(),
                        .y = dy.data(),
                        .rows = 1,
                        .dim = 4,
                        .gate_stride = 4,
                        .up_stride = 4,
                        .y_stride = 4,
                        .dtype = DType::kFloat32});
  auto y = Download<float>(dy, 4);
  EXPECT_TRUE(std::isnan(y[0]));
  EXPECT_FALSE(std::isfinite(y[1]));
  EXPECT_TRUE(std::isfinite(y[2]));
  RmsNorm(TestDevice(), {.x = dx.data(),
                         .y = dbf16.data(),
                         .rows = 1,
                         .groups = 1,
                         .dim = 4,
                         .x_stride = 4,
                         .y_stride = 4,
                         .eps = 0,
                         .normalize = false,
                         .x_dtype = DType::kFloat32,
                         .y_dtype = DType::kBFloat16});
  y = DownloadAs(dbf16, 4, DType::kBFloat16);
  EXPECT_TRUE(std::isnan(y[0]));
  EXPECT_EQ(y[1], kInf);
}

}  // namespace
}  // namespace gla
