// The CUDA device: a stream and one of lower priority beside it, one cuBLASLt handle, and a pinned
// ring that uploads pass through.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels/cuda/common.cuh"

namespace gla {
namespace {

// Exists to ask whether this build's kernels fit the GPU.
__global__ void ProbeKernel() {}

std::unique_ptr<Device> Fail(std::string* error, const std::string& reason) {
  *error = "no CUDA device: " + reason;
  cudaGetLastError();
  return nullptr;
}

}  // namespace

void Die(const char* file, int line, const char* expression, const char* reason) {
  std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, expression, reason);
  std::fflush(stderr);
  std::abort();
}

void Device::Impl::Use() {
  thread_local int current = -1;
  if (current == ordinal) return;
  CUDA_CHECK(cudaSetDevice(ordinal));
  current = ordinal;
}

Device::Device(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

std::unique_ptr<Device> Device::Open(const DeviceOptions& options, std::string* error) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return Fail(error, cudaGetErrorString(status));
  if (options.ordinal < 0 || options.ordinal >= count) {
    return Fail(error, "ordinal " + std::to_string(options.ordinal) +
                           " asked for, this machine has " + std::to_string(count));
  }
  auto impl = std::make_unique<Impl>();
  impl->ordinal = options.ordinal;
  impl->poison = options.poison;
  status = cudaSetDevice(options.ordinal);
  if (status != cudaSuccess) return Fail(error, cudaGetErrorString(status));
  impl->Use();

  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, options.ordinal));
  impl->name = properties.name;
  impl->memory_total = properties.totalGlobalMem;
  impl->max_shared_bytes = properties.sharedMemPerBlockOptin;
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, ProbeKernel) != cudaSuccess) {
    return Fail(error, impl->name + " has compute capability " + std::to_string(properties.major) +
                           "." + std::to_string(properties.minor) +
                           ", which this build has no kernels for");
  }
  int low_priority = 0, high_priority = 0;
  CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&low_priority, &high_priority));
  CUDA_CHECK(cudaStreamCreateWithPriority(&impl->stream, cudaStreamNonBlocking, high_priority));
  CUDA_CHECK(
      cudaStreamCreateWithPriority(&impl->second_stream, cudaStreamNonBlocking, low_priority));
  CUDA_CHECK(cudaEventCreateWithFlags(&impl->forked, cudaEventDisableTiming));
  CUDA_CHECK(cudaEventCreateWithFlags(&impl->joined, cudaEventDisableTiming));
  CUBLAS_CHECK(cublasLtCreate(&impl->cublas));
  CUDA_CHECK(cudaMalloc(&impl->cublas_workspace, Impl::kCublasBytes));
  CUDA_CHECK(cudaMallocHost(&impl->staging, Impl::kNumSegments * Impl::kSegmentBytes));
  for (cudaEvent_t& event : impl->segment_copied) {
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  return std::unique_ptr<Device>(new Device(std::move(impl)));
}

Device::~Device() {
  // A device with static lifetime may outlive the CUDA runtime, which then has freed all this
  // itself.
  if (cudaSetDevice(impl_->ordinal) == cudaErrorCudartUnloading) return;
  Synchronize();
  for (cudaEvent_t event : impl_->segment_copied) CUDA_CHECK(cudaEventDestroy(event));
  CUDA_CHECK(cudaFreeHost(impl_->staging));
  CUBLAS_CHECK(cublasLtDestroy(impl_->cublas));
  CUDA_CHECK(cudaFree(impl_->cublas_workspace));
  CUDA_CHECK(cudaEventDestroy(impl_->forked));
  CUDA_CHECK(cudaEventDestroy(impl_->joined));
  CUDA_CHECK(cudaStreamDestroy(impl_->second_stream));
  CUDA_CHECK(cudaStreamDestroy(impl_->stream));
}

void* Device::Allocate(size_t bytes) {
  impl_->Use();
  if (bytes > impl_->memory_total) return nullptr;
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, std::max<size_t>(bytes, 1));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  CUDA_CHECK(status);
  if (impl_->poison) Fill(memory, 0xFF, bytes);
  return memory;
}

void Device::Free(void* memory) {
  if (memory == nullptr) return;
  Synchronize();
  CUDA_CHECK(cudaFree(memory));
}

void Device::Upload(void* device_dst, const void* host_src, size_t bytes) {
  Impl& impl = *impl_;
  impl.Use();
  char* dst = static_cast<char*>(device_dst);
  const char* src = static_cast<const char*>(host_src);
  while (bytes > 0) {
    if (impl.segment_used == Impl::kSegmentBytes) {
      CUDA_CHECK(cudaEventRecord(impl.segment_copied[impl.segment], impl.stream));
      impl.segment = (impl.segment + 1) % Impl::kNumSegments;
      // Returns at once on the first lap: an event never recorded counts as done.
      CUDA_CHECK(cudaEventSynchronize(impl.segment_copied[impl.segment]));
      impl.segment_used = 0;
    }
    const size_t n = std::min(bytes, Impl::kSegmentBytes - impl.segment_used);
    char* staged = impl.staging + impl.segment * Impl::kSegmentBytes + impl.segment_used;
    std::memcpy(staged, src, n);
    CUDA_CHECK(cudaMemcpyAsync(dst, staged, n, cudaMemcpyHostToDevice, impl.stream));
    impl.segment_used = std::min(RoundUp(impl.segment_used + n, size_t{256}), Impl::kSegmentBytes);
    src += n;
    dst += n;
    bytes -= n;
  }
}

