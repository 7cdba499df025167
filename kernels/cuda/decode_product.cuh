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
  float eps;
  const bf16* weight;
  DecodeEpilogue epilogue;
  bool y_is_float;
  void* y;
  int64_t y_stride;
  float* residual;
  const float* next_norm;
  bf16* next_x;
  float* next_squares;
  int rows, in, out;
};

// The kernel behind a product that ends in x for another product is that product, which reads only
// weights before it waits: it may begin while even the kernel ahead of this one still runs.
__device__ inline bool NextIsProduct(const ProductParams& p) {
  return p.epilogue != DecodeEpilogue::kStore;
}

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

// Of one row, by eight neighbouring lanes, when what is read was asked for early.
struct RowFactor {
  static constexpr int kAtOnce = 4;
  float2 squares[kAtOnce];

  __device__ void Load(const ProductParams& p, int row, int first = 0) {
    const int pairs = p.squares != nullptr && row < p.rows ? p.in / 32 : 0;
    const float2* const from = reinterpret_cast<const float2*>(p.squares) + int64_t{row} * pairs;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + threadIdx.x % 8 + i * 8;
      squares[i] = at < pairs ? __ldcg(from + at) : float2{};
    }
  }
  // In every lane of the warp.
  __device__ float Finish(const ProductParams& p, int row) {
    if (p.squares == nullptr) return 1.0f;
    float sums[kAtOnce] = {};
#pragma unroll 1
    for (int first = 0;;) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sums[i] += squares[i].x + squares[i].y;
      if ((first += kAtOnce * 8) >= p.in / 32) break;
      Load(p, row, first);
    }
    return FactorOf<4>(p, (sums[0] + sums[2]) + (sums[1] + sums[3]));
  }
  // Of the sums of lanes up to kFar apart.
  template <int kFar>
  __device__ static float FactorOf(const ProductParams& p, float sum) {
#pragma unroll
    for (int mask = kFar; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, mask);
    return 1.0f / sqrtf(sum / static_cast<float>(p.in) + p.eps);
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
  const float factor = RowFactor::FactorOf<2>(p, sums[0]);
  if (lane % 4 == 0) factors[lane / 4] = factor;
}

// A patch is 8 rows by 16 outputs and ends in a warp: lane i has the outputs 4 (i / 8) + [0, 4) of
// row `row` = the patch's first + i % 8. With kSwiGlu the 16 are 8 gates and their 8 ups.

// What can be read before the sums are there.
__device__ inline float4 PatchResidual(const ProductParams& p, int row, int out) {
  if (p.epilogue != DecodeEpilogue::kResidual || row >= p.rows || out >= p.out) return {};
  return LoadFresh(p.residual + int64_t{row} * p.out + out + threadIdx.x % 32 / 8 * 4);
}
__device__ inline float4 PatchNorm(const ProductParams& p, int out) {
  if (p.epilogue != DecodeEpilogue::kResidual || out >= p.out) return {};
  return LoadFour(p.next_norm + out + threadIdx.x % 32 / 8 * 4);
}
__device__ inline void EndPatch(const ProductParams& p, int row, int out, float4 residual,
                                float4 norm, float4 sum, float factor) {
  const int quarter = threadIdx.x % 32 / 8;
  const int column = out + quarter * 4;
  const bool valid = row < p.rows && out < p.out;
  sum = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
  if (p.epilogue == DecodeEpilogue::kStore) {
    const int64_t at = row * p.y_stride + column;
    if (valid && column + 4 <= p.out && p.y_stride % 4 == 0) {
      if (p.y_is_float) {
        StoreFour(static_cast<float*>(p.y) + at, sum);
      } else {
        StoreFour(static_cast<bf16*>(p.y) + at, sum);
      }
    } else if (valid) {
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
  } else if (p.epilogue == DecodeEpilogue::kSwiGlu) {
    const auto up = [](float x) { return __shfl_down_sync(0xFFFFFFFFu, x, 16); };
    const float4 u = {up(sum.x), up(sum.y), up(sum.z), up(sum.w)};
    if (valid && quarter < 2) {
      StoreFour(static_cast<bf16*>(p.y) + row * p.y_stride + out / 2 + quarter * 4,
                {Silu(sum.x) * u.x, Silu(sum.y) * u.y, Silu(sum.z) * u.z, Silu(sum.w) * u.w});
    }
  } else {
    const float4 r = {residual.x + sum.x, residual.y + sum.y, residual.z + sum.z,
                      residual.w + sum.w};
    const float squares = SumOfSixteen<16, 8>({r.x * r.x, r.y * r.y, r.z * r.z, r.w * r.w});
    if (!valid) return;
    const int64_t at = int64_t{row} * p.out + column;
    StoreFour(p.residual + at, r);
    StoreFour(p.next_x + at, {r.x * norm.x, r.y * norm.y, r.z * norm.z, r.w * norm.w});
    if (quarter == 0) p.next_squares[at / 16] = squares;
  }
}

}  // namespace gla
