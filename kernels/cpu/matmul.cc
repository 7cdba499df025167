// y = x W^T, for one row as for many.
//
// Every output element is one chain of fused multiply-adds over k = 0, 1, 2, ... in float32,
// whatever the tile that computes it. So its bits depend on its row and its weights alone: not on
// the number of rows, the row's place, the number of threads. No library offers that together with
// bfloat16 weights under float32 activations on AVX2 (see kernels/README.md).
//
// Packed weight: panels of 2 * L outputs (L: float32 lanes of a vector), zero-padded at the end;
// inside a panel, k-major. bfloat16: for each k, L words of 32 bits, word i holding output i in its
// low and output L + i in its high half: one load, a shift and a mask give two vectors of float32.
// float32: for each k, the 2 * L values in order.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

size_t PanelWidth() { return 2 * hn::Lanes(FloatTag()); }

// Two vectors of one panel at one k.
template <class D, class V>
HWY_INLINE void LoadPair(D d, const BFloat16* w, V& w0, V& w1) {
  const hn::RebindToUnsigned<D> d32;
  const auto words = hn::Load(d32, reinterpret_cast<const uint32_t*>(w));
  w0 = hn::BitCast(d, hn::ShiftLeft<16>(words));
  w1 = hn::BitCast(d, hn::And(words, hn::Set(d32, 0xFFFF0000u)));
}
template <class D, class V>
HWY_INLINE void LoadPair(D d, const float* w, V& w0, V& w1) {
  w0 = hn::Load(d, w);
  w1 = hn::Load(d, w + hn::Lanes(d));
}

// sums [kRows, kPanels * width] = x [kRows, in] times kPanels neighbouring panels.
template <int kRows, int kPanels, typename W>
HWY_INLINE void Tile(const float* HWY_RESTRICT x, int64_t x_stride, const W* HWY_RESTRICT panels,
                     int in, float* HWY_RESTRICT sums) {
  const FloatTag d;
  using V = hn::Vec<FloatTag>;
  const size_t lanes = hn::Lanes(d);
  const size_t width = 2 * lanes;
  const size_t panel_size = width * static_cast<size_t>(in);
  V acc[kRows][kPanels][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) acc[r][p][0] = acc[r][p][1] = hn::Zero(d);
  }
  for (int k = 0; k < in; ++k) {
    V w0[kPanels], w1[kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
      LoadPair(d, panels + p * panel_size + k * width, w0[p], w1[p]);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V xk = hn::Set(d, x[r * x_stride + k]);
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        acc[r][p][0] = hn::MulAdd(xk, w0[p], acc[r][p][0]);
        acc[r][p][1] = hn::MulAdd(xk, w1[p], acc[r][p][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      float* out = sums + (r * kPanels + p) * width;
      hn::StoreU(acc[r][p][0], d, out);
      hn::StoreU(acc[r][p][1], d, out + lanes);
    }
  }
}

// As many rows as the registers hold: two accumulators a row, two weights, one x.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON
constexpr int kMaxTileRows = 12;
#else
constexpr int kMaxTileRows = 6;
#endif
constexpr int kWidePanels = 4;  // of a single row: enough independent chains to hide the latency

template <typename W, int kRows = kMaxTileRows>
HWY_INLINE void TileOfRows(int rows, const float* x, int64_t x_stride, const W* panel, int in,
                           float* sums) {
  if (rows == kRows) return Tile<kRows, 1>(x, x_stride, panel, in, sums);
  if constexpr (kRows > 1) TileOfRows<W, kRows - 1>(rows, x, x_stride, panel, in, sums);
}

// One row's `n` outputs from `out0` on: sums, bias, what y held, in this order.
template <typename Y>
HWY_INLINE void StoreRow(const MatmulArgs& a, const float* sums, int row, int out0, int n) {
  Y* y = static_cast<Y*>(a.y) + row * a.y_stride + out0;
  const float* bias = a.bias == nullptr ? nullptr : a.bias + out0;
  const bool accumulate = a.accumulate;
  ForVectors(n, [=](auto d, size_t i) HWY_ATTR {
    auto value = hn::LoadU(d, sums + i);
    if (bias != nullptr) value = hn::Add(value, hn::LoadU(d, bias + i));
    if (accumulate) value = hn::Add(LoadFloats(d, y + i), value);
    StoreFloats(d, value, y + i);
  });
}

HWY_INLINE void StoreTile(const MatmulArgs& a, const float* sums, size_t sums_stride, int row0,
                          int rows, int out0, int n) {
  for (int r = 0; r < rows; ++r) {
    if (a.y_dtype == DType::kFloat32) {
      StoreRow<float>(a, sums + r * sums_stride, row0 + r, out0, n);
    } else {
      StoreRow<BFloat16>(a, sums + r * sums_stride, row0 + r, out0, n);
    }
  }
}

// Rows [row0, row0 + rows) of x, as float32 at `x`, times the panels [panel0, panel1).
template <typename W>
void MatmulBlock(const MatmulArgs& a, const float* x, int64_t x_stride, int row0, int rows,
                 int panel0, int panel1) {
  const int width = static_cast<int>(PanelWidth());
  const int in = a.weight->in(), out = a.weight->out();
  const size_t panel_size = static_cast<size_t>(width) * in;
  const W* weight = static_cast<const W*>(a.weight->data());
  HWY_ALIGN float sums[std::max(kMaxTileRows, 2 * kWidePanels) * 2 * HWY_MAX_BYTES / sizeof(float)];
  int panel = panel0;
  if (rows <= 2) {
    const int step = rows == 1 ? kWidePanels : kWidePanels / 2;
    for (; panel + step <= panel1; panel += step) {
      const W* w = weight + panel * panel_size;
      if (rows == 1) {
        Tile<1, kWidePanels>(x, x_stride, w, in, sums);
      } else {
        Tile<2, kWidePanels / 2>(x, x_stride, w, in, sums);
      }
      const int out0 = panel * width;
      StoreTile(a, sums, step * width, row0, rows, out0, std::min(step * width, out - out0));
    }
  }
  const int num_tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
  for (; panel < panel1; ++panel) {
    const int out0 = panel * width, n = std::min(width, out - out0);
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int first = rows * tile / num_tiles, count = rows * (tile + 1) / num_tiles - first;
      TileOfRows<W>(count, x + first * x_stride, x_stride, weight + panel * panel_size, in, sums);
      StoreTile(a, sums, width, row0 + first, count, out0, n);
    }
  }
}

