// The operations port: /metrics, /livez and /readyz over HTTP.
//
// A bounded number of threads of its own, every wait of a connection bounded by a second: a slow or
// hostile scraper costs the engine nothing.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace gla {

// What the pages say. Called from the HTTP threads; must be thread-safe and quick.
struct HttpPages {
  std::function<std::string()> metrics;
  std::function<std::string()> not_live;   // why the process should be restarted; empty: it is live
  std::function<std::string()> not_ready;  // why no traffic should come; empty: it is ready
};

class HttpServer {
 public:
  // Binds `host`:`port` (0: any free port) and serves. FailedPrecondition when the port cannot be
  // had.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& host, int port,
                                                           HttpPages pages);
  ~HttpServer();

  int port() const;

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace gla
