#include "base/log.h"

#include <poll.h>
#include <unistd.h>

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"

namespace gla {
namespace {

// A pipe that reports POLLOUT takes this many bytes without blocking, and in one piece (PIPE_BUF).
constexpr size_t kMaxLine = 4096;
constexpr size_t kMaxText = 1500;

// Printable ASCII as it is, the rest escaped: a line stays one line whatever a client put into it.
std::string Quoted(std::string_view text) {
  const bool cut = text.size() > kMaxText;
  std::string out = "\"";
  for (const unsigned char c : text.substr(0, kMaxText)) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c >= 0x20 && c < 0x7f) {
      out += static_cast<char>(c);
    } else {
      absl::StrAppendFormat(&out, "\\u%04x", c);
    }
  }
  return out + (cut ? "...\"" : "\"");
}

bool IsPlainWord(std::string_view text) {
  if (text.empty() || text.size() > kMaxText) return false;
  for (const unsigned char c : text) {
    if (c <= 0x20 || c >= 0x7f || c == '"' || c == '\\' || c == '=') return false;
  }
  return true;
}

std::string ValueText(const LogField& field, LogFormat format) {
  if (const bool* b = std::get_if<bool>(&field.value)) return *b ? "true" : "false";
  if (const int64_t* i = std::get_if<int64_t>(&field.value)) return absl::StrCat(*i);
  if (const double* d = std::get_if<double>(&field.value)) {
    return std::isfinite(*d) ? absl::StrFormat("%.6g", *d) : "null";
  }
  const std::string& text = std::get<std::string>(field.value);
  return format == LogFormat::kText && IsPlainWord(text) ? text : Quoted(text);
}

}  // namespace

std::string Logger::Format(LogFormat format, absl::Time time, std::string_view level,
                           std::string_view message, Fields fields) {
  const std::string stamp = absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", time, absl::UTCTimeZone());
  std::string line;
  if (format == LogFormat::kJson) {
    absl::StrAppend(&line, "{\"time\":\"", stamp, "\",\"level\":\"", std::string(level),
                    "\",\"message\":", Quoted(message));
  } else {
    std::string text = Quoted(message);
    absl::StrAppend(&line, stamp, " ", std::string(level), " ", text.substr(1, text.size() - 2));
  }
  for (const LogField& field : fields) {
    const std::string key(field.key);
    if (format == LogFormat::kJson) {
      absl::StrAppend(&line, ",\"", key, "\":", ValueText(field, format));
    } else {
      absl::StrAppend(&line, " ", key, "=", ValueText(field, format));
    }
  }
  return line + (format == LogFormat::kJson ? "}\n" : "\n");
}

void Logger::Write(std::string_view level, std::string_view message, Fields fields) {
  const std::string line = Format(format_, absl::Now(), level, message, fields);
  bool written = false;
  if (line.size() <= kMaxLine) {
    // The lock keeps another thread from filling the pipe between the question and the write.
    MutexLock lock(&mu_);
    pollfd out = {.fd = fd_, .events = POLLOUT, .revents = 0};
    if (poll(&out, 1, 0) == 1 && (out.revents & POLLOUT) != 0) {
      written = write(fd_, line.data(), line.size()) == static_cast<ssize_t>(line.size());
    }
  }
  if (!written) num_dropped_.fetch_add(1, std::memory_order_relaxed);
}

void Logger::Limited(std::string_view source, std::string_view message) {
  const absl::Time now = absl::Now();
  int64_t left_out = 0;
  {
    MutexLock lock(&mu_);
    const auto [it, inserted] = limits_.try_emplace(std::string(source));
    Limit& limit = it->second;
    if (now < limit.next) {
      ++limit.left_out;
      return;
    }
    left_out = std::exchange(limit.left_out, 0);
    limit.next = now + absl::Seconds(1);
  }
  Write("warn", message, {{"source", source}, {"left_out", left_out}});
}

}  // namespace gla
