#include "model/tokenizer/post_processor.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/strict_json.h"
#include "model/tokenizer/json_steps.h"

namespace gla {
namespace {

using nlohmann::json;

// The one id of a special token that the template names.
absl::StatusOr<int32_t> IdOf(const json& name, const json* special_tokens, int vocab_size) {
  if (name.is_string() && special_tokens != nullptr && special_tokens->is_object()) {
    const auto entry = special_tokens->find(name.get_ref<const std::string&>());
    if (entry != special_tokens->end() && entry->is_object() && entry->contains("ids")) {
      ConfigReader reader(*entry);
      const std::vector<int> ids = reader.TokenIds("ids", -1, vocab_size);
      GLA_RETURN_IF_ERROR(reader.status());
      if (ids.size() == 1) return ids[0];
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "expected one id in \"special_tokens\" for each special token, got ", DescribeJson(name)));
}

absl::Status ReadTemplate(ConfigReader& step, int vocab_size, PostProcessor* out) {
  const json* special_tokens = step.Take("special_tokens");
  const json* single = step.Take("single");
  step.Take("pair");  // for two texts at once
  bool seen_text = false;
  for (const json& item : single != nullptr && single->is_array() ? *single : json::array()) {
    const bool is_text = item.is_object() && item.contains("Sequence");
    const bool is_token = item.is_object() && item.contains("SpecialToken") &&
                          item["SpecialToken"].is_object() && item["SpecialToken"].contains("id");
    if (is_text && !seen_text) {
      seen_text = true;
      continue;
    }
    int32_t& id = seen_text ? out->eos_id : out->bos_id;
    if (!is_token || id >= 0) {
      seen_text = false;
      break;
    }
    GLA_ASSIGN_OR_RETURN(id, IdOf(item["SpecialToken"]["id"], special_tokens, vocab_size));
  }
  if (!seen_text) {
    step.Fail("single", "the text once, with at most one special token on each side");
  }
  return step.status();
}

}  // namespace

absl::StatusOr<PostProcessor> PostProcessor::Parse(const json& value, int vocab_size) {
  PostProcessor out;
  bool has_template = false;
  const auto parse = [&](const std::string& type, ConfigReader& step) -> absl::Status {
    if (type == "ByteLevel") {
      for (const char* key : {"add_prefix_space", "trim_offsets", "use_regex"}) {
        step.Bool(key, true);  // of the places in the text only
      }
      return absl::OkStatus();
    }
    if (type != "TemplateProcessing") {
      return UnknownStep("Sequence, ByteLevel, TemplateProcessing");
    }
    if (has_template) return absl::InvalidArgumentError("expected at most one");
    has_template = true;
    return ReadTemplate(step, vocab_size, &out);
  };
  GLA_RETURN_IF_ERROR(ForEachStep(value, "post_processor", "processors", parse));
  return out;
}

}  // namespace gla
