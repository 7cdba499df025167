// A decode product for few rows: mma.sync on weights that each warp brings for itself.
//
// A block computes tiles of 16 outputs (the 16 x 16 operand) by 8 or 16 rows, each of its eight
// warps one slice of the columns. There is about one block to a multiprocessor, whose tiles are
// shape.blocks apart. A warp copies the weights of its slices into a ring of its own in shared
// memory, on their way before the kernel waits for the one ahead of it: a layer's weight has room
// there beside those of the kernel before, so that memory never rests between kernels.
//
// Four neighbouring lanes hold 16 columns of an output, four columns each: the order of the columns
// inside one product is free as long as both operands agree.
#pragma once

#include "kernels/cuda/decode_product.cuh"

namespace gla {

constexpr int kFewThreads = 32 * kSlices;
constexpr int kFewRing = 6;        // chunks of 64 columns
constexpr int kFewBatch = 3;       // tiles whose slices are added up together
constexpr int kFewPitch = 16 + 4;  // floats; so that neither side meets a bank twice
constexpr int kFewChunkBytes = 16 * kTileRowBytes;

// What a launch fixes.
struct FewShape {
  int tiles_out, blocks, most_tiles;  // tiles in all, blocks that share them, tiles of one
  bool packed;                        // the rings hold all that a block has
  int weight_bytes, row_bytes;

