#include "model/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ctime>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>

#include "model/tokenizer/sentencepiece_tokenizer.h"
#include "model/tokenizer/tokenizer_config.h"
#include "model/tokenizer/tokenizer_json.h"
#include "tests/model/model_folder.h"
#include "tests/model/tokenizer_files.h"

namespace gla {
namespace {

using ::gla::testing::ByteFallbackJson;
using ::gla::testing::ModelFolder;
using ::gla::testing::PieceField;
using ::gla::testing::SentencePieceFile;
using ::gla::testing::TokenizerJson;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

using Ids = std::vector<int32_t>;

constexpr char kBad[] = "\xEF\xBF\xBD";  // U+FFFD

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::unique_ptr<Tokenizer> Json(const TokenizerJson& json, std::string_view config = "{}") {
  auto tokenizer = ParseTokenizerJson(json.Text(), *ParseTokenizerConfig(config));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

std::unique_ptr<Tokenizer> SentencePiece(std::string_view model, std::string_view config = "{}") {
  auto tokenizer = ParseSentencePiece(model, *ParseTokenizerConfig(config));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

std::string BardPath() { return std::string(GLA_SOURCE_DIR) + "/deploy/models/bard-6m"; }
const Tokenizer& Bard() {
  static const Tokenizer* const tokenizer = Tokenizer::Load(BardPath()).value().release();
  return *tokenizer;
}

// The tokens' texts as a stream gives them, one by one, and what is left at the end.
std::vector<std::string> Stream(const Tokenizer& tokenizer, const Ids& ids, bool at_start = true,
                                bool skip_special = true) {
  StreamDecoder decoder(tokenizer, at_start, skip_special);
  std::vector<std::string> texts;
  for (const int32_t id : ids) texts.push_back(decoder.Add(id));
  texts.push_back(decoder.Finish());
  return texts;
}

// ---- The model that comes with the project ------------------------------------------------------

TEST(Tokenizer, EncodesThePromptsOfTheReference) {
  const auto expected = nlohmann::json::parse(
      ReadFile(std::string(GLA_SOURCE_DIR) + "/tests/golden/reference/expected.json"));
  ASSERT_FALSE(expected["greedy"].empty());
  for (const auto& run : expected["greedy"]) {
    const auto ids = Bard().Encode(run["prompt"].get<std::string>(), /*add_special=*/true);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, run["prompt_ids"].get<Ids>());
    const Ids all = run["greedy_ids"].get<Ids>();
    std::string text;
    for (const std::string& piece : Stream(Bard(), all)) text += piece;
    EXPECT_EQ(text, run["text"].get<std::string>());
  }
}

TEST(Tokenizer, EncodesTheReferencesTextToItsNumberOfTokens) {
  const std::string text =
      ReadFile(std::string(GLA_SOURCE_DIR) + "/tests/golden/reference/val_kjv.txt");
  const Ids ids = Bard().Encode(text, /*add_special=*/true).value();
  EXPECT_EQ(ids.size(), 61665);
  EXPECT_EQ(ids[0], 1);
  EXPECT_EQ(Bard().Decode(ids).value(), text);
}

TEST(Tokenizer, KnowsItsSpecialTokens) {
  EXPECT_EQ(Bard().vocab_size(), 2048);
  EXPECT_EQ(Bard().bos_token_id(), 1);
  EXPECT_EQ(Bard().eos_token_id(), 2);
  EXPECT_TRUE(Bard().adds_bos());
  EXPECT_FALSE(Bard().adds_eos());
  EXPECT_TRUE(Bard().IsSpecial(1));
  EXPECT_FALSE(Bard().IsSpecial(3));
  EXPECT_FALSE(Bard().IsSpecial(-1));
  EXPECT_FALSE(Bard().IsSpecial(2048));
  EXPECT_EQ(Bard().Piece(3), "<0x00>");
  EXPECT_EQ(Bard().Piece(261), "▁the");
  EXPECT_EQ(Bard().Piece(-1), "");
  EXPECT_EQ(Bard().Piece(2048), "");
}

// ---- Finding the files --------------------------------------------------------------------------

TEST(TokenizerLoad, AFolderWithoutATokenizerIsNotFound) {
  const ModelFolder folder;
  const absl::Status status = Tokenizer::Load(folder.path()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("expected tokenizer.json or"));
}

TEST(TokenizerLoad, TokenizerJsonComesBeforeTokenizerModel) {
  const ModelFolder folder;
  folder.Write("tokenizer.model", ReadFile(BardPath() + "/tokenizer.model"));
  EXPECT_EQ(Tokenizer::Load(folder.path()).value()->vocab_size(), 2048);
  folder.Write("tokenizer.json", TokenizerJson().Text());
  EXPECT_EQ(Tokenizer::Load(folder.path()).value()->vocab_size(), 10);
}

TEST(TokenizerLoad, AnErrorNamesTheFile) {
  const ModelFolder folder;
  folder.Write("tokenizer.json", "{");
  EXPECT_THAT(std::string(Tokenizer::Load(folder.path()).status().message()),
              HasSubstr("/tokenizer.json: not valid JSON"));
  folder.Write("tokenizer_config.json", "[]");
  EXPECT_THAT(std::string(Tokenizer::Load(folder.path()).status().message()),
              HasSubstr("/tokenizer_config.json: expected a JSON object"));
}

// ---- Begin and end tokens -----------------------------------------------------------------------

TEST(BeginAndEnd, TheTemplateDecidesWhereTheConfigurationIsSilent) {
  const auto tokenizer = Json(ByteFallbackJson());
  EXPECT_EQ(tokenizer->bos_token_id(), 1);
  EXPECT_EQ(tokenizer->eos_token_id(), -1);
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_THAT(tokenizer->Encode("a", true).value(), ElementsAre(1, 262));
  EXPECT_THAT(tokenizer->Encode("a", false).value(), ElementsAre(262));
}

TEST(BeginAndEnd, TheConfigurationDecidesBeforeTheTemplate) {
  const auto tokenizer =
      Json(ByteFallbackJson(), R"({"bos_token": {"content": "<s>"}, "eos_token": "</s>",
                                   "add_bos_token": false, "add_eos_token": true})");
  EXPECT_EQ(tokenizer->bos_token_id(), 1);
  EXPECT_EQ(tokenizer->eos_token_id(), 2);
  EXPECT_FALSE(tokenizer->adds_bos());
  EXPECT_TRUE(tokenizer->adds_eos());
  EXPECT_THAT(tokenizer->Encode("a", true).value(), ElementsAre(262, 2));
}

TEST(BeginAndEnd, SentencePieceFollowsTheConfiguration) {
  const std::string model = ReadFile(BardPath() + "/tokenizer.model");
  EXPECT_TRUE(SentencePiece(model)->adds_bos());
  const auto tokenizer =
      SentencePiece(model, R"({"bos_token": "</s>", "eos_token": "<s>", "add_eos_token": true})");
  EXPECT_THAT(tokenizer->Encode("the", true).value(), ElementsAre(2, 261, 1));
}

TEST(BeginAndEnd, ANameThatIsNoTokenIsRefused) {
  const auto config = *ParseTokenizerConfig(R"({"bos_token": "<begin>"})");
  for (const absl::Status& status :
       {ParseTokenizerJson(ByteFallbackJson().Text(), config).status(),
        ParseSentencePiece(ReadFile(BardPath() + "/tokenizer.model"), config).status()}) {
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("bos_token of tokenizer_config.json: expected a token of the vocabulary, "
                          "got \"<begin>\""));
  }
}

TEST(BeginAndEnd, ATokenThatIsToBeAddedMustExist) {
  const auto config = *ParseTokenizerConfig(R"({"add_eos_token": true})");
  EXPECT_THAT(std::string(ParseTokenizerJson(TokenizerJson().Text(), config).status().message()),
              HasSubstr("add_eos_token of tokenizer_config.json is true: expected a eos_token"));
}

// ---- Special and added tokens -------------------------------------------------------------------

TEST(SpecialTokens, AreRecognisedOnlyWhenAskedFor) {
  const auto tokenizer = Json(TokenizerJson());
  EXPECT_THAT(tokenizer->Encode("ab<end>c", false, true).value(), ElementsAre(4, 9, 2));
  TokenizerJson letters;
  letters.vocab = R"({"a": 0, "<": 1, "e": 2, "n": 3, "d": 4, ">": 5})";
  letters.merges = "[]";
  EXPECT_THAT(Json(letters)->Encode("a<end>", false, false).value(), ElementsAre(0, 1, 2, 3, 4, 5));
}

TEST(SpecialTokens, GiveNoTextWhenSkipped) {
  const auto tokenizer = Json(TokenizerJson());
  EXPECT_EQ(tokenizer->Decode({4, 9, 2}).value(), "abc");
  EXPECT_EQ(tokenizer->Decode({4, 9, 2}, /*skip_special=*/false).value(), "ab<end>c");
  EXPECT_EQ(Bard().Decode({1, 261, 2}).value(), "the");
  EXPECT_EQ(Bard().Decode({1, 261, 2}, /*skip_special=*/false).value(), "<s> the</s>");
}

TEST(SpecialTokens, TheConfigurationAddsToTheVocabulary) {
  constexpr char kConfig[] = R"({"added_tokens_decoder": {
      "2048": {"content": "[INST]", "special": true}, "2050": {"content": "::", "special": false},
      "1": {"content": "<s>", "special": true}}})";
  const auto tokenizer = SentencePiece(ReadFile(BardPath() + "/tokenizer.model"), kConfig);
  EXPECT_EQ(tokenizer->vocab_size(), 2051);
  EXPECT_EQ(tokenizer->Piece(2048), "[INST]");
  EXPECT_EQ(tokenizer->Piece(2049), "");
  const Ids ids = tokenizer->Encode("[INST]the::<s>", false).value();
  EXPECT_THAT(ids, ElementsAre(2048, 261, 2050, 1));
  EXPECT_EQ(tokenizer->Decode(ids).value(), "the::");
  EXPECT_EQ(tokenizer->Decode(ids, false).value(), "[INST] the::<s>");
  EXPECT_EQ(tokenizer->Encode("::", false, /*parse_special=*/false).value(), Ids{2050});
}

