// The accept loop: our own, because the gRPC of Debian 12 stops accepting for ever after one
// EMFILE.
//
// It outlives exhausted descriptors, caps the number of open connections and hands each accepted
// socket to whoever serves it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "base/log.h"
#include "base/mutex.h"
#include "telemetry/metrics.h"

namespace gla {

class Listener {
 public:
  // Listens on `host`:`port` (0: any free port), IPv4 or IPv6. FailedPrecondition when it cannot be
  // had.
  static absl::StatusOr<std::unique_ptr<Listener>> Open(const std::string& host, int port,
                                                        int max_connections, Metrics& metrics,
                                                        Logger& log);
  ~Listener();

  int port() const { return port_; }

  // Accepts from now on; `serve` takes ownership of the descriptor.
  void Start(std::function<void(int fd)> serve);
  // Closes the port. Idempotent.
  void Stop();

  // Connections that are open now; also sets the gauge. From any thread.
  int CountConnections();

 private:
  Listener(int fd, int wake_fd, int port, int max_connections, Metrics& metrics, Logger& log)
      : fd_(fd),
        wake_fd_(wake_fd),
        port_(port),
        max_connections_(max_connections),
        metrics_(metrics),
        log_(log) {}

  void Run();
  // False when the loop should pause: there is no descriptor to be had.
  bool AcceptOne();
  // False when the stop came.
  bool WaitForStop(int milliseconds);

  int fd_;
  const int wake_fd_;
  const int port_;
  const int max_connections_;
  Metrics& metrics_;
  Logger& log_;
  std::function<void(int fd)> serve_;
  std::thread thread_;

  Mutex mu_;
  // Descriptor -> inode of the socket that was handed over. Whoever serves it closes it without a
  // word; but then the descriptor is free or some other file.
  std::unordered_map<int, uint64_t> connections_ ABSL_GUARDED_BY(mu_);
};

// "[::1]:80" or "127.0.0.1:80".
std::string HostPort(const std::string& host, int port);

}  // namespace gla
