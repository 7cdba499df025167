#include <numeric>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/decode_entry.h"
#include "kernels/decode.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/testing/near.h"

namespace gla {
namespace {

constexpr float kEps = 1e-5f;

enum class End { kStoreBf16, kStoreFloat, kSwiGlu, kResidual };
constexpr End kEnds[] = {End::kStoreBf16, End::kStoreFloat, End::kSwiGlu, End::kResidual};

// The rows of every result of a product, as float32 (exact for bfloat16).
struct Results {
  std::vector<float> y, residual, next_x, next_squares;
  int y_columns;

  std::vector<float> Rows(int first, int rows, int in_all) const {
    std::vector<float> all;
    for (const auto* part : {&y, &residual, &next_x, &next_squares}) {
      const size_t columns = part->size() / in_all;
      all.insert(all.end(), part->begin() + first * columns,
                 part->begin() + (first + rows) * columns);
    }
    return all;
  }
};

// One product of up to `rows` rows, its inputs on the device, with gaps of NaN between the rows.
class Product {
 public:
  Product(int rows, int in, int out, End end, bool normalized = true)
      : rows_(rows), in_(in), out_(out), end_(end), normalized_(normalized) {
    x_stride_ = in + 8;
    x_.assign(size_t(rows) * x_stride_, NAN);
    const auto x = Rounded(Normal(size_t(rows) * in, 1, 1), DType::kBFloat16);
    for (int r = 0; r < rows; ++r) {
      std::copy_n(x.begin() + size_t(r) * in, in, x_.begin() + size_t(r) * x_stride_);
    }
    w_ = Rounded(Normal(size_t(out) * in, 1 / std::sqrt(float(in)), 2), DType::kBFloat16);
    weight_ = PackedWeight(TestDevice(), {{w_.data(), DType::kFloat32, out, in}}, DType::kBFloat16);
    squares_ = Uniform(size_t(rows) * (in / 16), 1, 40, 3);
    residual_ = Normal(size_t(rows) * out, 1, 4);
    norm_ = Normal(out, 1, 5);
    dx_ = UploadAs(x_, DType::kBFloat16);
    dsquares_ = Upload(squares_);
    dnorm_ = Upload(norm_);
  }

  // Rows [first, first + rows); plan null: the one that DecodeProduct() picks.
  Results Run(const ProductPlan* plan, int first, int rows) {
    const bool store = end_ == End::kStoreBf16 || end_ == End::kStoreFloat;
    const DType type = end_ == End::kStoreFloat ? DType::kFloat32 : DType::kBFloat16;
    Results results;
    results.y_columns = end_ == End::kSwiGlu ? out_ / 2 : out_;
    const int y_stride = RoundUp8(results.y_columns) + 8, spare = 3;
    const size_t n = size_t(rows + spare) * out_;
    DeviceBuffer dy = Poisoned(size_t(rows + spare) * y_stride, type);
    DeviceBuffer dresidual = Poisoned(n, DType::kFloat32), dnext = Poisoned(n, DType::kBFloat16);
    DeviceBuffer dnext_squares = Poisoned(n / 16, DType::kFloat32);
    TestDevice().Upload(dresidual.data(), residual_.data() + size_t(first) * out_,
                        size_t(rows) * out_ * 4);
    DecodeProductArgs args = {.x = dx_.as<uint16_t>() + size_t(first) * x_stride_,
                              .x_stride = x_stride_,
                              .weight = &weight_,
                              .rows = rows};
    if (normalized_) {
      args.squares = dsquares_.as<float>() + size_t(first) * (in_ / 16);
      args.eps = kEps;
    }
    if (end_ == End::kResidual) {
      args.epilogue = DecodeEpilogue::kResidual;
      args.residual = dresidual.as<float>();
      args.next_norm = dnorm_.as<float>();
      args.next_x = dnext.data();
      args.next_squares = dnext_squares.as<float>();
    } else {
      args.epilogue = store ? DecodeEpilogue::kStore : DecodeEpilogue::kSwiGlu;
      args.y = dy.data();
      args.y_dtype = type;
      args.y_stride = y_stride;
    }
    EXPECT_TRUE(ServesDecodeProduct(args));
    if (plan == nullptr) {
      DecodeProduct(TestDevice(), args);
    } else {
      DecodeProductBy(*plan, TestDevice(), args);
    }
    const auto download = [&](const DeviceBuffer& from, size_t columns, DType dtype) {
      auto all = DownloadAs(from, (rows + spare) * columns, dtype);
      EXPECT_TRUE(AllNaN({all.begin() + rows * columns, all.end()})) << "rows that are not its own";
      all.resize(rows * columns);
      return all;
    };
    if (end_ == End::kResidual) {
      results.residual = download(dresidual, out_, DType::kFloat32);
      results.next_x = download(dnext, out_, DType::kBFloat16);
      results.next_squares = download(dnext_squares, out_ / 16, DType::kFloat32);
    } else {
      const auto y = download(dy, y_stride, type);
      results.y = Columns(y, y_stride, 0, results.y_columns);
      EXPECT_TRUE(AllNaN(Columns(y, y_stride, results.y_columns, y_stride - results.y_columns)));
    }
    return results;
  }

