#include "service/server.h"

#include <google/protobuf/stubs/logging.h>
#include <grpc/grpc.h>
#include <grpc/support/log.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>

#include <atomic>
#include <utility>

#include "base/status_macros.h"

namespace gla {
namespace {

constexpr int kKeepaliveMs = 30'000;
constexpr int kKeepaliveTimeoutMs = 10'000;
constexpr int kMinClientPingMs = 10'000;
constexpr int kMaxMessageBytes = 4 << 20;
constexpr int kMaxMetadataBytes = 16 << 10;
constexpr int kMaxStreamsPerConnection = 1024;

// The libraries take plain functions, so the logger has to be found from nowhere.
std::atomic<Logger*> library_log = nullptr;

void LogGrpc(gpr_log_func_args* args) {
  if (args->severity >= GPR_LOG_SEVERITY_ERROR) library_log.load()->Limited("grpc", args->message);
}

void LogProtobuf(google::protobuf::LogLevel level, const char* /*file*/, int /*line*/,
                 const std::string& message) {
  if (level >= google::protobuf::LOGLEVEL_ERROR) library_log.load()->Limited("protobuf", message);
}

}  // namespace

void RouteLibraryLogs(Logger& log) {
  library_log = &log;
  gpr_set_log_function(LogGrpc);
  google::protobuf::SetLogHandler(LogProtobuf);
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(ServiceContext& service,
                                                      const ServerOptions& options) {
  std::unique_ptr<Server> server(new Server(service));
  GLA_ASSIGN_OR_RETURN(server->listener_,
                       Listener::Open(options.host, options.port, options.max_connections,
                                      service.metrics, service.log));
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.RegisterService(&server->inference_);
  builder.RegisterService(&server->sessions_);
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxStreamsPerConnection);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kMinClientPingMs);
  server->acceptor_ = builder.experimental().AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
      grpc::InsecureServerCredentials());
  server->grpc_ = builder.BuildAndStart();
  if (server->grpc_ == nullptr) return absl::InternalError("gRPC did not start");
  server->SetHealth(false);
  server->listener_->Start([acceptor = server->acceptor_.get()](int fd) {
    grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
    connection.fd = fd;
    acceptor->HandleNewConnection(&connection);
  });
  return server;
}

Server::~Server() { Stop(absl::ZeroDuration()); }

void Server::SetHealth(bool serving) {
  grpc::HealthCheckServiceInterface* health = grpc_->GetHealthCheckService();
  for (const char* name :
       {"", v1::InferenceService::service_full_name(), v1::SessionService::service_full_name()}) {
    health->SetServingStatus(name, serving);
  }
}

void Server::SetServing(const Serving& serving) {
  service_.serving.store(&serving, std::memory_order_release);
  SetHealth(true);
}

void Server::SetNotServing() { SetHealth(false); }

void Server::Drain() { service_.calls.Drain(); }

void Server::Stop(absl::Duration patience) {
  if (grpc_ == nullptr) return;
  // Nobody else ends a call that waits for a client which does not read or does not speak.
  if (!service_.calls.WaitUntilEmpty(patience)) service_.calls.Abort();
  listener_->Stop();
  // The deadline cancels what is not ours: health watches and reflection streams.
  grpc_->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(100));
  grpc_->Wait();
  // Every call has ended by now; its reactor's last step may still be under way.
  service_.calls.WaitUntilEmpty(absl::Seconds(10));
  grpc_.reset();
}

}  // namespace gla