TEST(SpecialTokens, TextBehindThemHasNoSpaceBeforeItUnlessLegacy) {
  const std::string model = ReadFile(BardPath() + "/tokenizer.model");
  const auto text_of = [&](std::string_view config, std::string_view text) {
    const auto tokenizer = SentencePiece(model, config);
    std::string pieces;
    const Ids ids = tokenizer->Encode(text, false).value();
    for (const int32_t id : ids) pieces += tokenizer->Piece(id);
    return pieces;
  };
  EXPECT_EQ(text_of("{}", "the<s>the"), "▁the<s>▁the");
  EXPECT_EQ(text_of(R"({"legacy": false})", "the<s>the"), "▁the<s>the");
  EXPECT_EQ(text_of(R"({"legacy": false})", "<s>the"), "<s>the");
  EXPECT_EQ(text_of(R"({"add_prefix_space": false})", "the<s>the"), "the<s>the");
}

// ---- Decoding -----------------------------------------------------------------------------------

TEST(StreamDecoder, HoldsBackAPartOfACharacter) {
  const auto tokenizer = Json(TokenizerJson());
  EXPECT_THAT(Stream(*tokenizer, {0, 7, 8, 1}), ElementsAre("a", "", "é", "b", ""));
  const auto fallback = Json(ByteFallbackJson());
  const Ids bytes = {3 + 0xF0, 3 + 0x9F, 3 + 0x91, 3 + 0x8D};
  EXPECT_THAT(Stream(*fallback, bytes), ElementsAre("", "", "", "👍", ""));
}