void Device::Download(void* host_dst, const void* device_src, size_t bytes) {
  impl_->Use();
  if (bytes > 0) {
    CUDA_CHECK(cudaMemcpyAsync(host_dst, device_src, bytes, cudaMemcpyDeviceToHost, impl_->stream));
  }
  Synchronize();
}

void Device::Copy(void* device_dst, const void* device_src, size_t bytes) {
  impl_->Use();
  if (bytes == 0) return;
  CUDA_CHECK(
      cudaMemcpyAsync(device_dst, device_src, bytes, cudaMemcpyDeviceToDevice, impl_->stream));
}

void Device::Fill(void* device_dst, int byte, size_t bytes) {
  impl_->Use();
  if (bytes == 0) return;
  CUDA_CHECK(cudaMemsetAsync(device_dst, byte, bytes, impl_->stream));
}

void Device::Synchronize() {
  impl_->Use();
  CUDA_CHECK(cudaStreamSynchronize(impl_->stream));
}

void Device::SideBySide(const std::function<void()>& first, const std::function<void()>& second) {
  Impl& impl = *impl_;
  impl.Use();
  CUDA_CHECK(cudaEventRecord(impl.forked, impl.stream));
  CUDA_CHECK(cudaStreamWaitEvent(impl.second_stream, impl.forked, 0));
  std::swap(impl.stream, impl.second_stream);
  const bool was_after_event = std::exchange(impl.after_event, true);
  second();
  CUDA_CHECK(cudaEventRecord(impl.joined, impl.stream));
  std::swap(impl.stream, impl.second_stream);
  impl.after_event = was_after_event;
  first();
  CUDA_CHECK(cudaStreamWaitEvent(impl.stream, impl.joined, 0));
  impl.after_event = true;
}

Readback::Readback(Device& device, size_t capacity) : device_(device) {
  device_.impl().Use();
  const cudaError_t status = cudaMallocHost(&data_, std::max<size_t>(capacity, 1));
  if (status != cudaSuccess) {
    data_ = nullptr;
    cudaGetLastError();
    if (status != cudaErrorMemoryAllocation) CUDA_CHECK(status);
    return;
  }
  cudaEvent_t event = nullptr;
  CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  event_ = event;
}

Readback::~Readback() {
  if (data_ == nullptr) return;
  Wait();
  CUDA_CHECK(cudaEventDestroy(static_cast<cudaEvent_t>(event_)));
  CUDA_CHECK(cudaFreeHost(data_));
}

void Readback::Start(const void* device_src, size_t bytes) {
  const cudaStream_t stream = Queue(device_);
  if (bytes > 0) {
    CUDA_CHECK(cudaMemcpyAsync(data_, device_src, bytes, cudaMemcpyDeviceToHost, stream));
  }
  CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(event_), stream));
}

const void* Readback::Wait() {
  device_.impl().Use();
  // Returns at once before the first Start: an event never recorded counts as done.
  CUDA_CHECK(cudaEventSynchronize(static_cast<cudaEvent_t>(event_)));
  return data_;
}

const std::string& Device::name() const { return impl_->name; }
const char* Device::backend() { return "cuda"; }
size_t Device::memory_total() const { return impl_->memory_total; }

size_t Device::memory_free() const {
  impl_->Use();
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return free;
}

// ---- Recordings ---------------------------------------------------------------------------------

struct Recording::Impl {
  Device& device;
  cudaGraphExec_t graph = nullptr;
  ~Impl() {
    if (graph == nullptr) return;
    device.Synchronize();
    CUDA_CHECK(cudaGraphExecDestroy(graph));
  }
};

Recording::Recording(Device& device, std::function<void()> work)
    : impl_(std::make_unique<Impl>(Impl{device})) {
  const cudaStream_t stream = Queue(device);
  cudaGraph_t graph;
  CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  work();
  CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  CUDA_CHECK(cudaGraphInstantiate(&impl_->graph, graph, 0));
  CUDA_CHECK(cudaGraphDestroy(graph));
  CUDA_CHECK(cudaGraphUpload(impl_->graph, stream));
}

Recording::~Recording() = default;
Recording::Recording(Recording&& other) noexcept = default;
Recording& Recording::operator=(Recording&& other) noexcept = default;

void Recording::Replay() const { CUDA_CHECK(cudaGraphLaunch(impl_->graph, Queue(impl_->device))); }

}  // namespace gla
