// How long queued work takes on a device. timing_cpu.cc and timing_cuda.cu implement it.
#pragma once

#include <functional>
#include <vector>

#include "kernels/device.h"

namespace gla::bench {

// Whether this backend can capture queued work once and replay it.
bool HasReplay();

// Milliseconds of each of `repeats` runs of what `work` queues, after runs that are not counted.
// `work` only queues: it neither allocates nor waits. With `replay` (REQUIRES HasReplay()) it is
// captured once and the capture is run; without, `work` itself is called each time. CUDA: the time
// between two events on the device's stream, the host staying ahead where it can. CPU: wall clock.
std::vector<double> Time(Device& device, const std::function<void()>& work, int repeats,
                         bool replay);

double Median(std::vector<double> values);

// Bytes read plus bytes written per second by a copy far larger than any cache; 0 when there is no
// memory for it.
double CopyRate(Device& device);

// Bytes per second at which all threads of the device together read what no cache holds; 0 on
// CUDA, where a copy is the measure, and when there is no memory for it.
double ReadRate(Device& device);

}  // namespace gla::bench
