#include "model/tokenizer/token_decoder.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "model/strict_json.h"
#include "model/tokenizer/byte_level.h"
#include "model/tokenizer/byte_token.h"
#include "model/tokenizer/json_steps.h"
#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

using nlohmann::json;

absl::StatusOr<std::pair<std::string, std::string>> TakeReplacement(ConfigReader& step) {
  const json* pattern = step.Take("pattern");
  std::pair<std::string, std::string> replacement;
  replacement.second = TakeText(step, "content");
  if (pattern == nullptr || !pattern->is_object() || pattern->size() != 1 ||
      !pattern->contains("String") || !(*pattern)["String"].is_string() ||
      (*pattern)["String"] == "") {
    step.Fail("pattern", "{\"String\": TEXT}");
    return step.status();
  }
  replacement.first = (*pattern)["String"].get<std::string>();
  return replacement;
}

}  // namespace

absl::StatusOr<TokenDecoder> TokenDecoder::Parse(const json& value) {
  if (value.is_null()) return absl::InvalidArgumentError("decoder: expected one, got null");
  TokenDecoder decoder;
  // Places in the order that is supported; a step of place 0 stands alone.
  int last = -1;
  const auto in_order = [&last](int place) {
    const bool ok = last == -1 || (last > 0 && place >= last);
    last = place;
    return ok ? absl::OkStatus()
              : absl::InvalidArgumentError(
                    "not supported after the steps before it; supported: ByteLevel or Metaspace "
                    "alone, or Replace, ByteFallback, Fuse, Strip in this order");
  };
  const auto parse = [&](const std::string& type, ConfigReader& step) -> absl::Status {
    if (type == "ByteLevel") {
      for (const char* key : {"add_prefix_space", "trim_offsets", "use_regex"}) {
        step.Bool(key, true);  // of the pre-tokenizer only
      }
      decoder.is_byte_level_ = true;
      return in_order(0);
    }
    if (type == "Metaspace") {
      decoder.metaspace_ = TakeMetaspace(step);
      return in_order(0);
    }
    if (type == "Replace") {
      GLA_ASSIGN_OR_RETURN(auto replacement, TakeReplacement(step));
      decoder.replacements_.push_back(std::move(replacement));
      return in_order(1);
    }
    if (type == "ByteFallback") {
      decoder.has_byte_tokens_ = true;
      return in_order(2);
    }
    if (type == "Fuse") return in_order(3);
    if (type != "Strip") {
      return UnknownStep("Sequence, ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip");
    }
    if (last != 3) return absl::InvalidArgumentError("expected a Fuse right before it");
    const std::string content = TakeText(step, "content", 1);
    step.Only("stop", 0, "the end of a text that grows is not known");
    if (step.Int("start", 0, 0, 1) == 1) decoder.stripped_ = content;
    return in_order(4);
  };
  GLA_RETURN_IF_ERROR(ForEachStep(value, "decoder", "decoders", parse));
  return decoder;
}

std::string TokenDecoder::Bytes(std::string_view piece, bool at_start) const {
  if (is_byte_level_) return BytesOfCharacters(piece);
  if (metaspace_.has_value()) return metaspace_->Restore(piece, at_start);
  std::string bytes(piece);
  for (const auto& [from, to] : replacements_) absl::StrReplaceAll({{from, to}}, &bytes);
  if (has_byte_tokens_) {
    if (const int byte = ByteOfToken(bytes); byte >= 0) bytes.assign(1, static_cast<char>(byte));
  }
  if (at_start && !stripped_.empty() && bytes.starts_with(stripped_)) {
    bytes.erase(0, stripped_.size());
  }
  return bytes;
}

}  // namespace gla
