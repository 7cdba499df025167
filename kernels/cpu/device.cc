// The CPU as a device: plain memory, calls that return when the work is done, a pool of threads.
#include "kernels/device.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>

#include "kernels/cpu/common.h"

namespace gla {
namespace {

// How long a waiting thread keeps its core. Longer than the gaps between the kernels of a step,
// short enough not to be felt by the server's other threads.
constexpr auto kSpinTime = std::chrono::microseconds(40);

void CpuRelax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Spins until `value` is no longer `old`, and sleeps when that takes too long.
void WaitWhileEqual(const std::atomic<uint32_t>& value, uint32_t old) {
  const auto give_up = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 16; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      CpuRelax();
    }
  } while (std::chrono::steady_clock::now() < give_up);
  value.wait(old, std::memory_order_acquire);
}

// The first value of "key: value" in a /proc file; empty when there is none.
std::string ProcValue(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const size_t start = line.find_first_not_of(" \t:", key.size());
    return start == std::string::npos ? "" : line.substr(start);
  }
  return "";
}

size_t MemInfoBytes(const char* key) {
  const std::string value = ProcValue("/proc/meminfo", key);
  return static_cast<size_t>(std::strtoull(value.c_str(), nullptr, 10)) * 1024;
}

// A number in a control group's file; `none` when there is no such file or no limit in it.
size_t CgroupBytes(std::initializer_list<const char*> paths, size_t none) {
  for (const char* path : paths) {
    std::ifstream file(path);
    uint64_t bytes = 0;
    if (file >> bytes) return bytes;
  }
  return none;
}

size_t MemoryLimit() {
  const size_t unlimited = std::numeric_limits<size_t>::max();
  const size_t cgroup = CgroupBytes(
      {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}, unlimited);
  return std::min(MemInfoBytes("MemTotal"), cgroup);
}

// The cores this process may use: its affinity, and the control group's share of time if any (more
// threads than that would be stopped in the middle of a step).
int UsableCores() {
  cpu_set_t set;
  int cores = static_cast<int>(std::thread::hardware_concurrency());
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = CPU_COUNT(&set);
  double quota = 0, period = 0;
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  if (!(v2 >> quota >> period)) {
    quota = period = 0;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  if (quota > 0 && period > 0) cores = std::min(cores, static_cast<int>(std::ceil(quota / period)));
  return std::max(cores, 1);
}

constexpr size_t kAlignment = 256;

// Buffers of some size are given pages of 2 MiB where the system has them to spare: reading a
// weight or a state once is bound by memory, and small pages cost a third of its rate.
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kHugePageMinBytes = 2 * kHugePage;

}  // namespace

