#include "model/tokenizer/tokenizer_json.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/config_reader.h"
#include "model/strict_json.h"
#include "model/tokenizer/added_tokens.h"
#include "model/tokenizer/bpe.h"
#include "model/tokenizer/normalizer.h"
#include "model/tokenizer/post_processor.h"
#include "model/tokenizer/pre_tokenizer.h"
#include "model/tokenizer/token_decoder.h"
#include "model/tokenizer/utf8.h"
#include "model/tokenizer/vocabulary.h"

namespace gla {
namespace {

using nlohmann::json;

constexpr size_t kMaxValues = 8'000'000;

struct Parts {
  Vocabulary vocabulary;
  Bpe bpe;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  TokenDecoder decoder;
  AddedTokens raw{};         // found in the text as it comes
  AddedTokens normalized{};  // found in the normalized text
  absl::flat_hash_set<int32_t> special_ids{};
  int32_t bos_id = -1, eos_id = -1;        // of a text
  int32_t prefix_id = -1, suffix_id = -1;  // what `add_special` adds, -1: nothing
};

class JsonTokenizer : public Tokenizer {
 public:
  explicit JsonTokenizer(Parts parts) : parts_(std::move(parts)) {}

  int vocab_size() const override { return parts_.vocabulary.size(); }
  int bos_token_id() const override { return parts_.bos_id; }
  int eos_token_id() const override { return parts_.eos_id; }
  bool adds_bos() const override { return parts_.prefix_id >= 0; }
  bool adds_eos() const override { return parts_.suffix_id >= 0; }

  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool add_special,
                                              bool parse_special) const override;
  std::string Piece(int32_t id) const override {
    return id < 0 || id >= vocab_size() ? "" : parts_.vocabulary.Piece(id);
  }
  bool IsSpecial(int32_t id) const override { return parts_.special_ids.contains(id); }
  std::string TokenBytes(int32_t id, bool at_start, bool skip_special) const override {
    if (id < 0 || id >= vocab_size() || (skip_special && IsSpecial(id))) return "";
    return parts_.decoder.Bytes(parts_.vocabulary.Piece(id), at_start);
  }
  BadBytes bad_bytes() const override { return parts_.decoder.bad_bytes(); }

