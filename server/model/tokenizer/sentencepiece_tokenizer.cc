#include "model/tokenizer/sentencepiece_tokenizer.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "model/strict_json.h"
#include "model/tokenizer/added_tokens.h"
#include "model/tokenizer/byte_token.h"
#include "model/tokenizer/sentencepiece_check.h"
#include "model/tokenizer/sentencepiece_library.h"
#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, a space as pieces spell it

// A field of a message that stands twice counts as the last one says: normalizer_spec {
// add_dummy_prefix: false }.
constexpr std::string_view kNoDummyPrefix("\x1A\x02\x18\x00", 4);

absl::StatusOr<std::unique_ptr<SentencePieceLibrary>> LoadLibrary(std::string_view model) {
  std::string error;
  auto library = SentencePieceLibrary::Load(model, &error);
  if (library == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("SentencePiece model: ", error));
  }
  return library;
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Make(std::string_view model,
                                                         const TokenizerConfig& config);

  int vocab_size() const override { return vocab_size_; }
  int bos_token_id() const override { return bos_id_; }
  int eos_token_id() const override { return eos_id_; }
  bool adds_bos() const override { return adds_bos_; }
  bool adds_eos() const override { return adds_eos_; }

  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool add_special,
                                              bool parse_special) const override;
  std::string Piece(int32_t id) const override;
  bool IsSpecial(int32_t id) const override;
  std::string TokenBytes(int32_t id, bool at_start, bool skip_special) const override;
  bool BeginsText(int32_t id, bool skip_special) const override;
  BadBytes bad_bytes() const override { return BadBytes::kEachByte; }

 private:
  bool IsPiece(int32_t id) const { return id >= 0 && id < library_->size(); }
  absl::Status ReadAddedTokens(const TokenizerConfig& config);
  absl::Status SetBeginAndEnd(const TokenizerConfig& config);
  int32_t Find(const std::string& piece) const;

  std::unique_ptr<SentencePieceLibrary> library_;
  std::unique_ptr<SentencePieceLibrary> without_prefix_;  // null: not needed
  SentencePieceModel spec_;
  bool prefix_at_start_ = true;  // else no text gets the model's space before it
  bool prefix_everywhere_ = true;
  AddedTokens added_;
  absl::flat_hash_map<int32_t, AddedToken> added_only_;  // beyond the model's pieces
  std::vector<bool> is_special_;                         // by id
  int vocab_size_ = 0;
  int32_t bos_id_ = -1, eos_id_ = -1;
  bool adds_bos_ = false, adds_eos_ = false;
};

absl::StatusOr<std::unique_ptr<Tokenizer>> SentencePieceTokenizer::Make(
    std::string_view model, const TokenizerConfig& config) {
  auto made = std::make_unique<SentencePieceTokenizer>();
  GLA_ASSIGN_OR_RETURN(made->spec_, CheckSentencePieceModel(model));
  made->spec_.user_defined.clear();  // views of `model`
  GLA_ASSIGN_OR_RETURN(made->library_, LoadLibrary(model));
  made->prefix_at_start_ = config.add_prefix_space;
  made->prefix_everywhere_ = config.legacy && config.add_prefix_space;
  if (made->spec_.add_dummy_prefix && !made->prefix_everywhere_) {
    GLA_ASSIGN_OR_RETURN(made->without_prefix_,
                         LoadLibrary(std::string(model).append(kNoDummyPrefix)));
  }
  made->vocab_size_ = made->library_->size();
  GLA_RETURN_IF_ERROR(made->ReadAddedTokens(config));
  GLA_RETURN_IF_ERROR(made->SetBeginAndEnd(config));
  return made;
}

absl::Status SentencePieceTokenizer::ReadAddedTokens(const TokenizerConfig& config) {
  is_special_.resize(library_->size());
  // The configuration's first: it may say more about a control piece.
  for (const AddedToken& token : config.added_tokens) {
    const std::string known = IsPiece(token.id) ? library_->Piece(token.id) : "";
    const int32_t id = IsPiece(token.id) ? token.id : Find(token.content);
    if (id >= 0 && (id != token.id || known != token.content)) {
      return absl::InvalidArgumentError(
          absl::StrCat("added_tokens_decoder: token ", token.id, ": expected ",
                       QuoteForMessage(library_->Piece(id)), " as id ", id, ", got ",
                       QuoteForMessage(token.content)));
    }
    const int limit = library_->size() + static_cast<int>(kMaxAddedTokens);
    if (token.id >= limit) {
      return absl::InvalidArgumentError(
          absl::StrCat("added_tokens_decoder: expected ids below ", limit, ", got ", token.id));
    }
    if (token.id >= static_cast<int>(is_special_.size())) is_special_.resize(token.id + 1);
    is_special_[token.id] = token.special;
    if (id < 0) added_only_.emplace(token.id, token);
    vocab_size_ = std::max(vocab_size_, token.id + 1);
    added_.Add(token, token.content);
  }
  for (int32_t id = 0; id < library_->size(); ++id) {
    if (!library_->IsControl(id)) continue;
    is_special_[id] = true;
    const AddedToken token{.content = library_->Piece(id), .id = id, .special = true};
    added_.Add(token, token.content);
  }
  return absl::OkStatus();
}

