// The decoder of tokenizer.json: what bytes a token stands for.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "model/tokenizer.h"
#include "model/tokenizer/metaspace.h"

namespace gla {

// Const; any thread may use it.
class TokenDecoder {
 public:
  // ByteLevel; Metaspace; or Replace, ByteFallback, Fuse and Strip in this order, each of which may
  // be missing. Only what can be decoded token by token is supported.
  static absl::StatusOr<TokenDecoder> Parse(const nlohmann::json& value);

  // `piece` is the token as the vocabulary spells it. May be a part of a character.
  std::string Bytes(std::string_view piece, bool at_start) const;
  BadBytes bad_bytes() const {
    return is_byte_level_ ? BadBytes::kEachSequence : BadBytes::kEachByte;
  }

 private:
  bool is_byte_level_ = false;
  bool has_byte_tokens_ = false;
  std::optional<Metaspace> metaspace_;
  std::vector<std::pair<std::string, std::string>> replacements_;
  std::string stripped_;  // one such is dropped from the start of a text; may be empty
};

}  // namespace gla
