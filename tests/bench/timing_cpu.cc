#include <atomic>
#include <chrono>
#include <cstdlib>

#include "kernels/cpu/common.h"
#include "tests/bench/timing.h"

namespace gla::bench {

bool HasReplay() { return false; }

std::vector<double> Time(Device& device, const std::function<void()>& work, int repeats,
                         bool replay) {
  if (replay) std::abort();
  std::vector<double> times;
  for (int i = -1; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    device.Synchronize();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    if (i >= 0) times.push_back(took.count());
  }
  return times;
}

double ReadRate(Device& device) {
  constexpr int64_t kLines = int64_t{1} << 24, kWordsPerLine = 8;  // 1 GiB, beyond any cache
  const DeviceBuffer from(device, kLines * kWordsPerLine * sizeof(uint64_t));
  if (!from.ok()) return 0;
  device.Fill(from.data(), 1, from.bytes());
  std::atomic<uint64_t> total = 0;  // keeps the reads
  const auto read = [&] {
    ParallelFor(device, kLines, kCopyNs, [&](int64_t begin, int64_t end) {
      uint64_t sum = 0;
      for (int64_t i = begin; i < end; ++i) sum += from.as<uint64_t>()[i * kWordsPerLine];
      total += sum;
    });
  };
  return 1e3 * static_cast<double>(from.bytes()) / Median(Time(device, read, 9, /*replay=*/false));
}

}  // namespace gla::bench
