// What both kernels of a decode product share: the order of its sums, and what ends it.
//
// Batch invariance. The columns are cut into kSlices slices at places that depend on `in` alone.
// The sum of a slice is one chain of tensor core products of 16 neighbouring columns each, in
// ascending order from zero; the slices are added in ascending order in float32. Whichever kernel,
// tile or cluster computes a row, the order is this one. (mma.sync and wgmma round alike on Hopper;
// tests/kernels/decode_product_test.cc compares every plan bit for bit.)
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor.cuh"
#include "kernels/decode.h"

namespace gla {

constexpr int kSlices = 8;

// DecodeProductArgs for the device.
struct ProductParams {
  const bf16* x;
  int64_t x_stride;
  const float* squares;
  float inverse_in, eps;
  const bf16* weight;
  DecodeEpilogue epilogue;
  bool y_is_float;
  bool next_begins;  // the next kernel, at once
  void* y;
  int64_t y_stride;
  float* residual;
  const float* next_norm;
  bf16* next_x;
  float* next_squares;
  int rows, in, out;
};

// Slice s is the pieces of 64 columns [SliceStart(s), SliceStart(s + 1)).
__device__ inline int SliceStart(int in, int slice) { return CeilDiv(in, 64) * slice / kSlices; }

// What earlier kernels of the stream wrote comes from the L2 cache, never from an L1 line that
// another kernel may have left behind.
__device__ inline float4 LoadFresh(const float* p) {
  return __ldcg(reinterpret_cast<const float4*>(p));
}

// The sum over 16 neighbours that four lanes hold by four: lane and lane ^ kFar are 8 apart, lane
// and lane ^ kNear 4 apart. The same bits whatever the lanes.
template <int kFar, int kNear>
__device__ float SumOfSixteen(float4 x) {
  const auto sum = [](float y) {
    y += __shfl_xor_sync(0xFFFFFFFFu, y, kFar);
    return y + __shfl_xor_sync(0xFFFFFFFFu, y, kNear);
  };
  return (sum(x.x) + sum(x.z)) + (sum(x.y) + sum(x.w));
}

// The factors of rows: 1 / sqrt(mean of squares + eps). The order of a sum: partial sum i of 32 has
// the pairs i, i + 32, .. of `squares`, and partial sums 16, 8, 4, 2 and 1 apart are added.

__device__ inline float FactorOf(const ProductParams& p, float sum) {
  return rsqrtf(sum * p.inverse_in + p.eps);
}
// Of kRows rows kSlices apart, by a warp, when what is read was asked for early.
template <int kRows>
struct RowFactor {
  static constexpr int kAtOnce = 2;
  const float2* all_squares;
  int from[kRows];
  int pairs;  // of a row that are left, from the lane's first on
  float2 squares[kRows][kAtOnce];

  __device__ RowFactor(const ProductParams& p, int row)
      : all_squares(reinterpret_cast<const float2*>(p.squares)) {
    const int lane = threadIdx.x % 32, all = p.in / 32;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      from[r] = min(row + r * kSlices, p.rows - 1) * all + lane;
    }
    pairs = p.squares != nullptr ? all - lane : 0;
  }
  __device__ void Load() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        squares[r][i] = i * 32 < pairs ? __ldcg(all_squares + from[r] + i * 32) : float2{};
      }
    }
  }
  // To factors[0, kSlices, ..].
  __device__ void Finish(const ProductParams& p, float* factors) {
    if (p.squares == nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) factors[r * kSlices] = 1;
      return;
    }
    float sums[kRows] = {};
    const auto add = [&] {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sums[r] += squares[r][i].x + squares[r][i].y;
      }
    };
    add();
#pragma unroll 1
    for (int first = kAtOnce * 32; first < p.in / 32; first += kAtOnce * 32) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) from[r] += kAtOnce * 32;
      pairs -= kAtOnce * 32;
      Load();
      add();
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = WarpSum(sums[r]);
      if (threadIdx.x % 32 == 0) factors[r * kSlices] = FactorOf(p, sum);
    }
  }
};

