// The products of a decode step: which kernel serves how many rows, and the embedding before them.
#include <algorithm>

#include "kernels/cuda/decode_entry.h"
#include "kernels/cuda/decode_product.cuh"
#include "kernels/cuda/decode_product_few.cuh"
#include "kernels/cuda/decode_product_tile.cuh"
#include "kernels/cuda/tensor_map.h"

namespace gla {
namespace {

// ---- Launches -----------------------------------------------------------------------------------

int Multiprocessors(Device& device) {
  static const int count = [&] {
    int n = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device.impl().ordinal));
    return n;
  }();
  return count;
}

template <int kTiles>
void LaunchFewRows(Device& device, const ProductParams& p) {
  const int tiles_out = CeilDiv(p.out, 16), blocks = std::min(tiles_out, Multiprocessors(device));
  const int chunks = CeilDiv(p.in, 64), most_tiles = CeilDiv(tiles_out, blocks);
  const int most_chunks = CeilDiv(chunks, kSlices);  // of a slice
  const bool is_packed =
      most_tiles * most_chunks <= kFewPacked && most_chunks <= kFewMostChunks<kTiles>;
  const FewShape shape = {
      .tiles_out = tiles_out,
      .blocks = blocks,
      .most_tiles = most_tiles,
      .weight_bytes = (is_packed ? chunks * most_tiles : kSlices * kFewRing) * kFewChunkBytes};
  const LaunchShape launch = {
      .blocks = GridOf(int64_t{blocks} * CeilDiv(p.rows, kTiles * 8)),
      .threads = kFewThreads,
      .shared_bytes = static_cast<size_t>(shape.SharedBytes(kTiles, is_packed)),
      .most_shared = true};
  LaunchOverlapped(device, is_packed ? FewRowsKernel<kTiles, true> : FewRowsKernel<kTiles, false>,
                   launch, p, shape);
}

template <int kGroups, int kRows>
void LaunchTile(Device& device, const ProductParams& p, int cluster) {
  const uint64_t in = p.in, out = p.out;
  const CUtensorMap weights = p.epilogue == DecodeEpilogue::kSwiGlu
                                  ? MapOf(p.weight, {in, 8, 2, out / 16},
                                          {in, in * (out / 2), in * 8}, {64, 8, 2, kGroups * 4})
                                  : MapOf(p.weight, {in, out}, {in}, {64, kGroups * 64});
  const CUtensorMap rows = MapOf(p.x, {in, static_cast<uint64_t>(p.rows)},
                                 {static_cast<uint64_t>(p.x_stride)}, {64, kRows});
  const int tiles_rows = CeilDiv(p.rows, kRows);
  const int64_t tiles = int64_t{CeilDiv(p.out, kGroups * 64)} * tiles_rows;
  using Shape = TileShape<kGroups, kRows>;
  // Rather one block more to a multiprocessor than a second turn.
  const int beside = static_cast<int>(
      std::min<int64_t>(Shape::kMostBeside, (tiles * cluster - 1) / Multiprocessors(device)));
  const int chunks = CeilDiv(CeilDiv(p.in, 64), cluster) + 1;  // of a block, at most
  const int stages = std::max(std::min(2, Shape::Stages(cluster, 0, chunks)),
                              Shape::Stages(cluster, beside, chunks));
  const LaunchShape launch = {
      .blocks = GridOf(tiles * cluster),
      .threads = Shape::kThreads,
      .shared_bytes = static_cast<size_t>(Shape::SharedBytes(cluster, stages)),
      .cluster = static_cast<unsigned>(cluster),
      .most_shared = true};
  if (cluster == 1) {
    LaunchOverlapped(device, TileKernel<kGroups, kRows, false>, launch, p, weights, rows, stages,
                     cluster, tiles_rows);
  } else {
    LaunchOverlapped(device, TileKernel<kGroups, kRows, true>, launch, p, weights, rows, stages,
                     cluster, tiles_rows);
  }
}

// f.template operator()<kGroups, kRows>()
template <typename F>
auto WithTile(const ProductPlan& plan, const F& f) {
  if (plan.tile_out == 128) {
    return plan.tile_rows == 64 ? f.template operator()<2, 64>() : f.template operator()<2, 128>();
  }
  switch (plan.tile_rows) {
    case 16:
      return f.template operator()<1, 16>();
    case 32:
      return f.template operator()<1, 32>();
    case 64:
      return f.template operator()<1, 64>();
    default:
      return f.template operator()<1, 128>();
  }
}

// ---- The embedding ------------------------------------------------------------------------------

constexpr int kEmbedThreads = 256;

// A block to a row, four neighbours to a thread.
__global__ void __launch_bounds__(kEmbedThreads) EmbedKernel(const DecodeEmbedArgs a) {
  WaitForPrevious();
  AllowNext();
  const int64_t row = blockIdx.x;
  const bf16* const from = static_cast<const bf16*>(a.table) + int64_t{a.tokens[row]} * a.dim;
  for (int i = 0; i < a.dim; i += kEmbedThreads * 4) {
    const int column = i + threadIdx.x * 4;
    const bool valid = column < a.dim;
    const float4 r = valid ? LoadFour(from + column) : float4{};
    const float squares = SumOfSixteen<2, 1>({r.x * r.x, r.y * r.y, r.z * r.z, r.w * r.w});
    if (!valid) continue;
    const float4 norm = LoadFour(a.norm + column);
    StoreFour(a.residual + row * a.dim + column, r);
    StoreFour(static_cast<bf16*>(a.x) + row * a.dim + column,
              {r.x * norm.x, r.y * norm.y, r.z * norm.z, r.w * norm.w});
    if (column % 16 == 0) a.squares[(row * a.dim + column) / 16] = squares;
  }
}

}  // namespace

