#include "engine/core.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "engine/status_payload.h"

namespace gla {
namespace {

constexpr int kTile = 64;  // see SchedulerOptions::align_chunks
constexpr auto kIdleSleep = std::chrono::seconds(1);
constexpr auto kCancelledByDeadline = std::chrono::milliseconds(20);

bool AlignsChunks(const Model& model) {
  return model.options().prefill_form == PrefillForm::kChunkwise;
}

// A state that is rounded whenever it rests shows where it did.
bool KeepsChunksWhole(const Model& model) {
  return model.options().state_format != StateFormat::kFloat32;
}

absl::Status CheckRange(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": expected ", low, " .. ", high, ", got ", value));
}

absl::Status CheckOptions(const EngineOptions& options, const Model& model) {
  const ModelOptions& limits = model.options();
  // With aligned chunks a prompt gets on only by whole tiles.
  const int extra = AlignsChunks(model) ? kTile - 1 : 0;
  constexpr int64_t kAny = INT64_MAX;
  GLA_RETURN_IF_ERROR(CheckRange("max_num_seqs", options.max_num_seqs, 1, limits.max_seqs));
  GLA_RETURN_IF_ERROR(CheckRange("max_num_batched_tokens", options.max_num_batched_tokens,
                                 options.max_num_seqs + extra, limits.max_rows));
  const int64_t most_chunk =
      KeepsChunksWhole(model) ? options.max_num_batched_tokens - options.max_num_seqs : kAny;
  GLA_RETURN_IF_ERROR(
      CheckRange("max_prefill_chunk", options.max_prefill_chunk, 1 + extra, most_chunk));
  GLA_RETURN_IF_ERROR(CheckRange("the model's max_logit_rows", limits.max_logit_rows,
                                 options.max_num_seqs + extra, kAny));
  GLA_RETURN_IF_ERROR(CheckRange("max_queued_requests", options.max_queued_requests, 0, kAny));
  return CheckRange("state slots", options.num_slots, options.max_num_seqs + 1, kAny);
}

Inbox::Limits LimitsOf(const EngineOptions& options) {
  return {.max_requests = options.max_num_seqs + options.max_queued_requests,
          .max_tokens = options.max_queued_tokens};
}

SchedulerOptions SchedulingOf(const EngineOptions& options, const Model& model) {
  return {.max_num_seqs = options.max_num_seqs,
          .max_num_batched_tokens = options.max_num_batched_tokens,
          .max_prefill_chunk = options.max_prefill_chunk,
          .max_logit_rows = model.options().max_logit_rows,
          .align_chunks = AlignsChunks(model),
          .whole_chunks = KeepsChunksWhole(model)};
}

// A wall-clock deadline as an instant: it is read once, so that later jumps do not matter.
Instant ToInstant(absl::Time deadline, Instant now) {
  const absl::Duration left = deadline - absl::Now();
  if (left > absl::Hours(24 * 365)) return Instant::max();
  return now + absl::ToChronoNanoseconds(std::max(left, absl::ZeroDuration()));
}

const char* NameOf(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength:
      return "length";
    case FinishReason::kEos:
      return "eos";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kDeadline:
      return "deadline";
    case FinishReason::kError:
      return "error";
  }
  return "error";
}

