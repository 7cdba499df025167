#include "service/listener.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace gla {
namespace {

constexpr int kBacklog = 1024;
constexpr int kPauseMs = 50;  // when descriptors are exhausted

uint64_t InodeOf(int fd) {
  struct stat info = {};
  return fstat(fd, &info) == 0 ? info.st_ino : 0;
}

// -1 and errno when it cannot be had.
int OpenSocket(const addrinfo& address) {
  const int fd = socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -1;
  const int yes = 1;
  const int no = 0;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  if (address.ai_family == AF_INET6) {
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof(no));  // "::" serves both
  }
  if (bind(fd, address.ai_addr, address.ai_addrlen) == 0 && listen(fd, kBacklog) == 0) return fd;
  const int error = errno;
  close(fd);
  errno = error;
  return -1;
}

int PortOf(int fd) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  return address.ss_family == AF_INET6
             ? ntohs(reinterpret_cast<const sockaddr_in6*>(&address)->sin6_port)
             : ntohs(reinterpret_cast<const sockaddr_in*>(&address)->sin_port);
}

}  // namespace

std::string HostPort(const std::string& host, int port) {
  const bool bracket = host.find(':') != std::string::npos && host.front() != '[';
  return bracket ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
}

absl::StatusOr<std::unique_ptr<Listener>> Listener::Open(const std::string& host, int port,
                                                         int max_connections, Metrics& metrics,
                                                         Logger& log) {
  std::string name = host;
  if (name.size() > 2 && name.front() == '[' && name.back() == ']') {
    name = name.substr(1, name.size() - 2);
  }
  addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const auto failed = [&](const std::string& why) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot listen for gRPC on ", HostPort(host, port), ": ", why));
  };
  if (const int error = getaddrinfo(name.c_str(), absl::StrCat(port).c_str(), &hints, &found);
      error != 0) {
    return failed(gai_strerror(error));
  }
  const int fd = OpenSocket(*found);
  const int error = errno;
  freeaddrinfo(found);
  if (fd < 0) return failed(strerror(error));
  const int wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_fd < 0) {
    close(fd);
    return failed("no descriptor left");
  }
  return std::unique_ptr<Listener>(
      new Listener(fd, wake_fd, PortOf(fd), max_connections, metrics, log));
}

Listener::~Listener() {
  Stop();
  if (fd_ >= 0) close(fd_);
  close(wake_fd_);
}

void Listener::Start(std::function<void(int fd)> serve) {
  serve_ = std::move(serve);
  thread_ = std::thread([this] { Run(); });
}

void Listener::Stop() {
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(wake_fd_, &one, sizeof(one));
  thread_.join();
  close(std::exchange(fd_, -1));
}

bool Listener::WaitForStop(int milliseconds) {
  pollfd wake = {.fd = wake_fd_, .events = POLLIN, .revents = 0};
  return poll(&wake, 1, milliseconds) > 0;
}

void Listener::Run() {
  while (true) {
    pollfd fds[] = {{.fd = fd_, .events = POLLIN, .revents = 0},
                    {.fd = wake_fd_, .events = POLLIN, .revents = 0}};
    if (poll(fds, 2, -1) < 0) continue;  // a signal
    if (fds[1].revents != 0) return;
    if (!AcceptOne() && WaitForStop(kPauseMs)) return;
  }
}

bool Listener::AcceptOne() {
  const int fd = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) {
    const bool exhausted =
        errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
    if (exhausted) {
      log_.Limited("accept", absl::StrCat("cannot accept connections: ", strerror(errno)));
    }
    return !exhausted;  // the others belong to one connection, which has gone
  }
  {
    MutexLock lock(&mu_);
    connections_[fd] = InodeOf(fd);
  }
  if (CountConnections() > max_connections_) {
    {
      MutexLock lock(&mu_);
      connections_.erase(fd);
    }
    metrics_.Rejected("connections").Increment();
    close(fd);
    log_.Limited("connections", absl::StrCat("more than ", max_connections_,
                                             " connections (--max-connections): refused one"));
    return true;
  }
  const int yes = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
  serve_(fd);
  return true;
}

int Listener::CountConnections() {
  MutexLock lock(&mu_);
  std::erase_if(connections_,
                [](const auto& entry) { return InodeOf(entry.first) != entry.second; });
  const int n = static_cast<int>(connections_.size());
  metrics_.connections.Set(n);
  return n;
}

}  // namespace gla
