// One Converse call: a session over one stream, turn after turn.
//
// Reads, writes, the engine's events and a drain come from different threads and may overlap. Each
// of them notes what happened under the lock and then calls Advance(), where one thread at a time
// does whatever comes next; so Finish, the last touch, never runs beside another operation's start.
#pragma once

#include <grpcpp/grpcpp.h>

#include <deque>
#include <optional>
#include <string>

#include "gla/v1/inference.grpc.pb.h"
#include "service/call.h"
#include "service/context.h"

namespace gla {

class ConverseReactor final
    : public grpc::ServerBidiReactor<v1::ConverseRequest, v1::ConverseResponse>,
      public TokenSink,
      public Call {
 public:
  // Owns itself from here on.
  static grpc::ServerBidiReactor<v1::ConverseRequest, v1::ConverseResponse>* Start(
      ServiceContext& service, grpc::CallbackServerContext* context);

  void Drain() override;

 private:
  enum class Action { kNothing, kRead, kWrite, kOpen, kSubmit, kCancelTurn, kFinish };

  ConverseReactor(ServiceContext& service, grpc::CallbackServerContext* context)
      : Call(service, "Converse", context) {}

  // The engine's thread.
  void OnToken(const TokenEvent& event) override;
  void OnFinish(const FinishEvent& event) override;
  // gRPC's threads.
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  // Enters with the lock and leaves without it.
  void Advance() ABSL_UNLOCK_FUNCTION(mu_);
  Action PickAction() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Do(Action action) ABSL_LOCKS_EXCLUDED(mu_);
  void OpenSession() ABSL_LOCKS_EXCLUDED(mu_);
  void SubmitTurn() ABSL_LOCKS_EXCLUDED(mu_);
  void CancelTurn() ABSL_LOCKS_EXCLUDED(mu_);

  void OnMessage() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The stream ends with this status once nothing runs; the first one counts.
  void EndStream(const absl::Status& status, const FinishEvent* run = nullptr)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The message that the next token or finish belongs to.
  v1::GenerateResponse* Output() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !opening_ && !running_ && !turn_.has_value() && outbox_.empty() && !write_out_;
  }

  v1::ConverseRequest in_;    // gRPC's while a read is out
  v1::ConverseResponse out_;  // gRPC's while a write is out
  grpc::Status wire_status_;

  Mutex mu_;
  bool acting_ ABSL_GUARDED_BY(mu_) = false;  // a thread is in Advance
  const Serving* serving_ ABSL_GUARDED_BY(mu_) = nullptr;
  v1::ConverseOpen open_ ABSL_GUARDED_BY(mu_);
  std::string session_id_ ABSL_GUARDED_BY(mu_);  // empty until the session is open
  bool delete_session_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<v1::ConverseResponse> outbox_ ABSL_GUARDED_BY(mu_);
  std::optional<v1::ConverseTurn> turn_ ABSL_GUARDED_BY(mu_);  // the next one, not yet submitted
  std::optional<FinishEvent> turn_to_log_ ABSL_GUARDED_BY(mu_);
  std::optional<RequestId> id_ ABSL_GUARDED_BY(mu_);  // of the running turn
  bool wants_open_ ABSL_GUARDED_BY(mu_) = false;      // open_ came and is not yet acted on
  bool opening_ ABSL_GUARDED_BY(mu_) = false;         // from then until the engine answered
  bool running_ ABSL_GUARDED_BY(mu_) = false;
  bool wants_cancel_ ABSL_GUARDED_BY(mu_) = false;  // the turn is to be cancelled
  bool client_cancelled_turn_ ABSL_GUARDED_BY(mu_) = false;
  bool read_out_ ABSL_GUARDED_BY(mu_) = false;
  bool write_out_ ABSL_GUARDED_BY(mu_) = false;
  bool half_closed_ ABSL_GUARDED_BY(mu_) = false;  // the client sends no more
  bool broken_ ABSL_GUARDED_BY(mu_) = false;       // a write failed: the client is gone
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;  // wire_status_ is set
};

}  // namespace gla
