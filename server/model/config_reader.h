// Typed, range-checked reading of one JSON object's keys.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace gla {

// Reads values by key. The first wrong one is kept as the error and every read of a wrong value
// answers its default, so that reading needs no check after each key. Every key read is known;
// Finish() refuses the others. For one thread; the object must outlive it.
class ConfigReader {
 public:
  explicit ConfigReader(const nlohmann::json& object) : object_(object) {}

  const absl::Status& status() const { return status_; }

  // "KEY: expected EXPECTED, got GOT", unless there is an error already. Without `got`: the value.
  void Fail(std::string_view key, std::string_view expected, std::string_view got);
  void Fail(std::string_view key, std::string_view expected);

  // The value, or null when the key is absent.
  const nlohmann::json* Take(std::string_view key);
  bool IsAbsentOrNull(std::string_view key);

  // The value, or `absent`.
  int Int(std::string_view key, int absent, int min, int max);
  double Number(std::string_view key, double absent, double min, double max);
  bool Bool(std::string_view key, bool absent);
  // Nothing when absent or null.
  std::optional<int> OptionalInt(std::string_view key, int min, int max);
  std::optional<double> OptionalNumber(std::string_view key, double min, double max);
  // One id, a short list of ids, or null (none); when the key is absent, `absent` if it is an id.
  std::vector<int> TokenIds(std::string_view key, int absent, int vocab_size);
  // A key that may be absent but has only one value that is supported.
  void Only(std::string_view key, const nlohmann::json& allowed, std::string_view why);

  // The first error; or one that names a key that was neither read nor is in `ignored`.
  absl::Status Finish(absl::Span<const std::string_view> ignored);

 private:
  const nlohmann::json& object_;
  std::set<std::string_view, std::less<>> known_;
  absl::Status status_;
};

}  // namespace gla
