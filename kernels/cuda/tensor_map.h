// The copy engine's view of a matrix: made on the host, read by CopyBox (tensor.cuh).
#pragma once

#include <cuda.h>

#include <algorithm>
#include <initializer_list>

#include "kernels/cuda/common.cuh"

namespace gla {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// `box` elements at a time; `strides` (BYTES) of all sides but the first. What lies outside reads
// as zero.
inline CUtensorMap EncodeMap(CUtensorMapDataType type, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion promotion, const void* data,
                             std::initializer_list<uint64_t> sides, const uint64_t* strides,
                             std::initializer_list<uint32_t> box) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found));
    GLA_REQUIRES(found == cudaDriverEntryPointSuccess, "a driver that knows tensor maps");
    return reinterpret_cast<EncodeTiled>(function);
  }();
  CUtensorMap map;
  const uint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, type, static_cast<uint32_t>(sides.size()), const_cast<void*>(data),
             sides.begin(), strides, box.begin(), steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  GLA_REQUIRES(result == CUDA_SUCCESS, "a matrix that the copy engine can read");
  return map;
}

// bfloat16 in the swizzle of tensor.cuh; `strides` in elements.
inline CUtensorMap MapOf(const void* data, std::initializer_list<uint64_t> sides,
                         std::initializer_list<uint64_t> strides,
                         std::initializer_list<uint32_t> box) {
  uint64_t bytes[3] = {};
  std::transform(strides.begin(), strides.end(), bytes,
                 [](uint64_t s) { return s * sizeof(bf16); });
  return EncodeMap(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, data, sides, bytes, box);
}

// [T, H, dim] of bfloat16, tokens `stride` elements apart, in boxes of 64 tokens x 64 columns:
// tiles.
inline CUtensorMap TilesOf(const void* data, int tokens, int heads, int dim, int64_t stride) {
  const uint64_t rows = std::max(1, tokens), columns = uint64_t{1} * heads * dim;
  return MapOf(data, {columns, rows}, {static_cast<uint64_t>(stride)}, {64, 64});
}

}  // namespace gla
