// What a person at a terminal sees: colours only there, and a progress bar on standard error.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace gla {

bool IsTerminal(int fd);

// `text` in faint, bold or red when `fd` is a terminal and NO_COLOR is not set; as it is otherwise.
enum class Style { kFaint, kBold, kRed };
std::string Styled(int fd, Style style, const std::string& text);

// "label  [#####     ]  50%  1234/2468 tokens  2,100/s  0:12 left", drawn at most ten times a
// second, only when standard error is a terminal, only after `kShowAfter`.
class ProgressBar {
 public:
  explicit ProgressBar(std::string label);
  ~ProgressBar();  // clears the line
  void Update(int64_t done, int64_t total);
  void Clear();

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kShowAfter{300};
  std::string label_;
  bool enabled_;
  bool drawn_ = false;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_ = {};
};

}  // namespace gla
