// The text of one generation as it grows: whole characters, cut at the first stop string.
#pragma once

#include <string>
#include <vector>

#include "model/tokenizer.h"

namespace gla {

// Finds the first of several strings in a text that comes in pieces. Text that may be the beginning
// of one of them is held back until that is decided. The result does not depend on how the text is
// cut: the match that is complete first wins, the longest of those that end together.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // Text that is certain not to be a part of a stop string. After a match: the text before it, and
  // matched() tells which.
  std::string Add(const std::string& text);
  // What is held back, when the text ends without a match.
  std::string Flush();

  const std::string* matched() const { return matched_; }  // null: none yet

 private:
  const std::vector<std::string> stops_;
  std::string held_;  // the longest end of the text so far that is a proper beginning of a stop
  const std::string* matched_ = nullptr;
};

// Tokens to text: a StreamDecoder followed by a StopMatcher.
class TextStream {
 public:
  // The stream continues a prompt.
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stops)
      : decoder_(tokenizer, /*at_start=*/false), matcher_(std::move(stops)) {}

  std::string Add(int32_t token) { return matcher_.Add(decoder_.Add(token)); }
  std::string Finish() { return matcher_.Flush() + decoder_.Finish(); }
  const std::string* matched() const { return matcher_.matched(); }

 private:
  StreamDecoder decoder_;
  StopMatcher matcher_;
};

}  // namespace gla
