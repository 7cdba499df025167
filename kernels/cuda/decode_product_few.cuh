// A decode product for few rows: mma.sync on weights that each warp brings for itself.
//
// A block computes tiles of 16 outputs (the 16 x 16 operand) by 8 or 16 rows, each of its eight
// warps one slice of the columns. There is about one block to a multiprocessor, whose tiles are
// shape.blocks apart. A warp's weights go into a ring of its own in shared memory, on their way
// before the kernel waits for the one ahead of it: a layer's weight has room there beside those of
// the kernel before, so that memory never rests between kernels.
//
// What follows that wait is what a step of few rows takes: it is as few instructions as possible,
// one after the other in a lone warp. So all rows of a slice are asked for at once, to registers,
// at addresses that are known before; a chunk at a time passes through shared memory.
//
// Four neighbouring lanes hold 16 columns of an output, four columns each: the order of the columns
// inside one product is free as long as both operands agree.
#pragma once

#include "kernels/cuda/decode_product.cuh"

namespace gla {

constexpr int kFewThreads = 32 * kSlices;
constexpr int kFewPacked = 6;      // chunks of 64 columns: the most that are packed,
constexpr int kFewRing = 5;        // and the slots of a ring
constexpr int kFewBatch = 3;       // tiles whose slices are added up together
constexpr int kFewPitch = 16 + 4;  // floats; so that neither side meets a bank twice
constexpr int kFewChunkBytes = 16 * kTileRowBytes;
constexpr int kFewRowsBytes = 8 * kTileRowBytes;  // of a chunk of eight rows
// Chunks of the rows that are on their way to a warp.
template <int kTiles>
constexpr int kFewAhead = 4 / kTiles;
// Of a slice that is packed, as registers allow.
template <int kTiles>
constexpr int kFewMostChunks = kTiles == 1 ? kFewPacked : kFewAhead<kTiles>;

// What a launch fixes.
struct FewShape {
  int tiles_out, blocks, most_tiles;  // tiles in all, blocks that share them, tiles of one
  int weight_bytes;

  // Packed, a warp's sums take the place of its rows.
  int SharedBytes(int tiles_rows, bool is_packed) const {
    const int sums = is_packed ? 0 : kFewBatch * tiles_rows * 8 * kFewPitch * 4;
    return weight_bytes + kSlices * (2 * tiles_rows * kFewRowsBytes + sums);
  }
};

// Where eight columns of a row lie in a chunk of [rows][64]: eight lanes' pieces of 16 bytes, and
// four rows' pairs of them, in different banks.
__device__ inline int FewPiece(int row, int piece) {
  return row * kTileRowBytes + ((piece ^ (row & 3) << 1) << 4);
}

// kTiles: of eight rows. kPacked: the rings hold all weights that a block has; tiles are then
// worked on side by side.
template <int kTiles, bool kPacked>
__global__ void __launch_bounds__(kFewThreads, 2)
    FewRowsKernel(const __grid_constant__ ProductParams p, const FewShape shape) {
  extern __shared__ __align__(128) char shared[];
  __shared__ float factors[kTiles * 8];
  constexpr int kAhead = kFewAhead<kTiles>;
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int block = static_cast<int>(blockIdx.x) % shape.blocks;
  const int row0 = static_cast<int>(blockIdx.x) / shape.blocks * kTiles * 8;
  const int chunk0 = SliceStart(p.in, warp), chunks = SliceStart(p.in, warp + 1) - chunk0;
  const int tiles = CeilDiv(shape.tiles_out - block, shape.blocks);
  const auto out_of = [&](int tile) { return (block + tile * shape.blocks) * 16; };
  char* const ring =
      shared + (kPacked ? chunk0 * shape.most_tiles : warp * kFewRing) * kFewChunkBytes;
  constexpr int kTileFloats = kTiles * 8 * kFewPitch;  // of a slice's sums
  constexpr int kRowsBytes = 2 * kTiles * kFewRowsBytes;
  constexpr int kSliceFloats = kPacked ? kRowsBytes / 4 : kFewBatch * kTileFloats;
  static_assert(kSliceFloats >= kFewBatch * kTileFloats);
  char* const rows = shared + shape.weight_bytes + warp * kRowsBytes;
  float* const sums =
      reinterpret_cast<float*>(shared + shape.weight_bytes + (kPacked ? 0 : kSlices * kRowsBytes));

  // The next chunk of this warp into its ring, as one group of copies; an empty one at the end.
  const int piece = lane % 8;
  const bool is_swiglu = p.epilogue == DecodeEpilogue::kSwiGlu;
  int of_row[4];  // elements from the first output's chunk to what the lane copies
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = is_swiglu ? lane / 8 + i % 2 * 4 + i / 2 * (p.out / 2) : lane / 8 + i * 4;
    of_row[i] = row * p.in + piece * 8;
  }
  uint32_t copy_to = SharedAddress(ring) + FewPiece(lane / 8, piece);
  int next_tile = chunks > 0 ? 0 : tiles, next_chunk = 0, next_slot = 0;
  const auto copy_next = [&] {
    if (next_tile < tiles) {
      const int column = (chunk0 + next_chunk) * 64;
      const int first = out_of(next_tile) / (is_swiglu ? 2 : 1) * p.in + column;
      const int last = (p.out - 1) * p.in + column + piece * 8;
      const bool valid = column + piece * 8 < p.in;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int from = min(first + of_row[i], last);
        CopyAsync(copy_to + next_slot * kFewChunkBytes + i * 4 * kTileRowBytes,
                  p.weight + (valid ? from : 0), valid);
      }
      if (++next_slot == kFewRing && !kPacked) next_slot = 0;
      if (++next_chunk == chunks) next_chunk = 0, ++next_tile;
    }
    CommitCopies();
  };
  if (p.next_begins) AllowNext();
