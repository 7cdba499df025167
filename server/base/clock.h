// Monotonic time: deadlines, idle times and latencies do not follow jumps of the wall clock.
#pragma once

#include <chrono>
#include <functional>

namespace gla {

using Instant = std::chrono::steady_clock::time_point;
using Clock = std::function<Instant()>;  // tests move it by hand

inline double SecondsBetween(Instant from, Instant to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace gla
