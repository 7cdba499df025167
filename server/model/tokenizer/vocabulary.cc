#include "model/tokenizer/vocabulary.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "model/strict_json.h"

namespace gla {
namespace {

using nlohmann::json;

absl::Status Wrong(std::string_view piece, std::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat("token ", QuoteForMessage(piece), ": ", std::string(what)));
}

}  // namespace

absl::StatusOr<Vocabulary> Vocabulary::Make(const json& vocab,
                                            const std::vector<AddedToken>& added) {
  int64_t max_id = -1;
  for (const auto& [piece, id] : vocab.items()) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > kMaxTokenId) {
      return Wrong(piece, absl::StrCat("expected an id from 0 to ", kMaxTokenId, ", got ",
                                       DescribeJson(id)));
    }
    if (piece.size() > kMaxTokenBytes) {
      return Wrong(piece,
                   absl::StrCat("expected at most ", kMaxTokenBytes, " bytes, got ", piece.size()));
    }
    max_id = std::max(max_id, id.get<int64_t>());
  }
  for (const AddedToken& token : added) max_id = std::max<int64_t>(max_id, token.id);
  // So that memory is in proportion to the file.
  const int64_t limit = 2 * static_cast<int64_t>(vocab.size() + added.size()) + 65536;
  if (max_id < 0 || max_id >= limit) {
    return absl::InvalidArgumentError(absl::StrCat(
        "vocabulary: expected ids below ", limit, " for ", vocab.size(), " tokens and ",
        added.size(), " added ones, got ", max_id < 0 ? "no token" : absl::StrCat(max_id)));
  }
  Vocabulary made;
  made.pieces_.resize(max_id + 1);
  made.is_added_only_.resize(max_id + 1);
  made.ids_.reserve(vocab.size() + added.size());
  std::vector<bool> taken(max_id + 1);
  const auto put = [&](const std::string& piece, int32_t id) {
    if (taken[id]) {
      return Wrong(piece, absl::StrCat("expected an id of its own, got ", id, " of ",
                                       QuoteForMessage(made.pieces_[id])));
    }
    taken[id] = true;
    made.pieces_[id] = piece;
    made.ids_.emplace(made.pieces_[id], id);
    return absl::OkStatus();
  };
  for (const auto& [piece, id] : vocab.items()) {
    if (absl::Status status = put(piece, id.get<int32_t>()); !status.ok()) return status;
  }
  for (const AddedToken& token : added) {
    if (const int32_t known = made.Find(token.content); known >= 0) {
      if (known == token.id) continue;
      return Wrong(token.content,
                   absl::StrCat("expected id ", known, " as in the vocabulary, got ", token.id));
    }
    if (absl::Status status = put(token.content, token.id); !status.ok()) return status;
    made.is_added_only_[token.id] = true;
  }
  return made;
}

int32_t Vocabulary::Find(std::string_view piece) const {
  const auto it = ids_.find(absl::string_view(piece.data(), piece.size()));
  return it == ids_.end() ? -1 : it->second;
}

int32_t Vocabulary::FindInModel(std::string_view piece) const {
  const int32_t id = Find(piece);
  return id >= 0 && is_added_only_[id] ? -1 : id;
}

}  // namespace gla