std::string Progress(const Sequence& sequence) {
  if (sequence.is_queued()) return "while the request waited in the queue";
  if (sequence.is_prefill()) {
    return absl::StrCat("after ", sequence.consumed, " of ", sequence.prompt_rows(),
                        " prompt tokens");
  }
  return absl::StrCat("after ", sequence.num_generated, " generated tokens");
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine::Core>> Engine::Core::Create(Device& device, Model& model,
                                                                   const Tokenizer& tokenizer,
                                                                   Metrics& metrics,
                                                                   const EngineOptions& options) {
  GLA_RETURN_IF_ERROR(CheckOptions(options, model));
  GLA_ASSIGN_OR_RETURN(auto sampler,
                       Sampler::Create(device, {.max_jobs = options.max_num_seqs,
                                                .max_logit_rows = model.options().max_logit_rows,
                                                .max_step_rows = options.max_num_batched_tokens,
                                                .vocab = model.config().vocab_size}));
  GLA_ASSIGN_OR_RETURN(auto pool, StatePool::Create(device, options.num_slots, model.state_bytes(),
                                                    options.poison_freed_slots));
  model.Record(pool->states());
  metrics.slots_total.Set(static_cast<double>(pool->num_slots()));
  metrics.state_bytes_per_session.Set(static_cast<double>(model.state_bytes()));
  return std::unique_ptr<Core>(
      new Core(device, model, tokenizer, metrics, options, std::move(pool), std::move(sampler)));
}

Engine::Core::Core(Device& device, Model& model, const Tokenizer& tokenizer, Metrics& metrics,
                   const EngineOptions& options, std::unique_ptr<StatePool> pool,
                   std::unique_ptr<Sampler> sampler)
    : device_(device),
      model_(model),
      tokenizer_(tokenizer),
      metrics_(metrics),
      options_(options),
      end_tokens_(model.config().eos_token_ids),
      inbox_(LimitsOf(options), metrics),
      pool_(std::move(pool)),
      sampler_(std::move(sampler)),
      sessions_(capacity_sessions(), options.default_session_ttl_seconds, model.state_bytes()),
      scheduler_(SchedulingOf(options, model)),
      now_(options.clock()) {
  if (end_tokens_.empty() && tokenizer.eos_token_id() >= 0) {
    end_tokens_.push_back(tokenizer.eos_token_id());
  }
  Beat();
}

// ---- The thread ---------------------------------------------------------------------------------

void Engine::Core::Run() {
  thread_id_ = std::this_thread::get_id();
  while (TakeInbox()) {
    const std::optional<QueuedStep> last = std::exchange(in_flight_, std::nullopt);
    if (last.has_value() && (!options_.run_ahead || scheduler_.waits_for_tokens())) {
      Deliver(*last);
      continue;
    }
    // The device goes on while the last step's tokens are delivered.
    Step step = scheduler_.Plan();
    if (!step.is_empty()) in_flight_ = Queue(std::move(step));
    if (last.has_value()) Deliver(*last);
  }
}

bool Engine::Core::TakeInbox() {
  for (;;) {
    Beat();
    const bool is_idle = scheduler_.is_empty() && !in_flight_.has_value();
    std::vector<Message> messages =
        inbox_.Take(is_idle ? std::chrono::steady_clock::now() + kIdleSleep : Instant::min());
    now_ = options_.clock();
    ExpireSessions();
    for (Message& message : messages) Handle(std::move(message));
    if (inbox_.stopped()) {
      EndEverything();
      return false;
    }
    EndOverdue();
    Admit();
    UpdateGauges();
    if (scheduler_.num_running() > 0 || in_flight_.has_value()) return true;
    TellDrained();
  }
}

void Engine::Core::Start() {
  if (!thread_.joinable()) thread_ = std::thread([this] { Run(); });
}

void Engine::Core::Stop() {
  inbox_.Stop();
  if (std::this_thread::get_id() == thread_id_.load()) return;  // the next turn is the last
  std::call_once(stopped_, [this] {
    if (thread_.joinable()) {
      thread_.join();
    } else {
      EndEverything();
    }
  });
}

void Engine::Core::Beat() {
  heartbeat_.store(std::chrono::steady_clock::now().time_since_epoch().count(),
                   std::memory_order_relaxed);
}

double Engine::Core::heartbeat_age_seconds() const {
  const Instant last{Instant::duration(heartbeat_.load(std::memory_order_relaxed))};
  return SecondsBetween(last, std::chrono::steady_clock::now());
}

// ---- Messages -----------------------------------------------------------------------------------

absl::StatusOr<RequestId> Engine::Core::Submit(GenerateParams params, bool is_score,
                                               TokenSink* sink) {
  const size_t least = is_score ? 2 : 1;
  const int64_t num_tokens =
      static_cast<int64_t>(params.prompt.size()) + (params.bos_if_start.has_value() ? 1 : 0);
  if (params.prompt.size() < least) {
    return absl::InvalidArgumentError(
        absl::StrCat("prompt: expected at least ", least, " tokens, got ", params.prompt.size()));
  }
  if (num_tokens > options_.max_queued_tokens) {  // a retry would not help
    return WithReason(
        absl::InvalidArgumentError(absl::StrCat(
            "prompt: expected at most ", options_.max_queued_tokens,
            " tokens with its begin token (--max-num-queued-tokens), got ", num_tokens)),
        "PROMPT_TOO_LONG");
  }
  auto sequence = std::make_unique<Sequence>(std::move(params), is_score, tokenizer_, sink);
  sequence->arrival = options_.clock();
  sequence->deadline = ToInstant(sequence->params.deadline, sequence->arrival);
  sequence->queued_tokens = num_tokens;
  sequence->adjustments.AddPrompt(sequence->params.prompt);
  return inbox_.Submit(std::move(sequence));
}

void Engine::Core::Handle(Message message) {
  if (auto* sequence = std::get_if<std::unique_ptr<Sequence>>(&message)) {
    Accept(std::move(*sequence));
  } else if (auto* cancel = std::get_if<CancelMessage>(&message)) {
    Cancel(cancel->id);
  } else {
    std::get<EngineTask>(message)(absl::OkStatus());
  }
}

void Engine::Core::Accept(std::unique_ptr<Sequence> owned) {
  Sequence& sequence = *owned;
  sequences_[sequence.id] = &sequence;
  scheduler_.Enqueue(std::move(owned));
  absl::Status status = OpenSession(sequence);
  if (!status.ok()) Finish(sequence, FinishReason::kError, std::move(status));
}

absl::Status Engine::Core::OpenSession(Sequence& sequence) {
  GenerateParams& params = sequence.params;
  if (!params.session_id.empty()) {
    GLA_ASSIGN_OR_RETURN(Session * session, sessions_.Find(params.session_id));
    GLA_RETURN_IF_ERROR(sessions_.Open(*session, params.expected_position, sequence));
    sequence.session = session;
    sequence.start_position = session->position;
  }
  if (params.bos_if_start.has_value() && sequence.start_position == 0) {
    params.prompt.insert(params.prompt.begin(), *params.bos_if_start);
    sequence.adjustments.AddPrompt({*params.bos_if_start});
  }
  return absl::OkStatus();
}

void Engine::Core::Cancel(RequestId id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) return;
  Sequence& sequence = *it->second;
  // A client whose deadline passes cancels the call itself, a little before the deadline as it is
  // known here.
  const bool is_overdue = now_ + kCancelledByDeadline >= sequence.deadline;
  Abort(sequence, is_overdue ? FinishReason::kDeadline : FinishReason::kCancelled);
}

