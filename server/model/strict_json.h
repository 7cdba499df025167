// JSON written by strangers, parsed within bounds.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace gla {

// The value of `text`, or InvalidArgument that says what is wrong and where. Unlike the library's
// own parse, a name twice in one object is refused (not silently the last), nesting is at most 32
// deep, and parsing stops at `max_values` values, so time and memory stay proportional to the
// limits.
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, size_t max_values);

// A name or value from a file, fit for a message: quoted, escaped and cut when long.
std::string QuoteForMessage(std::string_view text);
// A JSON value, fit for a message.
std::string DescribeJson(const nlohmann::json& value);

}  // namespace gla
