// The engine's door: what other threads leave for the engine thread.
//
// Bounds are kept here, under the one lock, so that they are exact and a refusal is immediate.
// Thread-safe.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "engine/engine.h"
#include "engine/sequence.h"
#include "telemetry/metrics.h"

namespace gla {

// Runs on the engine thread, with OK; or, when that has ended, wherever it is, with the error that
// says so.
using EngineTask = std::function<void(const absl::Status&)>;
struct CancelMessage {
  RequestId id;
};
using Message = std::variant<std::unique_ptr<Sequence>, CancelMessage, EngineTask>;

class Inbox {
 public:
  struct Limits {
    int max_requests;    // accepted and not finished: running ones and the queue
    int64_t max_tokens;  // prompt tokens of requests that wait
  };
  Inbox(const Limits& limits, Metrics& metrics) : limits_(limits), metrics_(metrics) {}

  // Unavailable (DRAINING) after StopAccepting; ResourceExhausted (QUEUE_FULL, TOKENS_FULL).
  absl::StatusOr<RequestId> Submit(std::unique_ptr<Sequence> sequence);
  // Nothing happens once the inbox is closed.
  void Cancel(RequestId id);
  // Runs the task at once, with an error, when the inbox is closed.
  void Post(EngineTask task);
  void StopAccepting();
  // Wakes the engine thread for the last time.
  void Stop();

  // The engine thread's side. All messages in order; waits until there is one, or the inbox is
  // stopped, or until `deadline`.
  std::vector<Message> Take(Instant deadline);
  bool accepting() const;
  bool stopped() const;
  int num_requests() const;    // accepted and not finished
  int64_t num_tokens() const;  // prompt tokens of requests that wait
  void RequestFinished();
  void TokensAdmitted(int64_t tokens);
  // Takes the last messages; later ones are refused.
  std::vector<Message> Close();

 private:
  const Limits limits_;
  Metrics& metrics_;

  mutable Mutex mu_;
  std::condition_variable_any arrived_;
  std::vector<Message> messages_ ABSL_GUARDED_BY(mu_);
  RequestId last_id_ ABSL_GUARDED_BY(mu_) = 0;
  int num_requests_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t num_tokens_ ABSL_GUARDED_BY(mu_) = 0;
  bool accepting_ ABSL_GUARDED_BY(mu_) = true;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

// The error of everything that comes too late.
absl::Status DrainingError();

}  // namespace gla
