// y = x W^T, for one row as for many.
//
// Every output element is one chain of fused multiply-adds over k = 0, 1, 2, ... in float32,
// whatever the tile that computes it. So its bits depend on its row and its weights alone: not on
// the number of rows, the row's place, the number of threads. No library offers that together with
// bfloat16 weights under float32 activations on AVX2 (see kernels/README.md). bfloat16 activations
// with bfloat16 weights take an instruction for pairs along k where there is one (matmul_dot.h):
// again one chain.
//
// Packed weight: panels of 2 * L outputs (L: float32 lanes of a vector), zero-padded at the end;
// inside a panel, k-major, k padded to an even number. bfloat16: for each pair k, k + 1 and output
// a word of 32 bits, k in its low and k + 1 in its high half: a shift or a mask gives a vector of
// float32. float32: for each k, the 2 * L values in order.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/cpu/common.h"
#include "kernels/cpu/matmul_dot.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

#ifndef GLA_KERNELS_CPU_MATMUL_ROWS_
#define GLA_KERNELS_CPU_MATMUL_ROWS_
namespace gla {

// The rows of x as the tiles read them: float32, or (is_dot) bfloat16; an even number of k.
struct MatmulRows {
  int first_row(int tile) const { return static_cast<int>(int64_t{rows} * tile / num_tiles); }

  const void* data;
  int64_t stride;  // in elements
  int rows, num_tiles, pairs;
  bool is_dot;
};

}  // namespace gla
#endif  // GLA_KERNELS_CPU_MATMUL_ROWS_

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

size_t PanelWidth() { return 2 * hn::Lanes(FloatTag()); }

// One vector of a panel at k + kOdd; `w` is at the panel's pair k, k + 1 and `vec` its half.
template <int kOdd, class D>
HWY_INLINE hn::Vec<D> LoadWeights(D d, const BFloat16* w, size_t vec) {
  const hn::RebindToUnsigned<D> d32;
  const auto words = hn::Load(d32, reinterpret_cast<const uint32_t*>(w) + vec * hn::Lanes(d));
  if constexpr (kOdd == 0) return hn::BitCast(d, hn::ShiftLeft<16>(words));
  return hn::BitCast(d, hn::And(words, hn::Set(d32, 0xFFFF0000u)));
}
template <int kOdd, class D>
HWY_INLINE hn::Vec<D> LoadWeights(D d, const float* w, size_t vec) {
  return hn::Load(d, w + (2 * kOdd + vec) * hn::Lanes(d));
}

// sums [kRows, kPanels * width] = x [kRows, 2 * pairs] times kPanels neighbouring panels. Fetches
// to the second-level cache meanwhile: for one row what lies kAhead bytes ahead, for several the
// next panel.
template <int kRows, int kPanels, int kAhead, typename W>
HWY_INLINE void Tile(const float* HWY_RESTRICT x, int64_t x_stride, const W* HWY_RESTRICT panels,
                     int pairs, float* HWY_RESTRICT sums) {
  const FloatTag d;
  using V = hn::Vec<FloatTag>;
  constexpr int kVecs = 2 * kPanels;
  const size_t lanes = hn::Lanes(d);
  const size_t pair_size = 4 * lanes, panel_size = pair_size * static_cast<size_t>(pairs);
  V acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = hn::Zero(d);
  }
  const auto step = [&]<int kOdd>(const W* HWY_RESTRICT w, const float* HWY_RESTRICT xk) HWY_ATTR {
    V weights[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      weights[v] = LoadWeights<kOdd>(d, w + v / 2 * panel_size, v % 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V xr = hn::Set(d, xk[r * x_stride + kOdd]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = hn::MulAdd(xr, weights[v], acc[r][v]);
    }
  };
  const W* HWY_RESTRICT w = panels;
  for (int k = 0; k < pairs; ++k, w += pair_size, x += 2) {
    if constexpr (kRows > 1 || kAhead > 0) {
      const size_t ahead = kRows > 1 ? panel_size * sizeof(W) : kAhead;
#pragma GCC unroll 8
      for (size_t byte = 0; byte < pair_size * sizeof(W); byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(w) + ahead + byte, 0, 2);
      }
    }
    step.template operator()<0>(w, x);
    step.template operator()<1>(w, x);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) hn::StoreU(acc[r][v], d, sums + (r * kVecs + v) * lanes);
  }
}

// As many rows as the registers hold, with two accumulators a row; but no more than the ways of a
// first-level cache, where rows a power of two apart fall on one set.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON
constexpr int kMaxTileRows = 8;
#else
constexpr int kMaxTileRows = 6;
#endif

