#include "shutdown.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>

namespace gla {

using Clock = std::chrono::steady_clock;

void ProtectStandardStreams() {
  signal(SIGPIPE, SIG_IGN);
  for (int fd = 0; fd <= 2; ++fd) {
    // open() gives the lowest free number, which is this one.
    if (fcntl(fd, F_GETFD) < 0) [[maybe_unused]]
      const int opened = open("/dev/null", O_RDWR);
  }
}

Shutdown::Shutdown(Logger& log, absl::Duration patience) : log_(log), patience_(patience) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal_fd_ = signalfd(-1, &signals, SFD_CLOEXEC);
  stop_fd_ = eventfd(0, EFD_CLOEXEC);
  thread_ = std::thread([this] { Run(); });
}

Shutdown::~Shutdown() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(stop_fd_, &one, sizeof(one));
  thread_.join();
  close(signal_fd_);
  close(stop_fd_);
}

void Shutdown::Run() {
  Clock::time_point deadline = Clock::time_point::max();
  while (true) {
    int timeout = -1;
    if (deadline != Clock::time_point::max()) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
      timeout = static_cast<int>(std::max<int64_t>(left.count(), 0));
    }
    pollfd fds[] = {{.fd = signal_fd_, .events = POLLIN, .revents = 0},
                    {.fd = stop_fd_, .events = POLLIN, .revents = 0}};
    const int n = poll(fds, 2, timeout);
    if (n == 0) {
      log_.Error("shutdown took too long: the watchdog ends the process");
      _exit(kExitWatchdog);
    }
    if (n < 0) continue;
    if (fds[1].revents != 0) return;
    signalfd_siginfo info = {};
    if (read(signal_fd_, &info, sizeof(info)) != sizeof(info)) continue;
    MutexLock lock(&mu_);
    log_.Info("signal", {{"number", info.ssi_signo}, {"ready", ready_}});
    if (!ready_) _exit(kExitDrained);
    if (num_signals_++ == 0) deadline = Clock::now() + absl::ToChronoMilliseconds(patience_);
    changed_.notify_all();
  }
}

void Shutdown::SetReady() {
  MutexLock lock(&mu_);
  ready_ = true;
}

void Shutdown::Wait() {
  MutexLock lock(&mu_);
  while (num_signals_ == 0) changed_.wait(mu_);
}

bool Shutdown::Pause(absl::Duration timeout) {
  const auto until = Clock::now() + absl::ToChronoMilliseconds(timeout);
  MutexLock lock(&mu_);
  while (num_signals_ < 2) {
    if (changed_.wait_until(mu_, until) == std::cv_status::timeout) break;
  }
  return num_signals_ < 2;
}

bool Shutdown::WaitUntilDone(absl::Duration timeout) {
  const auto until = Clock::now() + absl::ToChronoMilliseconds(timeout);
  MutexLock lock(&mu_);
  while (!done_ && num_signals_ < 2) {
    if (changed_.wait_until(mu_, until) == std::cv_status::timeout) break;
  }
  return done_;
}

void Shutdown::NotifyDone() {
  MutexLock lock(&mu_);
  done_ = true;
  changed_.notify_all();
}

}  // namespace gla
