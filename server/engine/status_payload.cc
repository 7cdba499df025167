#include "engine/status_payload.h"

#include <random>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "engine/engine.h"

namespace gla {

absl::Status WithRetry(absl::Status status) {
  thread_local std::minstd_rand random{std::random_device{}()};
  const int ms = std::uniform_int_distribution<int>(200, 2000)(random);
  status.SetPayload(kRetryMsUrl, absl::Cord(absl::StrCat(ms)));
  return status;
}

absl::Status WithReason(absl::Status status, const std::string& reason) {
  status.SetPayload(kReasonUrl, absl::Cord(reason));
  return status;
}

}  // namespace gla
