#include "tests/bench/timing.h"

#include <algorithm>
#include <string>

namespace gla::bench {

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

double CopyRate(Device& device) {
  const size_t bytes = size_t{1} << (HasReplay() ? 30 : 28);
  const DeviceBuffer from(device, bytes), to(device, bytes);
  if (!from.ok() || !to.ok()) return 0;
  device.Fill(from.data(), 1, bytes);
  const auto copy = [&] { device.Copy(to.data(), from.data(), bytes); };
  return 2e3 * static_cast<double>(bytes) / Median(Time(device, copy, 9, /*replay=*/false));
}

}  // namespace gla::bench
