#include "service/converse_reactor.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "service/convert.h"
#include "service/status.h"

namespace gla {
namespace {

absl::Status Draining() {
  return WithReason(absl::UnavailableError("the server is shutting down"), "DRAINING");
}

}  // namespace

grpc::ServerBidiReactor<v1::ConverseRequest, v1::ConverseResponse>* ConverseReactor::Start(
    ServiceContext& service, grpc::CallbackServerContext* context) {
  auto* reactor = new ConverseReactor(service, context);
  reactor->request_id_ = absl::StrCat("c-", RandomSource::Hex(8));
  context->AddInitialMetadata("x-request-id", reactor->request_id_);
  reactor->Begin();
  const absl::StatusOr<const Serving*> serving = service.Ready();
  reactor->mu_.lock();
  if (serving.ok()) {
    reactor->serving_ = *serving;
  } else {
    reactor->EndStream(serving.status());
  }
  // After Begin(): a drain either found this call in the registry or is seen here.
  if (service.calls.draining()) reactor->EndStream(Draining());
  reactor->Advance();
  return reactor;
}

void ConverseReactor::Drain() {
  mu_.lock();
  draining_ = true;
  Advance();
}

void ConverseReactor::OnToken(const TokenEvent& event) {
  mu_.lock();
  Append(event, Output());
  Advance();
}

void ConverseReactor::OnFinish(const FinishEvent& event) {
  mu_.lock();
  running_ = false;
  id_.reset();
  wants_cancel_ = false;
  const bool cancelled = std::exchange(client_cancelled_turn_, false);
  if (event.status.ok() || (absl::IsCancelled(event.status) && cancelled && !ended_)) {
    SetFinish(event, Output());
    turn_to_log_ = event;
  } else {
    EndStream(event.status, &event);
  }
  Advance();
}

void ConverseReactor::OnReadDone(bool ok) {
  BackFromGrpc(this);
  mu_.lock();
  read_out_ = false;
  if (!ok) {
    half_closed_ = true;
  } else if (!ended_) {
    OnMessage();
  }
  Advance();
}

void ConverseReactor::OnMessage() {
  switch (in_.message_case()) {
    case v1::ConverseRequest::kOpen:
      if (!session_id_.empty()) {
        return EndStream(FieldError("open", "expected once, first in the stream; got a second"));
      }
      open_ = std::move(*in_.mutable_open());
      wants_open_ = opening_ = true;
      return;
    case v1::ConverseRequest::kTurn:
      if (session_id_.empty()) {
        return EndStream(FieldError("turn", "expected open first in the stream, got a turn"));
      }
      if (running_) {
        return EndStream(FieldError("turn", "expected after the finish of the last, which runs"));
      }
      turn_ = std::move(*in_.mutable_turn());
      return;
    case v1::ConverseRequest::kCancel:
      // When nothing runs, the turn ended while the message was on its way.
      if (running_) wants_cancel_ = client_cancelled_turn_ = true;
      return;
    case v1::ConverseRequest::MESSAGE_NOT_SET:
      return EndStream(FieldError("message", "expected open, turn or cancel, got none"));
  }
}

void ConverseReactor::OnWriteDone(bool ok) {
  BackFromGrpc(this);
  std::optional<FinishEvent> turn;
  {
    MutexLock lock(&mu_);
    if (outbox_.empty()) turn.swap(turn_to_log_);
  }
  if (turn.has_value()) LogRun("turn", *turn);
  mu_.lock();
  write_out_ = false;
  broken_ = broken_ || !ok;
  Advance();
}

void ConverseReactor::OnCancel() {
  BackFromGrpc(this);
  mu_.lock();
  EndStream(absl::CancelledError("the client cancelled the stream or went away"));
  if (DeadlineIsNear()) wants_cancel_ = false;
  Advance();
}

void ConverseReactor::OnDone() {
  BackFromGrpc(this);
  std::string session;
  const Serving* serving = nullptr;
  {
    MutexLock lock(&mu_);
    if (delete_session_) session = session_id_;
    serving = serving_;
    if (turn_to_log_.has_value()) LogRun("turn", *turn_to_log_);
  }
  if (!session.empty()) serving->engine.DeleteSession(session, [](const absl::Status&) {});
  Conclude();
  delete this;
}

void ConverseReactor::EndStream(const absl::Status& status, const FinishEvent* run) {
  if (ended_) return;
  ended_ = true;
  wire_status_ = EndWith(status, run);
  turn_.reset();
  wants_open_ = false;
  if (running_) wants_cancel_ = true;
}

v1::GenerateResponse* ConverseReactor::Output() {
  if (outbox_.empty() || !outbox_.back().has_output()) outbox_.emplace_back();
  return outbox_.back().mutable_output();
}

void ConverseReactor::Advance() {
  if (acting_) return mu_.unlock();  // that thread will see what has been noted
  acting_ = true;
  while (true) {
    const Action action = PickAction();
    if (action == Action::kNothing) break;
    mu_.unlock();
    Do(action);
    if (action == Action::kFinish) return;  // the reactor may be gone; nobody acts after Finish
    mu_.lock();
  }
  acting_ = false;
  mu_.unlock();
}

ConverseReactor::Action ConverseReactor::PickAction() {
  if (wants_cancel_ && id_.has_value()) {
    wants_cancel_ = false;
    return Action::kCancelTurn;
  }
  if (!ended_ && draining_ && idle()) EndStream(Draining());
  if (!ended_ && half_closed_ && idle()) EndStream(absl::OkStatus());
  if (broken_) outbox_.clear();
  if (!outbox_.empty() && !write_out_) {
    write_out_ = true;
    out_ = std::move(outbox_.front());
    outbox_.pop_front();
    return Action::kWrite;
  }
  if (ended_) {
    const bool busy = write_out_ || running_ || opening_;
    return busy ? Action::kNothing : Action::kFinish;
  }
  if (wants_open_) {
    wants_open_ = false;
    return Action::kOpen;
  }
  if (turn_.has_value() && outbox_.empty() && !write_out_) {
    running_ = true;
    return Action::kSubmit;
  }
  if (!read_out_ && !half_closed_ && !opening_ && !turn_.has_value()) {
    read_out_ = true;
    return Action::kRead;
  }
  return Action::kNothing;
}

void ConverseReactor::Do(Action action) {
  switch (action) {
    case Action::kNothing:
      return;
    case Action::kRead:
      HandToGrpc(this);
      return StartRead(&in_);
    case Action::kWrite:
      HandToGrpc(this);
      return StartWrite(&out_);
    case Action::kOpen:
      return OpenSession();
    case Action::kSubmit:
      return SubmitTurn();
    case Action::kCancelTurn:
      return CancelTurn();
    case Action::kFinish:
      HandToGrpc(this);
      return Finish(wire_status_);
  }
}

void ConverseReactor::OpenSession() {
  const Serving* serving = nullptr;
  v1::ConverseOpen open;
  {
    MutexLock lock(&mu_);
    serving = serving_;
    open = open_;
  }
  const auto on_opened = [this](absl::StatusOr<SessionInfo> info) {
    mu_.lock();
    opening_ = false;
    if (info.ok()) {
      session_id_ = info->id;
      delete_session_ = open_.session_id().empty() && !open_.keep();
      *outbox_.emplace_back().mutable_opened() = ToProto(*info);
    } else {
      EndStream(info.status());
    }
    Advance();
  };
  absl::Status status = CheckModel(open.model(), *serving);
  if (status.ok() && !open.session_id().empty()) status = CheckSessionId(open.session_id());
  if (!status.ok()) {
    on_opened(status);
  } else if (open.session_id().empty()) {
    serving->engine.CreateSession(RandomSource::Hex(16), std::nullopt, on_opened);
  } else {
    serving->engine.GetSession(open.session_id(), on_opened);
  }
}

void ConverseReactor::SubmitTurn() {
  v1::GenerateRequest request;
  const Serving* serving = nullptr;
  {
    MutexLock lock(&mu_);
    serving = serving_;
    request = ToRequest(std::move(*turn_), open_, session_id_);
    turn_.reset();
  }
  const auto submit = [&]() -> absl::StatusOr<RequestId> {
    GLA_ASSIGN_OR_RETURN(GenerateParams params, ToParams(request, *serving, service_.random));
    params.deadline = absl::FromChrono(context_->deadline());
    params.request_id = request_id_;
    return serving->engine.Submit(std::move(params), this);
  };
  const absl::StatusOr<RequestId> id = submit();
  MutexLock lock(&mu_);
  if (id.ok()) {
    if (running_) id_ = *id;  // else it has finished already
  } else {
    running_ = false;
    EndStream(id.status());
  }
}

void ConverseReactor::CancelTurn() {
  std::optional<RequestId> id;
  const Serving* serving = nullptr;
  {
    MutexLock lock(&mu_);
    id = id_;
    serving = serving_;
  }
  if (id.has_value()) serving->engine.Cancel(*id);
}

}  // namespace gla
