#include "service/call.h"

#include <chrono>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "service/context.h"
#include "service/status.h"

namespace gla {
namespace {

constexpr std::chrono::milliseconds kNear(50);

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

}  // namespace

Call::Call(ServiceContext& service, const char* method, grpc::CallbackServerContext* context)
    : service_(service), context_(context), method_(method), arrival_(absl::Now()) {}

void Call::Begin() { service_.calls.Add(this); }

grpc::Status Call::EndWith(const absl::Status& status, const FinishEvent* run) {
  end_ = status;
  if (absl::IsCancelled(status) && DeadlineIsNear()) {
    end_ = absl::DeadlineExceededError("the deadline passed while the request was running");
  }
  std::map<std::string, std::string> metadata;
  if (!request_id_.empty()) metadata["request_id"] = request_id_;
  if (run != nullptr) {
    run_ = *run;
    run_->status = end_;
    if (!run->session_id.empty()) {
      metadata["session_id"] = run->session_id;
      metadata["session_position"] = absl::StrCat(run->session_position);
    }
  }
  return ToGrpc(end_, context_, metadata);
}

bool Call::DeadlineIsNear() const {
  return context_->deadline() - std::chrono::system_clock::now() <= kNear;
}

void Call::LogRun(const std::string& message, const FinishEvent& run) const {
  service_.log.Info(message,
                    {{"id", request_id_},
                     {"method", method_},
                     {"code", CodeName(run.status.code())},
                     {"reason", run.status.ok() ? NameOf(run.reason) : ReasonOf(run.status)},
                     {"session", !run.session_id.empty()},
                     {"restored", run.tokens_restored},
                     {"prefilled", run.tokens_prefilled},
                     {"generated", run.tokens_generated},
                     {"queue_s", run.timings.queue},
                     {"prefill_s", run.timings.prefill},
                     {"decode_s", run.timings.decode},
                     {"ttft_s", run.timings.time_to_first_token},
                     {"total_s", run.timings.total}});
}

void Call::Conclude() {
  const double seconds = absl::ToDoubleSeconds(absl::Now() - arrival_);
  const std::string code = CodeName(end_.code());
  service_.metrics.CountRequest(method_, code, seconds);
  if (absl::IsInvalidArgument(end_)) {
    const bool too_long = ReasonOf(end_) == "PROMPT_TOO_LONG";
    service_.metrics.Rejected(too_long ? "prompt_too_long" : "invalid_argument").Increment();
  }
  if (run_.has_value()) {
    LogRun("request", *run_);
  } else {
    service_.log.Info("request", {{"id", request_id_},
                                  {"method", method_},
                                  {"code", code},
                                  {"reason", ReasonOf(end_)},
                                  {"total_s", seconds}});
  }
  service_.calls.Remove(this);
}

void CallRegistry::Add(Call* call) {
  MutexLock lock(&mu_);
  calls_.insert(call);
}

void CallRegistry::Remove(Call* call) {
  MutexLock lock(&mu_);
  calls_.erase(call);
  if (calls_.empty()) emptied_.notify_all();
}

void CallRegistry::Drain() {
  MutexLock lock(&mu_);
  draining_ = true;
  for (Call* call : calls_) call->Drain();
}

void CallRegistry::Abort() {
  MutexLock lock(&mu_);
  for (Call* call : calls_) call->Abort();
}

bool CallRegistry::WaitUntilEmpty(absl::Duration timeout) {
  const auto deadline = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(timeout);
  MutexLock lock(&mu_);
  while (!calls_.empty()) {
    if (emptied_.wait_until(mu_, deadline) == std::cv_status::timeout) return calls_.empty();
  }
  return true;
}

int CallRegistry::size() {
  MutexLock lock(&mu_);
  return static_cast<int>(calls_.size());
}

void UnaryCall::Answer(const absl::Status& status, const FinishEvent* run) {
  const grpc::Status wire = EndWith(status, run);
  HandToGrpc(this);
  Finish(wire);
}

void UnaryCall::OnDone() {
  BackFromGrpc(this);
  Conclude();
  delete this;
}

}  // namespace gla
