// Dense products, y = x W^T (+ bias) (+ y): by cuBLASLt where it can be held to one algorithm, else
// by the tiles of matmul_tiles.cuh.
//
// Batch invariance. For every (out, in, types, accumulate, alignment) ONE algorithm gives the bits:
// the first that cuBLASLt proposes for 512 rows, a chunk of a prompt, and that
//   - splits no sum over K and has no reduction scheme (so one thread block finishes each output
//     alone, in the order its code gives), and
//   - says that it also serves 1 to 8192 rows; more rows are so many calls.
// Few and many rows want other tiles. What cuBLASLt proposes for them and what is of the same kind
// takes its place where it gives the very same bits on random rows: algorithms that sum along k in
// ascending order do (all that were seen on an H100 and H200).
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

constexpr int kMostRows = 8192;  // of one call
// The numbers of rows that algorithms are asked for, and those up to which each is then used.
struct RowsRange {
  int typical, most;
};
constexpr RowsRange kRanges[kMatmulRanges] = {
    {128, 160}, {256, 384}, {512, 1024}, {2048, kMostRows}};
constexpr int kGivesBits = 2;  // of kRanges
// Results that are compared. Another order of a sum shows in one of some 10,000 of bfloat16.
constexpr int kTrialResults = 1 << 22;

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

// What a product is chosen an algorithm for.
struct MatmulKind {
  const PackedWeight& w;
  DType y_dtype;
  bool accumulate;
  int64_t x_alignment, y_alignment;
};

// The first that cuBLASLt proposes for `typical` rows that serves every number and splits no sum.
std::optional<cublasLtMatmulAlgo_t> FirstAlgorithm(cublasLtHandle_t cublas, const MatmulKind& kind,
                                                   int typical) {
  const PackedWeight& w = kind.w;
  const DType y_dtype = kind.y_dtype;
  const int64_t x_alignment = kind.x_alignment, y_alignment = kind.y_alignment;
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

  CublasProblem p = MakeProblem(w, y_dtype, typical, x_stride, y_stride);
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

struct MatmulCall {
  const void* x;
  void* y;
  int64_t rows, x_stride, y_stride;
};

void Run(Device::Impl& impl, const MatmulKind& kind, const cublasLtMatmulAlgo_t& algorithm,
         const MatmulCall& call) {
  const float alpha = 1.0f, beta = kind.accumulate ? 1.0f : 0.0f;
  CublasProblem p = MakeProblem(kind.w, kind.y_dtype, call.rows, call.x_stride, call.y_stride);
  CUBLAS_CHECK(cublasLtMatmul(impl.cublas, &p.product, &alpha, kind.w.data(), &p.weight, call.x,
                              &p.x, &beta, call.y, &p.y, call.y, &p.y, &algorithm,
                              impl.cublas_workspace, Device::Impl::kCublasBytes, impl.stream));
}

// Normal numbers of either sign, between 1/8 and 2, as bfloat16 or float32.
__global__ void __launch_bounds__(256) RandomKernel(uint16_t* to, int64_t size, bool is_float) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= size) return;
  uint64_t x = (static_cast<uint64_t>(i) + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 31) * 0xBF58476D1CE4E5B9u;
  const uint32_t bits = static_cast<uint32_t>(x >> 32);
  const uint32_t number = (bits & 0x807FFFFFu) | (124u + (bits >> 23 & 3)) << 23;
  if (is_float) {
    reinterpret_cast<uint32_t*>(to)[i] = number;
  } else {
    to[i] = static_cast<uint16_t>(number >> 16);
  }
}

__global__ void __launch_bounds__(256)
    DifferKernel(const uint16_t* a, const uint16_t* b, int64_t size, int* differ) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i < size && a[i] != b[i]) *differ = 1;
}

