// Hopper's matrix units and asynchronous copies: bfloat16 tiles in shared memory, float32 sums in
// registers.
//
// A *tile* is [rows][64] bfloat16, 128 bytes a row, its address a multiple of 1024, in the 128-byte
// swizzle of the PTX manual (section wgmma): the 16-byte piece c of row r lies at piece c ^ (r %
// 8). A matrix with more than 64 columns is several tiles one after another. One tile serves as an
// operand both ways: contracted along its columns (kAlongColumns) or along its rows (kAlongRows).
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/cuda/common.cuh"

namespace gla {

constexpr int kTileColumns = 64;
constexpr int kTileRowBytes = 128;

__device__ inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Where the 16-byte piece `piece` (0 .. 7) of row `row` lies, in bytes from the tile's start.
__device__ inline int TilePiece(int row, int piece) {
  return row * kTileRowBytes + ((piece ^ (row & 7)) << 4);
}
// The same for element `column` (0 .. 63).
__device__ inline int TileElement(int row, int column) {
  return TilePiece(row, column >> 3) + (column & 7) * 2;
}

// ---- Asynchronous copies ------------------------------------------------------------------------

// 16 bytes, or zeros when not `valid` (then `from` only has to be an address of the device).
__device__ inline void CopyAsync(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Shared memory written by threads or CopyAsync, before the matrix units read it: in every writing
// thread, before the barrier.
__device__ inline void FenceShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// f.template operator()<i>() for i in [0, kCount).
template <int kCount, typename F>
__device__ void Unrolled(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) { (f.template operator()<i>(), ...); }
  (std::make_integer_sequence<int, kCount>());
}

// Rows [0, 64) and 64 columns of a row-major matrix into a tile, by kThreads threads of which this
// is `id`; rows from `valid_rows` on are zero.
template <int kThreads>
__device__ void CopyTile(char* to, const bf16* from, int64_t stride, int valid_rows, int id) {
  constexpr int kRows = kThreads / 8;  // at a time: whole groups of eight, so the swizzle stays
  static_assert(kRows % 8 == 0 && 64 % kRows == 0);
  const int row = id / 8, piece = id % 8;
  const uint32_t address = SharedAddress(to) + TilePiece(row, piece);
  const bf16* const first = from + row * stride + piece * 8;
#pragma unroll
  for (int i = 0; i < 64 / kRows; ++i) {
    const bool valid = row + i * kRows < valid_rows;
    CopyAsync(address + i * kRows * kTileRowBytes, valid ? first + i * kRows * stride : from,
              valid);
  }
}

// A tile's first `valid_rows` rows to a row-major matrix.
template <int kThreads>
__device__ void StoreTile(bf16* to, int64_t stride, const char* tile, int valid_rows, int id) {
  constexpr int kRows = kThreads / 8;
  const int row = id / 8, piece = id % 8;
  const char* const from = tile + TilePiece(row, piece);
  to += row * stride + piece * 8;
#pragma unroll
  for (int i = 0; i < 64 / kRows; ++i) {
    if (row + i * kRows < valid_rows) {
      *reinterpret_cast<uint4*>(to + i * kRows * stride) =
          *reinterpret_cast<const uint4*>(from + i * kRows * kTileRowBytes);
    }
  }
}

// Shared memory by address, 16 bytes at a time: a pointer's is found anew wherever it is used. In
// the order of the program, like stores.
__device__ inline void StoreShared(uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
template <typename T>
__device__ void LoadShared(uint32_t from, T& x) {
  static_assert(sizeof(T) % 16 == 0);
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / 16; ++i) {
    uint4 piece;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
                 : "r"(from + static_cast<uint32_t>(16 * i))
                 : "memory");
    memcpy(reinterpret_cast<char*>(&x) + 16 * i, &piece, 16);
  }
}

// ---- Bulk copies and the barriers that they end at ----------------------------------------------

