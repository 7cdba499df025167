// Any bytes as tokenizer.json, tokenizer.model or tokenizer_config.json: refused with a message, or
// a tokenizer that encodes and decodes hard text.

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "model/tokenizer.h"
#include "model/tokenizer/sentencepiece_tokenizer.h"
#include "model/tokenizer/tokenizer_config.h"
#include "model/tokenizer/tokenizer_json.h"

namespace {

using gla::Tokenizer;

void Require(bool fact) {
  if (!fact) abort();
}

const std::string& HardText() {
  using std::literals::operator""sv;
  static const std::string text =
      std::string("<s> The  quick\tbrown 12345 ab<end>ab\r\n\n"sv)
          .append("e\xCC\x81 \0 \xE2\x96\x81\xE4\xBD\xA0 \xF0\x9F\x91\x8D\xE2\x80\x8D!!!"sv)
          .append(200, 'a')
          .append(50, ' ');
  return text;
}

void Use(const Tokenizer& tokenizer) {
  Require(tokenizer.vocab_size() > 0 && tokenizer.bos_token_id() < tokenizer.vocab_size() &&
          tokenizer.eos_token_id() < tokenizer.vocab_size());
  for (const bool special : {true, false}) {
    const auto ids = tokenizer.Encode(HardText(), special, special);
    if (!ids.ok()) {
      Require(!ids.status().message().empty());
      continue;
    }
    const auto text = tokenizer.Decode(*ids, special);
    Require(text.ok());
    gla::StreamDecoder decoder(tokenizer, /*at_start=*/true, special);
    std::string streamed;
    for (const int32_t id : *ids) streamed += decoder.Add(id);
    Require(streamed + decoder.Finish() == *text);
  }
  for (const int32_t id : {-1, 0, 1, tokenizer.vocab_size() - 1, tokenizer.vocab_size()}) {
    tokenizer.Piece(id);
    tokenizer.IsSpecial(id);
  }
}

template <typename T>
bool Check(const absl::StatusOr<T>& parsed) {
  if (!parsed.ok()) {
    Require(!parsed.status().message().empty() && parsed.status().message().size() < 4000);
  }
  return parsed.ok();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  if (const auto config = gla::ParseTokenizerConfig(input); Check(config)) {
    // With a model of its own, so that what the configuration says is used.
    const auto tokenizer = gla::ParseTokenizerJson(
        R"({"model": {"type": "BPE", "vocab": {"a": 0, "<s>": 1}, "merges": []},
            "decoder": {"type": "ByteLevel"}})",
        *config);
    if (Check(tokenizer)) Use(**tokenizer);
  }
  if (const auto tokenizer = gla::ParseTokenizerJson(input, {}); Check(tokenizer)) Use(**tokenizer);
  if (const auto tokenizer = gla::ParseSentencePiece(input, {}); Check(tokenizer)) Use(**tokenizer);
  return 0;
}
