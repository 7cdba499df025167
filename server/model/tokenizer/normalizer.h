// The normalizer of tokenizer.json: changes the text before it is cut into pieces.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "model/tokenizer/regex.h"

namespace gla {

// Const; any thread may use it.
class Normalizer {
 public:
  // null, Sequence, NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace.
  static absl::StatusOr<Normalizer> Parse(const nlohmann::json& value);

  // REQUIRES: text is valid UTF-8; so is the result.
  absl::StatusOr<std::string> Apply(std::string_view text, WorkBudget& budget) const;

 private:
  using Step = std::function<absl::StatusOr<std::string>(std::string text, WorkBudget& budget)>;
  std::vector<Step> steps_;
};

}  // namespace gla
