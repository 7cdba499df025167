#include "service/inference_service.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "service/converse_reactor.h"
#include "service/convert.h"
#include "service/generate_reactor.h"
#include "service/status.h"

namespace gla {
namespace {

class ScoreCall final : public UnaryCall, public TokenSink {
 public:
  ScoreCall(ServiceContext& service, grpc::CallbackServerContext* context,
            v1::ScoreResponse* response)
      : UnaryCall(service, "Score", context), response_(response) {}

  void Start(const v1::ScoreRequest& request) {
    if (const absl::Status status = Submit(request); !status.ok()) Answer(status);
  }

 private:
  absl::Status Submit(const v1::ScoreRequest& request) {
    GLA_ASSIGN_OR_RETURN(serving_, service_.Ready());
    GLA_ASSIGN_OR_RETURN(ScoreParams params, ToParams(request, *serving_));
    params.deadline = absl::FromChrono(context_->deadline());
    request_id_ = params.request_id;
    context_->AddInitialMetadata("x-request-id", request_id_);
    response_->mutable_token_ids()->Add(params.tokens.begin(), params.tokens.end());
    GLA_ASSIGN_OR_RETURN(const RequestId id, serving_->engine.Submit(std::move(params), this));
    MutexLock lock(&mu_);
    id_ = id;
    return absl::OkStatus();
  }

  void OnToken(const TokenEvent& /*event*/) override {}

  void OnFinish(const FinishEvent& event) override {
    double total = 0;
    for (const float logprob : event.score_logprobs) total += logprob;
    response_->mutable_logprobs()->Add(event.score_logprobs.begin(), event.score_logprobs.end());
    response_->set_total_logprob(total);
    *response_->mutable_timings() = ToProto(event.timings);
    Answer(event.status, &event);
  }

  void OnCancel() override {
    BackFromGrpc(this);
    std::optional<RequestId> id;
    {
      MutexLock lock(&mu_);
      id = id_;
    }
    if (id.has_value() && !DeadlineIsNear()) serving_->engine.Cancel(*id);
  }

  v1::ScoreResponse* const response_;
  const Serving* serving_ = nullptr;
  Mutex mu_;
  std::optional<RequestId> id_ ABSL_GUARDED_BY(mu_);
};

absl::Status TokenizeInto(const ServiceContext& service, const v1::TokenizeRequest& request,
                          v1::TokenizeResponse* response) {
  GLA_ASSIGN_OR_RETURN(const Serving* serving, service.Ready());
  if (request.text().size() > kMaxTextBytes) {
    return FieldError("text", absl::StrCat("expected at most ", kMaxTextBytes, " bytes, got ",
                                           request.text().size()));
  }
  const bool special = !request.has_add_special_tokens() || request.add_special_tokens();
  const absl::StatusOr<std::vector<int32_t>> ids =
      serving->tokenizer.Encode(request.text(), special);
  if (!ids.ok()) return FieldError("text", std::string(ids.status().message()));
  for (const int32_t id : *ids) {
    response->add_token_ids(id);
    if (!request.omit_pieces()) response->add_pieces(serving->tokenizer.Piece(id));
  }
  return absl::OkStatus();
}

absl::Status DetokenizeInto(const ServiceContext& service, const v1::DetokenizeRequest& request,
                            v1::DetokenizeResponse* response) {
  GLA_ASSIGN_OR_RETURN(const Serving* serving, service.Ready());
  const std::vector<int32_t> ids(request.token_ids().begin(), request.token_ids().end());
  const bool skip = !request.has_skip_special_tokens() || request.skip_special_tokens();
  absl::StatusOr<std::string> text = serving->tokenizer.Decode(ids, skip);
  if (!text.ok()) return FieldError("token_ids", std::string(text.status().message()));
  response->set_text(*std::move(text));
  return absl::OkStatus();
}

}  // namespace

grpc::ServerWriteReactor<v1::GenerateResponse>* InferenceService::Generate(
    grpc::CallbackServerContext* context, const v1::GenerateRequest* request) {
  return GenerateReactor::Start(service_, context, *request);
}

grpc::ServerBidiReactor<v1::ConverseRequest, v1::ConverseResponse>* InferenceService::Converse(
    grpc::CallbackServerContext* context) {
  return ConverseReactor::Start(service_, context);
}

grpc::ServerUnaryReactor* InferenceService::Score(grpc::CallbackServerContext* context,
                                                  const v1::ScoreRequest* request,
                                                  v1::ScoreResponse* response) {
  auto* call = new ScoreCall(service_, context, response);
  call->Start(*request);
  return call;
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const v1::TokenizeRequest* request,
                                                     v1::TokenizeResponse* response) {
  auto* call = new UnaryCall(service_, "Tokenize", context);
  call->Answer(TokenizeInto(service_, *request, response));
  return call;
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const v1::DetokenizeRequest* request,
                                                       v1::DetokenizeResponse* response) {
  auto* call = new UnaryCall(service_, "Detokenize", context);
  call->Answer(DetokenizeInto(service_, *request, response));
  return call;
}

grpc::ServerUnaryReactor* InferenceService::GetModelInfo(grpc::CallbackServerContext* context,
                                                         const v1::GetModelInfoRequest* /*request*/,
                                                         v1::GetModelInfoResponse* response) {
  auto* call = new UnaryCall(service_, "GetModelInfo", context);
  const absl::StatusOr<const Serving*> serving = service_.Ready();
  if (serving.ok()) {
    *response = (*serving)->info;
    response->set_sessions((*serving)->engine.num_sessions());
  }
  call->Answer(serving.status());
  return call;
}

}  // namespace gla
