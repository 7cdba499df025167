// The kernels around the normalized operator.
#include <cmath>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/testing/near.h"

namespace gla {
namespace {

TEST(CopyColumns, ConvertsBetweenAllTypesAndTouchesNothingElse) {
  for (const auto& [rows, cols] : {std::pair(1, 1), {5, 3}, {3, 9000}, {700, 1}}) {
    for (DType from : kAttentionTypes) {
      for (DType to : kAttentionTypes) {
        const int x_stride = cols + 2, y_stride = cols + 3;
        const std::vector<float> values = Rounded(Normal(size_t(rows) * x_stride, 3, 1), from);
        const DeviceBuffer x = UploadAs(values, from), y = Poisoned(size_t(rows) * y_stride, to);
        CopyColumns(TestDevice(), {.x = x.data(),
                                   .y = y.data(),
                                   .rows = rows,
                                   .cols = cols,
                                   .x_stride = x_stride,
                                   .y_stride = y_stride,
                                   .x_dtype = from,
                                   .y_dtype = to});
        const std::vector<float> got = DownloadAs(y, size_t(rows) * y_stride, to);
        EXPECT_TRUE(IsSameBits(Columns(got, y_stride, 0, cols),
                               Rounded(Columns(values, x_stride, 0, cols), to)))
            << NameOf(from) << " to " << NameOf(to) << ", " << rows << " x " << cols;
        EXPECT_TRUE(AllNaN(Columns(got, y_stride, cols, 3)));
      }
    }
  }
}

TEST(CopyColumns, FillsWithAValueWhereNothingIsCopied) {
  const DeviceBuffer y = Poisoned(4 * 6, DType::kFloat32);
  CopyColumns(TestDevice(),
              {.value = 1, .y = y.as<float>() + 5, .rows = 4, .cols = 1, .y_stride = 6});
  const std::vector<float> got = Download<float>(y, 4 * 6);
  EXPECT_EQ(Columns(got, 6, 5, 1), std::vector<float>(4, 1.0f));
  EXPECT_TRUE(AllNaN(Columns(got, 6, 0, 5)));
}

TEST(CopyColumns, NoRowsIsNoWork) {
  CopyColumns(TestDevice(), {.y = nullptr, .rows = 0, .cols = 4, .y_stride = 4});
  TestDevice().Synchronize();
}

TEST(QuotientGradient, EqualsArithmetic) {
  for (DType dtype : kAttentionTypes) {
    for (int dim : {1, 31, 32, 33, 200}) {
      const int rows = 19;
      std::vector<float> sums = Normal(size_t(rows) * (dim + 1), 1, 1);
      for (int r = 0; r < rows; ++r) {
        float& denominator = sums[size_t(r) * (dim + 1) + dim];
        denominator = std::abs(denominator) + 0.5f;
      }
      const std::vector<float> d_o = Rounded(Normal(size_t(rows) * dim, 1, 2), dtype);
      reference::Doubles want;
      for (int r = 0; r < rows; ++r) {
        const float* row = sums.data() + size_t(r) * (dim + 1);
        const double d = row[dim] + 1e-10;
        double dot = 0;
        for (int i = 0; i < dim; ++i) {
          dot += double{d_o[size_t(r) * dim + i]} * row[i];
          want.push_back(d_o[size_t(r) * dim + i] / d);
        }
        want.push_back(-dot / (d * d));
      }
      const DeviceBuffer device_d_o = UploadAs(d_o, dtype), device_sums = Upload(sums);
      QuotientGradient(TestDevice(), {.d_o = device_d_o.data(),
                                      .sums = device_sums.as<float>(),
                                      .rows = rows,
                                      .dim = dim,
                                      .dtype = dtype});
      EXPECT_TRUE(IsNear(Download<float>(device_sums, sums.size()), want, 1e-6)) << dim;
    }
  }
}

}  // namespace
}  // namespace gla