#pragma unroll 1
  for (int i = 0; i < (kPacked ? tiles * chunks : kFewRing); ++i) copy_next();

  // Rows come as they lie, 16 bytes to a lane: eight lanes have a row, the warp four rows at a time
  // (others where there are none: what comes of those is not stored).
  int x_from[kTiles * 2];
#pragma unroll
  for (int i = 0; i < kTiles * 2; ++i) {
    const int row = min(row0 + i * 4 + lane / 8, p.rows - 1);
    x_from[i] = row * static_cast<int>(p.x_stride) + chunk0 * 64 + lane % 8 * 8;
    Keep(x_from[i]);
  }
  int x_columns = p.in - chunk0 * 64 - lane % 8 * 8;  // from the lane's first on
  uint32_t x_to = SharedAddress(rows) + FewPiece(lane / 8, lane % 8);
  int x_at = FewPiece(g, t / 2) + (t & 1) * 8;
  Keep(x_columns), Keep(x_to), Keep(x_at);
  uint4 x[kAhead][kTiles * 2];
  const auto load_rows = [&](int u, int chunk) {
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      x[u][i] = chunk * 64 < x_columns
                    ? __ldcg(reinterpret_cast<const uint4*>(p.x + x_from[i] + chunk * 64))
                    : uint4{0, 0, 0, 0};
    }
  };
  // Two chunks take turns in shared memory. (Row 4 lies as row 0 does.)
  const auto put_rows = [&](int u, int turn) {
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      StoreShared(x_to + turn % 2 * kTiles * kFewRowsBytes + i * 4 * kTileRowBytes, x[u][i]);
    }
  };
  struct Fragments {
    uint2 of[4][kTiles];
  };
  const auto take_rows = [&](int turn, Fragments& f) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        f.of[s][i] = *reinterpret_cast<const uint2*>(rows + (x_at ^ s << 5) +
                                                     (turn % 2 * kTiles + i) * kFewRowsBytes);
      }
    }
  };
  // Of a chunk of weights lane (g, t) has outputs g and g + 8.
  const auto multiply = [&](float(&sum)[kTiles][4], int chunk_at, const Fragments& f) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const char* const from = ring + (x_at ^ s << 5) + chunk_at;
      const uint2 low = *reinterpret_cast<const uint2*>(from);
      const uint2 high = *reinterpret_cast<const uint2*>(from + 8 * kTileRowBytes);
      const uint32_t w[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
      for (int r = 0; r < kTiles; ++r) Mma16x8x16(sum[r], w, {f.of[s][r].x, f.of[s][r].y});
    }
  };
  float* const sums_to = sums + warp * kSliceFloats + t * 2 * kFewPitch + g;
  const auto store = [&](const float(&sum)[kTiles][4], int tile) {
    float* const to = sums_to + tile * kTileFloats;
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        to[(r * 8 + (e & 1)) * kFewPitch + (e & 2 ? 8 : 0)] = sum[r][e];
      }
    }
  };
  // One patch of 8 rows by 16 outputs to a warp, at most.
  const int patch_tile = warp / kTiles, patch_row = warp % kTiles * 8 + lane % 8;
  uint32_t patch_sums =
      SharedAddress(sums + patch_tile * kTileFloats + patch_row * kFewPitch + lane / 8 * 4);
  Keep(patch_sums);
  const auto patch_of = [&](int first) {
    return Patch(p, row0 + patch_row, out_of(first + patch_tile));
  };
  Patch patch = patch_of(0);
  RowFactor<kTiles> factor(p, row0 + warp);  // of rows kSlices apart

  WaitForPrevious();
  AllowNext();
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (u < chunks) load_rows(u, u);
  }
  factor.Load();

  int slot = 0, turn = 0;
  for (int first = 0; first < tiles; first += kFewBatch) {
    const int batch = min(kFewBatch, tiles - first);
    if (first > 0) patch = patch_of(first);
    const bool ends = patch_tile < batch;
    if (ends) patch.LoadResidual(p);

    if constexpr (kPacked) {
      if (first == 0) WaitCopies<0>();
      const auto side_by_side = [&]<int kCount>() {
        constexpr int kMost = kFewMostChunks<kTiles> < kFewPacked / kCount ? kFewMostChunks<kTiles>
                                                                           : kFewPacked / kCount;
        float sum[kCount][kTiles][4] = {};
        const auto pass_rows = [&](int c) {
          if (c >= chunks) return;
          put_rows(c % kAhead, c);
          if (c + kAhead < kMost && c + kAhead < chunks) load_rows(c % kAhead, c + kAhead);
        };
        pass_rows(0);
#pragma unroll
        for (int c = 0; c < kMost; ++c) {
          if (c >= chunks) break;
          __syncwarp();
          Fragments f;
          take_rows(c, f);
          if (c + 1 < kMost) pass_rows(c + 1);
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            multiply(sum[j], ((first + j) * chunks + c) * kFewChunkBytes, f);
          }
          if (c == 0 && first == 0) factor.Finish(p, factors + warp);  // while products run
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < kCount; ++j) store(sum[j], j);
      };
      if (batch == 1) {
        side_by_side.template operator()<1>();
      } else if (batch == 2) {
        side_by_side.template operator()<2>();
      } else {
        side_by_side.template operator()<kFewBatch>();
      }
    } else {
#pragma unroll 1
      for (int tile = 0; tile < batch; ++tile) {
        float sum[kTiles][4] = {};
#pragma unroll 1
        for (int c0 = 0; c0 < chunks; c0 += kAhead) {
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            const int c = c0 + u;
            if (c >= chunks) break;
            WaitCopies<kFewRing - 1>();
            put_rows(u, turn);
            // Rows that a warp cannot hold come again for each tile.
            if (chunks > kAhead) load_rows(u, c + kAhead < chunks ? c + kAhead : u);
            __syncwarp();
            Fragments f;
            take_rows(turn++, f);
            multiply(sum, slot * kFewChunkBytes, f);
            __syncwarp();
            copy_next();
            if (++slot == kFewRing) slot = 0;
          }
        }
        store(sum, tile);
      }
    }
    if (first == 0 && (!kPacked || chunks == 0)) factor.Finish(p, factors + warp);
    __syncthreads();
    if (ends) {
      float4 total = {};
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        float4 part;
        LoadShared(patch_sums + s * kSliceFloats * 4, part);
        total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
      }
      patch.End(p, total, factors[patch_row]);
    }
    if (first + kFewBatch < tiles) __syncthreads();
  }
}

}  // namespace gla
