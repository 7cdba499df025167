// A decode product for few rows: weights from memory straight into the registers of mma.sync.
//
// A block computes 16 outputs of 8 or 16 rows, each of its eight warps one slice of the columns.
// The weights are the 16 x 16 operand. Four neighbouring lanes hold 16 columns of an output, four
// columns each: the order of the columns inside one product is free as long as both operands agree.
// The weights of a whole slice, or as many as registers hold, are on their way before the kernel
// waits for the one ahead of it.
#pragma once

#include "kernels/cuda/decode_product.cuh"

namespace gla {

constexpr int kFewThreads = 32 * kSlices;
constexpr int kFewPitch = 16 + 4;  // floats; so that neither side meets a bank twice

__device__ inline uint2 LoadWeights(const bf16* p) {
  uint2 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(x.x), "=r"(x.y)
               : "l"(p));
  return x;
}

// kTiles: of eight rows. kDepth: products whose weights are in registers at once; kOnce: as many as
// a slice has.
template <int kTiles, int kDepth, bool kOnce>
__global__ void __launch_bounds__(kFewThreads, kDepth > 16                  ? 1
                                               : kDepth == 8 && kTiles == 1 ? 3
                                                                            : 2)
    FewRowsKernel(const __grid_constant__ ProductParams p, int tiles_out) {
  constexpr int kAhead = 8;  // products whose rows are in registers at once
  static_assert(kDepth % kAhead == 0);
  __shared__ float4 sums[kSlices * kTiles * 8 * kFewPitch / 4];
  __shared__ float factors[kTiles * 8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int out0 = static_cast<int>(blockIdx.x % tiles_out) * 16;
  const int row0 = static_cast<int>(blockIdx.x / tiles_out) * kTiles * 8;

  const int first = SliceStart(p.in, warp) * 4;
  const int steps = min(SliceStart(p.in, warp + 1) * 4, p.in / 16) - first;
  const bool swiglu = p.epilogue == DecodeEpilogue::kSwiGlu;
  const int out_a = swiglu ? out0 / 2 + g : min(out0 + g, p.out - 1);
  const int out_b = swiglu ? out_a + p.out / 2 : min(out0 + g + 8, p.out - 1);
  const bf16* const weight_a = p.weight + int64_t{out_a} * p.in + first * 16 + t * 4;
  const bf16* const weight_b = p.weight + int64_t{out_b} * p.in + first * 16 + t * 4;
  uint2 a[kDepth], b[kDepth];
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    if (i < steps) {
      a[i] = LoadWeights(weight_a + i * 16);
      b[i] = LoadWeights(weight_b + i * 16);
    }
  }

  WaitForPrevious();
  AllowNext();

  const bf16* x[kTiles];
  bool has_row[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int row = row0 + j * 8 + g;
    has_row[j] = row < p.rows;
    x[j] = p.x + (has_row[j] ? row : 0) * p.x_stride + first * 16 + t * 4;
  }
  const auto load_row = [&](int j, int step) -> uint2 {
    if (!has_row[j]) return {0, 0};
    return __ldcg(reinterpret_cast<const uint2*>(x[j] + step * 16));
  };
  uint2 xs[kAhead][kTiles];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < steps) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) xs[i][j] = load_row(j, i);
    }
  }
  PatchEnd end;
  const int row = row0 + warp * 8 + lane % 8;
  if (warp < kTiles) end.Load(p, row, out0);
  RowFactor row_factor[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) row_factor[j].Load(p, row0 + j * 8 + warp);

  float sum[kTiles][4] = {};
  for (int base = 0; base < (kOnce ? 1 : steps); base += kDepth) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int step = kOnce ? i : base + i;
      if (step < steps) {
        const uint32_t w[4] = {a[i].x, b[i].x, a[i].y, b[i].y};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint2 v = xs[i % kAhead][j];
          Mma16x8x16(sum[j], w, {v.x, v.y});
        }
      }
      if (!kOnce && step + kDepth < steps) {
        a[i] = LoadWeights(weight_a + (step + kDepth) * 16);
        b[i] = LoadWeights(weight_b + (step + kDepth) * 16);
      }
      if ((!kOnce || i + kAhead < kDepth) && step + kAhead < steps) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) xs[i % kAhead][j] = load_row(j, step + kAhead);
      }
    }
  }

  float* const mine = reinterpret_cast<float*>(sums) + warp * kTiles * 8 * kFewPitch;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      mine[(j * 8 + t * 2 + (e & 1)) * kFewPitch + g + (e & 2 ? 8 : 0)] = sum[j][e];
    }
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float factor = row_factor[j].Finish(p, row0 + j * 8 + warp);
    if (lane == 0) factors[j * 8 + warp] = factor;
  }
  __syncthreads();
  if (warp >= kTiles) return;
  const int n = warp * 8 + lane % 8;
  float4 total = {};
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const float4 part = sums[(s * kTiles * 8 + n) * kFewPitch / 4 + lane / 8];
    total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
  }
  end.Finish(p, row, out0, total, factors[n]);
}

}  // namespace gla
