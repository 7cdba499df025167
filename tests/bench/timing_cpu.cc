#include <chrono>
#include <cstdlib>

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

}  // namespace gla::bench
