// tokenizer_config.json: which tokens begin and end a text, and tokens added to the vocabulary.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace gla {

// Ids and sizes far beyond any real vocabulary.
constexpr int kMaxTokenId = (1 << 24) - 1;
constexpr size_t kMaxTokenBytes = 4096;
constexpr size_t kMaxAddedTokens = 1 << 16;

// A token that is found in the text as it stands, before the model sees the rest.
struct AddedToken {
  std::string content;
  int32_t id = -1;
  bool special = false;
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
  bool normalized = false;   // found in the normalized text
};

struct TokenizerConfig {
  std::optional<std::string> bos_token, eos_token;
  std::optional<bool> add_bos_token, add_eos_token;
  // Of SentencePiece tokenizers: whether text after a special token is encoded as text at the start
  // is, with a space before it, and whether text at the start is.
  bool legacy = true;
  bool add_prefix_space = true;
  std::vector<AddedToken> added_tokens;  // with distinct ids
};

// Other keys than the above do not change ids or text and are not looked at.
absl::StatusOr<TokenizerConfig> ParseTokenizerConfig(std::string_view json);

// One element of "added_tokens", or one value of "added_tokens_decoder" (without an id).
absl::StatusOr<AddedToken> ParseAddedToken(const nlohmann::json& value);

// The id of the token that `name`, the value of `key`, names: -1 without a name, InvalidArgument
// when the vocabulary has no such token. `find` gives -1 for those.
absl::StatusOr<int32_t> FindNamedToken(const std::optional<std::string>& name, std::string_view key,
                                       const std::function<int32_t(const std::string&)>& find);

// InvalidArgument when a token that is to be added is missing (-1).
absl::Status CheckAdds(const TokenizerConfig& config, int32_t bos_id, int32_t eos_id);

}  // namespace gla
