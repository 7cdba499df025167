// Launches that may begin before the kernel ahead of them has ended (programmatic dependent
// launch), in a stream or in a captured graph.
//
// A kernel that is launched so must call WaitForPrevious() before it reads what earlier kernels of
// the stream wrote or writes what they read, in every thread that does. It calls AllowNext() after
// that: then whatever the next kernel does before its own WaitForPrevious() can overlap with this
// kernel and with no other. Decode kernels may call it at once where the next is one of them too,
// and so overlap with each other as far as there is room: what they read before they wait no kernel
// of the step writes (kernels/decode.h).
#pragma once

#include <utility>

#include "kernels/cuda/common.cuh"

namespace gla {

__device__ inline void WaitForPrevious() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void AllowNext() { asm volatile("griddepcontrol.launch_dependents;"); }

// x as it is now, in a register: what a kernel computes before it waits the compiler would
// otherwise compute again after it.
template <typename T>
__device__ void Keep(T& x) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
}

struct LaunchShape {
  dim3 blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks
  // A multiprocessor splits its memory into cache and shared memory, and kernels that want
  // different splits do not overlap: this one wants all shared, as those beside it that hold
  // weights there.
  bool most_shared = false;
};

template <typename... Params, typename... Args>
void LaunchOverlapped(Device& device, void (*kernel)(Params...), const LaunchShape& shape,
                      Args&&... args) {
  AllowShared(kernel, shape.shared_bytes);
  if (shape.most_shared) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared));
  }
  const cudaStream_t stream = Queue(device);
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (!std::exchange(device.impl().after_event, false)) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {shape.cluster, 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

}  // namespace gla
