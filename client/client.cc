#include "client/client.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <chrono>

namespace gla {
namespace {

// Ties a call's context to its options for the time of the call.
class Scope {
 public:
  Scope(const CallOptions& options, std::function<void(grpc::ClientContext*)> attach)
      : attach_(std::move(attach)) {
    if (options.timeout_seconds > 0) {
      context_.set_deadline(
          std::chrono::system_clock::now() +
          std::chrono::microseconds(static_cast<int64_t>(options.timeout_seconds * 1e6)));
    }
    attach_(&context_);
  }
  ~Scope() { attach_(nullptr); }
  grpc::ClientContext* context() { return &context_; }

 private:
  grpc::ClientContext context_;
  std::function<void(grpc::ClientContext*)> attach_;
};

}  // namespace

void Call::Attach(grpc::ClientContext* context) {
  std::lock_guard<std::mutex> lock(mu_);
  context_ = context;
  if (context_ != nullptr && cancelled_) context_->TryCancel();
}

void Call::Cancel() {
  std::lock_guard<std::mutex> lock(mu_);
  cancelled_ = true;
  if (context_ != nullptr) context_->TryCancel();
}

Client::Client(const std::string& target, int channel_id) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(64 << 20);
  arguments.SetInt("gla.channel_id", channel_id);
  channel_ = grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
  inference_ = v1::InferenceService::NewStub(channel_);
  sessions_ = v1::SessionService::NewStub(channel_);
}

#define GLA_CLIENT_SCOPE                                          \
  Scope scope(options, [&options](grpc::ClientContext* context) { \
    if (options.call != nullptr) options.call->Attach(context);   \
  })

grpc::Status Client::Generate(const v1::GenerateRequest& request, const OnMessage& on_message,
                              const CallOptions& options) {
  GLA_CLIENT_SCOPE;
  auto reader = inference_->Generate(scope.context(), request);
  v1::GenerateResponse response;
  while (reader->Read(&response)) on_message(response);
  return reader->Finish();
}

grpc::Status Client::Score(const v1::ScoreRequest& request, v1::ScoreResponse* response,
                           const CallOptions& options) {
  GLA_CLIENT_SCOPE;
  return inference_->Score(scope.context(), request, response);
}

grpc::Status Client::Tokenize(const v1::TokenizeRequest& request, v1::TokenizeResponse* response,
                              const CallOptions& options) {
  GLA_CLIENT_SCOPE;
  return inference_->Tokenize(scope.context(), request, response);
}

grpc::Status Client::Detokenize(const v1::DetokenizeRequest& request,
                                v1::DetokenizeResponse* response, const CallOptions& options) {
  GLA_CLIENT_SCOPE;
  return inference_->Detokenize(scope.context(), request, response);
}

grpc::Status Client::GetModelInfo(v1::GetModelInfoResponse* response, const CallOptions& options) {
  GLA_CLIENT_SCOPE;
  return inference_->GetModelInfo(scope.context(), v1::GetModelInfoRequest(), response);
}

grpc::Status Client::CreateSession(const v1::CreateSessionRequest& request, v1::Session* session,
                                   const CallOptions& options) {
  GLA_CLIENT_SCOPE;
  return sessions_->CreateSession(scope.context(), request, session);
}

grpc::Status Client::GetSession(const std::string& id, v1::Session* session,
                                const CallOptions& options) {
  GLA_CLIENT_SCOPE;
  v1::GetSessionRequest request;
  request.set_session_id(id);
  return sessions_->GetSession(scope.context(), request, session);
}

grpc::Status Client::ListSessions(const v1::ListSessionsRequest& request,
                                  v1::ListSessionsResponse* response, const CallOptions& options) {
  GLA_CLIENT_SCOPE;
  return sessions_->ListSessions(scope.context(), request, response);
}

grpc::Status Client::DeleteSession(const std::string& id, const CallOptions& options) {
  GLA_CLIENT_SCOPE;
  v1::DeleteSessionRequest request;
  request.set_session_id(id);
  v1::DeleteSessionResponse response;
  return sessions_->DeleteSession(scope.context(), request, &response);
}

// The health protocol is two tiny messages (HealthCheckRequest { string service = 1; } and
// HealthCheckResponse { enum status = 1; } with SERVING = 1), so they are written and read as
// bytes.
grpc::Status Client::Health(const std::string& service, bool* serving, const CallOptions& options) {
  GLA_CLIENT_SCOPE;
  *serving = false;
  if (service.size() > 127) {
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "service name longer than 127 bytes");
  }
  std::string bytes;
  if (!service.empty()) bytes = std::string("\x0a") + static_cast<char>(service.size()) + service;
  grpc::Slice slice(bytes);
  grpc::ByteBuffer request(&slice, 1), response;
  grpc::GenericStub stub(channel_);
  grpc::CompletionQueue queue;
  auto rpc =
      stub.PrepareUnaryCall(scope.context(), "/grpc.health.v1.Health/Check", request, &queue);
  rpc->StartCall();
  grpc::Status status;
  rpc->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  if (!status.ok()) return status;
  std::vector<grpc::Slice> slices;
  if (!response.Dump(&slices).ok()) return status;
  std::string answer;
  for (const grpc::Slice& part : slices) {
    answer.append(reinterpret_cast<const char*>(part.begin()), part.size());
  }
  *serving = answer == std::string("\x08\x01", 2);
  return status;
}

#undef GLA_CLIENT_SCOPE

std::unique_ptr<Conversation> Client::Converse() {
  auto conversation = std::make_unique<Conversation>();
  conversation->stream_ = inference_->Converse(&conversation->context_);
  return conversation;
}

bool Conversation::Write(const v1::ConverseRequest& request) {
  std::lock_guard<std::mutex> lock(write_mu_);
  return stream_->Write(request);
}

bool Conversation::Open(const v1::ConverseOpen& open, v1::Session* session) {
  v1::ConverseRequest request;
  *request.mutable_open() = open;
  v1::ConverseResponse response;
  if (!Write(request) || !stream_->Read(&response) || !response.has_opened()) return false;
  *session = response.opened();
  return true;
}

bool Conversation::Turn(const v1::ConverseTurn& turn, const OnMessage& on_message) {
  v1::ConverseRequest request;
  *request.mutable_turn() = turn;
  if (!Write(request)) return false;
  v1::ConverseResponse response;
  while (stream_->Read(&response)) {
    on_message(response.output());
    if (response.output().has_finish()) return true;
  }
  return false;
}

void Conversation::CancelTurn() {
  v1::ConverseRequest request;
  request.mutable_cancel();
  Write(request);
}

grpc::Status Conversation::Finish() {
  stream_->WritesDone();
  v1::ConverseResponse response;
  while (stream_->Read(&response)) {
  }
  return stream_->Finish();
}

std::string CodeName(grpc::StatusCode code) {
  static const char* const kNames[] = {"OK",
                                       "CANCELLED",
                                       "UNKNOWN",
                                       "INVALID_ARGUMENT",
                                       "DEADLINE_EXCEEDED",
                                       "NOT_FOUND",
                                       "ALREADY_EXISTS",
                                       "PERMISSION_DENIED",
                                       "RESOURCE_EXHAUSTED",
                                       "FAILED_PRECONDITION",
                                       "ABORTED",
                                       "OUT_OF_RANGE",
                                       "UNIMPLEMENTED",
                                       "INTERNAL",
                                       "UNAVAILABLE",
                                       "DATA_LOSS",
                                       "UNAUTHENTICATED"};
  return code >= 0 && code <= 16 ? kNames[code] : "UNKNOWN";
}

}  // namespace gla
