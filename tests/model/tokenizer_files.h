// Small tokenizer files made by a test.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "model/tokenizer/byte_token.h"

namespace gla::testing {

// The parts of a tokenizer.json, as JSON texts. The default is byte-level as GPT-2 over the letters
// a, b, c and a space, with one special token.
struct TokenizerJson {
  std::string vocab = R"({"a": 0, "b": 1, "c": 2, "Ġ": 3, "ab": 4, "Ġab": 5, "abc": 6, "Ã": 7,
                          "©": 8})";
  std::string merges = R"(["a b", "Ġ ab", ["ab", "c"]])";
  std::string model = "";  // more keys, with a comma in front
  std::string added = R"([{"id": 9, "content": "<end>", "special": true}])";
  std::string normalizer = "null";
  std::string pre_tokenizer = R"({"type": "ByteLevel", "add_prefix_space": false})";
  std::string post_processor = "null";
  std::string decoder = R"({"type": "ByteLevel"})";
  std::string more = "";  // more keys of the whole, with a comma in front

  std::string Text() const {
    return absl::StrCat(R"({"version": "1.0", "truncation": null, "padding": null, )",
                        R"("added_tokens": )", added, R"(, "normalizer": )", normalizer,
                        R"(, "pre_tokenizer": )", pre_tokenizer, R"(, "post_processor": )",
                        post_processor, R"(, "decoder": )", decoder,
                        R"(, "model": {"type": "BPE", "vocab": )", vocab, R"(, "merges": )", merges,
                        model, "}", more, "}");
  }
};

// Llama's kind: byte tokens 3 to 258, and "▁", "a", "b", "▁a" after them.
inline TokenizerJson ByteFallbackJson() {
  TokenizerJson json;
  std::string vocab = R"({"<unk>": 0, "<s>": 1, "</s>": 2)";
  for (int byte = 0; byte < 256; ++byte) {
    absl::StrAppend(&vocab, ", \"", TokenOfByte(byte), "\": ", byte + 3);
  }
  json.vocab = vocab + R"(, "▁": 259, "a": 260, "b": 261, "▁a": 262})";
  json.merges = R"(["▁ a"])";
  json.model = R"(, "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true)";
  json.added = R"([{"id": 1, "content": "<s>", "special": true},
                   {"id": 2, "content": "</s>", "special": true}])";
  json.normalizer = R"({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
      {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]})";
  json.pre_tokenizer = "null";
  json.post_processor = R"({"type": "TemplateProcessing", "single": [
      {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}})";
  json.decoder = R"({"type": "Sequence", "decoders": [
      {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
      {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})";
  return json;
}

// ---- SentencePiece models, as protocol buffers --------------------------------------------------

inline std::string Varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes.push_back(static_cast<char>(value | 0x80));
  bytes.push_back(static_cast<char>(value));
  return bytes;
}
inline std::string NumberField(int number, uint64_t value) {
  return Varint(number << 3) + Varint(value);
}
inline std::string BytesField(int number, std::string_view bytes) {
  return Varint(number << 3 | 2) + Varint(bytes.size()) + std::string(bytes);
}
enum PieceKind { kNormalPiece = 1, kUnknownPiece, kControlPiece, kUserDefinedPiece, kUnusedPiece };
inline std::string PieceField(std::string_view piece, PieceKind kind, float score = 0) {
  std::string score_bytes(4, '\0');
  std::memcpy(score_bytes.data(), &score, 4);
  return BytesField(1,
                    BytesField(1, piece) + Varint(2 << 3 | 5) + score_bytes + NumberField(3, kind));
}
// <unk>, <s>, </s> and more, a BPE model; `normalizer` is the NormalizerSpec's fields.
inline std::string SentencePieceFile(const std::string& more_pieces,
                                     const std::string& normalizer = NumberField(4, 0)) {
  return PieceField("<unk>", kUnknownPiece) + PieceField("<s>", kControlPiece) +
         PieceField("</s>", kControlPiece) + more_pieces + BytesField(2, NumberField(3, 2)) +
         BytesField(3, normalizer);
}

}  // namespace gla::testing
