// Structured log lines: one line per fact, as text or JSON; never a prompt, never a token.
//
// A line is written whole or not at all: when nobody reads the other end of the pipe, the line is
// counted as dropped and the caller goes on. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "base/mutex.h"

namespace gla {

enum class LogFormat { kText, kJson };

struct LogField {
  template <typename T>
  LogField(std::string_view key, const T& value) : key(key) {
    if constexpr (std::is_same_v<T, bool>) {
      this->value = value;
    } else if constexpr (std::is_integral_v<T>) {
      this->value = static_cast<int64_t>(value);
    } else if constexpr (std::is_floating_point_v<T>) {
      this->value = static_cast<double>(value);
    } else {
      this->value = std::string(value);
    }
  }

  std::string_view key;
  std::variant<bool, int64_t, double, std::string> value;
};

class Logger {
 public:
  using Fields = std::initializer_list<LogField>;

  explicit Logger(LogFormat format, int fd = 2) : format_(format), fd_(fd) {}

  void Info(std::string_view message, Fields fields = {}) { Write("info", message, fields); }
  void Warn(std::string_view message, Fields fields = {}) { Write("warn", message, fields); }
  void Error(std::string_view message, Fields fields = {}) { Write("error", message, fields); }

  // For what a stranger can cause at any rate: at most one line a second of each `source`; the next
  // line says how many were left out. `source` comes from a fixed set.
  void Limited(std::string_view source, std::string_view message);

  int64_t num_dropped() const { return num_dropped_; }

  // One line as it would be written, with its newline.
  static std::string Format(LogFormat format, absl::Time time, std::string_view level,
                            std::string_view message, Fields fields);

 private:
  struct Limit {
    absl::Time next = absl::InfinitePast();
    int64_t left_out = 0;
  };

  void Write(std::string_view level, std::string_view message, Fields fields);

  const LogFormat format_;
  const int fd_;
  std::atomic<int64_t> num_dropped_ = 0;
  Mutex mu_;
  std::map<std::string, Limit, std::less<>> limits_ ABSL_GUARDED_BY(mu_);
};

}  // namespace gla