// Of eight rows from row0 on to shared memory, by a warp.
__device__ inline void EightFactors(const ProductParams& p, int row0, float* factors) {
  const int lane = threadIdx.x % 32;
  if (p.squares == nullptr) {
    if (lane < 8) factors[lane] = 1.0f;
    return;
  }
  const int pairs = p.in / 32;
  float sums[8] = {};
#pragma unroll 2
  for (int at = lane; at < pairs; at += 32) {
    const float2* const from = reinterpret_cast<const float2*>(p.squares) + at;
    float2 squares[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      squares[i] = row0 + i < p.rows ? __ldcg(from + int64_t{row0 + i} * pairs) : float2{};
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += squares[i].x + squares[i].y;
  }
  // Half of the lanes keep half of the rows, until four lanes have one.
#pragma unroll
  for (int rows = 4; rows > 0; rows /= 2) {
    const bool upper = lane & rows * 4;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const float theirs = upper ? sums[i] : sums[i + rows];
      sums[i] = (upper ? sums[i + rows] : sums[i]) + __shfl_xor_sync(0xFFFFFFFFu, theirs, rows * 4);
    }
  }
  sums[0] += __shfl_xor_sync(0xFFFFFFFFu, sums[0], 2);
  sums[0] += __shfl_xor_sync(0xFFFFFFFFu, sums[0], 1);
  if (lane % 4 == 0) factors[lane / 4] = FactorOf(p, sums[0]);
}

// A patch is 8 rows by 16 outputs and ends in a warp: lane i has the outputs 4 (i / 8) + [0, 4) of
// row `row` = the patch's first + i % 8. With kSwiGlu the 16 are 8 gates and their 8 ups. Sixteen
// neighbours of a patch have one answer to `valid`.
struct Patch {
  int row, out;
  int column;  // of the lane's first output
  bool valid;
  int64_t at;  // from the start of y or of the residual stream
  float4 norm = {}, residual = {};

  // Reads weights alone.
  __device__ Patch(const ProductParams& p, int row, int out) : row(row), out(out) {
    const int quarter = threadIdx.x % 32 / 8;
    column = out + quarter * 4;
    valid = row < p.rows && out < p.out;
    if (p.epilogue == DecodeEpilogue::kStore) {
      at = row * p.y_stride + column;
    } else if (p.epilogue == DecodeEpilogue::kSwiGlu) {
      at = row * p.y_stride + out / 2 + quarter % 2 * 4 + quarter / 2 * 2;
    } else {
      at = int64_t{row} * p.out + column;
      if (out < p.out) norm = LoadFour(p.next_norm + column);
    }
  }
  // That of `rows` rows further on.
  __device__ Patch After(const ProductParams& p, int rows) const {
    Patch after = *this;
    after.row += rows;
    after.at += int64_t{rows} * (p.epilogue == DecodeEpilogue::kResidual ? p.out : p.y_stride);
    after.valid = after.row < p.rows && out < p.out;
    return after;
  }
  // What can be read before the sums are there.
  __device__ void LoadResidual(const ProductParams& p) {
    if (p.epilogue == DecodeEpilogue::kResidual && valid) residual = LoadFresh(p.residual + at);
  }
  // By all lanes of the warp.
  __device__ void End(const ProductParams& p, float4 sum, float factor) const {
    sum = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
    if (p.epilogue == DecodeEpilogue::kStore) {
      if (valid) Store(p, sum);
    } else if (p.epilogue == DecodeEpilogue::kSwiGlu) {
      // Gates are in the lower half of the lanes, ups in the upper: each ends half of its four.
      const bool is_up = threadIdx.x % 32 >= 16;
      const auto swap = [](float x) { return __shfl_xor_sync(0xFFFFFFFFu, x, 16); };
      const float2 theirs = {swap(is_up ? sum.x : sum.z), swap(is_up ? sum.y : sum.w)};
      const float2 gate = is_up ? theirs : float2{sum.x, sum.y};
      const float2 up = is_up ? float2{sum.z, sum.w} : theirs;
      if (valid) {
        *reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.y) + at) =
            PackBf16(QuickSilu(gate.x) * up.x, QuickSilu(gate.y) * up.y);
      }
    } else {
      const float4 r = {residual.x + sum.x, residual.y + sum.y, residual.z + sum.z,
                        residual.w + sum.w};
      const float squares = SumOfSixteen<16, 8>({r.x * r.x, r.y * r.y, r.z * r.z, r.w * r.w});
      if (!valid) return;
      StoreFour(p.residual + at, r);
      StoreFour(p.next_x + at, {r.x * norm.x, r.y * norm.y, r.z * norm.z, r.w * norm.w});
      if (threadIdx.x % 32 < 8) p.next_squares[at / 16] = squares;
    }
  }

 private:
  __device__ void Store(const ProductParams& p, float4 sum) const {
    if (column + 4 <= p.out && p.y_stride % 4 == 0) {
      if (p.y_is_float) {
        StoreFour(static_cast<float*>(p.y) + at, sum);
      } else {
        StoreFour(static_cast<bf16*>(p.y) + at, sum);
      }
      return;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i >= p.out) continue;
      if (p.y_is_float) {
        static_cast<float*>(p.y)[at + i] = values[i];
      } else {
        static_cast<bf16*>(p.y)[at + i] = FromFloat<bf16>(values[i]);
      }
    }
  }
};

}  // namespace gla
