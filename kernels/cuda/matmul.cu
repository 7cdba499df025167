// Dense products, y = x W^T (+ bias) (+ y): by cuBLASLt where it can be held to one algorithm, else
// by the tiles of matmul_tiles.cuh.
//
// Batch invariance. For every (out, in, types, accumulate, alignment), never for a number of rows,
// ONE algorithm is chosen, once, and used for every call: the first that cuBLASLt proposes for 512
// rows, a chunk of a prompt, and that
//   - splits no sum over K and has no reduction scheme (so one thread block finishes each output
//     alone, in the order its code gives), and
//   - says that it also serves 1 to 8192 rows; more rows are so many calls.
// Where there is none, and for every product with a bias (cuBLASLt wants the bias in y's own type,
// ours is float32), our own tiles serve all row counts, invariant by their construction. Compiled
// with GLA_CUDA_OWN_MATMUL, they serve everything.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/matmul_tiles.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

#ifdef GLA_CUDA_OWN_MATMUL
constexpr bool kUseCublas = false;
#else
constexpr bool kUseCublas = true;
#endif

// Rows of a weight start at 16 bytes, zeros after `in`.
int64_t WeightStride(int in, DType dtype) {
  return RoundUp<int64_t>(in, 16 / static_cast<int64_t>(SizeOf(dtype)));
}

// ---- Packing ------------------------------------------------------------------------------------

float HostFloat(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kBFloat16) return __bfloat162float(static_cast<const bf16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}

// Rows [first, first + count) of `block` as `dtype`, `stride` elements apart, zeros between.
void ConvertRows(const HostMatrix& block, int first, int count, DType dtype, int64_t stride,
                 std::vector<char>* to) {
  to->assign(count * stride * SizeOf(dtype), 0);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t from = (first + r) * block.cols;
    char* row = to->data() + r * stride * SizeOf(dtype);
    if (block.dtype == dtype) {
      std::memcpy(row, static_cast<const char*>(block.data) + from * SizeOf(dtype),
                  block.cols * SizeOf(dtype));
    } else if (dtype == DType::kFloat32) {
      float* out = reinterpret_cast<float*>(row);
      for (int c = 0; c < block.cols; ++c) out[c] = HostFloat(block.data, block.dtype, from + c);
    } else {
      bf16* out = reinterpret_cast<bf16*>(row);
      for (int c = 0; c < block.cols; ++c) {
        out[c] = __float2bfloat16_rn(HostFloat(block.data, block.dtype, from + c));
      }
    }
  }
}

// ---- cuBLASLt -----------------------------------------------------------------------------------

constexpr int kTypicalRows = 512;
constexpr int kMostRows = 8192;  // of one call

// It thinks in columns: our row-major [rows, in] is its [in, rows], so it computes y^T = W x^T with
// m = out, n = rows, k = in.
struct CublasProblem {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t weight, x, y;
};

cudaDataType_t TypeOf(DType dtype) { return dtype == DType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF; }

CublasProblem MakeProblem(const PackedWeight& w, DType y_dtype, int64_t rows, int64_t x_stride,
                          int64_t y_stride) {
  CublasProblem p;
  // Never TF32: for float32 inputs this type means float32 products.
  CUBLAS_CHECK(cublasLtMatmulDescInit(&p.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transpose = CUBLAS_OP_T;
  CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&p.product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                              sizeof(transpose)));
  const cudaDataType_t type = TypeOf(w.dtype());
  CUBLAS_CHECK(
      cublasLtMatrixLayoutInit(&p.weight, type, w.in(), w.out(), WeightStride(w.in(), w.dtype())));
  CUBLAS_CHECK(cublasLtMatrixLayoutInit(&p.x, type, w.in(), rows, x_stride));
  CUBLAS_CHECK(cublasLtMatrixLayoutInit(&p.y, TypeOf(y_dtype), w.out(), rows, y_stride));
  return p;
}

// The largest power of two up to 16 that divides both the address and the distance between rows:
// the same for every row of a matrix, so a part of a batch gets the algorithm of the whole.
int64_t AlignmentOf(const void* p, int64_t stride, DType dtype) {
  const uint64_t bits =
      reinterpret_cast<uintptr_t>(p) | static_cast<uint64_t>(stride) * SizeOf(dtype) | uint64_t{16};
  return static_cast<int64_t>(bits & (~bits + 1));
}