// ---- ThreadPool ---------------------------------------------------------------------------------

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { WorkerLoop(); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  round_.fetch_add(1);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::RunOneChunk() {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  uint32_t chunk, num_chunks;
  do {
    chunk = ticket & 0xFFFF;
    num_chunks = (ticket >> 16) & 0xFFFF;
    if (chunk >= num_chunks) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
  // The chunk is ours, so the round cannot end, nor its task change, before it is counted as done.
  const Task task = task_.load(std::memory_order_relaxed);
  task(context_.load(std::memory_order_relaxed), static_cast<int>(chunk));
  if (num_done_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_chunks) num_done_.notify_one();
  return true;
}

void ThreadPool::Run(int num_chunks, void* context, Task task) {
  const uint32_t round = round_.load(std::memory_order_relaxed) + 1;
  task_.store(task, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  num_done_.store(0, std::memory_order_relaxed);
  ticket_.store(static_cast<uint64_t>(round) << 32 | static_cast<uint64_t>(num_chunks) << 16,
                std::memory_order_release);
  round_.store(round, std::memory_order_seq_cst);
  round_.notify_all();
  while (RunOneChunk()) {
  }
  for (uint32_t done;
       (done = num_done_.load(std::memory_order_acquire)) != static_cast<uint32_t>(num_chunks);) {
    WaitWhileEqual(num_done_, done);
  }
}

void ThreadPool::WorkerLoop() {
  while (!stop_.load()) {
    const uint32_t round = round_.load(std::memory_order_acquire);
    while (RunOneChunk()) {
    }
    if (!stop_.load()) WaitWhileEqual(round_, round);
  }
}

// ---- Device -------------------------------------------------------------------------------------

Device::Device(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Device::~Device() = default;

std::unique_ptr<Device> Device::Open(const DeviceOptions& options, std::string* error) {
  if (options.ordinal != 0) {
    *error = "device ordinal: expected 0 (there is one CPU device), got " +
             std::to_string(options.ordinal);
    return nullptr;
  }
  if (options.num_threads < 0 || options.num_threads > 1024) {
    *error =
        "threads: expected 0 (one per core) to 1024, got " + std::to_string(options.num_threads);
    return nullptr;
  }
  auto impl = std::make_unique<Impl>(options.num_threads > 0 ? options.num_threads : UsableCores());
  impl->poison = options.poison;
  impl->name = ProcValue("/proc/cpuinfo", "model name");
  if (impl->name.empty()) impl->name = "CPU";
  impl->memory_total = MemoryLimit();
  return std::unique_ptr<Device>(new Device(std::move(impl)));
}

void* Device::Allocate(size_t bytes) {
  // The system hands out more than it has and ends the process later, so the limit is kept here.
  // The pages themselves are committed as they are touched: an unused state slot costs nothing.
  const size_t limit = impl_->memory_total - std::min(impl_->memory_total, impl_->allocated);
  if (bytes > limit) return nullptr;
  const size_t alignment = bytes >= kHugePageMinBytes ? kHugePage : kAlignment;
  const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, rounded) != 0) return nullptr;
  if (alignment == kHugePage) madvise(memory, rounded / kHugePage * kHugePage, MADV_HUGEPAGE);
  impl_->sizes.emplace(memory, rounded);
  impl_->allocated += rounded;
  if (impl_->poison) std::memset(memory, 0xFF, rounded);  // NaN in float32 and in bfloat16
  return memory;
}

void Device::Free(void* memory) {
  if (memory == nullptr) return;
  const auto it = impl_->sizes.find(memory);
  GLA_CHECK(it != impl_->sizes.end());
  impl_->allocated -= it->second;
  impl_->sizes.erase(it);
  std::free(memory);
}

void Device::Upload(void* device_dst, const void* host_src, size_t bytes) {
  if (bytes > 0) std::memcpy(device_dst, host_src, bytes);
}
void Device::Download(void* host_dst, const void* device_src, size_t bytes) {
  if (bytes > 0) std::memcpy(host_dst, device_src, bytes);
}
void Device::Copy(void* device_dst, const void* device_src, size_t bytes) {
  if (bytes > 0) std::memmove(device_dst, device_src, bytes);
}
void Device::Fill(void* device_dst, int byte, size_t bytes) {
  if (bytes > 0) std::memset(device_dst, byte, bytes);
}
void Device::Synchronize() {}

// Queued work is done when the call returns, so there is never anything to wait for.
Readback::Readback(Device& device, size_t capacity)
    : device_(device), data_(std::malloc(std::max<size_t>(capacity, 1))) {}
Readback::~Readback() { std::free(data_); }
void Readback::Start(const void* device_src, size_t bytes) {
  device_.Download(data_, device_src, bytes);
}
const void* Readback::Wait() { return data_; }

const std::string& Device::name() const { return impl_->name; }
const char* Device::backend() { return "cpu"; }
size_t Device::memory_total() const { return impl_->memory_total; }
size_t Device::memory_free() const {
  const size_t unlimited = std::numeric_limits<size_t>::max();
  const size_t used = CgroupBytes(
      {"/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes"}, 0);
  const size_t in_group = MemoryLimit() == MemInfoBytes("MemTotal")
                              ? unlimited
                              : impl_->memory_total - std::min(impl_->memory_total, used);
  return std::min({MemInfoBytes("MemAvailable"), in_group,
                   impl_->memory_total - std::min(impl_->memory_total, impl_->allocated)});
}

void Device::SideBySide(const std::function<void()>& first, const std::function<void()>& second) {
  first();
  second();
}

// ---- Recordings ---------------------------------------------------------------------------------

struct Recording::Impl {
  std::function<void()> work;
};

Recording::Recording(Device& /*device*/, std::function<void()> work)
    : impl_(std::make_unique<Impl>(Impl{std::move(work)})) {}

Recording::~Recording() = default;
Recording::Recording(Recording&& other) noexcept = default;
Recording& Recording::operator=(Recording&& other) noexcept = default;

void Recording::Replay() const { impl_->work(); }

}  // namespace gla
