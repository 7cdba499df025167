#include "model/tokenizer.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/model_file.h"
#include "model/tokenizer/sentencepiece_tokenizer.h"
#include "model/tokenizer/tokenizer_config.h"
#include "model/tokenizer/tokenizer_json.h"
#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

constexpr size_t kMaxTokenizerBytes = size_t{64} << 20;  // the largest real ones are half of it
constexpr size_t kMaxConfigBytes = size_t{16} << 20;

using TokenizerPtr = std::unique_ptr<Tokenizer>;

absl::Status InFile(const std::string& path, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

// Nothing when the folder has no such file.
absl::StatusOr<std::string> PathIfThere(const std::string& folder, std::string_view name) {
  absl::StatusOr<std::string> path = ResolveBelow(folder, name);
  if (absl::IsNotFound(path.status())) return std::string();
  return path;
}

absl::StatusOr<TokenizerConfig> LoadConfig(const std::string& folder) {
  GLA_ASSIGN_OR_RETURN(const std::string path, PathIfThere(folder, "tokenizer_config.json"));
  if (path.empty()) return TokenizerConfig();
  GLA_ASSIGN_OR_RETURN(const std::string text, ReadModelFile(path, kMaxConfigBytes));
  absl::StatusOr<TokenizerConfig> config = ParseTokenizerConfig(text);
  if (!config.ok()) return InFile(path, config.status());
  return config;
}

}  // namespace

absl::StatusOr<TokenizerPtr> Tokenizer::Load(const std::string& folder) {
  GLA_ASSIGN_OR_RETURN(const TokenizerConfig config, LoadConfig(folder));
  // The order of the transformers library, which checkpoints are trained with.
  GLA_ASSIGN_OR_RETURN(std::string path, PathIfThere(folder, "tokenizer.json"));
  const bool is_json = !path.empty();
  if (!is_json) {
    GLA_ASSIGN_OR_RETURN(path, PathIfThere(folder, "tokenizer.model"));
  }
  if (path.empty()) {
    return absl::NotFoundError(absl::StrCat(
        folder, ": no tokenizer: expected tokenizer.json or tokenizer.model in the folder"));
  }
  GLA_ASSIGN_OR_RETURN(const std::string bytes, ReadModelFile(path, kMaxTokenizerBytes));
  absl::StatusOr<TokenizerPtr> tokenizer =
      is_json ? ParseTokenizerJson(bytes, config) : ParseSentencePiece(bytes, config);
  if (!tokenizer.ok()) return InFile(path, tokenizer.status());
  return tokenizer;
}

absl::StatusOr<std::string> Tokenizer::Decode(absl::Span<const int32_t> ids,
                                              bool skip_special) const {
  std::string text;
  StreamDecoder decoder(*this, /*at_start=*/true, skip_special);
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("token id: expected 0 to ", vocab_size() - 1, ", got ", id));
    }
    text += decoder.Add(id);
  }
  return text + decoder.Finish();
}

bool Tokenizer::BeginsText(int32_t id, bool skip_special) const {
  return !TokenBytes(id, /*at_start=*/false, skip_special).empty();
}

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool at_start, bool skip_special)
    : tokenizer_(&tokenizer), at_start_(at_start), skip_special_(skip_special) {}

std::string StreamDecoder::Add(int32_t id) {
  pending_ += tokenizer_->TokenBytes(id, at_start_, skip_special_);
  if (at_start_) at_start_ = !tokenizer_->BeginsText(id, skip_special_);
  std::string text;
  RepairUtf8(/*at_end=*/false, tokenizer_->bad_bytes(), &pending_, &text);
  return text;
}

std::string StreamDecoder::Finish() {
  std::string text;
  RepairUtf8(/*at_end=*/true, tokenizer_->bad_bytes(), &pending_, &text);
  return text;
}

}  // namespace gla
