// A decode product for more rows: wgmma on tiles that the bulk copy engine brings.
//
// A block of kGroups groups of four warps computes 64 kGroups outputs by kRows rows; beside them
// one warp copies and three find the rows' factors. The blocks of a cluster share one tile: each
// sums kSlices / cluster of the slices, and after a barrier each adds up and ends a part of the
// tile, reading the slices of the others from their shared memory. Weights are on their way before
// the kernel waits for the one ahead of it.
//
// With kSwiGlu each 16 outputs of a tile are 8 gates and their 8 ups, which the copy engine
// interleaves: it sees the weight as [out / 16][gate, up][8][in].
#pragma once

#include "kernels/cuda/decode_product.cuh"
#include "kernels/cuda/tensor.cuh"

namespace gla {

// ---- The blocks of a cluster --------------------------------------------------------------------

__device__ inline void ArriveCluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void WaitCluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Four floats at `address` of this block's shared memory, of block `rank` of the cluster.
__device__ inline float4 LoadFromBlock(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(there)
               : "memory");
  return x;
}

// ---- The kernel ---------------------------------------------------------------------------------

constexpr int kTileMostStages = 16;
constexpr int kTileMostShared = 227 << 10;  // bytes of a multiprocessor

template <int kGroups, int kRows>
struct TileShape {
  static constexpr int kWarps = kGroups * 4;  // that compute
  static constexpr int kFactorWarps = 3;
  static constexpr int kThreads = (kWarps + 1 + kFactorWarps) * 32;
  // More blocks that a multiprocessor has registers for.
  static constexpr int kMostBeside = kRows == 128 ? 0 : 3 - kGroups;
  static constexpr int kWeightBytes = kGroups * 64 * kTileRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kRows * kTileRowBytes;
  // A slice in shared memory: [kRows][kPitch] floats, so that neither side meets a bank twice.
  static constexpr int kPitch = kGroups * 64 + 4;
  static constexpr int kSliceBytes = kRows * kPitch * 4;

  // Alone, a block stores one sum, where the stages were.
  static constexpr int SharedBytes(int cluster, int num_stages) {
    const int stages = num_stages * kStageBytes;
    const int sums = cluster == 1 ? 0 : kSlices / cluster * kSliceBytes;
    const int head = 1024 + 1024;  // barriers and factors; what aligning may cost
    return head + (cluster == 1 && kSliceBytes > stages ? kSliceBytes : stages) + sums;
  }
  // As many as there is room for beside `beside` more blocks of the kind, at most `most`; 0: none.
  static constexpr int Stages(int cluster, int beside, int most) {
    int stages = most < kTileMostStages ? most : kTileMostStages;
    while (stages > 0 && SharedBytes(cluster, stages) > kTileMostShared / (1 + beside)) --stages;
    return stages;
  }
};

// Instructions that run once cost as much as data from far away: what is not worth unrolling stays
// a loop. kSplit: cluster > 1.
template <int kGroups, int kRows, bool kSplit>
__global__ void __launch_bounds__(TileShape<kGroups, kRows>::kThreads)
    TileKernel(const __grid_constant__ ProductParams p, const __grid_constant__ CUtensorMap weights,
               const __grid_constant__ CUtensorMap rows, int num_stages, int blocks,
               int tiles_rows) {
  using Shape = TileShape<kGroups, kRows>;
  const int cluster = kSplit ? blocks : 1;
  extern __shared__ char shared[];
  const uint32_t base = RoundUp<uint32_t>(SharedAddress(shared), 1024);
  char* const head = shared + (base - SharedAddress(shared));
  float* const factors = reinterpret_cast<float*>(head + 256);  // [kRows]
  char* const stages = head + 1024;
  const auto full = [&](int stage) { return base + stage * 16; };
  const auto empty = [&](int stage) { return base + stage * 16 + 8; };
  const uint32_t sums_at = base + 1024 + (kSplit ? num_stages * Shape::kStageBytes : 0);
  float* const sums = reinterpret_cast<float*>(head + (sums_at - base));

  const int rank = static_cast<int>(blockIdx.x) % cluster;
  const int tile = static_cast<int>(blockIdx.x) / cluster;
  const int out0 = tile / tiles_rows * kGroups * 64, row0 = tile % tiles_rows * kRows;
  const int slices = kSlices / cluster, slice0 = rank * slices;
  const int chunk0 = SliceStart(p.in, slice0), chunks = SliceStart(p.in, slice0 + slices) - chunk0;
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < num_stages; ++i) {
      InitBarrier(full(i), 1);
      InitBarrier(empty(i), Shape::kWarps);
    }
    FenceBarriers();
  }
  __syncthreads();

  if (warp == Shape::kWarps) {
    if (lane == 0) {
      PrefetchMap(rows);
      const auto copy_weights = [&](int i, int stage) {
        const uint32_t to = base + 1024 + stage * Shape::kStageBytes;
        ArriveExpecting(full(stage), Shape::kStageBytes);
        if (p.epilogue == DecodeEpilogue::kSwiGlu) {
          CopyBox(to, weights, full(stage), (chunk0 + i) * 64, 0, 0, out0 / 16);
        } else {
          CopyBox(to, weights, full(stage), (chunk0 + i) * 64, out0);
        }
      };
      const auto copy_rows = [&](int i, int stage) {
        CopyBox(base + 1024 + stage * Shape::kStageBytes + Shape::kWeightBytes, rows, full(stage),
                (chunk0 + i) * 64, row0);
      };
      const int ahead = min(chunks, num_stages);
      if (p.next_begins) AllowNext();
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) copy_weights(i, i);
      WaitForPrevious();
      AllowNext();
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) copy_rows(i, i);
      int stage = 0;
      uint32_t parity = 0;