 private:
  const Parts parts_;
};

absl::StatusOr<std::vector<int32_t>> JsonTokenizer::Encode(std::string_view text, bool add_special,
                                                           bool parse_special) const {
  GLA_RETURN_IF_ERROR(CheckText(text));
  std::vector<int32_t> ids;
  if (add_special && parts_.prefix_id >= 0) ids.push_back(parts_.prefix_id);
  WorkBudget budget(text.size());
  Bpe::Scratch scratch;
  for (const Segment& segment : parts_.raw.Split(text, parse_special)) {
    if (segment.id >= 0) {
      ids.push_back(segment.id);
      continue;
    }
    GLA_ASSIGN_OR_RETURN(
        const std::string normalized,
        parts_.normalizer.Apply(text.substr(segment.begin, segment.end - segment.begin), budget));
    for (const Segment& part : parts_.normalized.Split(normalized, parse_special)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      const bool at_start = segment.begin == 0 && part.begin == 0;
      GLA_ASSIGN_OR_RETURN(
          const Pieces pieces,
          parts_.pre_tokenizer.Apply(
              std::string_view(normalized).substr(part.begin, part.end - part.begin), at_start,
              budget));
      size_t begin = 0;
      for (const size_t end : pieces.ends) {
        parts_.bpe.Encode(parts_.vocabulary,
                          std::string_view(pieces.text).substr(begin, end - begin), scratch, &ids);
        begin = end;
      }
    }
  }
  if (add_special && parts_.suffix_id >= 0) ids.push_back(parts_.suffix_id);
  return ids;
}

// The file's added tokens, and those of the configuration that the file lacks.
absl::StatusOr<std::vector<AddedToken>> ReadAddedTokens(const json* list,
                                                        const TokenizerConfig& config) {
  std::vector<AddedToken> tokens;
  absl::flat_hash_set<std::string> contents;
  if (list != nullptr && (!list->is_array() || list->size() > kMaxAddedTokens)) {
    return absl::InvalidArgumentError(
        absl::StrCat("added_tokens: expected a list of at most ", kMaxAddedTokens));
  }
  for (const json& value : list == nullptr ? json::array() : *list) {
    GLA_ASSIGN_OR_RETURN(AddedToken token, ParseAddedToken(value));
    if (token.id < 0 || !contents.insert(token.content).second) {
      return absl::InvalidArgumentError(absl::StrCat(
          "added_tokens: expected distinct tokens with an id, got ", DescribeJson(value)));
    }
    tokens.push_back(std::move(token));
  }
  for (const AddedToken& token : config.added_tokens) {
    if (contents.insert(token.content).second) tokens.push_back(token);
  }
  return tokens;
}

absl::Status CheckModel(const json* model) {
  if (model == nullptr || !model->is_object()) {
    return absl::InvalidArgumentError("model: expected an object");
  }
  // Old files do not say the type; among those that have merges it is always BPE.
  const std::string type = model->contains("type") && (*model)["type"].is_string()
                               ? (*model)["type"].get<std::string>()
                               : std::string(model->contains("merges") ? "BPE" : "none");
  if (type != "BPE") {
    return absl::InvalidArgumentError(
        absl::StrCat("model type: expected \"BPE\", got ", QuoteForMessage(type)));
  }
  if (!model->contains("vocab") || !(*model)["vocab"].is_object()) {
    return absl::InvalidArgumentError("model vocab: expected an object");
  }
  return absl::OkStatus();
}

absl::Status AddTokens(const std::vector<AddedToken>& tokens, Parts* parts) {
  size_t bytes = 0;
  for (const AddedToken& token : tokens) bytes += token.content.size();
  WorkBudget budget(bytes);
  for (const AddedToken& token : tokens) {
    if (token.special) parts->special_ids.insert(token.id);
    if (!token.normalized) {
      parts->raw.Add(token, token.content);
      continue;
    }
    GLA_ASSIGN_OR_RETURN(const std::string pattern, parts->normalizer.Apply(token.content, budget));
    parts->normalized.Add(token, pattern);
  }
  return absl::OkStatus();
}

absl::Status SetBeginAndEnd(const TokenizerConfig& config, const PostProcessor& around,
                            Parts* parts) {
  const auto find = [parts](const std::string& name) { return parts->vocabulary.Find(name); };
  GLA_ASSIGN_OR_RETURN(parts->bos_id, FindNamedToken(config.bos_token, "bos_token", find));
  GLA_ASSIGN_OR_RETURN(parts->eos_id, FindNamedToken(config.eos_token, "eos_token", find));
  // The configuration decides; where it is silent, the template does.
  if (parts->bos_id < 0 || !config.add_bos_token.has_value()) {
    if (around.bos_id >= 0) parts->bos_id = around.bos_id;
  }
  if (parts->eos_id < 0) parts->eos_id = around.eos_id;
  if (config.add_bos_token.value_or(around.bos_id >= 0)) parts->prefix_id = parts->bos_id;
  if (config.add_eos_token.has_value()) {
    parts->suffix_id = *config.add_eos_token ? parts->eos_id : -1;
  } else {
    parts->suffix_id = around.eos_id;
  }
  return CheckAdds(config, parts->bos_id, parts->eos_id);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizerJson(std::string_view text,
                                                              const TokenizerConfig& config) {
  GLA_ASSIGN_OR_RETURN(const json root, ParseJson(text, kMaxValues));
  if (!root.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected a JSON object, got ", DescribeJson(root)));
  }
  ConfigReader reader(root);
  reader.Take("version");
  for (const char* key : {"truncation", "padding"}) reader.Only(key, nullptr, "not supported");
  const auto part = [&reader](std::string_view key) {
    const json* value = reader.Take(key);
    return value == nullptr ? json() : *value;
  };
  const json* model = reader.Take("model");
  const json* added = reader.Take("added_tokens");
  const json normalizer_json = part("normalizer");
  const json pre_tokenizer_json = part("pre_tokenizer");
  const json post_processor_json = part("post_processor");
  const json decoder_json = part("decoder");
  GLA_RETURN_IF_ERROR(reader.Finish({}));
  GLA_RETURN_IF_ERROR(CheckModel(model));
  GLA_ASSIGN_OR_RETURN(const std::vector<AddedToken> tokens, ReadAddedTokens(added, config));
  GLA_ASSIGN_OR_RETURN(Vocabulary vocabulary, Vocabulary::Make((*model)["vocab"], tokens));
  GLA_ASSIGN_OR_RETURN(Bpe bpe, Bpe::Parse(*model, vocabulary));
  GLA_ASSIGN_OR_RETURN(Normalizer normalizer, Normalizer::Parse(normalizer_json));
  GLA_ASSIGN_OR_RETURN(PreTokenizer pre_tokenizer, PreTokenizer::Parse(pre_tokenizer_json));
  GLA_ASSIGN_OR_RETURN(TokenDecoder decoder, TokenDecoder::Parse(decoder_json));
  GLA_ASSIGN_OR_RETURN(const PostProcessor around,
                       PostProcessor::Parse(post_processor_json, vocabulary.size()));
  Parts parts{.vocabulary = std::move(vocabulary),
              .bpe = std::move(bpe),
              .normalizer = std::move(normalizer),
              .pre_tokenizer = std::move(pre_tokenizer),
              .decoder = std::move(decoder)};
  GLA_RETURN_IF_ERROR(AddTokens(tokens, &parts));
  GLA_RETURN_IF_ERROR(SetBeginAndEnd(config, around, &parts));
  return std::make_unique<JsonTokenizer>(std::move(parts));
}

}  // namespace gla
