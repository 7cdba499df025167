#include "service/session_service.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "service/convert.h"
#include "service/status.h"

namespace gla {
namespace {

constexpr int kMaxPageSize = 1000;
constexpr int kDefaultPageSize = 100;

// A check that comes before the engine is asked: the loaded model, when all is well.
using Checked = absl::StatusOr<const Serving*>;

Checked CheckId(const ServiceContext& service, const std::string& id) {
  GLA_RETURN_IF_ERROR(CheckSessionId(id));
  return service.Ready();
}

Checked CheckCreate(const ServiceContext& service, const v1::CreateSessionRequest& request) {
  if (request.has_idle_ttl_seconds() && request.idle_ttl_seconds() < 0) {
    return FieldError("idle_ttl_seconds",
                      absl::StrCat("expected 0 or more, got ", request.idle_ttl_seconds()));
  }
  if (request.session_id().empty()) return service.Ready();
  return CheckId(service, request.session_id());
}

Checked CheckList(const ServiceContext& service, const v1::ListSessionsRequest& request) {
  if (request.page_size() < 0 || request.page_size() > kMaxPageSize) {
    return FieldError("page_size",
                      absl::StrCat("expected 0 .. ", kMaxPageSize, ", got ", request.page_size()));
  }
  if (!request.page_token().empty() && !CheckSessionId(request.page_token()).ok()) {
    return FieldError("page_token", absl::StrCat("expected one from the last response, got ",
                                                 Shown(request.page_token())));
  }
  return service.Ready();
}

Engine::SessionCallback AnswerWithSession(UnaryCall* call, v1::Session* response) {
  return [call, response](absl::StatusOr<SessionInfo> info) {
    if (info.ok()) *response = ToProto(*info);
    call->Answer(info.status());
  };
}

// The page after the session that the token names; a deleted one still marks its place.
void FillPage(const std::vector<SessionInfo>& all, const std::string& token, size_t size,
              v1::ListSessionsResponse* response) {
  auto it = std::upper_bound(
      all.begin(), all.end(), token,
      [](const std::string& id, const SessionInfo& session) { return id < session.id; });
  for (; it != all.end() && static_cast<size_t>(response->sessions_size()) < size; ++it) {
    *response->add_sessions() = ToProto(*it);
  }
  if (it != all.end()) {
    response->set_next_page_token(response->sessions(response->sessions_size() - 1).session_id());
  }
  response->set_total(static_cast<int64_t>(all.size()));
}

}  // namespace

grpc::ServerUnaryReactor* SessionService::CreateSession(grpc::CallbackServerContext* context,
                                                        const v1::CreateSessionRequest* request,
                                                        v1::Session* response) {
  auto* call = new UnaryCall(service_, "CreateSession", context);
  const Checked serving = CheckCreate(service_, *request);
  if (!serving.ok()) {
    call->Answer(serving.status());
    return call;
  }
  const std::optional<int64_t> ttl =
      request->has_idle_ttl_seconds() ? std::optional(request->idle_ttl_seconds()) : std::nullopt;
  (*serving)->engine.CreateSession(
      request->session_id().empty() ? RandomSource::Hex(16) : request->session_id(), ttl,
      AnswerWithSession(call, response));
  return call;
}

grpc::ServerUnaryReactor* SessionService::GetSession(grpc::CallbackServerContext* context,
                                                     const v1::GetSessionRequest* request,
                                                     v1::Session* response) {
  auto* call = new UnaryCall(service_, "GetSession", context);
  const Checked serving = CheckId(service_, request->session_id());
  if (serving.ok()) {
    (*serving)->engine.GetSession(request->session_id(), AnswerWithSession(call, response));
  } else {
    call->Answer(serving.status());
  }
  return call;
}

grpc::ServerUnaryReactor* SessionService::ListSessions(grpc::CallbackServerContext* context,
                                                       const v1::ListSessionsRequest* request,
                                                       v1::ListSessionsResponse* response) {
  auto* call = new UnaryCall(service_, "ListSessions", context);
  const Checked serving = CheckList(service_, *request);
  if (!serving.ok()) {
    call->Answer(serving.status());
    return call;
  }
  const size_t size =
      request->page_size() == 0 ? kDefaultPageSize : static_cast<size_t>(request->page_size());
  (*serving)->engine.ListSessions(
      [call, response, size, token = request->page_token()](std::vector<SessionInfo> all) {
        FillPage(all, token, size, response);
        call->Answer(absl::OkStatus());
      });
  return call;
}

grpc::ServerUnaryReactor* SessionService::DeleteSession(grpc::CallbackServerContext* context,
                                                        const v1::DeleteSessionRequest* request,
                                                        v1::DeleteSessionResponse* /*response*/) {
  auto* call = new UnaryCall(service_, "DeleteSession", context);
  const Checked serving = CheckId(service_, request->session_id());
  if (serving.ok()) {
    (*serving)->engine.DeleteSession(request->session_id(),
                                     [call](const absl::Status& status) { call->Answer(status); });
  } else {
    call->Answer(serving.status());
  }
  return call;
}

}  // namespace gla
