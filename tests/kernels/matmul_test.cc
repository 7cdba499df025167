#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/testing/near.h"

namespace gla {
namespace {

struct Types {
  DType weight, x, y;
};
// CUDA multiplies activations and weights of one type; the CPU also keeps bfloat16 weights under
// float32 activations.
std::vector<Types> AllTypes() {
  const DType f32 = DType::kFloat32, bf16 = DType::kBFloat16;
  std::vector<Types> all = {{f32, f32, f32}, {bf16, bf16, bf16}, {bf16, bf16, f32}};
  if (!OnCuda()) all.insert(all.end(), {{bf16, f32, f32}, {f32, bf16, bf16}, {f32, bf16, f32}});
  return all;
}

PackedWeight Pack(const std::vector<float>& w, int out, int in, DType dtype) {
  return PackedWeight(TestDevice(), {{w.data(), DType::kFloat32, out, in}}, dtype);
}

double Tolerance(DType y) { return y == DType::kFloat32 ? 5e-6 : 0.004; }

TEST(Matmul, EqualsArithmetic) {
  struct Shape {
    int rows, in, out;
  };
  const Shape shapes[] = {{1, 256, 1024}, {1, 16, 128},   {2, 256, 96},  {3, 64, 17},
                          {5, 1, 1},      {7, 19, 37},    {13, 100, 40}, {33, 320, 64},
                          {100, 768, 8},  {128, 64, 256}, {2000, 255, 9}};
  for (const Types& types : AllTypes()) {
    for (const Shape& s : shapes) {
      const auto x = Rounded(Normal(s.rows * s.in, 1, 1), types.x);
      const auto w = Rounded(Normal(s.out * s.in, 0.1f, 2), types.weight);
      const PackedWeight weight = Pack(w, s.out, s.in, types.weight);
      ASSERT_TRUE(weight.ok());
      DeviceBuffer dx = UploadAs(x, types.x), dy = Poisoned(s.rows * s.out, types.y);
      Matmul(TestDevice(), {.x = dx.data(),
                            .weight = &weight,
                            .y = dy.data(),
                            .rows = s.rows,
                            .x_stride = s.in,
                            .y_stride = s.out,
                            .x_dtype = types.x,
                            .y_dtype = types.y});
      EXPECT_TRUE(IsNear(DownloadAs(dy, s.rows * s.out, types.y),
                         reference::Matmul(x, w, s.rows, s.in, s.out), Tolerance(types.y)))
          << NameOf(types.weight) << " " << NameOf(types.x) << " " << s.rows << "x" << s.in << "x"
          << s.out;
    }
  }
}

TEST(Matmul, AddsBiasAndAccumulates) {
  const int rows = 9, in = 48, out = 56;
  for (DType dtype : kActTypes) {
    const auto x = Rounded(Normal(rows * in, 1, 3), dtype),
               w = Rounded(Normal(out * in, 1, 4), dtype);
    const auto bias = Normal(out, 5, 5), before = Normal(rows * out, 5, 6);
    const PackedWeight weight = Pack(w, out, in, dtype);
    DeviceBuffer dx = UploadAs(x, dtype), dbias = Upload(bias);
    for (bool with_bias : {false, true}) {
      for (bool accumulate : {false, true}) {
        DeviceBuffer dy = Upload(before);
        Matmul(TestDevice(), {.x = dx.data(),
                              .weight = &weight,
                              .bias = with_bias ? dbias.as<float>() : nullptr,
                              .y = dy.data(),
                              .rows = rows,
                              .x_stride = in,
                              .y_stride = out,
                              .x_dtype = dtype,
                              .y_dtype = DType::kFloat32,
                              .accumulate = accumulate});
        auto want = reference::Matmul(x, w, rows, in, out);
        for (int i = 0; i < rows * out; ++i) {
          want[i] += (with_bias ? bias[i % out] : 0) + (accumulate ? before[i] : 0);
        }
        EXPECT_TRUE(IsNear(Download<float>(dy, rows * out), want, 5e-6)) << with_bias << accumulate;
      }
    }
  }
}

TEST(Matmul, ReadsAndWritesStridedRowsAndNothingBetweenThem) {
  const int rows = 11, in = 40, out = 24, x_stride = 64, y_stride = 72;
  for (const Types& types : AllTypes()) {
    const auto x = Rounded(Normal(rows * x_stride, 1, 7), types.x);
    const auto w = Rounded(Normal(out * in, 1, 8), types.weight);
    const PackedWeight weight = Pack(w, out, in, types.weight);
    DeviceBuffer dx = UploadAs(x, types.x), dy = Poisoned(rows * y_stride, types.y);
    Matmul(TestDevice(), {.x = dx.data(),
                          .weight = &weight,
                          .y = dy.data(),
                          .rows = rows,
                          .x_stride = x_stride,
                          .y_stride = y_stride,
                          .x_dtype = types.x,
                          .y_dtype = types.y});
    const auto y = DownloadAs(dy, rows * y_stride, types.y);
    EXPECT_TRUE(IsNear(Columns(y, y_stride, 0, out),
                       reference::Matmul(Columns(x, x_stride, 0, in), w, rows, in, out),
                       Tolerance(types.y)));
    EXPECT_TRUE(AllNaN(Columns(y, y_stride, out, y_stride - out)));
  }
}

TEST(Matmul, ARowsBitsDependOnNothingButTheRow) {
  struct Shape {
    int in, out;
  };
  for (const Shape& s : {Shape{64, 80}, Shape{256, 136}, Shape{40, 24}, Shape{37, 70}}) {
    for (const Types& types : AllTypes()) {
      const int most = 300;
      const auto x = Normal(most * s.in, 1, 9);
      const PackedWeight weight = Pack(Normal(s.out * s.in, 1, 10), s.out, s.in, types.weight);
      DeviceBuffer dx = UploadAs(x, types.x);
      const auto run = [&](int first, int rows) {
        DeviceBuffer dy = Poisoned(rows * s.out, types.y);
        Matmul(TestDevice(), {.x = dx.as<char>() + size_t(first) * s.in * SizeOf(types.x),
                              .weight = &weight,
                              .y = dy.data(),
                              .rows = rows,
                              .x_stride = s.in,
                              .y_stride = s.out,
                              .x_dtype = types.x,
                              .y_dtype = types.y});
        return DownloadAs(dy, rows * s.out, types.y);
      };
      const std::vector<float> all = run(0, most);
      const auto part = [&](int first, int rows) {
        return std::vector<float>(all.begin() + first * s.out,
                                  all.begin() + (first + rows) * s.out);
      };
      for (int rows = 1; rows <= 70; ++rows) {
        const int first = (rows * 37) % (most - rows);
        ASSERT_TRUE(IsSameBits(run(first, rows), part(first, rows)))
            << rows << " rows from " << first << ", " << NameOf(types.weight) << " "
            << NameOf(types.x) << " " << NameOf(types.y) << " " << s.in << "x" << s.out;
      }
      ASSERT_TRUE(IsSameBits(run(0, most), all)) << "the same call twice";
    }
  }
}

TEST(PackedWeight, StacksBlocksOfAnyStoredType) {
  // 2^-n and small integers are exact in every type.
  const int in = 8;
  const std::vector<float> f32 = {1, 2, 3, 4, 5, 6, 7, 8, -1, -2, -3, -4, -5, -6, -7, -8};
  std::vector<uint16_t> bf16, f16;
  for (float x : {0.5f, 0.25f, 0.0f, -0.0f, 1.0f, -1.0f, 2.0f, 16.0f}) bf16.push_back(ToBf16(x));
  f16 = {0x3C00, 0xBC00, 0x0000, 0x8000,
         0x4000, 0x3800, 0x0001, 0x7BFF};  // 1 -1 0 -0 2 .5 2^-24 max
  const std::vector<HostMatrix> blocks = {{f32.data(), DType::kFloat32, 2, in},
                                          {bf16.data(), DType::kBFloat16, 1, in},
                                          {f16.data(), DType::kFloat16, 1, in}};
  const float rows[4][8] = {{1, 2, 3, 4, 5, 6, 7, 8},
                            {-1, -2, -3, -4, -5, -6, -7, -8},
                            {0.5f, 0.25f, 0, 0, 1, -1, 2, 16},
                            {1, -1, 0, 0, 2, 0.5f, 0x1p-24f, 65504}};
  for (DType dtype : kActTypes) {
    const PackedWeight weight(TestDevice(), blocks, dtype);
    ASSERT_TRUE(weight.ok());
    EXPECT_EQ(weight.out(), 4);
    EXPECT_EQ(weight.in(), in);
    EXPECT_EQ(weight.dtype(), dtype);
    EXPECT_GE(weight.bytes(), 4 * in * SizeOf(dtype));
    for (int k = 0; k < in; ++k) {  // the k-th unit vector reads column k
      std::vector<float> unit(in, 0.0f);
      unit[k] = 1;
      DeviceBuffer dx = UploadAs(unit, dtype), dy = Poisoned(4, DType::kFloat32);
      Matmul(TestDevice(), {.x = dx.data(),
                            .weight = &weight,
                            .y = dy.data(),
                            .rows = 1,
                            .x_stride = in,
                            .y_stride = 4,
                            .x_dtype = dtype,
                            .y_dtype = DType::kFloat32});
      const auto y = Download<float>(dy, 4);
      for (int n = 0; n < 4; ++n) {
        const float want = dtype == DType::kFloat32 ? rows[n][k] : FromBf16(ToBf16(rows[n][k]));
        EXPECT_EQ(y[n], want) << "output " << n << " column " << k;
      }
    }
  }
}

TEST(Matmul, NoRowsIsNoWork) {
  const PackedWeight weight = Pack(Normal(64, 1, 1), 8, 8, DType::kFloat32);
  Matmul(TestDevice(), {.x = nullptr,
                        .weight = &weight,
                        .y = nullptr,
                        .rows = 0,
                        .x_stride = 8,
                        .y_stride = 8,
                        .x_dtype = DType::kFloat32,
                        .y_dtype = DType::kFloat32});
  TestDevice().Synchronize();
}

}  // namespace
}  // namespace gla
