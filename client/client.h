// A small C++ client of gla-server: blocking calls over one gRPC channel.
//
// A Client may be used by many threads at once. Every call takes a CallOptions with a deadline; a
// Call handle lets another thread (a Ctrl-C handler) cancel what runs.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "gla/v1/inference.grpc.pb.h"
#include "gla/v1/session.grpc.pb.h"

namespace gla {

// Cancels the RPC that is running with it, from any thread. Reusable for one call after another.
class Call {
 public:
  void Cancel();
  bool cancelled() const { return cancelled_; }

 private:
  friend class Client;
  friend class Conversation;
  void Attach(grpc::ClientContext* context);
  std::mutex mu_;
  grpc::ClientContext* context_ = nullptr;  // guarded by mu_
  std::atomic<bool> cancelled_ = false;
};

struct CallOptions {
  double timeout_seconds = 0;  // 0: none
  Call* call = nullptr;        // null: not cancellable
};

// One Converse stream. Not thread-safe but for Cancel(), which ends the running turn.
class Conversation {
 public:
  using OnMessage = std::function<void(const v1::GenerateResponse&)>;
  // The session, once it is open; an error otherwise (see status()).
  bool Open(const v1::ConverseOpen& open, v1::Session* session);
  // Runs one turn; false when the stream has ended (see status()).
  bool Turn(const v1::ConverseTurn& turn, const OnMessage& on_message);
  void CancelTurn();
  // Ends the stream and gives its status.
  grpc::Status Finish();

 private:
  friend class Client;
  bool Write(const v1::ConverseRequest& request);
  grpc::ClientContext context_;
  std::mutex write_mu_;  // a turn and its cancellation are written by two threads
  std::unique_ptr<grpc::ClientReaderWriter<v1::ConverseRequest, v1::ConverseResponse>> stream_;
};

class Client {
 public:
  // `target` is HOST:PORT. Connects at the first call. `channel_id` tells channels to the same
  // target apart; equal ids share a connection.
  explicit Client(const std::string& target, int channel_id = 0);

  using OnMessage = std::function<void(const v1::GenerateResponse&)>;
  grpc::Status Generate(const v1::GenerateRequest& request, const OnMessage& on_message,
                        const CallOptions& options = {});
  std::unique_ptr<Conversation> Converse();
  grpc::Status Score(const v1::ScoreRequest& request, v1::ScoreResponse* response,
                     const CallOptions& options = {});
  grpc::Status Tokenize(const v1::TokenizeRequest& request, v1::TokenizeResponse* response,
                        const CallOptions& options = {});
  grpc::Status Detokenize(const v1::DetokenizeRequest& request, v1::DetokenizeResponse* response,
                          const CallOptions& options = {});
  grpc::Status GetModelInfo(v1::GetModelInfoResponse* response, const CallOptions& options = {});
  grpc::Status CreateSession(const v1::CreateSessionRequest& request, v1::Session* session,
                             const CallOptions& options = {});
  grpc::Status GetSession(const std::string& id, v1::Session* session,
                          const CallOptions& options = {});
  grpc::Status ListSessions(const v1::ListSessionsRequest& request,
                            v1::ListSessionsResponse* response, const CallOptions& options = {});
  grpc::Status DeleteSession(const std::string& id, const CallOptions& options = {});
  // grpc.health.v1: *serving is true for SERVING. `service` empty: the whole server.
  grpc::Status Health(const std::string& service, bool* serving, const CallOptions& options = {});

 private:
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::InferenceService::Stub> inference_;
  std::unique_ptr<v1::SessionService::Stub> sessions_;
};

// "INVALID_ARGUMENT", "OK", ...
std::string CodeName(grpc::StatusCode code);

}  // namespace gla