// A distance between rows of `size` elements that is aligned so and no better, by which an
// algorithm is chosen: not by the caller's own, which may differ from call to call.
int64_t StandardStride(int64_t size, int64_t alignment, DType dtype) {
  const int64_t step = std::max<int64_t>(1, alignment / static_cast<int64_t>(SizeOf(dtype)));
  const int64_t stride = RoundUp(size, step);
  return alignment < 16 && stride / step % 2 == 0 ? stride + step : stride;
}

template <typename T>
T ConfigOf(const cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute) {
  T value = {};
  size_t written = 0;
  CUBLAS_CHECK(
      cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, sizeof(value), &written));
  return value;
}

bool SplitsNoSum(const cublasLtMatmulAlgo_t& algorithm) {
  return ConfigOf<int32_t>(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1 &&
         ConfigOf<uint32_t>(algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME) ==
             CUBLASLT_REDUCTION_SCHEME_NONE;
}

std::optional<cublasLtMatmulAlgo_t> ChooseAlgorithm(cublasLtHandle_t cublas, const PackedWeight& w,
                                                    DType y_dtype, int64_t x_alignment,
                                                    int64_t y_alignment) {
  const int64_t x_stride = StandardStride(w.in(), x_alignment, w.dtype());
  const int64_t y_stride = StandardStride(w.out(), y_alignment, y_dtype);
  cublasLtMatmulPreferenceOpaque_t preference;
  CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    CUBLAS_CHECK(
        cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)));
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{Device::Impl::kCublasBytes});
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE});
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t{16});
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(x_alignment));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(y_alignment));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(y_alignment));

  CublasProblem p = MakeProblem(w, y_dtype, kTypicalRows, x_stride, y_stride);
  cublasLtMatmulHeuristicResult_t results[32];
  int count = 0;
  if (cublasLtMatmulAlgoGetHeuristic(cublas, &p.product, &p.weight, &p.x, &p.y, &p.y, &preference,
                                     32, results, &count) != CUBLAS_STATUS_SUCCESS) {
    return std::nullopt;
  }
  for (int i = 0; i < count; ++i) {
    if (results[i].state != CUBLAS_STATUS_SUCCESS || !SplitsNoSum(results[i].algo)) continue;
    const auto serves = [&](int64_t rows) {
      CublasProblem q = MakeProblem(w, y_dtype, rows, x_stride, y_stride);
      cublasLtMatmulHeuristicResult_t check = {};
      return cublasLtMatmulAlgoCheck(cublas, &q.product, &q.weight, &q.x, &q.y, &q.y,
                                     &results[i].algo, &check) == CUBLAS_STATUS_SUCCESS &&
             check.workspaceSize <= Device::Impl::kCublasBytes;
    };
    bool serves_all = true;
    for (int64_t rows : {1, 2, 3, 5, 8, 16, 33, 127, 256, 1000, 4096, kMostRows}) {
      serves_all = serves_all && serves(rows);
    }
    if (serves_all) return results[i].algo;
  }
  return std::nullopt;
}

// False when there is no algorithm that serves every number of rows.
bool CublasMatmul(Device& device, const MatmulArgs& a) {
  Device::Impl& impl = device.impl();
  const PackedWeight& w = *a.weight;
  const int64_t x_alignment = AlignmentOf(a.x, a.x_stride, a.x_dtype);
  const int64_t y_alignment = AlignmentOf(a.y, a.y_stride, a.y_dtype);
  const MatmulKey key = {w.out(),
                         w.in(),
                         static_cast<int64_t>(w.dtype()),
                         static_cast<int64_t>(a.y_dtype),
                         a.accumulate,
                         x_alignment,
                         y_alignment};
  auto found = impl.matmul_algorithms.find(key);
  if (found == impl.matmul_algorithms.end()) {
    found = impl.matmul_algorithms
                .emplace(key, ChooseAlgorithm(impl.cublas, w, a.y_dtype, x_alignment, y_alignment))
                .first;
  }
  if (!found->second.has_value()) return false;
  const float alpha = 1.0f, beta = a.accumulate ? 1.0f : 0.0f;
  for (int64_t row = 0; row < a.rows; row += kMostRows) {
    const int64_t rows = std::min<int64_t>(kMostRows, a.rows - row);
    CublasProblem p = MakeProblem(w, a.y_dtype, rows, a.x_stride, a.y_stride);
    const char* x = static_cast<const char*>(a.x) + row * a.x_stride * SizeOf(a.x_dtype);
    char* y = static_cast<char*>(a.y) + row * a.y_stride * SizeOf(a.y_dtype);
    CUBLAS_CHECK(cublasLtMatmul(impl.cublas, &p.product, &alpha, w.data(), &p.weight, x, &p.x,
                                &beta, y, &p.y, y, &p.y, &*found->second, impl.cublas_workspace,
                                Device::Impl::kCublasBytes, impl.stream));
  }
  return true;
}