TEST(StreamDecoder, AnIncompleteCharacterAtTheEndIsReplaced) {
  EXPECT_THAT(Stream(*Json(TokenizerJson()), {0, 7}), ElementsAre("a", "", kBad));
  // Byte-level: one for the sequence. Byte tokens: one for each byte.
  TokenizerJson chinese;
  chinese.vocab = R"({"ä": 0, "½": 1, "A": 2})";
  chinese.merges = "[]";
  EXPECT_THAT(Stream(*Json(chinese), {0, 1}), ElementsAre("", "", kBad));
  EXPECT_THAT(Stream(*Json(ByteFallbackJson()), {3 + 0xE4, 3 + 0xBD}),
              ElementsAre("", "", std::string(kBad) + kBad));
}

TEST(StreamDecoder, BadBytesAreReplacedAsTheirKindOfTokenizerDoes) {
  TokenizerJson chinese;
  chinese.vocab = R"({"ä": 0, "½": 1, "A": 2, "ł": 3})";  // E4 BD 41 A0
  chinese.merges = "[]";
  EXPECT_EQ(Json(chinese)->Decode({0, 1, 2, 3, 3}).value(), absl::StrCat(kBad, "A", kBad, kBad));
  // A valid character beside bad bytes stays. (Hugging Face's decoder, which is not streamed, shows
  // U+FFFD for all bytes of a run of byte tokens in which one is bad; SentencePiece does as we do.)
  const Ids run = {3 + 0xE4, 3 + 0xBD, 3 + 0xA0, 3 + 0xE4, 3 + 0xBD, 260, 3 + 0xFF};
  EXPECT_EQ(Json(ByteFallbackJson())->Decode(run).value(),
            absl::StrCat("你", kBad, kBad, "a", kBad));
  EXPECT_EQ(Bard().Decode({3 + 0xE4, 3 + 0xBD, 3 + 0xA0, 3 + 0xE4, 3 + 0xBD}).value(),
            absl::StrCat("你", kBad, kBad));
}

