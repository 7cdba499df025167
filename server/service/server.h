// The gRPC server: listener, services, health, reflection, and the order of its end.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/context.h"
#include "service/inference_service.h"
#include "service/listener.h"
#include "service/session_service.h"

namespace gla {

struct ServerOptions {
  std::string host = "127.0.0.1";
  int port = 0;
  int max_connections = 1024;
};

class Server {
 public:
  // Serves at once: health says NOT_SERVING and calls are UNAVAILABLE until SetServing(). `service`
  // must outlive the server.
  static absl::StatusOr<std::unique_ptr<Server>> Start(ServiceContext& service,
                                                       const ServerOptions& options);
  ~Server();  // Stop() at once

  int port() const { return listener_->port(); }
  int CountConnections() { return listener_->CountConnections(); }
  int num_calls() const { return service_.calls.size(); }

  // The model is loaded: calls reach it and health says SERVING.
  void SetServing(const Serving& serving);
  // Health says NOT_SERVING; everything is still served.
  void SetNotServing();
  // Conversations that wait for their client end; calls that run go on.
  void Drain();
  // Waits up to `patience` for calls to end by themselves, cancels the rest and closes every
  // connection. Nothing of the service is in use when it returns. The engine must be stopped
  // before.
  void Stop(absl::Duration patience);

 private:
  explicit Server(ServiceContext& service)
      : service_(service), inference_(service), sessions_(service) {}
  void SetHealth(bool serving);

  ServiceContext& service_;
  InferenceService inference_;
  SessionService sessions_;
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor_;
  std::unique_ptr<grpc::Server> grpc_;
};

// gRPC and protobuf print what strangers cause to stderr, unbounded. From now on it goes to `log`,
// at most one line a second each. `log` must outlive every use of them.
void RouteLibraryLogs(Logger& log);

}  // namespace gla
