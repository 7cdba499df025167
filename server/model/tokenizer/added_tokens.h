// Finds added and special tokens in a text before the model sees what lies between them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "model/tokenizer/tokenizer_config.h"

namespace gla {

// A stretch of a text: a token (id >= 0), or text between tokens.
struct Segment {
  size_t begin, end;
  int32_t id = -1;
};

// A set of tokens, found from left to right, the longest first. Const after the last Add().
class AddedTokens {
 public:
  // `pattern` is what is looked for: the token's content, normalized where it wants to be. Empty
  // patterns and those that were added before are not looked for.
  void Add(AddedToken token, std::string_view pattern);

  // The text, cut into tokens and what is between them. Without `parse_special` special tokens are
  // ordinary text. REQUIRES: text is valid UTF-8.
  std::vector<Segment> Split(std::string_view text, bool parse_special) const;

 private:
  // The longest token that begins at text[at], null when none does.
  const AddedToken* Match(std::string_view text, size_t at, size_t* length) const;

  std::vector<AddedToken> tokens_;
  // A trie: node 0 is the root; (node, byte) leads to a node; a node may end a token.
  absl::flat_hash_map<uint64_t, uint32_t> edges_;
  std::vector<int32_t> ends_{-1};  // by node, an index of tokens_
  bool begins_[256] = {};          // bytes that begin a token
};

}  // namespace gla
