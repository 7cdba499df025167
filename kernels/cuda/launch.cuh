// Launches that may begin before the kernel ahead of them has ended (programmatic dependent
// launch), in a stream or in a captured graph.
//
// A kernel that is launched so must call WaitForPrevious() before it reads what earlier kernels of
// the stream wrote or writes what they read, in every thread that does, and AllowNext() only after
// that: then whatever a kernel does before its WaitForPrevious() can overlap with the one kernel
// ahead of it and with no other. Before it, read weights and, of states, only what no kernel
// between the last writer and this one touches.
#pragma once

#include "kernels/cuda/common.cuh"

namespace gla {

__device__ inline void WaitForPrevious() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void AllowNext() { asm volatile("griddepcontrol.launch_dependents;"); }

struct LaunchShape {
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks
};

template <typename... Params, typename... Args>
void LaunchOverlapped(Device& device, void (*kernel)(Params...), const LaunchShape& shape,
                      Args&&... args) {
  AllowShared(kernel, shape.shared_bytes);
  cudaLaunchAttribute attributes[3] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  // The same split of a multiprocessor's memory for all: kernels with different ones do not
  // overlap.
  attributes[1].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  attributes[1].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  attributes[2].id = cudaLaunchAttributeClusterDimension;
  attributes[2].val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = Queue(device);
  config.attrs = attributes;
  config.numAttrs = shape.cluster > 1 ? 3 : 2;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

}  // namespace gla
