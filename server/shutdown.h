// SIGTERM and SIGINT: waited for, never handled in between; and the watchdog that ends a shutdown
// which takes too long.
//
// Made first thing in main, so that every later thread inherits the blocked signals.
#pragma once

#include <condition_variable>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "base/log.h"
#include "base/mutex.h"

namespace gla {

inline constexpr int kExitDrained = 0;
inline constexpr int kExitConfiguration = 2;
inline constexpr int kExitWatchdog = 4;

class Shutdown {
 public:
  // Until SetReady() a signal ends the process at once with kExitDrained: there is nothing to
  // drain. `patience` after the first signal the process ends with kExitWatchdog.
  Shutdown(Logger& log, absl::Duration patience);
  ~Shutdown();

  void SetReady();
  // Waits for the first signal.
  void Wait();
  // Waits for `timeout`; false when a second signal cut it short.
  bool Pause(absl::Duration timeout);
  // Waits for NotifyDone(); false when `timeout` has passed or a second signal came.
  bool WaitUntilDone(absl::Duration timeout);
  void NotifyDone();  // from any thread

 private:
  void Run();

  Logger& log_;
  const absl::Duration patience_;
  int signal_fd_ = -1;
  int stop_fd_ = -1;
  std::thread thread_;

  Mutex mu_;
  std::condition_variable_any changed_;
  bool ready_ ABSL_GUARDED_BY(mu_) = false;
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  int num_signals_ ABSL_GUARDED_BY(mu_) = 0;
};

// For main, before anything else: SIGPIPE is ignored, and a closed stdin, stdout or stderr becomes
// /dev/null, so that no socket gets their numbers and with them what libraries print.
void ProtectStandardStreams();

}  // namespace gla
