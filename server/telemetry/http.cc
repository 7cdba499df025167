#include "telemetry/http.h"

#include <httplib.h>

#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

namespace gla {
namespace {

constexpr int kThreads = 16;
constexpr int kMaxWaitSeconds = 1;

void Answer(const std::string& problem, httplib::Response& response) {
  response.status = problem.empty() ? 200 : 503;
  response.set_content(problem.empty() ? "ok\n" : problem + "\n", "text/plain");
}

}  // namespace

struct HttpServer::Impl {
  httplib::Server server;
  HttpPages pages;
  int port = 0;
  std::thread thread;
};

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& host, int port,
                                                              HttpPages pages) {
  auto impl = std::make_unique<Impl>();
  impl->pages = std::move(pages);
  httplib::Server& server = impl->server;
  // The library's default, SO_REUSEPORT, would let two servers share a port without a word.
  server.set_socket_options([](socket_t fd) {
    const int yes = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  server.new_task_queue = [] { return new httplib::ThreadPool(kThreads); };
  server.set_keep_alive_max_count(1);
  server.set_keep_alive_timeout(kMaxWaitSeconds);
  server.set_read_timeout(kMaxWaitSeconds);
  server.set_write_timeout(kMaxWaitSeconds);
  server.set_payload_max_length(1024);
  HttpPages& page = impl->pages;
  server.Get("/metrics", [&page](const httplib::Request&, httplib::Response& response) {
    response.set_content(page.metrics(), "text/plain; version=0.0.4; charset=utf-8");
  });
  server.Get("/livez", [&page](const httplib::Request&, httplib::Response& response) {
    Answer(page.not_live(), response);
  });
  server.Get("/readyz", [&page](const httplib::Request&, httplib::Response& response) {
    Answer(page.not_ready(), response);
  });

  if (port == 0) {
    impl->port = server.bind_to_any_port(host);
  } else {
    impl->port = server.bind_to_port(host, port) ? port : -1;
  }
  if (impl->port <= 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot listen for HTTP on ", host, ":", port, ": is the port taken?"));
  }
  impl->thread = std::thread([&server] { server.listen_after_bind(); });
  while (!server.is_running()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

HttpServer::~HttpServer() {
  impl_->server.stop();
  impl_->thread.join();
}

int HttpServer::port() const { return impl_->port; }

}  // namespace gla
