#include "service/generate_reactor.h"

#include <utility>

#include "absl/time/time.h"
#include "base/status_macros.h"
#include "service/convert.h"

namespace gla {

grpc::ServerWriteReactor<v1::GenerateResponse>* GenerateReactor::Start(
    ServiceContext& service, grpc::CallbackServerContext* context,
    const v1::GenerateRequest& request) {
  auto* reactor = new GenerateReactor(service, context);
  reactor->Begin();
  const absl::Status status = reactor->Submit(request);
  if (!status.ok()) {
    const grpc::Status wire = reactor->EndWith(status);
    HandToGrpc(reactor);
    reactor->Finish(wire);
  }
  return reactor;
}

absl::Status GenerateReactor::Submit(const v1::GenerateRequest& request) {
  GLA_ASSIGN_OR_RETURN(serving_, service_.Ready());
  GLA_ASSIGN_OR_RETURN(GenerateParams params, ToParams(request, *serving_, service_.random));
  params.deadline = absl::FromChrono(context_->deadline());
  request_id_ = params.request_id;
  report_prefill_ = request.report_prefill();
  context_->AddInitialMetadata("x-request-id", request_id_);
  // Tokens may come before Submit returns; the lock makes OnCancel see the id.
  GLA_ASSIGN_OR_RETURN(const RequestId id, serving_->engine.Submit(std::move(params), this));
  MutexLock lock(&mu_);
  id_ = id;
  return absl::OkStatus();
}

void GenerateReactor::OnPrefill(int64_t done, int64_t total) {
  if (!report_prefill_) return;
  Next next;
  {
    MutexLock lock(&mu_);
    pending_.mutable_prefill()->set_tokens_done(done);
    pending_.mutable_prefill()->set_tokens_total(total);
    has_pending_ = true;
    next = PickNext();
  }
  if (next != Next::kNothing) Do(next);  // else the reactor may be gone already
}

void GenerateReactor::OnToken(const TokenEvent& event) {
  Next next;
  {
    MutexLock lock(&mu_);
    pending_.clear_prefill();
    Append(event, &pending_);
    has_pending_ = true;
    next = PickNext();
  }
  if (next != Next::kNothing) Do(next);  // else the reactor may be gone already
}

void GenerateReactor::OnFinish(const FinishEvent& event) {
  status_ = EndWith(event.status, &event);
  Next next;
  {
    MutexLock lock(&mu_);
    if (event.status.ok()) {
      SetFinish(event, &pending_);
      has_pending_ = true;
    }
    ended_ = true;
    next = PickNext();
  }
  if (next != Next::kNothing) Do(next);  // else the reactor may be gone already
}

void GenerateReactor::OnWriteDone(bool ok) {
  BackFromGrpc(this);
  Next next;
  {
    MutexLock lock(&mu_);
    write_out_ = false;
    broken_ = broken_ || !ok;
    next = PickNext();
  }
  if (next != Next::kNothing) Do(next);  // else the reactor may be gone already
}

void GenerateReactor::OnCancel() {
  BackFromGrpc(this);
  std::optional<RequestId> id;
  {
    MutexLock lock(&mu_);
    id = id_;
  }
  if (id.has_value() && !DeadlineIsNear()) serving_->engine.Cancel(*id);
}

void GenerateReactor::OnDone() {
  BackFromGrpc(this);
  Conclude();
  delete this;
}

GenerateReactor::Next GenerateReactor::PickNext() {
  if (write_out_) return Next::kNothing;
  const bool has_message = has_pending_ && !broken_;
  if (!has_message) return ended_ ? Next::kFinish : Next::kNothing;
  write_out_ = true;
  has_pending_ = false;
  out_.Clear();
  out_.Swap(&pending_);
  return ended_ ? Next::kWriteLast : Next::kWrite;
}

void GenerateReactor::Do(Next next) {
  HandToGrpc(this);
  switch (next) {
    case Next::kNothing:
      break;
    case Next::kWrite:
      StartWrite(&out_);
      break;
    case Next::kWriteLast:
      StartWriteAndFinish(&out_, grpc::WriteOptions(), status_);
      break;
    case Next::kFinish:
      Finish(status_);
      break;
  }
}

}  // namespace gla