  // Against arithmetic, in the rows `checked`.
  void Check(const Results& got, const std::vector<int>& checked) const {
    reference::Doubles y, residual, next_x, next_squares;
    std::vector<float> got_y, got_residual, got_next_x, got_next_squares;
    const auto take = [](const std::vector<float>& from, int row, int columns, auto* to) {
      to->insert(to->end(), from.begin() + size_t(row) * columns,
                 from.begin() + size_t(row + 1) * columns);
    };
    for (const int r : checked) {
      const std::vector<float> x(x_.begin() + size_t(r) * x_stride_,
                                 x_.begin() + size_t(r) * x_stride_ + in_);
      auto product = reference::Matmul(x, w_, 1, in_, out_);
      if (normalized_) {
        const auto from = squares_.begin() + size_t(r) * (in_ / 16);
        const double sum = std::accumulate(from, from + in_ / 16, 0.0);
        for (double& v : product) v /= std::sqrt(sum / in_ + kEps);
      }
      if (end_ == End::kSwiGlu) {
        for (int i = 0; i < out_ / 2; ++i) {
          y.push_back(reference::Silu(product[i]) * product[out_ / 2 + i]);
        }
      } else if (end_ == End::kResidual) {
        for (int i = 0; i < out_; ++i) {
          const double v = residual_[size_t(r) * out_ + i] + product[i];
          residual.push_back(v);
          next_x.push_back(v * norm_[i]);
          if (i % 16 == 0) next_squares.push_back(0);
          next_squares.back() += v * v;
        }
      } else {
        y.insert(y.end(), product.begin(), product.end());
      }
      if (end_ == End::kResidual) {
        take(got.residual, r, out_, &got_residual);
        take(got.next_x, r, out_, &got_next_x);
        take(got.next_squares, r, out_ / 16, &got_next_squares);
      } else {
        take(got.y, r, got.y_columns, &got_y);
      }
    }
    EXPECT_TRUE(IsNear(got_y, y, end_ == End::kStoreFloat ? 5e-6 : 0.004));
    EXPECT_TRUE(IsNear(got_residual, residual, 5e-6));
    EXPECT_TRUE(IsNear(got_next_x, next_x, 0.004));
    EXPECT_TRUE(IsNear(got_next_squares, next_squares, 1e-5));
  }

 private:
  static int RoundUp8(int n) { return (n + 7) / 8 * 8; }

