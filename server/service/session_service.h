// gla.v1.SessionService: the sessions live in the engine; this asks it and answers when it has.
//
// Fork, rewind, export and import are not served by this version: the generated base answers
// UNIMPLEMENTED.
#pragma once

#include "gla/v1/session.grpc.pb.h"
#include "service/context.h"

namespace gla {

class SessionService final : public v1::SessionService::CallbackService {
 public:
  explicit SessionService(ServiceContext& service) : service_(service) {}

  grpc::ServerUnaryReactor* CreateSession(grpc::CallbackServerContext* context,
                                          const v1::CreateSessionRequest* request,
                                          v1::Session* response) override;
  grpc::ServerUnaryReactor* GetSession(grpc::CallbackServerContext* context,
                                       const v1::GetSessionRequest* request,
                                       v1::Session* response) override;
  grpc::ServerUnaryReactor* ListSessions(grpc::CallbackServerContext* context,
                                         const v1::ListSessionsRequest* request,
                                         v1::ListSessionsResponse* response) override;
  grpc::ServerUnaryReactor* DeleteSession(grpc::CallbackServerContext* context,
                                          const v1::DeleteSessionRequest* request,
                                          v1::DeleteSessionResponse* response) override;

 private:
  ServiceContext& service_;
};

}  // namespace gla