#pragma unroll 1
      for (int i = ahead; i < chunks; ++i) {
        WaitBarrier(empty(stage), parity);
        copy_weights(i, stage);
        copy_rows(i, stage);
        if (++stage == num_stages) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();
    if (kSplit) ArriveCluster(), WaitCluster(), ArriveCluster(), WaitCluster();
    return;
  }

  if (p.epilogue == DecodeEpilogue::kResidual && warp < Shape::kWarps && lane == 0) {
    const int column = out0 + warp * 16;  // they come from afar
    if (column < p.out) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.next_norm + column));
  }
  WaitForPrevious();
  if (warp > Shape::kWarps) {
#pragma unroll 1
    for (int r = (warp - Shape::kWarps - 1) * 8; r < kRows; r += Shape::kFactorWarps * 8) {
      EightFactors(p, row0 + r, factors + r);
    }
    asm volatile("bar.arrive 2, %0;" ::"n"((Shape::kWarps + Shape::kFactorWarps) * 32) : "memory");
    if (kSplit) ArriveCluster(), WaitCluster(), ArriveCluster(), WaitCluster();
    return;
  }

  // Alone, a block adds up its slices as they are done; else it stores them apart.
  const int group = GroupOfWarps();
  constexpr int kSums = kRows / 2;
  float acc[kSums], total[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) acc[i] = 0, total[i] = 0;
  const auto store = [&](const float(&sum)[kSums], int slot) {
    float* const to = sums + slot * (Shape::kSliceBytes / 4) + group * 64;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        to[SumColumn(j, e) * Shape::kPitch + SumRow(e)] = sum[j * 4 + e];
      }
    }
  };
  // (A descriptor's address is counted from 0 to 256 KB: adding to it carries nowhere.)
  const uint64_t weight0 = TileOperand<kAlongColumns>(stages + group * 64 * kTileRowBytes, 0);
  const uint64_t x0 = TileOperand<kAlongColumns>(stages + Shape::kWeightBytes, 0);
  int stage = 0, before = 0;  // the stage whose products may still run
  uint32_t parity = 0;
  int refills = chunks - num_stages;  // stages that are filled again
  const auto release = [&] {
    if (--refills >= 0 && lane == 0) Arrive(empty(before));
  };
#pragma unroll 1
  for (int s = slice0; s < slice0 + slices; ++s) {
    const int count = SliceStart(p.in, s + 1) - SliceStart(p.in, s);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      WaitBarrier(full(stage), parity);
      BeginProducts();
      const uint64_t at = stage * (Shape::kStageBytes >> 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Wgmma<kRows, kAlongColumns, kAlongColumns>(acc, weight0 + at + k * 2, x0 + at + k * 2,
                                                   i > 0 || k > 0);
      }
      CommitProducts();
      if (i > 0) {
        WaitProducts<1>();
        release();
      }
      before = stage;
      if (++stage == num_stages) stage = 0, parity ^= 1;
    }
    WaitProducts<0>();
    if (count > 0) release();
#pragma unroll
    for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(acc[i])::"memory");
    if (count == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) acc[i] = 0;
    }
    if (kSplit) {
      store(acc, s - slice0);
    } else {
#pragma unroll
      for (int i = 0; i < kSums; ++i) total[i] += acc[i];
    }
  }

  // Patches of 8 rows by 16 outputs: a warp ends those of 16 outputs, every cluster-th one.
  const int column = warp * 16;
  Patch patch(p, row0 + rank * 8 + lane % 8, out0 + column);
  asm volatile("bar.sync 1, %0;" ::"n"(kGroups * 128) : "memory");  // the stages are used up
  asm volatile("bar.sync 2, %0;" ::"n"((Shape::kWarps + Shape::kFactorWarps) * 32) : "memory");
  if (kSplit) {
    ArriveCluster();
  } else {
    store(total, 0);
    __syncwarp();  // a warp ends what it summed itself
  }
  constexpr int kAtOnce = kRows >= 64 ? 4 : kRows / 8;
  const int step = cluster * 8;
  bool waited = !kSplit;
#pragma unroll 1
  for (int first = rank * 8; first < kRows; first += kAtOnce * step) {
    const int r = first + lane % 8;
    float4 residual[kAtOnce];
    Patch ahead = patch;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (r + j * step < kRows) ahead.LoadResidual(p);
      residual[j] = ahead.residual;
      ahead = ahead.After(p, step);
    }
    if (!waited) WaitCluster();
    waited = true;
    uint32_t at = sums_at + (r * Shape::kPitch + column + lane / 8 * 4) * 4;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j * step >= kRows) break;
      float4 sum = {};
      if (kSplit) {
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          const float4 part = LoadFromBlock(at + s % slices * Shape::kSliceBytes, s / slices);
          sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
        }
      } else {
        LoadShared(at, sum);
      }
      patch.residual = residual[j];
      patch.End(p, sum, factors[r + j * step]);
      patch = patch.After(p, step);
      at += step * Shape::kPitch * 4;
    }
  }
  if (kSplit) {
    if (!waited) WaitCluster();
    ArriveCluster();  // the others may still read this block's sums
    WaitCluster();
  }
}

}  // namespace gla
