// What a refusal tells a client beside its code.
#pragma once

#include "absl/status/status.h"

namespace gla {

// Adds the payload kRetryMsUrl: 200 .. 2000 ms at random, so that clients that were refused
// together do not come back together. Thread-safe.
absl::Status WithRetry(absl::Status status);

}  // namespace gla
