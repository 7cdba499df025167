// Our own dense products, y = x W^T (+ bias) (+ y): bfloat16 on the tensor cores, float32 on FMA.
//
// They take what cuBLASLt is not asked for (see matmul.cu). Every element of y is one chain of
// multiply-adds over the inputs in ascending order, whatever the tile and the number of rows, so a
// row's bits depend on that row alone. Tiles stand out-major: 64 outputs by kTileRows rows.
#pragma once

#include "kernels/cuda/common.cuh"

namespace gla {

struct TileArgs {
  const void* x;       // [rows, in]
  const void* weight;  // [out, weight_stride], zeros from `in` on
  const float* bias;   // [out] or null
  void* y;             // [rows, out]
  int rows, out, in;
  int64_t x_stride, weight_stride, y_stride;
  bool accumulate;
  bool x_aligned;  // rows of x start at 16 bytes
  int tiles_out;   // the grid is tiles_out * tiles of rows, tiles_out running fastest
};

template <typename Y>
__device__ void StoreTileValue(const TileArgs& a, int row, int out, float value) {
  if (row >= a.rows || out >= a.out) return;
  Y* y = static_cast<Y*>(a.y) + row * a.y_stride + out;
  if (a.bias != nullptr) value += a.bias[out];
  if (a.accumulate) value += ToFloat(*y);
  *y = FromFloat<Y>(value);
}

// ---- bfloat16: mma.m16n8k16, W as the 16 x 16 operand, x as the 16 x 8 one ----------------------

constexpr int kTileOut = 64;    // 16 to each of four warps
constexpr int kTileIn = 64;     // inputs per round
constexpr int kPitch = 64 + 8;  // elements; 144 bytes, so that eight rows hit all banks once
constexpr int kTileThreads = 128;

__device__ inline void LoadMatrices(uint32_t (&r)[4], const bf16* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ inline void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Eight neighbours of row `row` from column `col` on; zeros outside [num_rows, num_cols].
__device__ inline uint4 LoadPiece(const bf16* matrix, int64_t stride, int row, int num_rows,
                                  int col, int num_cols, bool aligned) {
  if (row >= num_rows || col >= num_cols) return {0, 0, 0, 0};
  const bf16* p = matrix + row * stride + col;
  if (aligned && col + 8 <= num_cols) return *reinterpret_cast<const uint4*>(p);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (col + i < num_cols) {
      words[i / 2] |= static_cast<uint32_t>(__bfloat16_as_ushort(p[i])) << (16 * (i % 2));
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

template <typename Y, int kTileRows>
__global__ void __launch_bounds__(kTileThreads) Bf16TileKernel(const TileArgs a) {
  constexpr int kPieces = kTileIn / 8;  // of one row of a tile
  constexpr int kWeightLoads = kTileOut * kPieces / kTileThreads;
  constexpr int kRowLoads = kTileRows * kPieces / kTileThreads;
  static_assert(kTileRows % 16 == 0 && kRowLoads > 0);
  __shared__ alignas(16) bf16 weight_tile[kTileOut][kPitch];
  __shared__ alignas(16) bf16 x_tile[kTileRows][kPitch];
  const int out0 = static_cast<int>(blockIdx.x % a.tiles_out) * kTileOut;
  const int row0 = static_cast<int>(blockIdx.x / a.tiles_out) * kTileRows;
  const bf16* weight = static_cast<const bf16*>(a.weight);
  const bf16* x = static_cast<const bf16*>(a.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // The next round's tiles travel in registers while this round's are used.
  uint4 next_weight[kWeightLoads], next_x[kRowLoads];
  const auto load = [&](int in0) {
#pragma unroll
    for (int i = 0; i < kWeightLoads; ++i) {
      const int piece = threadIdx.x + i * kTileThreads;
      next_weight[i] =
          LoadPiece(weight, a.weight_stride, out0 + piece / kPieces, a.out,
                    in0 + piece % kPieces * 8, static_cast<int>(a.weight_stride), true);
    }
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      const int piece = threadIdx.x + i * kTileThreads;
      next_x[i] = LoadPiece(x, a.x_stride, row0 + piece / kPieces, a.rows,
                            in0 + piece % kPieces * 8, a.in, a.x_aligned);
    }
  };

  float sums[kTileRows / 8][4] = {};
  load(0);
  for (int in0 = 0; in0 < a.in; in0 += kTileIn) {
    __syncthreads();  // the round before has read its tiles
#pragma unroll
    for (int i = 0; i < kWeightLoads; ++i) {
      const int piece = threadIdx.x + i * kTileThreads;
      *reinterpret_cast<uint4*>(&weight_tile[piece / kPieces][piece % kPieces * 8]) =
          next_weight[i];
    }
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      const int piece = threadIdx.x + i * kTileThreads;
      *reinterpret_cast<uint4*>(&x_tile[piece / kPieces][piece % kPieces * 8]) = next_x[i];
    }
    __syncthreads();
    if (in0 + kTileIn < a.in) load(in0 + kTileIn);
#pragma unroll
    for (int k = 0; k < kTileIn; k += 16) {
      uint32_t w[4];
      LoadMatrices(w, &weight_tile[warp * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
      for (int n = 0; n < kTileRows; n += 16) {
        uint32_t b[4];  // rows n..n+7 at k, k+8; rows n+8..n+15 at k, k+8
        LoadMatrices(b, &x_tile[n + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
        MultiplyAdd(sums[n / 8], w, b[0], b[1]);
        MultiplyAdd(sums[n / 8 + 1], w, b[2], b[3]);
      }
    }
  }
  const int out = out0 + warp * 16 + lane / 4, row = row0 + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTileRows / 8; ++n) {
    StoreTileValue<Y>(a, row + n * 8, out, sums[n][0]);
    StoreTileValue<Y>(a, row + n * 8 + 1, out, sums[n][1]);
    StoreTileValue<Y>(a, row + n * 8, out + 8, sums[n][2]);
    StoreTileValue<Y>(a, row + n * 8 + 1, out + 8, sums[n][3]);
  }
}

// ---- float32: 4 x 4 outputs to each of 256 threads ----------------------------------------------

constexpr int kFloatTile = 64;  // outputs, and rows
constexpr int kFloatTileIn = 16;
constexpr int kFloatPitch = 64 + 4;
constexpr int kFloatThreads = 256;

__device__ inline float4 LoadPiece(const float* matrix, int64_t stride, int row, int num_rows,
                                   int col, int num_cols, bool aligned) {
  if (row >= num_rows || col >= num_cols) return {0, 0, 0, 0};
  const float* p = matrix + row * stride + col;
  return aligned && col + 4 <= num_cols ? LoadFour(p) : LoadUpToFour(p, num_cols - col);
}

__device__ inline void StoreTransposed(float (&tile)[kFloatTileIn][kFloatPitch], int row, int col,
                                       float4 piece) {
  tile[col][row] = piece.x;
  tile[col + 1][row] = piece.y;
  tile[col + 2][row] = piece.z;
  tile[col + 3][row] = piece.w;
}

// A template only so that the header may be included twice.
template <typename Y>
__global__ void __launch_bounds__(kFloatThreads) FloatTileKernel(const TileArgs a) {
  static_assert(kFloatTile * kFloatTileIn / 4 == kFloatThreads);  // one piece of each tile a thread
  __shared__ alignas(16) float weight_tile[kFloatTileIn][kFloatPitch];
  __shared__ alignas(16) float x_tile[kFloatTileIn][kFloatPitch];
  const int out0 = static_cast<int>(blockIdx.x % a.tiles_out) * kFloatTile;
  const int row0 = static_cast<int>(blockIdx.x / a.tiles_out) * kFloatTile;
  const float* weight = static_cast<const float*>(a.weight);
  const float* x = static_cast<const float*>(a.x);
  const int piece_row = threadIdx.x / 4, piece_col = threadIdx.x % 4 * 4;
  const int out = threadIdx.x % 16 * 4, row = threadIdx.x / 16 * 4;  // within the tile

  float4 next_weight, next_x;
  const auto load = [&](int in0) {
    next_weight = LoadPiece(weight, a.weight_stride, out0 + piece_row, a.out, in0 + piece_col,
                            static_cast<int>(a.weight_stride), true);
    next_x = LoadPiece(x, a.x_stride, row0 + piece_row, a.rows, in0 + piece_col, a.in, a.x_aligned);
  };

  float sums[4][4] = {};  // [row][out]
  load(0);
  for (int in0 = 0; in0 < a.in; in0 += kFloatTileIn) {
    __syncthreads();
    StoreTransposed(weight_tile, piece_row, piece_col, next_weight);
    StoreTransposed(x_tile, piece_row, piece_col, next_x);
    __syncthreads();
    if (in0 + kFloatTileIn < a.in) load(in0 + kFloatTileIn);
#pragma unroll
    for (int k = 0; k < kFloatTileIn; ++k) {
      const float4 w = LoadFour(&weight_tile[k][out]), v = LoadFour(&x_tile[k][row]);
      const float ws[4] = {w.x, w.y, w.z, w.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(vs[i], ws[j], sums[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) StoreTileValue<Y>(a, row0 + row + i, out0 + out + j, sums[i][j]);
  }
}

}  // namespace gla
