#include "engine/text_stream.h"

#include <algorithm>
#include <string_view>
#include <utility>

namespace gla {

std::string StopMatcher::Add(const std::string& text) {
  if (stops_.empty()) return text;
  const size_t old_size = held_.size();
  held_ += text;
  const std::string_view all = held_;
  // By the end of the match, byte by byte, so that pieces do not matter.
  for (size_t end = old_size + 1; end <= all.size(); ++end) {
    for (const std::string& stop : stops_) {
      const bool longer = matched_ == nullptr || stop.size() > matched_->size();
      if (longer && all.substr(0, end).ends_with(stop)) matched_ = &stop;
    }
    if (matched_ != nullptr) {
      std::string before = held_.substr(0, end - matched_->size());
      held_.clear();
      return before;
    }
  }
  // Stop strings are whole characters, so what is let go ends on a character's boundary too.
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(stop.size() - 1, all.size()); n > keep; --n) {
      if (all.ends_with(std::string_view(stop).substr(0, n))) keep = n;
    }
  }
  std::string certain = held_.substr(0, held_.size() - keep);
  held_.erase(0, certain.size());
  return certain;
}

std::string StopMatcher::Flush() { return std::exchange(held_, std::string()); }

}  // namespace gla
