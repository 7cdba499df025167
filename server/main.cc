// gla-server: reads the configuration, builds the parts in order, waits for a signal, drains.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "config.h"
#include "parts.h"
#include "service/server.h"
#include "shutdown.h"
#include "telemetry/http.h"

namespace gla {
namespace {

HttpPages Pages(Metrics& metrics, Server& server, Logger& log, const Loaded& loaded) {
  return {.metrics =
              [&] {
                server.CountConnections();
                metrics.log_lines_dropped.Set(static_cast<double>(log.num_dropped()));
                return metrics.Render();
              },
          .not_live = [&] { return loaded.NotLive(); },
          .not_ready = [&] { return loaded.NotReady(); }};
}

// From SIGTERM to the last byte, in the order that clients and balancers need.
void Drain(const Config& config, Shutdown& shutdown, Metrics& metrics, Loaded& loaded,
           Server& server, Logger& log) {
  log.Info("draining",
           {{"delay_s", config.shutdown_delay}, {"timeout_s", config.shutdown_timeout}});
  metrics.draining.Set(1);
  loaded.SetState(ServingState::kDraining);
  server.SetNotServing();
  shutdown.Pause(absl::Seconds(config.shutdown_delay));
  loaded.engine().Drain([&shutdown] { shutdown.NotifyDone(); });
  server.Drain();
  const bool finished = shutdown.WaitUntilDone(absl::Seconds(config.shutdown_timeout));
  if (!finished) log.Warn("ending what still runs", {{"calls", server.num_calls()}});
  loaded.engine().Stop();
  // The last messages are on their way to clients that may read slowly.
  server.Stop(absl::Seconds(1));
  log.Info("drained", {{"finished", finished}});
}

absl::Status Serve(const Config& config, Shutdown& shutdown, Logger& log) {
  const absl::Time began = absl::Now();
  RouteLibraryLogs(log);
  GLA_ASSIGN_OR_RETURN(Ground ground, OpenGround(config));
  Metrics metrics(ground.facts);
  ServiceContext service(metrics, log, config.seed);
  Loaded loaded;
  GLA_ASSIGN_OR_RETURN(const std::unique_ptr<Server> server,
                       Server::Start(service, {.host = config.host,
                                               .port = config.port,
                                               .max_connections = config.max_connections}));
  GLA_ASSIGN_OR_RETURN(
      const std::unique_ptr<HttpServer> http,
      HttpServer::Start(config.host, config.http_port, Pages(metrics, *server, log, loaded)));
  GLA_RETURN_IF_ERROR(loaded.Load(config, ground, metrics, log));
  log.Info(absl::StrCat("configuration: ", Describe(config)));
  shutdown.SetReady();
  loaded.SetState(ServingState::kReady);
  server->SetServing(loaded.serving());
  log.Info(absl::StrCat("ready: grpc ", HostPort(config.host, server->port()), " http ",
                        HostPort(config.host, http->port())),
           {{"seconds", absl::ToDoubleSeconds(absl::Now() - began)}});
  shutdown.Wait();
  Drain(config, shutdown, metrics, loaded, *server, log);
  return absl::OkStatus();
}

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "gla-server: %s\n", std::string(status.message()).c_str());
  return kExitConfiguration;
}

int Main(const std::vector<std::string>& args) {
  ProtectStandardStreams();
  const absl::StatusOr<Config> config =
      ParseConfig(args, [](const std::string& name) { return std::getenv(name.c_str()); });
  if (!config.ok()) return Fail(config.status());
  if (config->help || config->version) {
    std::fputs(config->help ? HelpText().c_str() : VersionText().c_str(), stdout);
    return kExitDrained;
  }
  Logger log(config->log());
  Shutdown shutdown(log, absl::Seconds(config->shutdown_delay + config->shutdown_timeout + 5));
  const absl::Status status = Serve(*config, shutdown, log);
  if (status.ok()) return kExitDrained;
  return Fail(status);
}

}  // namespace
}  // namespace gla

int main(int argc, char** argv) {
  return gla::Main(std::vector<std::string>(argv + 1, argv + argc));
}
