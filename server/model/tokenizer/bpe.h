// Byte-pair encoding: a piece of text to token ids by merging neighbours, the best pair first.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "model/tokenizer/vocabulary.h"

namespace gla {

// Const; any thread may use it. n bytes take O(n log n).
class Bpe {
 public:
  // `model` is the "model" of tokenizer.json, of type BPE; the vocabulary was made of its "vocab".
  static absl::StatusOr<Bpe> Parse(const nlohmann::json& model, const Vocabulary& vocabulary);

  // Memory that a run of Encode() calls shares.
  struct Symbol {
    int32_t id;          // -1: merged into the one before it
    int32_t prev, next;  // -1: none
  };
  struct Merge {
    int32_t rank, left, id;
  };
  struct Scratch {
    std::vector<Symbol> symbols;
    std::vector<Merge> heap;
  };
  // Adds the tokens of `piece` to `ids`. REQUIRES: piece is valid UTF-8, below 2 GB, and
  // `vocabulary` that of Parse().
  void Encode(const Vocabulary& vocabulary, std::string_view piece, Scratch& scratch,
              std::vector<int32_t>* ids) const;

 private:
  struct Rule {
    int32_t rank, id;
  };

  Bpe() = default;
  absl::Status ReadMerges(const nlohmann::json& merges, const Vocabulary& vocabulary);
  void SplitIntoCharacters(std::string_view piece, std::vector<Symbol>* symbols) const;
  void PushIfMerges(int32_t left, Scratch& scratch) const;

  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
  bool fuse_unk_ = false;
  int32_t unk_id_ = -1;
  std::vector<int32_t> byte_ids_;                      // of byte fallback, -1: none
  absl::flat_hash_map<char32_t, int32_t> characters_;  // tokens of one character
  absl::flat_hash_map<uint64_t, Rule> rules_;          // by the pair of ids
};

}  // namespace gla
