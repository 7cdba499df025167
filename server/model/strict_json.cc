#include "model/strict_json.h"

#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace gla {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxQuoted = 120;

// Builds the value from the parser's events and stops it at the first event that breaks a rule.
class StrictBuilder : public nlohmann::json_sax<json> {
 public:
  explicit StrictBuilder(size_t max_values) : max_values_(max_values) {}

  bool null() override { return Add(nullptr) != nullptr; }
  bool boolean(bool value) override { return Add(value) != nullptr; }
  bool number_integer(number_integer_t value) override { return Add(value) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return Add(value) != nullptr; }
  bool number_float(number_float_t value, const string_t&) override {
    return Add(value) != nullptr;
  }
  bool string(string_t& value) override { return Add(std::move(value)) != nullptr; }
  bool binary(binary_t&) override { return Refuse("binary value"); }
  bool start_object(size_t) override { return Open(json::object()); }
  bool start_array(size_t) override { return Open(json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    if (open_.back()->contains(name)) {
      return Refuse(absl::StrCat("name ", QuoteForMessage(name), " appears twice in one object"));
    }
    key_ = std::move(name);
    return true;
  }
  bool parse_error(size_t position, const std::string&, const json::exception&) override {
    return Refuse(absl::StrCat("not valid JSON at byte ", position));
  }

  const std::string& error() const { return error_; }
  json TakeValue() { return std::move(root_); }

 private:
  bool Refuse(std::string error) {
    error_ = std::move(error);
    return false;
  }
  json* Add(json value) {
    if (++num_values_ > max_values_) {
      Refuse(absl::StrCat("more than ", max_values_, " JSON values"));
      return nullptr;
    }
    if (open_.empty()) return &(root_ = std::move(value));
    json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[key_] = std::move(value));
  }
  bool Open(json container) {
    if (open_.size() == kMaxDepth) {
      return Refuse(absl::StrCat("JSON nested deeper than ", kMaxDepth));
    }
    json* added = Add(std::move(container));
    if (added == nullptr) return false;
    open_.push_back(added);
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  const size_t max_values_;
  size_t num_values_ = 0;
  json root_;
  // A parent never grows while a child is open, so these stay valid.
  std::vector<json*> open_;
  std::string key_;
  std::string error_;
};

}  // namespace

absl::StatusOr<json> ParseJson(std::string_view text, size_t max_values) {
  StrictBuilder builder(max_values);
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    return absl::InvalidArgumentError(builder.error());
  }
  return builder.TakeValue();
}

std::string QuoteForMessage(std::string_view text) {
  const bool cut = text.size() > kMaxQuoted;
  return absl::StrCat("\"", absl::CHexEscape({text.data(), cut ? kMaxQuoted : text.size()}),
                      cut ? "...\"" : "\"");
}

std::string DescribeJson(const json& value) {
  if (value.is_string()) return QuoteForMessage(value.get_ref<const std::string&>());
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > kMaxQuoted) text = absl::StrCat(text.substr(0, kMaxQuoted), "...");
  return text;
}

}  // namespace gla