TEST(StreamDecoder, TheFirstSpaceIsDroppedOnlyAtTheStart) {
  const auto tokenizer = Json(ByteFallbackJson());
  EXPECT_THAT(Stream(*tokenizer, {262, 262}), ElementsAre("a", " a", ""));
  EXPECT_THAT(Stream(*tokenizer, {262, 262}, /*at_start=*/false), ElementsAre(" a", " a", ""));
  EXPECT_THAT(Stream(*tokenizer, {259, 262}), ElementsAre("", " a", ""));
  EXPECT_THAT(Stream(*tokenizer, {1, 262}), ElementsAre("", "a", ""));
  EXPECT_THAT(Stream(*tokenizer, {1, 262}, true, /*skip_special=*/false),
              ElementsAre("<s>", " a", ""));
  EXPECT_THAT(Stream(Bard(), {1, 261, 261}), ElementsAre("", "the", " the", ""));
  EXPECT_THAT(Stream(Bard(), {261}, /*at_start=*/false), ElementsAre(" the", ""));
}

TEST(StreamDecoder, ThePiecesTogetherAreTheWholeText) {
  std::mt19937 random(1);
  std::vector<std::unique_ptr<Tokenizer>> tokenizers;
  tokenizers.push_back(Json(TokenizerJson()));
  tokenizers.push_back(Json(ByteFallbackJson()));
  tokenizers.push_back(Tokenizer::Load(BardPath()).value());
  for (const auto& tokenizer : tokenizers) {
    for (int run = 0; run < 500; ++run) {
      Ids ids;
      for (int i = random() % 20; i > 0; --i) {
        const int limit = random() % 2 == 0 ? 262 : tokenizer->vocab_size();
        ids.push_back(random() % std::min(limit, tokenizer->vocab_size()));
      }
      const bool skip = random() % 2 == 0;
      std::string text;
      for (const std::string& piece : Stream(*tokenizer, ids, true, skip)) {
        text += piece;
        // No piece ends inside a character: it can be encoded.
        EXPECT_TRUE(Bard().Encode(piece, false).ok());
      }
      EXPECT_EQ(text, tokenizer->Decode(ids, skip).value());
    }
  }
}