// ---- Our tiles ----------------------------------------------------------------------------------

template <typename Y>
void Bf16TileMatmul(TileArgs t, cudaStream_t stream) {
  t.tiles_out = CeilDiv(t.out, kTileOut);
  // Both sizes compute the same chains; the small one wastes less on few rows.
  const auto launch = [&]<int kRows>() {
    const unsigned grid = GridOf(int64_t{t.tiles_out} * CeilDiv(t.rows, kRows));
    Bf16TileKernel<Y, kRows><<<grid, kTileThreads, 0, stream>>>(t);
  };
  if (t.rows <= 16) {
    launch.template operator()<16>();
  } else {
    launch.template operator()<64>();
  }
}

void TileMatmul(Device& device, const MatmulArgs& a) {
  const PackedWeight& w = *a.weight;
  TileArgs t = {.x = a.x,
                .weight = w.data(),
                .bias = a.bias,
                .y = a.y,
                .rows = a.rows,
                .out = w.out(),
                .in = w.in(),
                .x_stride = a.x_stride,
                .weight_stride = WeightStride(w.in(), w.dtype()),
                .y_stride = a.y_stride,
                .accumulate = a.accumulate,
                .x_aligned = AlignmentOf(a.x, a.x_stride, a.x_dtype) == 16,
                .tiles_out = CeilDiv(w.out(), kFloatTile)};
  const cudaStream_t stream = device.impl().stream;
  if (a.x_dtype == DType::kFloat32) {
    const unsigned grid = GridOf(int64_t{t.tiles_out} * CeilDiv(t.rows, kFloatTile));
    FloatTileKernel<float><<<grid, kFloatThreads, 0, stream>>>(t);
  } else if (a.y_dtype == DType::kFloat32) {
    Bf16TileMatmul<float>(t, stream);
  } else {
    Bf16TileMatmul<bf16>(t, stream);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

PackedWeight::PackedWeight(Device& device, const std::vector<HostMatrix>& blocks, DType dtype)
    : dtype_(dtype) {
  GLA_REQUIRES(dtype == DType::kFloat32 || dtype == DType::kBFloat16,
               "weights are stored as float32 or bfloat16");
  GLA_REQUIRES(!blocks.empty(), "at least one block");
  in_ = blocks[0].cols;
  for (const HostMatrix& block : blocks) {
    GLA_REQUIRES(block.cols == in_, "all blocks have the same number of columns");
    out_ += block.rows;
  }
  const int64_t stride = WeightStride(in_, dtype);
  const size_t row_bytes = stride * SizeOf(dtype);
  buffer_ = DeviceBuffer(device, out_ * row_bytes);
  if (!buffer_.ok()) return;
  char* to = buffer_.as<char>();
  std::vector<char> converted;
  for (const HostMatrix& block : blocks) {
    if (block.dtype == dtype && stride == in_) {
      device.Upload(to, block.data, block.rows * row_bytes);
      to += block.rows * row_bytes;
      continue;
    }
    const int rows_at_once = static_cast<int>(std::max<size_t>(1, (size_t{1} << 20) / row_bytes));
    for (int r = 0; r < block.rows; r += rows_at_once) {
      const int count = std::min(rows_at_once, block.rows - r);
      ConvertRows(block, r, count, dtype, stride, &converted);
      device.Upload(to, converted.data(), converted.size());
      to += converted.size();
    }
  }
}

void Matmul(Device& device, const MatmulArgs& a) {
  GLA_REQUIRES(a.x_dtype == a.weight->dtype(),
               "on CUDA a weight is multiplied in its own type: pack it as the activations' dtype");
  GLA_REQUIRES(a.y_dtype == DType::kFloat32 || a.y_dtype == a.x_dtype, "y is float32 or as x");
  GLA_REQUIRES(!a.accumulate || a.y_dtype == DType::kFloat32, "only a float32 y accumulates");
  if (a.rows == 0 || a.weight->out() == 0) return;
  device.impl().Use();
  if (kUseCublas && a.bias == nullptr && CublasMatmul(device, a)) return;
  TileMatmul(device, a);
}

}  // namespace gla
