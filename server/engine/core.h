// The engine's inside: everything the engine thread owns.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "engine/engine.h"
#include "engine/inbox.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/session.h"
#include "engine/state_pool.h"

namespace gla {

class Engine::Core {
 public:
  static absl::StatusOr<std::unique_ptr<Core>> Create(Device& device, Model& model,
                                                      const Tokenizer& tokenizer, Metrics& metrics,
                                                      const EngineOptions& options);
  ~Core() { Stop(); }

  // Any thread.
  absl::StatusOr<RequestId> Submit(GenerateParams params, bool is_score, TokenSink* sink);
  void Start();
  void Stop();
  Inbox& inbox() { return inbox_; }
  int64_t capacity_sessions() const { return options_.num_slots - options_.max_num_seqs; }
  int64_t num_sessions() const { return num_sessions_.load(std::memory_order_relaxed); }
  double heartbeat_age_seconds() const;

  // The engine thread, or any before Start.
  absl::Status SelfTest();

  // The engine thread: what the session calls do.
  absl::StatusOr<SessionInfo> CreateSession(const std::string& id, std::optional<int64_t> ttl);
  absl::StatusOr<SessionInfo> GetSession(const std::string& id);
  absl::Status DeleteSession(const std::string& id);
  std::vector<SessionInfo> ListSessions();
  void OnDrained(std::function<void()> drained) { drained_.push_back(std::move(drained)); }

 private:
  Core(Device& device, Model& model, const Tokenizer& tokenizer, Metrics& metrics,
       const EngineOptions& options, std::unique_ptr<StatePool> pool,
       std::unique_ptr<Sampler> sampler);

  // A step that the device runs, or is about to.
  struct QueuedStep {
    Step step;
    Instant queued;
  };

  void Run();
  void Beat();
  // Handles what has come, ends what is over, admits what waits. Returns when there is a step to
  // plan or to deliver: sleeps as long as there is neither. False once the engine is stopped.
  bool TakeInbox();
  QueuedStep Queue(Step step);
  // Waits for the results.
  void Deliver(const QueuedStep& queued);

  void UpdateGauges();

  // Messages.
  void Handle(Message message);
  void Accept(std::unique_ptr<Sequence> sequence);
  absl::Status OpenSession(Sequence& sequence);
  void Cancel(RequestId id);
  void EndOverdue();
  // Ends the request before its time, for kCancelled or kDeadline. One on a session ends once the
  // state of the step that is queued is known to be sound, because the session gets it.
  void Abort(Sequence& sequence, FinishReason reason);
  void FinishAborted(Sequence& sequence, FinishReason reason);
  void ExpireSessions();
  void Admit();
  void EndEverything();
  void TellDrained();

  // A step's results.
  // The first of the part's first `num_rows` rows that is not finite, or -1.
  static int64_t FirstNonFinite(const StepPart& part, int num_rows, const SampleResults& results);
  void Advance(Sequence& sequence, const StepPart& part, const SampleResults& results);
  void AdvanceScore(Sequence& sequence, absl::Span<const float> logprobs);
  void AddToken(Sequence& sequence, int32_t token, std::optional<TokenLogprob> logprob);
  // The end that `token` means by itself, whatever the text.
  std::optional<FinishReason> EndBy(const Sequence& sequence, int32_t token) const;
  void FinishNonFinite(Sequence& sequence, const std::string& what);
  void CountStep(const Step& step, Instant began);
  void CountToken(Sequence& sequence);

  // The one way out of every accepted request.
  void Finish(Sequence& sequence, FinishReason reason, absl::Status status);
  // The session gets the request's state, or stays as it was.
  void CloseSession(Sequence& sequence, bool keeps_state);
  FinishEvent MakeFinishEvent(Sequence& sequence, FinishReason reason, absl::Status status) const;

  // Constant after construction.
  Device& device_;
  Model& model_;
  const Tokenizer& tokenizer_;
  Metrics& metrics_;
  const EngineOptions options_;
  std::vector<int> end_tokens_;

  Inbox inbox_;
  std::atomic<int64_t> num_sessions_ = 0;
  std::atomic<Instant::rep> heartbeat_ = 0;
  std::thread thread_;
  std::atomic<std::thread::id> thread_id_;
  std::once_flag stopped_;

  // The engine thread's alone.
  const std::unique_ptr<StatePool> pool_;
  const std::unique_ptr<Sampler> sampler_;
  SessionTable sessions_;
  Scheduler scheduler_;
  std::unordered_map<RequestId, Sequence*> sequences_;  // accepted and not finished
  std::vector<std::function<void()>> drained_;
  std::optional<QueuedStep> in_flight_;
  Instant now_;             // options_.clock(), once per turn and per step
  Instant last_delivered_;  // now_ of the last step
};

}  // namespace gla