// Barriers in shared memory, by address: a phase ends after `count` arrivals and all bytes that
// were announced. The first phase has parity 0.
__device__ inline void InitBarrier(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// By the thread that initialized, before the block meets.
__device__ inline void FenceBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void ArriveExpecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void WaitBarrier(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}
// `bytes` (a multiple of 16), announced at `barrier`. By one thread; the matrix units need no
// fence.
__device__ inline void CopyBulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// The other way: what threads have written, after FenceShared and a barrier. By one thread, which
// waits until no more than kPending of its committed copies still read.
__device__ inline void StoreBulk(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kPending>
__device__ void WaitBulkReads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// A phase's arrival without bytes.
__device__ inline void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// A box of a matrix (tensor_map.h), its first element at x, y: tiles if it is 64 columns wide.
// What lies outside of the matrix arrives as zeros, and counts as bytes. By one thread.
__device__ inline void CopyBox(uint32_t to, const CUtensorMap& map, uint32_t barrier, int x,
                               int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
__device__ inline void CopyBox(uint32_t to, const CUtensorMap& map, uint32_t barrier, int x, int y,
                               int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
__device__ inline void PrefetchMap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- wgmma: 64 x N += 64 x 16 times 16 x N, by a group of four warps ----------------------------

// How an operand's tile is contracted.
enum Contract { kAlongColumns = 0, kAlongRows = 1 };

// Step i of 16 along the contracted side. Along columns: any number of rows, i < 4 within a tile.
// Along rows: i counts 16 rows; the other side's blocks of 64 columns are `block_bytes` apart.
template <Contract kContract>
__device__ uint64_t TileOperand(const char* tile, int i, int block_bytes = 0) {
  const uint32_t address =
      SharedAddress(tile) + (kContract == kAlongColumns ? i * 32 : i * 16 * kTileRowBytes);
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{8 * kTileRowBytes >> 4} << 32;
  const uint64_t leading = kContract == kAlongColumns ? 1 : block_bytes >> 4;
  return kSwizzle128 | kEightRows | leading << 16 | ((address & 0x3FFFF) >> 4);
}

template <int N>
struct WgmmaShape;
// clang-format off
template <>
struct WgmmaShape<16> {
  template <int kTransA, int kTransB>
  __device__ static void Run(float (&d)[8], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, %11, %12;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB));
  }
};
template <>
struct WgmmaShape<32> {
  template <int kTransA, int kTransB>
  __device__ static void Run(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, %19, %20;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB));
  }
};
template <>
struct WgmmaShape<64> {
  template <int kTransA, int kTransB>
  __device__ static void Run(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %35, %36;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB));
  }
};
template <>
struct WgmmaShape<128> {
  template <int kTransA, int kTransB>
  __device__ static void Run(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, %67, %68;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB));
  }
};
template <>
struct WgmmaShape<256> {
  template <int kTransA, int kTransB>
  __device__ static void Run(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, p, 1, 1, %131, %132;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB));
  }
};
// clang-format on

template <int N, Contract kA, Contract kB>
__device__ void Wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  WgmmaShape<N>::template Run<kA, kB>(d, a, b, accumulate);
}
// The same for N = 64 with the left operand in registers, in the order of Mma16x8x16's `a`, a
// warp's 16 rows each.
template <Contract kB>
__device__ void WgmmaFromRegisters(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  // clang-format off
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(kB)));
  // clang-format on
}
// Which group of four warps a thread is in, in a form whose uniformity within a warp the compiler
// sees: products in a branch that might diverge are run one by one.
__device__ inline int GroupOfWarps() { return __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0); }
// Before the first product after the sums were touched by other code.
__device__ inline void BeginProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Sum 4 j + e of a thread stands in row SumRow(e) and column SumColumn(j, e), e in 0 .. 3.
__device__ inline int SumRow(int e) {
  return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + (e & 2 ? 8 : 0);
}
__device__ inline int SumColumn(int j, int e) { return 8 * j + threadIdx.x % 4 * 2 + (e & 1); }

// 64 x 64 sums of a group of warps, in bfloat16 pairs 2 j + half (row SumRow(2 half), columns
// SumColumn(j, 0)), to a tile.
__device__ inline void StoreSums(char* tile, const uint32_t (&pairs)[16]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  const uint32_t address = SharedAddress(tile) + row * kTileRowBytes;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     address + ((j + lane / 16) ^ (row & 7)) * 16),
                 "r"(pairs[2 * j]), "r"(pairs[2 * j + 1]), "r"(pairs[2 * j + 2]),
                 "r"(pairs[2 * j + 3])
                 : "memory");
  }
}

// ---- mma.sync: 16 x 8 += 16 x 16 times 16 x 8, by a warp ----------------------------------------

// With g = lane / 4, c = lane % 4 * 2: a[0] holds A[g][c, c + 1], a[1] row g + 8, a[2] columns + 8,
// a[3] both; b[0] holds B[c, c + 1][g], b[1] rows + 8; d[0, 1] is D[g][c, c + 1], d[2, 3] row g
// + 8.
__device__ inline void Mma16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Such an a from [16][16] in shared memory. Lane i gives the address of row i % 16, column i / 16
// * 8.
__device__ inline void LoadMatrix(uint32_t address, uint32_t (&a)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address));
}

// Two such b from [16][16] in shared memory, rows along the contracted side: of columns 0 .. 7 in
// b[0, 1], of 8 .. 15 in b[2, 3]. Lane i gives the address of row i % 16, column i / 16 * 8.
__device__ inline void LoadTransposed(uint32_t address, uint32_t (&b)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address));
}

// Two float32 as bfloat16, `low` in the low half.
__device__ inline uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline float2 UnpackBf16(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
}

// Eight neighbours times a factor.
__device__ inline uint4 Scaled(uint4 piece, float factor) {
  uint32_t* const pairs = reinterpret_cast<uint32_t*>(&piece);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = UnpackBf16(pairs[i]);
    pairs[i] = PackBf16(x.x * factor, x.y * factor);
  }
  return piece;
}

// 2^x, subnormal results flushed to zero.
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x sigmoid(x), to 2^-18 or so of itself.
__device__ inline float QuickSilu(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return x * Reciprocal(1.0f + Exp2(-kLog2E * x));
}

// Pairs.
__device__ inline float2 Exp2(float2 x) { return {Exp2(x.x), Exp2(x.y)}; }
__device__ inline float2 Product(float2 x, float2 y) { return {x.x * y.x, x.y * y.y}; }
__device__ inline uint32_t PackBf16(float2 x) { return PackBf16(x.x, x.y); }

}  // namespace gla
