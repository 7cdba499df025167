// The pre-tokenizer of tokenizer.json: cuts a text into pieces, which tokens do not cross.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/tokenizer/regex.h"

namespace gla {

// A text in pieces: piece i is [ends[i - 1], ends[i]) of `text`, none is empty.
struct Pieces {
  std::string text;
  std::vector<size_t> ends;

  void Add(std::string_view piece) {
    if (piece.empty()) return;
    text += piece;
    ends.push_back(text.size());
  }
};

// Const; any thread may use it.
class PreTokenizer {
 public:
  // null, Sequence, ByteLevel, Split, Digits, Metaspace.
  static absl::StatusOr<PreTokenizer> Parse(const nlohmann::json& value);

  // `at_start`: whether `text` is the beginning of the whole text. REQUIRES: text is valid UTF-8.
  absl::StatusOr<Pieces> Apply(std::string_view text, bool at_start, WorkBudget& budget) const;

 private:
  struct Input {
    std::string_view piece;
    bool at_start;
    WorkBudget& budget;
  };
  // Adds the pieces of one piece to `out`.
  using Step = std::function<absl::Status(const Input& input, Pieces* out)>;
  std::vector<Step> steps_;
};

}  // namespace gla
