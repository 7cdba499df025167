// How much memory a piece of code holds at most, counted at operator new.
#pragma once

#include <cstddef>

namespace gla::testing {

// Starts a new measurement: the peak is counted above what is held now.
void ResetPeakMemory();
// The most bytes held at once since ResetPeakMemory(), above what was held then.
size_t PeakMemory();

}  // namespace gla::testing
