// Checks a SentencePiece model file before the library reads it.
//
// The library trusts its file: it follows the offsets of the normalization trie without bounds and
// keeps matches in arrays of a fixed size. What it does not check itself is checked here.
#pragma once

#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace gla {

struct SentencePieceModel {
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  std::vector<std::string_view> user_defined;  // views of the file's bytes
};

// InvalidArgument that names what is wrong.
absl::StatusOr<SentencePieceModel> CheckSentencePieceModel(std::string_view file);

// The "precompiled_charsmap" of a model: a trie of replacements and their texts.
absl::Status CheckCharsMap(std::string_view blob);

}  // namespace gla
