// One RPC in flight: known to the registry while it lives, counted and logged at its end.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <condition_variable>
#include <optional>
#include <string>
#include <unordered_set>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "engine/engine.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace gla {

struct ServiceContext;

// gRPC's own synchronisation is invisible to ThreadSanitizer. So a reactor says when it hands
// itself to gRPC (before every Start... and Finish) and when gRPC hands it back (first thing in
// every On...).
#if defined(__SANITIZE_THREAD__)
inline void HandToGrpc(void* reactor) { __tsan_release(reactor); }
inline void BackFromGrpc(void* reactor) { __tsan_acquire(reactor); }
#else
inline void HandToGrpc(void* /*reactor*/) {}
inline void BackFromGrpc(void* /*reactor*/) {}
#endif

// The part that all reactors share. A reactor calls Begin() when it is constructed, EndWith() once
// before its Finish, and Conclude() in OnDone before it deletes itself.
class Call {
 public:
  // `method` is a literal: the RPC's short name.
  Call(ServiceContext& service, const char* method, grpc::CallbackServerContext* context);
  virtual ~Call() = default;
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // The server drains: a call that waits for its client's next message ends; running work goes on.
  virtual void Drain() {}
  // Cancels the call, whatever it waits for.
  void Abort() { context_->TryCancel(); }

 protected:
  void Begin();
  void Conclude();

  // Notes how the call ends and gives the status for the wire. `run` is what the engine did for it.
  grpc::Status EndWith(const absl::Status& status, const FinishEvent* run = nullptr);
  // A client whose deadline passes cancels the call, a moment before our own clock says so: then
  // the engine is left to end the request by its deadline, and the metrics tell the truth.
  bool DeadlineIsNear() const;
  // One line about a generation or scoring that ended: a "request", or a "turn" of one.
  void LogRun(const std::string& message, const FinishEvent& run) const;

  ServiceContext& service_;
  grpc::CallbackServerContext* const context_;
  std::string request_id_;

 private:
  const char* const method_;
  const absl::Time arrival_;
  absl::Status end_ = absl::UnknownError("");
  std::optional<FinishEvent> run_;
};

// Every call in flight, so that a shutdown can end each of them: grpc::Server::Shutdown() waits for
// reactors that nobody finishes, for ever. Thread-safe.
class CallRegistry {
 public:
  void Add(Call* call);
  void Remove(Call* call);

  // Tells every call, and makes draining() true for the calls to come.
  void Drain();
  bool draining() const { return draining_; }
  // Cancels every call.
  void Abort();
  // False when some were left after `timeout`.
  bool WaitUntilEmpty(absl::Duration timeout);
  int size();

 private:
  Mutex mu_;
  std::condition_variable_any emptied_;
  std::unordered_set<Call*> calls_ ABSL_GUARDED_BY(mu_);
  std::atomic<bool> draining_ = false;
};

// A unary RPC's reactor: answers when Answer() is called, at once or later, from any thread.
class UnaryCall : public grpc::ServerUnaryReactor, public Call {
 public:
  UnaryCall(ServiceContext& service, const char* method, grpc::CallbackServerContext* context)
      : Call(service, method, context) {
    Begin();
  }

  // Once; the last touch of this object and of the response.
  void Answer(const absl::Status& status, const FinishEvent* run = nullptr);

 private:
  void OnDone() final;
};

}  // namespace gla