TEST(Tokenizer, AnIdOutOfRangeIsRefused) {
  for (const int32_t id : {-1, 2048, INT32_MAX, INT32_MIN}) {
    EXPECT_THAT(std::string(Bard().Decode({261, id}).status().message()),
                HasSubstr(absl::StrCat("token id: expected 0 to 2047, got ", id)));
  }
  StreamDecoder decoder(Bard(), true);
  EXPECT_EQ(decoder.Add(-1) + decoder.Add(1 << 30) + decoder.Finish(), "");
}

// ---- Text ---------------------------------------------------------------------------------------

TEST(Text, InvalidUtf8IsRefusedWithItsOffset) {
  const auto byte_level = Json(TokenizerJson());
  const std::pair<std::string, const char*> texts[] = {
      {"\x80", "0x80 at offset 0"},
      {"a\xE4\xBD", "0xe4 at offset 1"},
      {"aé\xC0\x80", "0xc0 at offset 3"},          // overlong
      {"a\xED\xA0\x80", "0xed at offset 1"},       // a surrogate
      {"ab\xF4\x90\x80\x80", "0xf4 at offset 2"},  // beyond U+10FFFF
      {std::string("\0\xFF", 2), "0xff at offset 1"},
      {"\xF0\x80\x80\x80", "0xf0 at offset 0"}};
  for (const auto& [text, expected] : texts) {
    for (const Tokenizer* tokenizer : {static_cast<const Tokenizer*>(byte_level.get()), &Bard()}) {
      const absl::Status status = tokenizer->Encode(text, true).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(status.message()),
                  HasSubstr(absl::StrCat("text: expected UTF-8, got byte ", expected)));
    }
  }
}

TEST(Text, NulIsACharacterLikeOthers) {
  const std::string text("a\0b", 3);
  const auto byte_fallback = Json(ByteFallbackJson());
  for (const Tokenizer* tokenizer : {static_cast<const Tokenizer*>(byte_fallback.get()), &Bard()}) {
    const Ids ids = tokenizer->Encode(text, false).value();
    EXPECT_THAT(ids, ::testing::Contains(3));
    EXPECT_EQ(tokenizer->Decode(ids).value(), text);
  }
}

TEST(Text, NothingGivesNoTokens) {
  EXPECT_THAT(Bard().Encode("", false).value(), IsEmpty());
  EXPECT_THAT(Bard().Encode("", true).value(), ElementsAre(1));
  EXPECT_THAT(Json(ByteFallbackJson())->Encode("", false).value(), IsEmpty());
}

TEST(Text, AMegabyteOfOneLetterIsEncodedInTime) {
  std::string vocab = R"({"<unk>": 0, "a": 1)";
  std::string merges = "[";
  for (int length = 2, id = 2; length <= 64; length *= 2, ++id) {
    absl::StrAppend(&vocab, ", \"", std::string(length, 'a'), "\": ", id);
    const std::string half(length / 2, 'a');
    absl::StrAppend(&merges, length == 2 ? "" : ", ", "\"", half, " ", half, "\"");
  }
  TokenizerJson words;
  words.vocab = vocab + "}";
  words.merges = merges + "]";
  TokenizerJson whole = words;
  whole.pre_tokenizer = "null";
  const std::string text(1 << 20, 'a');
  std::vector<std::unique_ptr<Tokenizer>> tokenizers;
  tokenizers.push_back(Json(words));
  tokenizers.push_back(Json(whole));
  tokenizers.push_back(Tokenizer::Load(BardPath()).value());
  for (const auto& tokenizer : tokenizers) {
    const clock_t start = clock();
    const Ids ids = tokenizer->Encode(text, false).value();
    EXPECT_LT(static_cast<double>(clock() - start) / CLOCKS_PER_SEC, GLA_SECONDS_LIMIT);
    if (tokenizer->vocab_size() < 100) {
      EXPECT_EQ(ids, Ids((1 << 20) / 64, 7));
    }
    EXPECT_EQ(tokenizer->Decode(ids).value(), text);
  }
}

}  // namespace
}  // namespace gla
