// One Generate call: tokens in from the engine thread, messages out over gRPC.
//
// While a write is out, tokens pile into one pending message (at most max_new_tokens of them), so a
// slow client gets fewer, larger messages and the engine never waits. Every entry decides under the
// lock what comes next and acts after it; Finish is the last touch, for OnDone may delete the
// reactor on another thread before Finish returns.
#pragma once

#include <grpcpp/grpcpp.h>

#include <optional>

#include "gla/v1/inference.grpc.pb.h"
#include "service/call.h"
#include "service/context.h"

namespace gla {

class GenerateReactor final : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                              public TokenSink,
                              public Call {
 public:
  // Owns itself from here on.
  static grpc::ServerWriteReactor<v1::GenerateResponse>* Start(ServiceContext& service,
                                                               grpc::CallbackServerContext* context,
                                                               const v1::GenerateRequest& request);

 private:
  enum class Next { kNothing, kWrite, kWriteLast, kFinish };

  GenerateReactor(ServiceContext& service, grpc::CallbackServerContext* context)
      : Call(service, "Generate", context) {}

  absl::Status Submit(const v1::GenerateRequest& request);

  // The engine's thread.
  void OnPrefill(int64_t done, int64_t total) override;
  void OnToken(const TokenEvent& event) override;
  void OnFinish(const FinishEvent& event) override;
  // gRPC's threads.
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  Next PickNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Do(Next next);

  bool report_prefill_ = false;
  const Serving* serving_ = nullptr;
  v1::GenerateResponse out_;  // being written; gRPC's while a write is out
  grpc::Status status_;       // final; written before kWriteLast and kFinish

  Mutex mu_;
  std::optional<RequestId> id_ ABSL_GUARDED_BY(mu_);
  v1::GenerateResponse pending_ ABSL_GUARDED_BY(mu_);
  bool has_pending_ ABSL_GUARDED_BY(mu_) = false;
  bool write_out_ ABSL_GUARDED_BY(mu_) = false;
  bool broken_ ABSL_GUARDED_BY(mu_) = false;  // a write failed: the client is gone
  bool ended_ ABSL_GUARDED_BY(mu_) = false;   // the engine is done with us
};

}  // namespace gla