// Whether two algorithms give the same bits for random rows; false also without memory.
bool GiveSameBits(Device& device, const MatmulKind& kind, const cublasLtMatmulAlgo_t& a,
                  const cublasLtMatmulAlgo_t& b) {
  Device::Impl& impl = device.impl();
  const int64_t x_stride = StandardStride(kind.w.in(), kind.x_alignment, kind.w.dtype());
  const int64_t y_stride = StandardStride(kind.w.out(), kind.y_alignment, kind.y_dtype);
  const size_t y_row = y_stride * SizeOf(kind.y_dtype);
  const int rows = std::clamp(kTrialResults / kind.w.out(), 64, kMostRows);
  const int64_t x_size = rows * x_stride;
  DeviceBuffer x(device, x_size * SizeOf(kind.w.dtype())), flag(device, sizeof(int));
  DeviceBuffer y_a(device, rows * y_row), y_b(device, rows * y_row);
  if (!x.ok() || !flag.ok() || !y_a.ok() || !y_b.ok()) return false;
  const auto randomize = [&](DeviceBuffer& to, int64_t size, DType dtype) {
    RandomKernel<<<GridOf(CeilDiv(size, int64_t{256})), 256, 0, impl.stream>>>(
        to.as<uint16_t>(), size, dtype == DType::kFloat32);
  };
  randomize(x, x_size, kind.w.dtype());
  const auto try_out = [&](const cublasLtMatmulAlgo_t& algorithm, DeviceBuffer& y) {
    randomize(y, rows * y_stride, kind.y_dtype);
    Run(impl, kind, algorithm, {x.data(), y.data(), rows, x_stride, y_stride});
  };
  try_out(a, y_a);
  try_out(b, y_b);
  CUDA_CHECK(cudaMemsetAsync(flag.data(), 0, sizeof(int), impl.stream));
  const int64_t halves = static_cast<int64_t>(rows * y_row / 2);
  DifferKernel<<<GridOf(CeilDiv(halves, int64_t{256})), 256, 0, impl.stream>>>(
      y_a.as<uint16_t>(), y_b.as<uint16_t>(), halves, flag.as<int>());
  CUDA_CHECK(cudaGetLastError());
  int differ = 1;
  device.Download(&differ, flag.data(), sizeof(int));
  return differ == 0;
}

// By kRanges; none where no algorithm serves every number of rows.
std::optional<MatmulAlgorithms> ChooseAlgorithms(Device& device, const MatmulKind& kind) {
  const auto first_of = [&](int range) {
    return FirstAlgorithm(device.impl().cublas, kind, kRanges[range].typical);
  };
  const std::optional<cublasLtMatmulAlgo_t> first = first_of(kGivesBits);
  if (!first.has_value()) return std::nullopt;
  MatmulAlgorithms out;
  out.fill(*first);
  for (int i = 0; i < kMatmulRanges; ++i) {
    const std::optional<cublasLtMatmulAlgo_t> other = first_of(i);
    if (!other.has_value() || std::memcmp(&*other, &*first, sizeof(*first)) == 0) continue;
    if (GiveSameBits(device, kind, *first, *other)) out[i] = *other;
  }
  return out;
}

// False when there is no algorithm that serves every number of rows.
bool CublasMatmul(Device& device, const MatmulArgs& a) {
  Device::Impl& impl = device.impl();
  const PackedWeight& w = *a.weight;
  const MatmulKind kind = {w, a.y_dtype, a.accumulate, AlignmentOf(a.x, a.x_stride, a.x_dtype),
                           AlignmentOf(a.y, a.y_stride, a.y_dtype)};
  const MatmulKey key = {w.out(),
                         w.in(),
                         static_cast<int64_t>(w.dtype()),
                         static_cast<int64_t>(a.y_dtype),
                         a.accumulate,
                         kind.x_alignment,
                         kind.y_alignment};
  auto found = impl.matmul_algorithms.find(key);
  if (found == impl.matmul_algorithms.end()) {
    found = impl.matmul_algorithms.emplace(key, ChooseAlgorithms(device, kind)).first;
  }
  if (!found->second.has_value()) return false;
  for (int64_t row = 0; row < a.rows; row += kMostRows) {
    const int64_t rows = std::min<int64_t>(kMostRows, a.rows - row);
    const char* x = static_cast<const char*>(a.x) + row * a.x_stride * SizeOf(a.x_dtype);
    char* y = static_cast<char*>(a.y) + row * a.y_stride * SizeOf(a.y_dtype);
    int range = 0;
    while (rows > kRanges[range].most) ++range;
    Run(impl, kind, (*found->second)[range], {x, y, rows, a.x_stride, a.y_stride});
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