void DecodeEmbed(Device& device, const DecodeEmbedArgs& a) {
  if (a.rows == 0) return;
  GLA_REQUIRES(a.dim % 16 == 0, "whole groups of 16 columns");
  LaunchOverlapped(device, EmbedKernel,
                   {.blocks = GridOf(a.rows), .threads = kEmbedThreads, .most_shared = true}, a);
}

bool ServesDecodeProduct(const DecodeProductArgs& a) {
  const PackedWeight& w = *a.weight;
  if (w.dtype() != DType::kBFloat16 || w.in() <= 0 || w.out() <= 0 || w.in() % 32 != 0 ||
      RoundUp(int64_t{w.out()}, int64_t{16}) * w.in() >= int64_t{1} << 31) {
    return false;  // (32 bits count a weight's elements, tiles of 16 outputs)
  }
  if (a.epilogue == DecodeEpilogue::kStore) {
    return a.y_dtype == DType::kBFloat16 || a.y_dtype == DType::kFloat32;
  }
  return w.out() % 16 == 0;
}

bool CanRun(const ProductPlan& plan) {
  if (plan.tile_out == 16) return plan.cluster == 1;
  return WithTile(plan, [&]<int kGroups, int kRows>() {
    return TileShape<kGroups, kRows>::Stages(plan.cluster, 0, kTileMostStages) >= 2;
  });
}

// By measurements of layers of GLA-340M and GLA-1.3B, one product's plan after the other, on an
// H100 and an H200 (132 multiprocessors both).
ProductPlan PlanProduct(int rows, int out, int in) {
  const auto blocks = [&](const ProductPlan& plan) {
    return int64_t{CeilDiv(out, plan.tile_out)} * CeilDiv(rows, plan.tile_rows);
  };
  const bool is_wide = out >= 3072;
  if (rows <= 8) return {16, 8, 1};
  if (rows <= 16 && in <= 1024 && out <= 6144) return {16, 16, 1};
  if (rows <= 16 && !is_wide) {
    return in <= 2048 ? ProductPlan{16, 16, 1} : ProductPlan{64, 16, out <= 1024 ? 8 : 2};
  }
  if (rows <= 64 && in <= 1024 && out <= 1024) return {16, 16, 1};
  if (in > 2048 && out <= 1024) {
    if (rows <= 32) return {64, 32, 8};
    if (rows > 48 && rows <= 64) return {128, 64, 8};
    if (rows > 64 && rows <= 96) return {64, 32, 4};
  } else if (in > 2048 && !is_wide) {
    if (rows <= 32 || (rows > 48 && rows <= 64)) return {64, 32, 2};
  }
  const ProductPlan largest = {128, 128, 1};
  if (blocks(largest) > 88 && blocks(largest) <= 132) return largest;  // one good turn
  if (rows > 64 && rows < 128 && blocks({64, 64, 1}) > 264) return largest;
  // The smallest tiles that do not take too many turns.
  const int most = !is_wide ? (in <= 2048 ? 264 : 132) : in > 1024 ? 300 : rows <= 64 ? 264 : 360;
  for (const ProductPlan& plan : {ProductPlan{64, 16, 1}, {64, 32, 1}, {64, 64, 1}, {128, 64, 1}}) {
    if (blocks(plan) <= most) return plan;
  }
  return largest;
}

void DecodeProductBy(const ProductPlan& plan, Device& device, const DecodeProductArgs& a) {
  if (a.rows == 0) return;
  GLA_REQUIRES(ServesDecodeProduct(a), "a product that Serves()");
  GLA_REQUIRES(a.rows * std::max<int64_t>(a.x_stride, a.weight->in()) < int64_t{1} << 31,
               "rows whose elements 32 bits count");
  const bool next_begins =
      !a.next_is_other && (a.epilogue != DecodeEpilogue::kStore || a.rows <= kRowsThatOverlap);
  const ProductParams p = {.x = static_cast<const bf16*>(a.x),
                           .x_stride = a.x_stride,
                           .squares = a.squares,
                           .inverse_in = 1.0f / static_cast<float>(a.weight->in()),
                           .eps = a.eps,
                           .weight = static_cast<const bf16*>(a.weight->data()),
                           .epilogue = a.epilogue,
                           .y_is_float = a.y_dtype == DType::kFloat32,
                           .next_begins = next_begins,
                           .y = a.y,
                           .y_stride = a.y_stride,
                           .residual = a.residual,
                           .next_norm = a.next_norm,
                           .next_x = static_cast<bf16*>(a.next_x),
                           .next_squares = a.next_squares,
                           .rows = a.rows,
                           .in = a.weight->in(),
                           .out = a.weight->out()};
  if (plan.tile_out == 16) {
    if (plan.tile_rows == 8) return LaunchFewRows<1>(device, p);
    return LaunchFewRows<2>(device, p);
  }
  WithTile(plan,
           [&]<int kGroups, int kRows>() { LaunchTile<kGroups, kRows>(device, p, plan.cluster); });
}

void DecodeProduct(Device& device, const DecodeProductArgs& a) {
  DecodeProductBy(PlanProduct(a.rows, a.weight->out(), a.weight->in()), device, a);
}

}  // namespace gla
