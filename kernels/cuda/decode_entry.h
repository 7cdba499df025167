// What decode.cu puts together: the two halves of the decode step on CUDA.
#pragma once

#include "kernels/decode.h"

namespace gla {

void DecodeEmbed(Device& device, const DecodeEmbedArgs& args);

bool ServesDecodeProduct(const DecodeProductArgs& args);
void DecodeProduct(Device& device, const DecodeProductArgs& args);

bool ServesDecodeAttention(const DecodeAttentionArgs& args);
void DecodeAttention(Device& device, const DecodeAttentionArgs& args);

// Up to so many rows in-projection and attention let the next kernel begin at once, as the other
// products always do. With more it was slower (kernels/README.md).
constexpr int kRowsThatOverlap = 8;

// How a product is computed. Every plan gives the same bits; PlanProduct() picks a fast one.
struct ProductPlan {
  int tile_out;   // outputs of a tile: 16 (mma.sync, for few rows), 64 or 128 (wgmma)
  int tile_rows;  // 16: 8 or 16; else 16, 32, 64 or 128
  int cluster;    // blocks that share the columns of one tile: 1, 2, 4 or 8; 16: always 1
};
ProductPlan PlanProduct(int rows, int out, int in);
// False when a block has not enough shared memory for the plan.
bool CanRun(const ProductPlan& plan);
void DecodeProductBy(const ProductPlan& plan, Device& device, const DecodeProductArgs& args);

}  // namespace gla