void Engine::Core::EndOverdue() {
  for (Sequence* sequence : scheduler_.All()) {
    if (now_ >= sequence->deadline) Abort(*sequence, FinishReason::kDeadline);
  }
}

void Engine::Core::Abort(Sequence& sequence, FinishReason reason) {
  // One whose tokens are all made ends in the next step as it would have anyway.
  if (sequence.end.has_value() || sequence.aborted.has_value()) return;
  if (sequence.session != nullptr && sequence.is_in_flight()) {
    sequence.aborted = reason;
  } else {
    FinishAborted(sequence, reason);
  }
}

void Engine::Core::FinishAborted(Sequence& sequence, FinishReason reason) {
  const std::string progress = Progress(sequence);
  Finish(sequence, reason,
         reason == FinishReason::kDeadline
             ? absl::DeadlineExceededError(absl::StrCat("deadline passed ", progress))
             : absl::CancelledError(absl::StrCat("cancelled ", progress)));
}

void Engine::Core::Admit() {
  while (Sequence* sequence = scheduler_.AdmitNext()) {
    sequence->slot = pool_->Acquire();  // num_slots > max_num_seqs + sessions: there is one
    sequence->scheduled = now_;
    inbox_.TokensAdmitted(sequence->queued_tokens);
    metrics_.queue_time_seconds.Observe(SecondsBetween(sequence->arrival, now_));
    metrics_.restored_tokens_total.Increment(static_cast<double>(sequence->start_position));
  }
}

void Engine::Core::EndEverything() {
  const absl::Status error =
      WithReason(absl::UnavailableError("the server shuts down"), "DRAINING");
  for (Message& message : inbox_.Close()) {
    if (auto* sequence = std::get_if<std::unique_ptr<Sequence>>(&message)) {
      scheduler_.Enqueue(std::move(*sequence));
    } else if (auto* task = std::get_if<EngineTask>(&message)) {
      (*task)(error);
    }
  }
  for (Sequence* sequence : scheduler_.All()) Finish(*sequence, FinishReason::kError, error);
  metrics_.SessionsEnded("drained").Increment(static_cast<double>(sessions_.size()));
  TellDrained();
}

void Engine::Core::TellDrained() {
  if (inbox_.accepting() || inbox_.num_requests() > 0) return;
  for (const auto& drained : std::exchange(drained_, {})) drained();
}

// ---- The end of a request -----------------------------------------------------------------------