void MatmulRows(const MatmulArgs& a, int row0, int rows, int panel0, int panel1) {
  const int in = a.weight->in();
  const float* x = static_cast<const float*>(a.x) + row0 * a.x_stride;
  int64_t x_stride = a.x_stride;
  if (a.x_dtype == DType::kBFloat16) {
    thread_local std::vector<float> converted;
    converted.resize(static_cast<size_t>(rows) * in);
    const BFloat16* from = static_cast<const BFloat16*>(a.x) + row0 * a.x_stride;
    for (int r = 0; r < rows; ++r) {
      Convert(from + r * a.x_stride, converted.data() + static_cast<size_t>(r) * in, in);
    }
    x = converted.data();
    x_stride = in;
  }
  if (a.weight->dtype() == DType::kFloat32) {
    MatmulBlock<float>(a, x, x_stride, row0, rows, panel0, panel1);
  } else {
    MatmulBlock<BFloat16>(a, x, x_stride, row0, rows, panel0, panel1);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(PanelWidth);
HWY_EXPORT(MatmulRows);

namespace {

void RowToFloat(const HostMatrix& block, int row, float* to) {
  WithStoredType(block.dtype, [&]<typename T>() {
    const T* from = static_cast<const T*>(block.data) + static_cast<size_t>(row) * block.cols;
    for (int i = 0; i < block.cols; ++i) to[i] = ToFloat(from[i]);
  });
}

// `rows`: the panel's outputs [width, in] in order. Element (k, i) of the packed panel is output i;
// as bfloat16, the two halves of a panel alternate (see the head of the file).
template <typename W>
void PackPanel(const std::vector<float>& rows, int width, int in, W* panel) {
  for (int i = 0; i < width; ++i) {
    const int half = width / 2;
    const int place = std::is_same_v<W, float> ? i : i < half ? 2 * i : 2 * (i - half) + 1;
    const float* row = rows.data() + static_cast<size_t>(i) * in;
    for (int k = 0; k < in; ++k)
      panel[static_cast<size_t>(k) * width + place] = FromFloat<W>(row[k]);
  }
}

}  // namespace

PackedWeight::PackedWeight(Device& device, const std::vector<HostMatrix>& blocks, DType dtype)
    : dtype_(dtype) {
  GLA_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16);
  GLA_CHECK(!blocks.empty());
  in_ = blocks[0].cols;
  for (const HostMatrix& block : blocks) {
    GLA_CHECK(block.cols == in_);
    out_ += block.rows;
  }
  const int width = static_cast<int>(HWY_DYNAMIC_DISPATCH(PanelWidth)());
  const int num_panels = (out_ + width - 1) / width;
  const size_t panel_size = static_cast<size_t>(width) * in_;
  buffer_ = DeviceBuffer(device, num_panels * panel_size * SizeOf(dtype));
  if (!buffer_.ok()) return;
  ParallelFor(device, num_panels, static_cast<double>(panel_size), [&](int64_t begin, int64_t end) {
    std::vector<float> rows(panel_size);
    for (int64_t panel = begin; panel < end; ++panel) {
      std::fill(rows.begin(), rows.end(), 0.0f);
      int first = 0;  // the block's first output
      for (const HostMatrix& block : blocks) {
        const int out0 = static_cast<int>(panel) * width;
        const int from = std::max(out0, first), to = std::min(out0 + width, first + block.rows);
        for (int out = from; out < to; ++out) {
          RowToFloat(block, out - first, rows.data() + static_cast<size_t>(out - out0) * in_);
        }
        first += block.rows;
      }
      if (dtype == DType::kFloat32) {
        PackPanel(rows, width, in_, buffer_.as<float>() + panel * panel_size);
      } else {
        PackPanel(rows, width, in_, buffer_.as<BFloat16>() + panel * panel_size);
      }
    }
  });
}

void Matmul(Device& device, const MatmulArgs& a) {
  if (a.rows == 0) return;
  GLA_CHECK(a.x_dtype == DType::kFloat32 || a.x_dtype == DType::kBFloat16);
  GLA_CHECK(a.y_dtype == DType::kFloat32 || a.y_dtype == a.x_dtype);
  GLA_CHECK(!a.accumulate || a.y_dtype == DType::kFloat32);
  const int in = a.weight->in();
  const int width = static_cast<int>(HWY_DYNAMIC_DISPATCH(PanelWidth)());
  const int num_panels = (a.weight->out() + width - 1) / width;
  // A block of rows stays in the second-level cache while the panels pass by.
  const int max_block = std::clamp(32768 / std::max(in, 1), 12, 96);
  const int num_blocks = (a.rows + max_block - 1) / max_block;
  constexpr int kGroup = 4;  // panels to an item
  const int num_groups = (num_panels + kGroup - 1) / kGroup;
  // A weight read once costs its bytes; one used by many rows the arithmetic.
  const double macs = static_cast<double>(kGroup) * width * in;
  const double block_rows = static_cast<double>(a.rows) / num_blocks;
  const double item_ns = macs * std::max(1.0 / 12, block_rows / 30);
  ParallelFor(device, static_cast<int64_t>(num_blocks) * num_groups, item_ns,
              [&](int64_t begin, int64_t end) {
                while (begin < end) {
                  const int block = static_cast<int>(begin / num_groups);
                  const int group0 = static_cast<int>(begin % num_groups);
                  const int group1 =
                      static_cast<int>(std::min<int64_t>(num_groups, group0 + (end - begin)));
                  const int row0 = static_cast<int>(int64_t{a.rows} * block / num_blocks);
                  const int row1 = static_cast<int>(int64_t{a.rows} * (block + 1) / num_blocks);
                  HWY_DYNAMIC_DISPATCH(MatmulRows)
                  (a, row0, row1 - row0, group0 * kGroup, std::min(num_panels, group1 * kGroup));
                  begin += group1 - group0;
                }
              });
}

}  // namespace gla
#endif  // HWY_ONCE