absl::Status SentencePieceTokenizer::SetBeginAndEnd(const TokenizerConfig& config) {
  const auto find = [this](const std::string& name) { return Find(name); };
  GLA_ASSIGN_OR_RETURN(bos_id_, FindNamedToken(config.bos_token, "bos_token", find));
  GLA_ASSIGN_OR_RETURN(eos_id_, FindNamedToken(config.eos_token, "eos_token", find));
  if (bos_id_ < 0) bos_id_ = library_->bos_id();
  if (eos_id_ < 0) eos_id_ = library_->eos_id();
  adds_bos_ = config.add_bos_token.value_or(bos_id_ >= 0);
  adds_eos_ = config.add_eos_token.value_or(false);
  return CheckAdds(config, bos_id_, eos_id_);
}

int32_t SentencePieceTokenizer::Find(const std::string& piece) const {
  if (const int32_t id = library_->Find(piece); id >= 0) return id;
  for (const auto& [added_id, token] : added_only_) {
    if (token.content == piece) return added_id;
  }
  return -1;
}

absl::StatusOr<std::vector<int32_t>> SentencePieceTokenizer::Encode(std::string_view text,
                                                                    bool add_special,
                                                                    bool parse_special) const {
  GLA_RETURN_IF_ERROR(CheckText(text));
  std::vector<int32_t> ids;
  if (add_special && adds_bos_) ids.push_back(bos_id_);
  for (const Segment& segment : added_.Split(text, parse_special)) {
    if (segment.id >= 0) {
      ids.push_back(segment.id);
      continue;
    }
    const bool with_prefix = prefix_everywhere_ || (prefix_at_start_ && segment.begin == 0);
    const SentencePieceLibrary& library =
        with_prefix || without_prefix_ == nullptr ? *library_ : *without_prefix_;
    std::vector<int32_t> part_ids;
    std::string error;
    if (!library.Encode(text.substr(segment.begin, segment.end - segment.begin), &part_ids,
                        &error)) {
      return absl::InvalidArgumentError(absl::StrCat("text: ", error));
    }
    ids.insert(ids.end(), part_ids.begin(), part_ids.end());
  }
  if (add_special && adds_eos_) ids.push_back(eos_id_);
  return ids;
}

std::string SentencePieceTokenizer::Piece(int32_t id) const {
  if (IsPiece(id)) return library_->Piece(id);
  const auto added = added_only_.find(id);
  return added == added_only_.end() ? "" : added->second.content;
}

bool SentencePieceTokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < static_cast<int32_t>(is_special_.size()) && is_special_[id];
}

std::string SentencePieceTokenizer::TokenBytes(int32_t id, bool at_start, bool skip_special) const {
  if (IsSpecial(id)) return skip_special ? "" : Piece(id);
  if (!IsPiece(id)) return Piece(id);
  if (library_->IsUnknown(id)) return library_->unknown_text();
  const std::string piece = library_->Piece(id);
  if (library_->IsByte(id)) return std::string(1, static_cast<char>(ByteOfToken(piece)));
  std::string_view text = piece;
  const bool drops_space = spec_.add_dummy_prefix || spec_.remove_extra_whitespaces;
  if (at_start && drops_space && text.starts_with(kSpace)) text.remove_prefix(kSpace.size());
  return absl::StrReplaceAll({text.data(), text.size()}, {{{kSpace.data(), kSpace.size()}, " "}});
}

bool SentencePieceTokenizer::BeginsText(int32_t id, bool skip_special) const {
  // A model that removes extra white space leaves none at the start, however many tokens it is.
  return !TokenBytes(id, spec_.remove_extra_whitespaces, skip_special).empty();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseSentencePiece(std::string_view model,
                                                              const TokenizerConfig& config) {
  return SentencePieceTokenizer::Make(model, config);
}

}  // namespace gla
