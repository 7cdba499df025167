#include "model/tokenizer/tokenizer_config.h"

#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/config_reader.h"
#include "model/strict_json.h"
#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

using nlohmann::json;

constexpr size_t kMaxValues = 2'000'000;

// A token as a string, an object with its "content", or null.
std::optional<std::string> TokenName(ConfigReader& reader, std::string_view key) {
  const json* value = reader.Take(key);
  if (value == nullptr || value->is_null()) return std::nullopt;
  if (value->is_object() && value->contains("content")) value = &(*value)["content"];
  if (value->is_string()) return value->get<std::string>();
  reader.Fail(key, "a string, an object with \"content\", or null");
  return std::nullopt;
}

std::optional<bool> OptionalBool(ConfigReader& reader, std::string_view key) {
  if (reader.IsAbsentOrNull(key)) return std::nullopt;
  return reader.Bool(key, false);
}

absl::Status ReadAddedTokens(const json& object, std::vector<AddedToken>* tokens) {
  if (!object.is_object() || object.size() > kMaxAddedTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("added_tokens_decoder: expected an object of at most ", kMaxAddedTokens,
                     " tokens, got ", DescribeJson(object)));
  }
  std::set<int32_t> ids;
  for (const auto& [key, value] : object.items()) {
    int32_t id;
    if (!absl::SimpleAtoi(key, &id) || id < 0 || id > kMaxTokenId || !ids.insert(id).second) {
      return absl::InvalidArgumentError(absl::StrCat(
          "added_tokens_decoder: expected distinct token ids, got ", QuoteForMessage(key)));
    }
    GLA_ASSIGN_OR_RETURN(AddedToken token, ParseAddedToken(value));
    token.id = id;
    tokens->push_back(std::move(token));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<AddedToken> ParseAddedToken(const json& value) {
  if (!value.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat("added token: expected an object, got ", DescribeJson(value)));
  }
  ConfigReader reader(value);
  AddedToken token;
  const json* content = reader.Take("content");
  if (content != nullptr && content->is_string()) token.content = content->get<std::string>();
  if (token.content.empty() || token.content.size() > kMaxTokenBytes) {
    reader.Fail("content", absl::StrCat("a string of 1 to ", kMaxTokenBytes, " bytes"));
  }
  token.id = reader.Int("id", -1, 0, kMaxTokenId);
  token.special = reader.Bool("special", false);
  token.single_word = reader.Bool("single_word", false);
  token.lstrip = reader.Bool("lstrip", false);
  token.rstrip = reader.Bool("rstrip", false);
  token.normalized = reader.Bool("normalized", !token.special);
  if (absl::Status status = reader.Finish({"__type"}); !status.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("added token ", QuoteForMessage(token.content), ": ", status.message()));
  }
  return token;
}

absl::StatusOr<TokenizerConfig> ParseTokenizerConfig(std::string_view text) {
  GLA_ASSIGN_OR_RETURN(const json root, ParseJson(text, kMaxValues));
  if (!root.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected a JSON object, got ", DescribeJson(root)));
  }
  ConfigReader reader(root);
  TokenizerConfig config;
  config.bos_token = TokenName(reader, "bos_token");
  config.eos_token = TokenName(reader, "eos_token");
  config.add_bos_token = OptionalBool(reader, "add_bos_token");
  config.add_eos_token = OptionalBool(reader, "add_eos_token");
  config.legacy = OptionalBool(reader, "legacy").value_or(true);
  config.add_prefix_space = OptionalBool(reader, "add_prefix_space").value_or(true);
  GLA_RETURN_IF_ERROR(reader.status());
  if (const json* added = reader.Take("added_tokens_decoder"); added != nullptr) {
    GLA_RETURN_IF_ERROR(ReadAddedTokens(*added, &config.added_tokens));
  }
  return config;
}

absl::StatusOr<int32_t> FindNamedToken(const std::optional<std::string>& name, std::string_view key,
                                       const std::function<int32_t(const std::string&)>& find) {
  if (!name.has_value()) return -1;
  const int32_t id = find(*name);
  if (id >= 0) return id;
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(key), " of tokenizer_config.json: expected a token of the ",
                   "vocabulary, got ", QuoteForMessage(*name)));
}

absl::Status CheckAdds(const TokenizerConfig& config, int32_t bos_id, int32_t eos_id) {
  const auto check = [](std::optional<bool> adds, int32_t id, const char* name) {
    if (!adds.value_or(false) || id >= 0) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("add_", name, " of tokenizer_config.json is true: expected a ", name));
  };
  GLA_RETURN_IF_ERROR(check(config.add_bos_token, bos_id, "bos_token"));
  return check(config.add_eos_token, eos_id, "eos_token");
}

}  // namespace gla
