#include "kernels/cuda/common.cuh"
#include "tests/bench/timing.h"

namespace gla::bench {

bool HasReplay() { return true; }

std::vector<double> Time(Device& device, const std::function<void()>& work, int repeats,
                         bool replay) {
  const cudaStream_t stream = Queue(device);
  work();  // what a first call sets up (modules, function attributes) cannot be captured
  device.Synchronize();
  cudaGraphExec_t graph = nullptr;
  if (replay) {
    cudaGraph_t captured = nullptr;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    CUDA_CHECK(cudaStreamEndCapture(stream, &captured));
    CUDA_CHECK(cudaGraphInstantiate(&graph, captured, 0));
    CUDA_CHECK(cudaGraphDestroy(captured));
  }
  const auto run = [&] {
    if (replay) {
      CUDA_CHECK(cudaGraphLaunch(graph, stream));
    } else {
      work();
    }
  };
  std::vector<cudaEvent_t> events(repeats + 1);
  for (cudaEvent_t& event : events) CUDA_CHECK(cudaEventCreate(&event));
  for (int i = 0; i < 3; ++i) run();
  // All is queued before anything is waited for, so that the device never waits for the host
  // between two replays.
  CUDA_CHECK(cudaEventRecord(events[0], stream));
  for (int i = 0; i < repeats; ++i) {
    run();
    CUDA_CHECK(cudaEventRecord(events[i + 1], stream));
  }
  device.Synchronize();
  std::vector<double> times(repeats);
  for (int i = 0; i < repeats; ++i) {
    float milliseconds = 0;
    CUDA_CHECK(cudaEventElapsedTime(&milliseconds, events[i], events[i + 1]));
    times[i] = milliseconds;
  }
  for (const cudaEvent_t event : events) CUDA_CHECK(cudaEventDestroy(event));
  if (graph != nullptr) CUDA_CHECK(cudaGraphExecDestroy(graph));
  return times;
}

double ReadRate(Device&) { return 0; }

}  // namespace gla::bench
