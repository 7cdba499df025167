// The engine: one thread that owns everything that changes.
//
//   while (TakeInbox()) { next = Queue(scheduler.Plan()); Deliver(last); last = next; }
//
// A step is queued on the device before the tokens of the one before it are read and delivered: it
// takes them from the device's memory.
//
// Other threads only leave messages in the inbox (Submit, Cancel, session calls, Drain); results
// come back through TokenSink and callbacks, which run on the engine thread and must not block,
// throw, or call a blocking function. A new message is seen at the top of the next step, so a
// cancellation or a passed deadline takes effect within one step.
//
// States. A slot is one sequence's recurrent state. A session at rest holds one slot (none while
// its position is 0). A running request holds one working slot: its first chunk reads the session's
// slot and writes the working slot, so the session's own state stays untouched until the request
// ends; then the working slot becomes the session's. On a numeric fault the working slot is dropped
// and the session is as before the request. Capacity: sessions = slots - max_num_seqs, so a session
// never starves a request and a request never evicts a session.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "model/model.h"
#include "model/tokenizer.h"
#include "telemetry/metrics.h"

namespace gla {

// Values are validated by the service (service/convert.cc) before they come here.
struct SamplingParams {
  float temperature = 1;
  int top_k = 0;
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  uint64_t seed = 0;
  std::vector<std::pair<int32_t, float>> logit_bias;  // distinct tokens
};

struct GenerateParams {
  std::vector<int32_t>
      prompt;  // at least one token, unless a session with position > 0 ... see Submit
  // Fed before the prompt when the request starts from the empty state (one-shot, or a session at
  // position 0): the begin token of a text prompt. It counts as a prefilled token.
  std::optional<int32_t> bos_if_start;
  std::string session_id;  // empty: one-shot
  std::optional<int64_t> expected_position;
  int max_new_tokens = 256;
  SamplingParams sampling;
  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
  int logprobs = -1;  // -1: none; n: of the chosen token and the n likeliest
  absl::Time deadline = absl::InfiniteFuture();
  std::string request_id;
};

struct ScoreParams {
  std::vector<int32_t> tokens;  // at least 2
  absl::Time deadline = absl::InfiniteFuture();
  std::string request_id;
};

struct TokenLogprob {
  float logprob = 0;
  std::vector<std::pair<int32_t, float>> top;  // likeliest first
};

struct TokenEvent {
  int32_t token = 0;
  std::string
      text;  // whole characters that became certain; empty while a stop string may be matching
  std::optional<TokenLogprob> logprob;
};

enum class FinishReason { kLength, kEos, kStop, kCancelled, kDeadline, kError };

struct RequestTimings {  // seconds
  double queue = 0, prefill = 0, decode = 0, time_to_first_token = 0, total = 0;
};

struct FinishEvent {
  absl::Status status;  // OK for kLength, kEos and kStop
  FinishReason reason = FinishReason::kLength;
  std::string text;           // what was held back and belongs to the text after all
  std::string stop_sequence;  // the stop string that matched
  int64_t tokens_restored = 0;
  int64_t tokens_prefilled = 0;
  int64_t tokens_generated = 0;
  std::string session_id;
  int64_t session_position = 0;  // after this request
  uint64_t seed = 0;
  RequestTimings timings;
  std::vector<float> score_logprobs;  // Score only
};

// Where a request's results go. Called on the engine thread; OnFinish exactly once and last.
class TokenSink {
 public:
  virtual ~TokenSink() = default;
  // After a step that ran a part of the prompt but not its end: tokens done and in all.
  virtual void OnPrefill(int64_t /*tokens_done*/, int64_t /*tokens_total*/) {}
  virtual void OnToken(const TokenEvent& event) = 0;
  virtual void OnFinish(const FinishEvent& event) = 0;
};

struct SessionInfo {
  std::string id;
  int64_t position = 0;
  int64_t state_bytes = 0;
  bool busy = false;
  double idle_seconds = 0;
  double age_seconds = 0;
  int64_t idle_ttl_seconds = 0;
};

struct EngineOptions {
  int max_num_seqs = 64;                // requests running at once
  int max_num_batched_tokens = 2048;    // rows of one step
  int max_prefill_chunk = 512;          // rows of one prompt in one step, so that others go on
  int max_queued_requests = 256;        // beyond: ResourceExhausted at Submit
  int64_t max_queued_tokens = 1 << 20;  // prompt tokens waiting; beyond: ResourceExhausted
  int64_t num_slots = 0;                // state slots; > max_num_seqs
  int64_t default_session_ttl_seconds = 900;
  // Queue a step before the results of the last one are known. Of no use where the device computes
  // in the caller's thread; results do not depend on it.
  bool run_ahead = true;
  bool poison_freed_slots = false;  // tests: fill freed slots with NaN
  Clock clock = [] { return std::chrono::steady_clock::now(); };  // tests move it by hand
};

using RequestId = uint64_t;

class Engine {
 public:
  // Allocates the slots. ResourceExhausted when device memory does not hold them.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(Device& device, Model& model,
                                                        const Tokenizer& tokenizer,
                                                        Metrics& metrics,
                                                        const EngineOptions& options);
  ~Engine();  // drains at once: running requests end with Unavailable