void Engine::Core::Finish(Sequence& sequence, FinishReason reason, absl::Status status) {
  const std::unique_ptr<Sequence> owned = scheduler_.Remove(sequence);
  sequences_.erase(sequence.id);
  if (sequence.is_queued()) inbox_.TokensAdmitted(sequence.queued_tokens);
  if (sequence.session != nullptr) CloseSession(sequence, reason != FinishReason::kError);
  sequence.slot.Release();
  inbox_.RequestFinished();
  metrics_.Finished(NameOf(reason)).Increment();
  if (sequence.num_generated > 0) {
    metrics_.decode_time_seconds.Observe(
        SecondsBetween(sequence.first_token_at, sequence.last_token_at));
  }
  UpdateGauges();
  sequence.sink->OnFinish(MakeFinishEvent(sequence, reason, std::move(status)));
}

void Engine::Core::CloseSession(Sequence& sequence, bool keeps_state) {
  Session& session = *sequence.session;
  // What is still in flight is not judged: only a session that is deleted meanwhile has any.
  if (keeps_state && sequence.consumed > 0 && !sequence.is_in_flight()) {
    session.position = sequence.position();
    session.slot = std::move(sequence.slot);
  }
  sessions_.Close(session, now_);
}

FinishEvent Engine::Core::MakeFinishEvent(Sequence& sequence, FinishReason reason,
                                          absl::Status status) const {
  FinishEvent event;
  event.status = std::move(status);
  event.reason = reason;
  if (const std::string* stop = sequence.text.matched()) {
    event.stop_sequence = *stop;
  } else {
    event.text = sequence.text.Finish();
  }
  event.tokens_restored = sequence.start_position;
  event.tokens_prefilled = std::min(sequence.consumed, sequence.prompt_rows());
  event.tokens_generated = sequence.num_generated;
  event.session_id = sequence.params.session_id;
  event.session_position = sequence.session != nullptr ? sequence.session->position : 0;
  event.seed = sequence.params.sampling.seed;
  event.timings = sequence.TimingsAt(now_);
  event.score_logprobs = std::move(sequence.score_logprobs);
  return event;
}

// ---- Sessions -----------------------------------------------------------------------------------

absl::StatusOr<SessionInfo> Engine::Core::CreateSession(const std::string& id,
                                                        std::optional<int64_t> ttl_seconds) {
  if (!inbox_.accepting()) {
    metrics_.Rejected("draining").Increment();
    return DrainingError();
  }
  const absl::StatusOr<Session*> session = sessions_.Create(id, ttl_seconds, now_);
  if (absl::IsResourceExhausted(session.status())) metrics_.Rejected("sessions_full").Increment();
  GLA_RETURN_IF_ERROR(session.status());
  metrics_.sessions_created_total.Increment();
  UpdateGauges();
  return sessions_.Describe(**session, now_);
}

absl::StatusOr<SessionInfo> Engine::Core::GetSession(const std::string& id) {
  GLA_ASSIGN_OR_RETURN(const Session* session, sessions_.Find(id));
  return sessions_.Describe(*session, now_);
}

absl::Status Engine::Core::DeleteSession(const std::string& id) {
  GLA_ASSIGN_OR_RETURN(Session * session, sessions_.Find(id));
  if (session->writer != nullptr) {
    Finish(*session->writer, FinishReason::kCancelled,
           absl::CancelledError(absl::StrCat("session \"", id, "\" was deleted")));
  }
  sessions_.Erase(*session);
  metrics_.SessionsEnded("deleted").Increment();
  UpdateGauges();
  return absl::OkStatus();
}

std::vector<SessionInfo> Engine::Core::ListSessions() { return sessions_.List(now_); }

void Engine::Core::ExpireSessions() {
  const int count = sessions_.Expire(now_);
  if (count > 0) metrics_.SessionsEnded("expired").Increment(count);
}

void Engine::Core::UpdateGauges() {
  const int running = scheduler_.num_running();
  metrics_.requests_running.Set(running);
  metrics_.requests_queued.Set(scheduler_.num_waiting());
  metrics_.queued_tokens.Set(static_cast<double>(inbox_.num_tokens()));
  metrics_.slots_used.Set(static_cast<double>(pool_->num_used()));
  metrics_.slots_pinned.Set(static_cast<double>(pool_->num_used() - running));
  metrics_.sessions_device.Set(static_cast<double>(sessions_.size()));
  num_sessions_.store(sessions_.size(), std::memory_order_relaxed);
}

}  // namespace gla
