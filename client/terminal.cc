#include "client/terminal.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace gla {

bool IsTerminal(int fd) { return isatty(fd) == 1; }

std::string Styled(int fd, Style style, const std::string& text) {
  const char* no_color = std::getenv("NO_COLOR");
  if (!IsTerminal(fd) || (no_color != nullptr && *no_color != '\0')) return text;
  const char* code = style == Style::kFaint  ? "\033[2m"
                     : style == Style::kBold ? "\033[1m"
                                             : "\033[31m";
  return code + text + "\033[0m";
}

ProgressBar::ProgressBar(std::string label)
    : label_(std::move(label)), enabled_(IsTerminal(STDERR_FILENO)) {}

ProgressBar::~ProgressBar() { Clear(); }

void ProgressBar::Clear() {
  if (drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

void ProgressBar::Update(int64_t done, int64_t total) {
  const Clock::time_point now = Clock::now();
  if (!enabled_ || total <= 0 || now - start_ < kShowAfter) return;
  if (done < total && now - last_ < std::chrono::milliseconds(100)) return;
  last_ = now;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double rate = static_cast<double>(done) / seconds;
  const int left = rate > 0 ? static_cast<int>(static_cast<double>(total - done) / rate + 0.5) : 0;
  constexpr int kWidth = 24;
  const int filled = static_cast<int>(std::min<int64_t>(kWidth, kWidth * done / total));
  std::fprintf(stderr, "\r\033[K%s [%s%s] %3d%%  %lld/%lld tokens  %.0f/s  %d:%02d left",
               label_.c_str(), std::string(filled, '#').c_str(),
               std::string(kWidth - filled, ' ').c_str(), static_cast<int>(100 * done / total),
               static_cast<long long>(done), static_cast<long long>(total), rate, left / 60,
               left % 60);
  std::fflush(stderr);
  drawn_ = true;
}

}  // namespace gla
