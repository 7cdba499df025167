#include "model/tokenizer/bpe.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/config_reader.h"
#include "model/strict_json.h"
#include "model/tokenizer/byte_token.h"
#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

using nlohmann::json;

uint64_t Pair(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

// The two sides of a merge, "a b" or ["a", "b"].
bool Sides(const json& merge, std::string_view* left, std::string_view* right) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    *left = merge[0].get_ref<const std::string&>();
    *right = merge[1].get_ref<const std::string&>();
    return true;
  }
  if (!merge.is_string()) return false;
  const std::string_view text = merge.get_ref<const std::string&>();
  const size_t space = text.find(' ');
  if (space == text.npos || text.find(' ', space + 1) != text.npos) return false;
  *left = text.substr(0, space);
  *right = text.substr(space + 1);
  return true;
}

// The heap's top is the merge of lowest rank, of those the leftmost.
bool IsWorse(const Bpe::Merge& a, const Bpe::Merge& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.left > b.left;
}

}  // namespace

absl::StatusOr<Bpe> Bpe::Parse(const json& model, const Vocabulary& vocabulary) {
  Bpe bpe;
  ConfigReader reader(model);
  reader.Take("type");
  reader.Take("vocab");
  if (!reader.IsAbsentOrNull("dropout")) reader.Only("dropout", 0.0, "encoding is not random");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!reader.IsAbsentOrNull(key)) reader.Only(key, "", "not supported");
  }
  bpe.fuse_unk_ = reader.Bool("fuse_unk", false);
  bpe.byte_fallback_ = reader.Bool("byte_fallback", false);
  bpe.ignore_merges_ = reader.Bool("ignore_merges", false);
  if (!reader.IsAbsentOrNull("unk_token")) {
    const json& unk = *reader.Take("unk_token");
    if (unk.is_string()) bpe.unk_id_ = vocabulary.FindInModel(unk.get_ref<const std::string&>());
    if (bpe.unk_id_ < 0) reader.Fail("unk_token", "a token of the vocabulary");
  }
  const json* merges = reader.Take("merges");
  if (merges == nullptr || !merges->is_array()) reader.Fail("merges", "a list");
  GLA_RETURN_IF_ERROR(reader.Finish({}));
  GLA_RETURN_IF_ERROR(bpe.ReadMerges(*merges, vocabulary));
  for (int32_t id = 0; id < vocabulary.size(); ++id) {
    const std::string& piece = vocabulary.Piece(id);
    if (piece.empty() || piece.size() > 4 || vocabulary.FindInModel(piece) < 0) continue;
    size_t at = 0;
    const char32_t c = NextCharacter(piece, &at);
    if (at == piece.size()) bpe.characters_.emplace(c, id);
  }
  for (int byte = 0; byte < 256 && bpe.byte_fallback_; ++byte) {
    bpe.byte_ids_.push_back(vocabulary.FindInModel(TokenOfByte(byte)));
  }
  return bpe;
}

absl::Status Bpe::ReadMerges(const json& merges, const Vocabulary& vocabulary) {
  rules_.reserve(merges.size());
  int32_t rank = 0;
  for (const json& merge : merges) {
    std::string_view left, right;
    if (!Sides(merge, &left, &right)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "merge ", rank, ": expected \"A B\" or [\"A\", \"B\"], got ", DescribeJson(merge)));
    }
    const std::string whole = std::string(left).append(right);
    int32_t ids[3] = {};
    int i = 0;
    for (const std::string_view piece : {left, right, std::string_view(whole)}) {
      ids[i] = vocabulary.FindInModel(piece);
      if (ids[i++] >= 0) continue;
      return absl::InvalidArgumentError(absl::StrCat("merge ", rank, ": expected tokens of the ",
                                                     "vocabulary, got ", QuoteForMessage(piece)));
    }
    rules_[Pair(ids[0], ids[1])] = {rank++, ids[2]};  // of two equal merges the last one counts
  }
  return absl::OkStatus();
}

void Bpe::SplitIntoCharacters(std::string_view piece, std::vector<Symbol>* symbols) const {
  const auto add = [symbols](int32_t id) {
    const int32_t at = static_cast<int32_t>(symbols->size());
    symbols->push_back({id, at - 1, at + 1});
  };
  // What is unknown is added when it is certain whether more of it follows. Byte tokens do not make
  // that certain: an unknown character comes behind the byte tokens that follow it, as in the
  // reference.
  bool unknown_pending = false;
  for (size_t at = 0; at < piece.size();) {
    const size_t begin = at;
    const char32_t c = NextCharacter(piece, &at);
    if (const auto known = characters_.find(c); known != characters_.end()) {
      if (unknown_pending) add(unk_id_);
      unknown_pending = false;
      add(known->second);
      continue;
    }
    const std::string_view bytes = piece.substr(begin, at - begin);
    const auto id_of = [this](char byte) { return byte_ids_[static_cast<unsigned char>(byte)]; };
    if (byte_fallback_ &&
        std::all_of(bytes.begin(), bytes.end(), [&](char byte) { return id_of(byte) >= 0; })) {
      for (const char byte : bytes) add(id_of(byte));
      continue;
    }
    if (unk_id_ < 0) continue;  // without an unknown token it is dropped, as in the reference
    if (unknown_pending && !fuse_unk_) add(unk_id_);
    unknown_pending = true;
  }
  if (unknown_pending) add(unk_id_);
  if (!symbols->empty()) symbols->back().next = -1;
}

void Bpe::PushIfMerges(int32_t left, Scratch& scratch) const {
  const std::vector<Symbol>& symbols = scratch.symbols;
  if (left < 0 || symbols[left].next < 0) return;
  const auto rule = rules_.find(Pair(symbols[left].id, symbols[symbols[left].next].id));
  if (rule == rules_.end()) return;
  scratch.heap.push_back({rule->second.rank, left, rule->second.id});
  std::push_heap(scratch.heap.begin(), scratch.heap.end(), IsWorse);
}

void Bpe::Encode(const Vocabulary& vocabulary, std::string_view piece, Scratch& scratch,
                 std::vector<int32_t>* ids) const {
  if (ignore_merges_) {
    if (const int32_t whole = vocabulary.FindInModel(piece); whole >= 0) {
      ids->push_back(whole);
      return;
    }
  }
  std::vector<Symbol>& symbols = scratch.symbols;
  symbols.clear();
  scratch.heap.clear();
  SplitIntoCharacters(piece, &symbols);
  for (size_t i = 0; i < symbols.size(); ++i) PushIfMerges(static_cast<int32_t>(i), scratch);
  while (!scratch.heap.empty()) {
    const Merge merge = scratch.heap.front();
    std::pop_heap(scratch.heap.begin(), scratch.heap.end(), IsWorse);
    scratch.heap.pop_back();
    Symbol& left = symbols[merge.left];
    if (left.id < 0 || left.next < 0) continue;
    // The pair may have become another since.
    Symbol& right = symbols[left.next];
    const auto rule = rules_.find(Pair(left.id, right.id));
    if (rule == rules_.end() || rule->second.id != merge.id) continue;
    left.id = merge.id;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[left.next].prev = merge.left;
    PushIfMerges(left.prev, scratch);
    PushIfMerges(merge.left, scratch);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.id >= 0) ids->push_back(symbol.id);
  }
}

}  // namespace gla
