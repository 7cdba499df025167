// Reading the steps that tokenizer.json is made of: objects with a "type", and sequences of them.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/config_reader.h"
#include "model/tokenizer/regex.h"

namespace gla {

// A step's own strings are short, and no chain of steps makes a text many times longer.
constexpr size_t kMaxStepText = 64;
constexpr size_t kMaxGrowth = 32;

// Calls `parse` for each step of `value`: null has none, a "Sequence" has those of its list
// `list_key`. `parse` reads the step's keys; what it leaves unread is refused. Errors begin with
// `what`, the name of the whole, and the step's type.
absl::Status ForEachStep(
    const nlohmann::json& value, std::string_view what, std::string_view list_key,
    const std::function<absl::Status(const std::string& type, ConfigReader& step)>& parse);

absl::Status UnknownStep(std::string_view supported);

// A string of `min` to kMaxStepText bytes.
std::string TakeText(ConfigReader& step, std::string_view key, size_t min = 0);
// {"String": ..} or {"Regex": ..}.
absl::StatusOr<Regex> TakePattern(ConfigReader& step, std::string_view key);

// InvalidArgument when steps made `size` bytes of `original` ones and that is too many.
absl::Status CheckGrowth(size_t size, size_t original);

}  // namespace gla