  int SharedBytes(int tiles_rows, bool rows_shared) const {
    if (!rows_shared) return weight_bytes + tiles_rows * kSlices * 8 * kTileRowBytes;
    const int batch = most_tiles < kFewBatch ? most_tiles : kFewBatch;
    return weight_bytes + row_bytes + batch * tiles_rows * kSlices * 8 * kFewPitch * 4;
  }
};

// Where four columns of a row lie in a chunk of [rows][64]: eight lanes' pieces of 16 bytes, and
// four rows' pairs of them, in different banks.
__device__ inline int FewPiece(int row, int piece) {
  return row * kTileRowBytes + ((piece ^ (row & 3) << 1) << 4);
}
__device__ inline uint2 FewFragment(const char* chunk, int row, int step, int t) {
  const int at = FewPiece(row, step * 2 + t / 2) + (t & 1) * 8;
  return *reinterpret_cast<const uint2*>(chunk + at);
}

// kTiles: of eight rows. kRowsShared: the rows are kept in shared memory too; else in registers,
// and a chunk at a time passes through what the warp's sums use later: that leaves room for another
// kernel's weights when rows are long.
template <int kTiles, bool kRowsShared>
__global__ void __launch_bounds__(kFewThreads, 2)
    FewRowsKernel(const __grid_constant__ ProductParams p, const FewShape shape) {
  extern __shared__ __align__(128) char shared[];
  __shared__ float factors[kTiles * 8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int block = static_cast<int>(blockIdx.x) % shape.blocks;
  const int row0 = static_cast<int>(blockIdx.x) / shape.blocks * kTiles * 8;
  const int chunk0 = SliceStart(p.in, warp), chunks = SliceStart(p.in, warp + 1) - chunk0;
  const int tiles = CeilDiv(shape.tiles_out - block, shape.blocks);
  const bool swiglu = p.epilogue == DecodeEpilogue::kSwiGlu;
  const auto out_of = [&](int tile) { return (block + tile * shape.blocks) * 16; };
  char* const ring =
      shared + (shape.packed ? chunk0 * shape.most_tiles : warp * kFewRing) * kFewChunkBytes;
  char* const rows = shared + shape.weight_bytes + chunk0 * kTiles * 8 * kTileRowBytes;
  float* const sums = reinterpret_cast<float*>(shared + shape.weight_bytes + shape.row_bytes);

  // The next chunk of this warp into its ring, as one group of copies; an empty one at the end.
  int next_tile = chunks > 0 ? 0 : tiles, next_chunk = 0, next_slot = 0;
  const auto copy_next = [&] {
    if (next_tile < tiles) {
      const uint32_t to = SharedAddress(ring) + next_slot * kFewChunkBytes;
      const int out0 = out_of(next_tile), piece = lane % 8;
      const int column = (chunk0 + next_chunk) * 64 + piece * 8;
      const bool valid = column < p.in;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 8 + i * 4;
        const int out =
            swiglu ? out0 / 2 + row % 8 + (i < 2 ? 0 : p.out / 2) : min(out0 + row, p.out - 1);
        CopyAsync(to + FewPiece(row, piece),
                  valid ? p.weight + int64_t{out} * p.in + column : p.weight, valid);
      }
      if (++next_slot == kFewRing) next_slot = 0;
      if (++next_chunk == chunks) next_chunk = 0, ++next_tile;
    }
    CommitCopies();
  };
  if (NextIsProduct(p)) AllowNext();
#pragma unroll 1
  for (int i = 0; i < kFewRing; ++i) copy_next();

  WaitForPrevious();
  AllowNext();

  if (kRowsShared) {
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
#pragma unroll
      for (int i = 0; i < kTiles * 2; ++i) {
        const int row = lane / 8 + i * 4, piece = lane % 8;
        const int column = (chunk0 + c) * 64 + piece * 8;
        const bool valid = row0 + row < p.rows && column < p.in;
        CopyAsync(SharedAddress(rows) + c * kTiles * 8 * kTileRowBytes + FewPiece(row, piece),
                  valid ? p.x + (row0 + row) * p.x_stride + column : p.x, valid);
      }
    }
    CommitCopies();
  }
  constexpr int kAhead = kTiles == 1 ? 6 : 3;  // chunks in registers
  uint4 held[kAhead][kTiles * 2];
  const auto load_rows = [&](int chunk) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
#pragma unroll
      for (int i = 0; i < kTiles * 2; ++i) {
        const int row = row0 + lane / 8 + i * 4, column = (chunk0 + chunk + u) * 64 + lane % 8 * 8;
        const bool valid = row < p.rows && chunk + u < chunks && column < p.in;
        const bf16* const from = p.x + row * p.x_stride + column;
        held[u][i] = valid ? __ldcg(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
      }
    }
  };
  constexpr int kBatch = kRowsShared ? kFewBatch : 1;
  constexpr int kSliceBytes = kTiles * 8 * (kRowsShared ? kFewPitch * 4 : kTileRowBytes);
  char* const passing = reinterpret_cast<char*>(sums) + warp * kSliceBytes;

  float sum[kTiles][4];
  const auto clear = [&] {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0;
  };
  const auto store = [&](int tile) {
    float* const to = sums + (tile * kSlices + warp) * (kSliceBytes / 4);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        to[(j * 8 + t * 2 + (e & 1)) * kFewPitch + g + (e & 2 ? 8 : 0)] = sum[j][e];
      }
    }
  };
  int turn = 0, slot = 0;
  for (int first = 0; first < tiles; first += kBatch) {
    const int batch = min(kBatch, tiles - first);
    // One patch of 8 rows by 16 outputs to a warp, at most.
    const int tile = warp / kTiles, row = row0 + warp % kTiles * 8 + lane % 8;
    const int out = out_of(first + tile);
    float4 residual = {}, norm = {};
    if (tile < batch) residual = PatchResidual(p, row, out), norm = PatchNorm(p, out);
    RowFactor factor;
    const int factor_row = warp * 4 + lane / 8;
    if (first == 0 && warp < kTiles * 2) factor.Load(p, row0 + factor_row);

    if (!kRowsShared) load_rows(0);
    clear();
    int chunk = 0, done = 0, used = 0;
#pragma unroll 1
    for (int q = 0; q < batch * chunks; ++q, ++turn) {
      if (turn == 0) {
        WaitCopies<0>();  // the rows came last
      } else if (turn >= kFewRing) {
        WaitCopies<kFewRing - 1>();
      }
      const char* x = rows + chunk * kTiles * 8 * kTileRowBytes;
      if (!kRowsShared) {
        if (used == kAhead) load_rows(chunk), used = 0;
#pragma unroll
        for (int i = 0; i < kTiles * 2; ++i) {
          *reinterpret_cast<uint4*>(passing + FewPiece(lane / 8 + i * 4, lane % 8)) = held[0][i];
        }
#pragma unroll
        for (int u = 0; u + 1 < kAhead; ++u) {
#pragma unroll
          for (int i = 0; i < kTiles * 2; ++i) held[u][i] = held[u + 1][i];
        }
        ++used;
        x = passing;
      }
      __syncwarp();
      const char* const weights = ring + slot * kFewChunkBytes;
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint2 low = FewFragment(weights, g, s, t), high = FewFragment(weights, g + 8, s, t);
        const uint32_t w[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint2 pair = FewFragment(x + j * 8 * kTileRowBytes, g, s, t);
          Mma16x8x16(sum[j], w, {pair.x, pair.y});
        }
      }
      __syncwarp();
      copy_next();
      if (++slot == kFewRing) slot = 0;
      if (++chunk == chunks) {
        chunk = 0;
        store(done++);
        clear();
      }
    }
    if (chunks == 0) {
      for (int i = 0; i < batch; ++i) store(i);
    }
    if (first == 0 && warp < kTiles * 2) {
      const float f = factor.Finish(p, row0 + factor_row);
      if (lane % 8 == 0) factors[factor_row] = f;
    }
    __syncthreads();
    if (tile < batch) {
      const int n = warp % kTiles * 8 + lane % 8;
      float4 total = {};
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        const float4 part = *reinterpret_cast<const float4*>(
            sums + (tile * kSlices + s) * (kSliceBytes / 4) + n * kFewPitch + lane / 8 * 4);
        total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
      }
      EndPatch(p, row, out, residual, norm, total, factors[n]);
    }
    if (first + kBatch < tiles) __syncthreads();
  }
}

}  // namespace gla
