#include "model/config_reader.h"

#include <cstdint>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/strict_json.h"

namespace gla {
namespace {

using nlohmann::json;

constexpr size_t kMaxTokenIds = 64;

std::optional<int> IntInRange(const json& value, int min, int max) {
  if (!value.is_number_integer()) return std::nullopt;
  // An unsigned value above 2^63 would come out negative as int64.
  if (value.is_number_unsigned() && value.get<uint64_t>() > INT32_MAX) return std::nullopt;
  const int64_t number = value.get<int64_t>();
  if (number < min || number > max) return std::nullopt;
  return static_cast<int>(number);
}

}  // namespace

void ConfigReader::Fail(std::string_view key, std::string_view expected, std::string_view got) {
  if (!status_.ok()) return;
  status_ = absl::InvalidArgumentError(absl::StrCat(
      std::string(key), ": expected ", std::string(expected), ", got ", std::string(got)));
}

void ConfigReader::Fail(std::string_view key, std::string_view expected) {
  const json* value = Take(key);
  Fail(key, expected, value == nullptr ? "nothing" : DescribeJson(*value));
}

const json* ConfigReader::Take(std::string_view key) {
  known_.insert(key);
  const auto it = object_.find(std::string(key));
  return it == object_.end() ? nullptr : &*it;
}

bool ConfigReader::IsAbsentOrNull(std::string_view key) {
  const json* value = Take(key);
  return value == nullptr || value->is_null();
}

int ConfigReader::Int(std::string_view key, int absent, int min, int max) {
  const json* value = Take(key);
  if (value == nullptr) return absent;
  if (const std::optional<int> number = IntInRange(*value, min, max)) return *number;
  Fail(key, absl::StrCat("an integer from ", min, " to ", max));
  return absent;
}

double ConfigReader::Number(std::string_view key, double absent, double min, double max) {
  const json* value = Take(key);
  if (value == nullptr) return absent;
  if (value->is_number()) {
    const double number = value->get<double>();
    if (number >= min && number <= max) return number;
  }
  Fail(key, absl::StrCat("a number from ", min, " to ", max));
  return absent;
}

bool ConfigReader::Bool(std::string_view key, bool absent) {
  const json* value = Take(key);
  if (value == nullptr) return absent;
  if (value->is_boolean()) return value->get<bool>();
  Fail(key, "true or false");
  return absent;
}

std::optional<int> ConfigReader::OptionalInt(std::string_view key, int min, int max) {
  if (IsAbsentOrNull(key)) return std::nullopt;
  return Int(key, min, min, max);
}

std::optional<double> ConfigReader::OptionalNumber(std::string_view key, double min, double max) {
  if (IsAbsentOrNull(key)) return std::nullopt;
  return Number(key, min, min, max);
}

std::vector<int> ConfigReader::TokenIds(std::string_view key, int absent, int vocab_size) {
  const json* value = Take(key);
  if (value == nullptr) return absent < vocab_size ? std::vector<int>{absent} : std::vector<int>{};
  if (value->is_null()) return {};
  std::vector<int> ids;
  const json list = value->is_array() ? *value : json::array({*value});
  for (const json& item : list) {
    const std::optional<int> id = IntInRange(item, 0, vocab_size - 1);
    if (!id.has_value() || ids.size() == kMaxTokenIds) {
      Fail(key, absl::StrCat("a token id below vocab_size (", vocab_size, "), a list of at most ",
                             kMaxTokenIds, " such, or null"));
      return {};
    }
    ids.push_back(*id);
  }
  return ids;
}

void ConfigReader::Only(std::string_view key, const json& allowed, std::string_view why) {
  const json* value = Take(key);
  if (value == nullptr || *value == allowed) return;
  Fail(key, absl::StrCat(allowed.dump(), " (", std::string(why), ")"));
}

absl::Status ConfigReader::Finish(absl::Span<const std::string_view> ignored) {
  known_.insert(ignored.begin(), ignored.end());
  for (const auto& [key, value] : object_.items()) {
    if (!status_.ok()) break;
    if (known_.count(key) > 0) continue;
    status_ = absl::InvalidArgumentError(
        absl::StrCat(QuoteForMessage(key), ": unknown key (", DescribeJson(value),
                     "); it may change what the model computes, so it is not ignored"));
  }
  return status_;
}

}  // namespace gla