// Panels of a single row. From a cache, as many as hide the latency of the chains; from memory,
// which likes one stream better than several, no more than keep up with it.
constexpr int kCachedPanels = HWY_TARGET == HWY_AVX3 ? 2 : 4;
constexpr int kMemoryPanels = HWY_TARGET == HWY_AVX3 ? 1 : 2;
constexpr size_t kCachedBytes = size_t{1} << 20;

int MaxTileRows() { return kMaxTileRows; }

template <typename W, int kRows = kMaxTileRows>
HWY_INLINE void TileOfRows(int rows, const float* x, int64_t x_stride, const W* panel, int pairs,
                           float* sums) {
  if (rows == kRows) return Tile<kRows, 1, 0>(x, x_stride, panel, pairs, sums);
  if constexpr (kRows > 1) TileOfRows<W, kRows - 1>(rows, x, x_stride, panel, pairs, sums);
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

// Tiles [tile0, tile1) of x times panels [panel0, panel1).
template <typename X, typename W>
void MultiplyPanels(const MatmulArgs& a, const MatmulRows& x, int tile0, int tile1, int panel0,
                    int panel1) {
  const int width = static_cast<int>(PanelWidth());
  const int out = a.weight->out();
  const size_t panel_size = size_t{2} * width * x.pairs;
  HWY_ALIGN float sums[kMaxTileRows * 2 * HWY_MAX_BYTES / sizeof(float)];
  const bool is_cached = a.weight->bytes() <= kCachedBytes;
  int panel = panel0;
  if constexpr (std::is_same_v<X, float>) {
    const auto pass = [&]<int kPanels, int kAhead>() HWY_ATTR {
      for (; panel + kPanels <= panel1; panel += kPanels) {
        const W* weight = static_cast<const W*>(a.weight->data()) + panel * panel_size;
        Tile<1, kPanels, kAhead>(static_cast<const float*>(x.data), 0, weight, x.pairs, sums);
        const int out0 = panel * width;
        StoreTile(a, sums, kPanels * width, 0, 1, out0, std::min(kPanels * width, out - out0));
      }
    };
    if (a.rows == 1 && is_cached) pass.template operator()<kCachedPanels, 0>();
    if (a.rows == 1) pass.template operator()<kMemoryPanels, kStreamAhead>();
  }
  for (; panel < panel1; ++panel) {
    const W* weight = static_cast<const W*>(a.weight->data()) + panel * panel_size;
    const int out0 = panel * width, n = std::min(width, out - out0);
    for (int tile = tile0; tile < tile1; ++tile) {
      const int row0 = x.first_row(tile), rows = x.first_row(tile + 1) - row0;
      const X* from = static_cast<const X*>(x.data) + row0 * x.stride;
      if constexpr (std::is_same_v<X, BFloat16>) {
        DotTile(rows, from, x.stride, weight, x.pairs, is_cached, sums);
      } else {
        TileOfRows<W>(rows, from, x.stride, weight, x.pairs, sums);
      }
      StoreTile(a, sums, width, row0, rows, out0, n);
    }
  }
}

void MatmulPanels(const MatmulArgs& a, const MatmulRows& x, int tile0, int tile1, int panel0,
                  int panel1) {
  if (x.is_dot) {
    MultiplyPanels<BFloat16, BFloat16>(a, x, tile0, tile1, panel0, panel1);
  } else if (a.weight->dtype() == DType::kFloat32) {
    MultiplyPanels<float, float>(a, x, tile0, tile1, panel0, panel1);
  } else {
    MultiplyPanels<float, BFloat16>(a, x, tile0, tile1, panel0, panel1);
  }
}

// Rows [begin, end) of a.x to `to` [rows, x.stride], as `x` says.
void CopyRows(const MatmulArgs& a, const MatmulRows& x, void* to, int64_t begin, int64_t end) {
  const int in = a.weight->in();
  const auto copy = [&]<typename From, typename To>(const From*, To* rows) {
    for (int64_t row = begin; row < end; ++row) {
      Convert(static_cast<const From*>(a.x) + row * a.x_stride, rows + row * x.stride, in);
      if (in % 2 != 0) rows[row * x.stride + in] = To{};
    }
  };
  WithActType(a.x_dtype, [&]<typename From>() {
    if (x.is_dot) {
      copy(static_cast<const From*>(nullptr), static_cast<BFloat16*>(to));
    } else {
      copy(static_cast<const From*>(nullptr), static_cast<float*>(to));
    }
  });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(PanelWidth);
HWY_EXPORT(MaxTileRows);
HWY_EXPORT(MatmulPanels);
HWY_EXPORT(CopyRows);

namespace {

void RowToFloat(const HostMatrix& block, int row, float* to) {
  WithStoredType(block.dtype, [&]<typename T>() {
    const T* from = static_cast<const T*>(block.data) + static_cast<size_t>(row) * block.cols;
    for (int i = 0; i < block.cols; ++i) to[i] = ToFloat(from[i]);
  });
}

// `rows`: the panel's outputs [width, in] in order. See the head of the file.
template <typename W>
void PackPanel(const std::vector<float>& rows, int width, int in, W* panel) {
  for (int i = 0; i < width; ++i) {
    const float* row = rows.data() + static_cast<size_t>(i) * in;
    for (int k = 0; k < in + in % 2; ++k) {
      const size_t place = std::is_same_v<W, float>
                               ? static_cast<size_t>(k) * width + i
                               : (static_cast<size_t>(k / 2) * width + i) * 2 + k % 2;
      panel[place] = FromFloat<W>(k < in ? row[k] : 0.0f);
    }
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
  const size_t panel_size = static_cast<size_t>(width) * (in_ + in_ % 2);
  buffer_ = DeviceBuffer(device, num_panels * panel_size * SizeOf(dtype));
  if (!buffer_.ok()) return;
  ParallelFor(device, num_panels, static_cast<double>(panel_size), [&](int64_t begin, int64_t end) {
    std::vector<float> rows(static_cast<size_t>(width) * in_);
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
  const bool is_dot = a.x_dtype == DType::kBFloat16 && a.weight->dtype() == DType::kBFloat16 &&
                      width == kDotPanelWidth && HasDotInstruction();
  const int max_tile_rows = is_dot ? kMaxDotRows : HWY_DYNAMIC_DISPATCH(MaxTileRows)();
  MatmulRows x{.data = a.x,
               .stride = a.x_stride,
               .rows = a.rows,
               .num_tiles = (a.rows + max_tile_rows - 1) / max_tile_rows,
               .pairs = (in + 1) / 2,
               .is_dot = is_dot};
  const bool is_in_place = in % 2 == 0 && (is_dot || a.x_dtype == DType::kFloat32);
  if (!is_in_place) {
    thread_local std::vector<float> copied;
    x.stride = 2 * x.pairs;
    copied.resize(std::max(copied.size(), static_cast<size_t>(x.stride) * a.rows));
    float* const to = copied.data();  // this thread's; the others have their own `copied`
    x.data = to;
    ParallelFor(device, a.rows, in * kCopyNs, [&](int64_t begin, int64_t end) {
      HWY_DYNAMIC_DISPATCH(CopyRows)(a, x, to, begin, end);
    });
  }

  // A block of rows stays in the second-level cache while the panels pass by.
  const int max_block = std::clamp(32768 / std::max(in, 1), 16, 96);
  const int block_tiles = (max_block + max_tile_rows - 1) / max_tile_rows;
  const int num_blocks = (x.num_tiles + block_tiles - 1) / block_tiles;
  constexpr int kGroup = 4;  // panels to an item
  const int num_groups = (num_panels + kGroup - 1) / kGroup;
  // A weight read once costs its bytes; one used by many rows the arithmetic.
  const double macs = static_cast<double>(kGroup) * width * in;
  const double block_rows = static_cast<double>(a.rows) / num_blocks;
  const double item_ns = macs * std::max(1.0 / 12, block_rows / (is_dot ? 100 : 50));
  ParallelFor(device, static_cast<int64_t>(num_blocks) * num_groups, item_ns,
              [&](int64_t begin, int64_t end) {
                while (begin < end) {
                  const int block = static_cast<int>(begin / num_groups);
                  const int group0 = static_cast<int>(begin % num_groups);
                  const int group1 =
                      static_cast<int>(std::min<int64_t>(num_groups, group0 + (end - begin)));
                  const int tile0 = x.num_tiles * block / num_blocks;
                  const int tile1 = x.num_tiles * (block + 1) / num_blocks;
                  HWY_DYNAMIC_DISPATCH(MatmulPanels)
                  (a, x, tile0, tile1, group0 * kGroup, std::min(num_panels, group1 * kGroup));
                  begin += group1 - group0;
                }
              });
}

}  // namespace gla
#endif  // HWY_ONCE
