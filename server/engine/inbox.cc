#include "engine/inbox.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status_payload.h"

namespace gla {

absl::Status DrainingError() {
  return WithRetry(
      WithReason(absl::UnavailableError("the server drains and takes no new work"), "DRAINING"));
}

absl::StatusOr<RequestId> Inbox::Submit(std::unique_ptr<Sequence> sequence) {
  const int64_t tokens = sequence->queued_tokens;
  MutexLock lock(&mu_);
  if (!accepting_ || stopped_) {
    metrics_.Rejected("draining").Increment();
    return DrainingError();
  }
  if (num_requests_ >= limits_.max_requests) {
    metrics_.Rejected("queue_full").Increment();
    return WithRetry(WithReason(
        absl::ResourceExhaustedError(absl::StrCat("the queue is full: expected at most ",
                                                  limits_.max_requests, " requests in flight")),
        "QUEUE_FULL"));
  }
  if (tokens > limits_.max_tokens - num_tokens_) {
    metrics_.Rejected("tokens_full").Increment();
    return WithRetry(
        WithReason(absl::ResourceExhaustedError(absl::StrCat(
                       "the queue is full: expected at most ", limits_.max_tokens,
                       " waiting prompt tokens, got ", tokens, " beside ", num_tokens_)),
                   "TOKENS_FULL"));
  }
  ++num_requests_;
  num_tokens_ += tokens;
  const RequestId id = sequence->id = ++last_id_;
  messages_.emplace_back(std::move(sequence));
  arrived_.notify_one();
  return id;
}

void Inbox::Cancel(RequestId id) {
  MutexLock lock(&mu_);
  if (closed_) return;
  messages_.emplace_back(CancelMessage{id});
  arrived_.notify_one();
}

void Inbox::Post(EngineTask task) {
  {
    MutexLock lock(&mu_);
    if (!closed_) {
      messages_.emplace_back(std::move(task));
      arrived_.notify_one();
      return;
    }
  }
  task(DrainingError());
}

void Inbox::StopAccepting() {
  MutexLock lock(&mu_);
  accepting_ = false;
}

void Inbox::Stop() {
  MutexLock lock(&mu_);
  stopped_ = true;
  arrived_.notify_one();
}

std::vector<Message> Inbox::Take(Instant deadline) {
  MutexLock lock(&mu_);
  while (messages_.empty() && !stopped_ && std::chrono::steady_clock::now() < deadline) {
    arrived_.wait_until(mu_, deadline);
  }
  return std::exchange(messages_, {});
}

bool Inbox::accepting() const {
  MutexLock lock(&mu_);
  return accepting_;
}

bool Inbox::stopped() const {
  MutexLock lock(&mu_);
  return stopped_;
}

int Inbox::num_requests() const {
  MutexLock lock(&mu_);
  return num_requests_;
}

int64_t Inbox::num_tokens() const {
  MutexLock lock(&mu_);
  return num_tokens_;
}

void Inbox::RequestFinished() {
  MutexLock lock(&mu_);
  --num_requests_;
}

void Inbox::TokensAdmitted(int64_t tokens) {
  MutexLock lock(&mu_);
  num_tokens_ -= tokens;
}

std::vector<Message> Inbox::Close() {
  MutexLock lock(&mu_);
  stopped_ = closed_ = true;
  return std::exchange(messages_, {});
}

}  // namespace gla