  // Runs a short computation on the device and checks that the logits are finite. Before Start().
  absl::Status SelfTest();
  void Start();

  // From any thread; never blocks for longer than an append. An error means that the sink will
  // never be called: InvalidArgument (a prompt too short, or longer than the whole queue),
  // ResourceExhausted (queue full), Unavailable (draining). Everything else comes by OnFinish:
  // NotFound (no such session; reason SESSION_EXPIRED if it expired), Aborted (session busy; stale
  // expected_position), ResourceExhausted, DeadlineExceeded, Cancelled, Internal (numeric guard).
  // Machine-readable reasons travel as the status payload kReasonUrl. The sink must stay valid
  // until its OnFinish returns.
  absl::StatusOr<RequestId> Submit(GenerateParams params, TokenSink* sink);
  absl::StatusOr<RequestId> Submit(ScoreParams params, TokenSink* sink);
  // Idempotent; nothing happens when the request has finished.
  void Cancel(RequestId id);

  // Session calls; `done` runs on the engine thread.
  using SessionCallback = std::function<void(absl::StatusOr<SessionInfo>)>;
  void CreateSession(std::string id, std::optional<int64_t> ttl_seconds, SessionCallback done);
  void GetSession(std::string id, SessionCallback done);
  void DeleteSession(std::string id, std::function<void(absl::Status)> done);
  void ListSessions(std::function<void(std::vector<SessionInfo>)> done);  // by id

  // New work is refused with Unavailable from now on; running and queued work goes on. `drained`
  // runs on the engine thread once nothing is left.
  void Drain(std::function<void()> drained);
  // Ends everything that still runs with Unavailable. Idempotent.
  void Stop();

  int64_t capacity_sessions() const;  // num_slots - max_num_seqs
  int64_t num_sessions() const;       // now; from any thread
  // Seconds since the engine thread last finished a step or slept idle: the liveness probe's
  // question.
  double heartbeat_age_seconds() const;

 private:
  class Core;
  explicit Engine(std::unique_ptr<Core> core);
  std::unique_ptr<Core> core_;
};

// Status payload that holds a machine-readable reason, e.g. "SESSION_EXPIRED"; becomes
// google.rpc.ErrorInfo.reason at the service's edge.
inline constexpr char kReasonUrl[] = "gla/reason";
// Payload: milliseconds after which a retry makes sense, decimal.
inline constexpr char kRetryMsUrl[] = "gla/retry_ms";
absl::Status WithReason(absl::Status status, const std::string& reason);

}  // namespace gla