  int rows_, in_, out_, x_stride_;
  End end_;
  bool normalized_;
  std::vector<float> x_, w_, squares_, residual_, norm_;
  PackedWeight weight_;
  DeviceBuffer dx_, dsquares_, dnorm_;
};

std::vector<ProductPlan> AllPlans() {
  std::vector<ProductPlan> plans = {{16, 8, 1}, {16, 16, 1}};
  for (const int tile_out : {64, 128}) {
    for (const int tile_rows : {16, 32, 64, 128}) {
      if (tile_out == 128 && tile_rows < 64) continue;
      for (const int cluster : {1, 2, 4, 8}) {
        const ProductPlan plan = {tile_out, tile_rows, cluster};
        if (CanRun(plan)) plans.push_back(plan);
      }
    }
  }
  return plans;
}
std::string NameOfPlan(const ProductPlan& plan) {
  return std::to_string(plan.tile_out) + "x" + std::to_string(plan.tile_rows) + " cluster " +
         std::to_string(plan.cluster);
}

struct Shape {
  int in, out;
};
constexpr Shape kShapes[] = {{32, 16},
                             {96, 48},
                             {256, 2048},
                             {1024, 1040},
                             {1056, 96},
                             {2816, 64},
                             {5632, 2048},
                             {2048, 176},
                             // More tiles of 16 than multiprocessors: 3, 2, 5 and 2 to a block.
                             {1024, 5632},
                             {1024, 4160},
                             {512, 8464},
                             {1536, 4160}};

TEST(DecodeProduct, EqualsArithmetic) {
  for (const Shape& s : kShapes) {
    for (const End end : kEnds) {
      const int most = 512;
      Product product(most, s.in, s.out, end, s.in != 96);
      for (const int rows : {1, 2, 7, 8, 9, 16, 31, 32, 33, 64, 100, 256, 512}) {
        if (s.out >= 2048 && rows > 9 && rows != 100) continue;  // for time
        SCOPED_TRACE(std::to_string(rows) + " rows, " + std::to_string(s.in) + " to " +
                     std::to_string(s.out) + ", end " + std::to_string(static_cast<int>(end)));
        std::vector<int> checked;
        const int step = std::max(1, rows / (s.out >= 2048 ? 2 : 6));
        for (int r = rows - 1; r >= 0; r -= step) checked.push_back(r);
        product.Check(product.Run(nullptr, 0, rows), checked);
      }
    }
  }
}

TEST(DecodeProduct, EveryPlanGivesTheSameBits) {
  for (const Shape& s : kShapes) {
    for (const End end : kEnds) {
      const int most = 300;
      Product product(most, s.in, s.out, end);
      const ProductPlan first = {16, 8, 1};
      const Results all = product.Run(&first, 0, most);
      for (const ProductPlan& plan : AllPlans()) {
        for (const int rows : {1, 9, 33, 64, 300}) {
          const int begin = rows * 37 % (most - rows + 1);
          ASSERT_TRUE(IsSameBits(product.Run(&plan, begin, rows).Rows(0, rows, rows),
                                 all.Rows(begin, rows, most)))
              << NameOfPlan(plan) << ", " << rows << " rows, " << s.in << " to " << s.out
              << ", end " << static_cast<int>(end);
        }
      }
    }
  }
}

TEST(DecodeProduct, ARowsBitsDependOnNothingButTheRow) {
  for (const Shape& s : {Shape{1024, 1040}, Shape{2816, 64}, Shape{96, 32000}}) {
    for (const End end : kEnds) {
      const int most = 200;
      Product product(most, s.in, s.out, end);
      const Results all = product.Run(nullptr, 0, most);
      for (int rows = 1; rows <= most; rows += rows < 40 ? 1 : 23) {
        const int begin = rows * 37 % (most - rows + 1);
        ASSERT_TRUE(IsSameBits(product.Run(nullptr, begin, rows).Rows(0, rows, rows),
                               all.Rows(begin, rows, most)))
            << rows << " rows from " << begin << ", end " << static_cast<int>(end);
      }
    }
  }
}

TEST(DecodeProduct, StoresAnyNumberOfOutputs) {
  for (const End end : {End::kStoreBf16, End::kStoreFloat}) {
    Product product(70, 64, 2051, end);
    for (const ProductPlan& plan : AllPlans()) {
      SCOPED_TRACE(NameOfPlan(plan));
      product.Check(product.Run(&plan, 0, 70), {0, 31, 69});
    }
  }
}

TEST(DecodeProduct, NoRowsIsNoWork) {
  Product product(1, 64, 32, End::kStoreBf16);
  product.Run(nullptr, 0, 0);
}

TEST(DecodeProduct, SaysWhatItServes) {
  const auto serves = [](int in, int out, DType dtype, DecodeEpilogue epilogue) {
    const std::vector<float> w(size_t(in) * out);
    const PackedWeight weight(TestDevice(), {{w.data(), DType::kFloat32, out, in}}, dtype);
    return ServesDecodeProduct(
        {.x = nullptr, .x_stride = in, .weight = &weight, .epilogue = epilogue, .rows = 1});
  };
  EXPECT_TRUE(serves(32, 16, DType::kBFloat16, DecodeEpilogue::kSwiGlu));
  EXPECT_TRUE(serves(32, 17, DType::kBFloat16, DecodeEpilogue::kStore));
  EXPECT_FALSE(serves(40, 16, DType::kBFloat16, DecodeEpilogue::kStore));
  EXPECT_FALSE(serves(32, 24, DType::kBFloat16, DecodeEpilogue::kResidual));
  EXPECT_FALSE(serves(32, 24, DType::kBFloat16, DecodeEpilogue::kSwiGlu));
  EXPECT_FALSE(serves(32, 16, DType::kFloat32, DecodeEpilogue::kStore));
}

TEST(DecodeEmbed, EqualsArithmetic) {
  for (const int dim : {16, 256, 1040, 2048}) {
    const int vocab = 50, rows = 37;
    const auto table = Rounded(Normal(size_t(vocab) * dim, 1, 1), DType::kBFloat16);
    const auto norm = Normal(dim, 1, 2);
    std::vector<int32_t> tokens(rows);
    for (int i = 0; i < rows; ++i) tokens[i] = i * 13 % vocab;
    DeviceBuffer dtable = UploadAs(table, DType::kBFloat16), dnorm = Upload(norm);
    DeviceBuffer dtokens = Upload(tokens);
    DeviceBuffer residual = Poisoned(rows * dim, DType::kFloat32);
    DeviceBuffer x = Poisoned(rows * dim, DType::kBFloat16);
    DeviceBuffer squares = Poisoned(rows * dim / 16, DType::kFloat32);
    DecodeEmbed(TestDevice(), {.tokens = dtokens.as<int32_t>(),
                               .table = dtable.data(),
                               .norm = dnorm.as<float>(),
                               .residual = residual.as<float>(),
                               .x = x.data(),
                               .squares = squares.as<float>(),
                               .rows = rows,
                               .dim = dim});
    std::vector<float> want;
    reference::Doubles want_x, want_squares;
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < dim; ++i) {
        const float v = table[size_t(tokens[r]) * dim + i];
        want.push_back(v);
        want_x.push_back(double{v} * norm[i]);
        if (i % 16 == 0) want_squares.push_back(0);
        want_squares.back() += double{v} * v;
      }
    }
    EXPECT_TRUE(IsSameBits(Download<float>(residual, rows * dim), want));
    EXPECT_TRUE(IsNear(DownloadAs(x, rows * dim, DType::kBFloat16), want_x, 0.004));
    EXPECT_TRUE(IsNear(Download<float>(squares, rows * dim / 16), want_squares, 1e-6));
  }
}

}  // namespace
}  // namespace gla
