#include "model/tokenizer/json_steps.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/strict_json.h"

namespace gla {
namespace {

using nlohmann::json;

constexpr size_t kMaxSteps = 16;

absl::Status Within(std::string_view what, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::InvalidArgumentError(absl::StrCat(std::string(what), ": ", status.message()));
}

}  // namespace

absl::Status ForEachStep(
    const json& value, std::string_view what, std::string_view list_key,
    const std::function<absl::Status(const std::string& type, ConfigReader& step)>& parse) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_object() || !value.contains("type") || !value["type"].is_string()) {
    return Within(what, absl::InvalidArgumentError(absl::StrCat(
                            "expected an object with a \"type\", got ", DescribeJson(value))));
  }
  ConfigReader step(value);
  const std::string type = step.Take("type")->get<std::string>();
  const std::string where = absl::StrCat(std::string(what), " ", QuoteForMessage(type));
  if (type != "Sequence") {
    GLA_RETURN_IF_ERROR(Within(where, parse(type, step)));
    return Within(where, step.Finish({}));
  }
  const json* list = step.Take(list_key);
  if (list == nullptr || !list->is_array() || list->size() > kMaxSteps) {
    step.Fail(list_key, absl::StrCat("a list of at most ", kMaxSteps));
    return Within(where, step.status());
  }
  for (const json& inner : *list) {
    if (inner.is_object() && inner.contains("type") && inner["type"] == "Sequence") {
      return Within(where, absl::InvalidArgumentError("a Sequence inside it is not supported"));
    }
    if (inner.is_null())
      return Within(where, absl::InvalidArgumentError("expected a step, got null"));
    GLA_RETURN_IF_ERROR(ForEachStep(inner, what, list_key, parse));
  }
  return Within(where, step.Finish({}));
}

absl::Status UnknownStep(std::string_view supported) {
  return absl::InvalidArgumentError(
      absl::StrCat("type is not supported; supported: ", std::string(supported)));
}

std::string TakeText(ConfigReader& step, std::string_view key, size_t min) {
  const json* value = step.Take(key);
  if (value != nullptr && value->is_string()) {
    const std::string& text = value->get_ref<const std::string&>();
    if (text.size() >= min && text.size() <= kMaxStepText) return text;
  }
  step.Fail(key, absl::StrCat("a string of ", min, " to ", kMaxStepText, " bytes"));
  return std::string();
}

absl::StatusOr<Regex> TakePattern(ConfigReader& step, std::string_view key) {
  const json* value = step.Take(key);
  if (value != nullptr && value->is_object() && value->size() == 1) {
    const std::string& kind = value->begin().key();
    if (value->begin()->is_string()) {
      const std::string& text = value->begin()->get_ref<const std::string&>();
      if (kind == "Regex") return Regex::Compile(text);
      if (kind == "String" && !text.empty()) return Regex::Literal(text);
    }
  }
  step.Fail(key, "{\"String\": TEXT} or {\"Regex\": PATTERN}");
  return step.status();
}

absl::Status CheckGrowth(size_t size, size_t original) {
  if (size <= kMaxGrowth * original + 4096) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("text: the tokenizer's steps make it more than ", kMaxGrowth, " times longer"));
}

}  // namespace gla
