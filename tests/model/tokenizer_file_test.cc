// Tokenizer files that are malformed, hostile or of a kind that is not supported.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ctime>
#include <fstream>
#include <iterator>

#include "model/tokenizer/regex.h"
#include "model/tokenizer/sentencepiece_check.h"
#include "model/tokenizer/sentencepiece_tokenizer.h"
#include "model/tokenizer/tokenizer_json.h"
#include "tests/model/tokenizer_files.h"

namespace gla {
namespace {

using ::gla::testing::BytesField;
using ::gla::testing::kControlPiece;
using ::gla::testing::kNormalPiece;
using ::gla::testing::kUnknownPiece;
using ::gla::testing::kUnusedPiece;
using ::gla::testing::kUserDefinedPiece;
using ::gla::testing::NumberField;
using ::gla::testing::PieceField;
using ::gla::testing::PieceKind;
using ::gla::testing::SentencePieceFile;
using ::gla::testing::TokenizerJson;
using ::testing::HasSubstr;

std::string JsonError(const std::string& text) {
  const auto tokenizer = ParseTokenizerJson(text, {});
  EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument) << text;
  return std::string(tokenizer.status().message());
}

// One part of an otherwise good tokenizer.json.
struct Refused {
  std::string TokenizerJson::*part;
  std::string value;
  const char* expected;
};

class RefusedJson : public ::testing::TestWithParam<Refused> {};

TEST_P(RefusedJson, NamesWhatIsWrong) {
  TokenizerJson json;
  json.*GetParam().part = GetParam().value;
  EXPECT_THAT(JsonError(json.Text()), HasSubstr(GetParam().expected));
}

std::string Pattern(std::string_view regex) {
  return absl::StrCat(R"({"type": "Split", "behavior": "Isolated", "pattern": {"Regex": ")",
                      std::string(regex), "\"}}");
}

using J = TokenizerJson;
INSTANTIATE_TEST_SUITE_P(
    Kinds, RefusedJson,
    ::testing::Values(
        Refused{&J::pre_tokenizer, R"({"type": "BertPreTokenizer"})",
                "pre_tokenizer \"BertPreTokenizer\": type is not supported; supported: Sequence, "
                "ByteLevel"},
        Refused{&J::pre_tokenizer,
                R"({"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}]})",
                "pre_tokenizer \"Punctuation\": type is not supported"},
        Refused{&J::normalizer, R"({"type": "Precompiled", "precompiled_charsmap": ""})",
                "normalizer \"Precompiled\": type is not supported"},
        Refused{&J::decoder, R"({"type": "WordPiece"})",
                "decoder \"WordPiece\": type is not supported"},
        Refused{&J::decoder, "null", "decoder: expected one, got null"},
        Refused{&J::post_processor, R"({"type": "BertProcessing"})",
                "post_processor \"BertProcessing\": type is not supported"},
        Refused{&J::model, R"(, "dropout": 0.1)", "dropout: expected 0.0"},
        Refused{&J::model, R"(, "end_of_word_suffix": "</w>")",
                "end_of_word_suffix: expected \"\""},
        Refused{&J::model, R"(, "surprise": 1)", "\"surprise\": unknown key"},
        Refused{&J::more, R"(, "surprise": 1)", "\"surprise\": unknown key"},
        Refused{&J::normalizer, R"({"type": "NFC", "surprise": 1})",
                "normalizer \"NFC\": \"surprise\": unknown key"}));

INSTANTIATE_TEST_SUITE_P(
    Vocabularies, RefusedJson,
    ::testing::Values(
        Refused{&J::vocab, R"({"a": 0, "b": 0})", "token \"b\": expected an id of its own, got 0"},
        Refused{&J::vocab, R"({"a": 16777216})", "expected an id from 0 to 16777215, got 16777216"},
        Refused{&J::vocab, R"({"a": -1})", "token \"a\": expected an id"},
        Refused{&J::vocab, R"({"a": 1.5})", "token \"a\": expected an id"},
        Refused{&J::vocab, R"({"a": 0, "b": 100000})", "vocabulary: expected ids below 65542"},
        Refused{&J::vocab, "[]", "model vocab: expected an object"},
        Refused{&J::vocab, R"({"a": 0, "a": 1})", "name \"a\" appears twice"},
        Refused{&J::merges, R"(["a x"])", "merge 0: expected tokens of the vocabulary, got \"x\""},
        Refused{&J::merges, R"(["b a"])", "merge 0: expected tokens of the vocabulary, got \"ba\""},
        Refused{&J::merges, R"(["a b", "a"])", "merge 1: expected \"A B\" or [\"A\", \"B\"]"},
        Refused{&J::merges, R"(["a b c"])", "merge 0: expected \"A B\""},
        Refused{&J::merges, R"([["a", "b", "c"]])", "merge 0: expected \"A B\""},
        Refused{&J::merges, "{}", "merges: expected a list"},
        Refused{&J::model, R"(, "unk_token": "<no>")",
                "unk_token: expected a token of the vocabulary, got \"<no>\""},
        Refused{&J::added, R"([{"id": 4, "content": "<end>", "special": true}])",
                "token \"<end>\": expected an id of its own, got 4 of \"ab\""},
        Refused{&J::added, R"([{"id": 3, "content": "ab", "special": true}])",
                "token \"ab\": expected id 4 as in the vocabulary, got 3"},
        Refused{&J::added, R"([{"content": "x"}])", "expected distinct tokens with an id"},
        Refused{&J::added, R"([{"id": 9, "content": ""}])", "content: expected a string of 1 to"},
        Refused{&J::added, R"([{"id": 9, "content": "x", "surprise": 1}])",
                "added token \"x\": \"surprise\": unknown key"}));

INSTANTIATE_TEST_SUITE_P(
    Steps, RefusedJson,
    ::testing::Values(
        Refused{&J::decoder,
                R"({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]})",
                "decoder \"ByteFallback\": not supported after the steps before it"},
        Refused{&J::decoder,
                R"({"type": "Sequence", "decoders": [{"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 0, "stop": 1}]})",
                "stop: expected 0"},
        Refused{&J::decoder, R"({"type": "Strip", "content": " ", "start": 1, "stop": 0})",
                "expected a Fuse right before it"},
        Refused{&J::normalizer,
                R"({"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]})",
                "a Sequence inside it is not supported"},
        Refused{&J::normalizer, R"({"type": "Replace", "pattern": {"String": ""}, "content": "x"})",
                "pattern: expected {\"String\": TEXT} or {\"Regex\": PATTERN}"},
        Refused{&J::normalizer, R"({"type": "Prepend", "prepend": 1})",
                "prepend: expected a string"},
        Refused{&J::normalizer, R"([])", "normalizer: expected an object with a \"type\""},
        Refused{&J::pre_tokenizer,
                R"({"type": "Split", "behavior": "Often", "pattern": {"String": "a"}})",
                "behavior: expected Removed, Isolated"},
        Refused{&J::pre_tokenizer, R"({"type": "Metaspace", "replacement": "ab"})",
                "replacement: expected one character"},
        Refused{&J::pre_tokenizer, Pattern("(a"), "missing closing parenthesis"},
        Refused{&J::pre_tokenizer, Pattern(R"(\\X)"), "\\X is not supported"},
        Refused{&J::pre_tokenizer, Pattern("[a&&b]"), "an intersection of sets is not supported"},
        Refused{&J::pre_tokenizer, Pattern("[a[b]]"), "a set inside a set is not supported"},
        Refused{&J::pre_tokenizer, Pattern(R"([a\\W])"), "\\W in a set is not supported"},
        Refused{&J::pre_tokenizer, Pattern("a{2}+"), "\"}+\" is not supported"},
        Refused{&J::pre_tokenizer, Pattern(R"(\\p{Nonsense})"), "unknown property"},
        Refused{&J::post_processor,
                R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}},
                    {"Sequence": {"id": "A"}}], "pair": [], "special_tokens": {}})",
                "expected one id in \"special_tokens\" for each special token, got \"<s>\""},
        Refused{&J::post_processor,
                R"({"type": "TemplateProcessing", "single": [], "special_tokens": {}})",
                "single: expected the text once"}));

TEST(TokenizerJson, OtherModelsAreRefusedByName) {
  for (const char* type : {"WordPiece", "Unigram", "WordLevel"}) {
    EXPECT_EQ(JsonError(absl::StrCat(R"({"model": {"type": ")", type, R"(", "vocab": {}}})")),
              absl::StrCat("model type: expected \"BPE\", got \"", type, "\""));
  }
  EXPECT_THAT(JsonError("{}"), HasSubstr("model: expected an object"));
  EXPECT_THAT(JsonError("[1]"), HasSubstr("expected a JSON object, got [1]"));
  EXPECT_THAT(JsonError(R"({"truncation": {"max_length": 5}, "model": {}})"),
              HasSubstr("truncation: expected null (not supported)"));
  EXPECT_THAT(JsonError(R"({"padding": {}, "model": {}})"), HasSubstr("padding: expected null"));
}

TEST(TokenizerJson, DeepNestingIsRefused) {
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "{\"a\":";
  EXPECT_THAT(JsonError(deep), HasSubstr("nested deeper"));
}

TEST(TokenizerJson, AHostilePatternCostsAnErrorAndLittleTime) {
  for (const char* pattern : {R"(((\\w|\\s)+)+!)", R"((a*)*x|(?:a|aa)+y|a)", R"(\\s*[xy])"}) {
    TokenizerJson json;
    json.pre_tokenizer = Pattern(pattern);
    const auto tokenizer = ParseTokenizerJson(json.Text(), {});
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    std::string text = std::string(100, 'a') + " x y";
    for (int i = 0; i < 16; ++i) text += std::string(2000, ' ') + std::string(200, 'a');
    const clock_t start = clock();
    const auto ids = (*tokenizer)->Encode(text, false);
    EXPECT_LT(static_cast<double>(clock() - start) / CLOCKS_PER_SEC, GLA_SECONDS_LIMIT);
    if (!ids.ok()) {
      EXPECT_THAT(std::string(ids.status().message()), HasSubstr("too hard for the tokenizer's"));
    }
  }
}

TEST(TokenizerJson, StepsThatMultiplyTheTextAreStopped) {
  TokenizerJson json;
  const std::string step =
      R"({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaaaaaaaa"})";
  json.normalizer = absl::StrCat(R"({"type": "Sequence", "normalizers": [)", step, ",", step, ",",
                                 step, ",", step, "]}");
  const auto tokenizer = ParseTokenizerJson(json.Text(), {});
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT(std::string((*tokenizer)->Encode(std::string(10000, 'a'), false).status().message()),
              HasSubstr("more than 32 times longer"));
}

// ---- Patterns -----------------------------------------------------------------------------------

std::vector<std::string> FindAll(std::string_view pattern, std::string_view text) {
  const absl::StatusOr<Regex> regex = Regex::Compile(pattern);
  EXPECT_TRUE(regex.ok()) << regex.status();
  WorkBudget budget(text.size());
  std::vector<std::string> found;
  if (!regex.ok()) return found;
  const std::vector<Range> ranges = regex->FindAll(text, budget).value();
  for (const Range& range : ranges) {
    found.emplace_back(text.substr(range.begin, range.end - range.begin));
  }
  return found;
}

TEST(Regex, WhiteSpaceIsUnicodes) {
  EXPECT_EQ(FindAll(R"(\s+)", "a\u0085\u00a0\u3000b\u180e\u200bc\u2028"),
            (std::vector<std::string>{"\u0085\u00a0\u3000", "\u2028"}));
  EXPECT_EQ(FindAll(R"([^\s]+)", " \u180e "), std::vector<std::string>{"\u180e"});
  EXPECT_EQ(FindAll(R"(\S+)", " \u180e "), std::vector<std::string>{"\u180e"});
}

TEST(Regex, WordsTakeMarksButNotEveryNumber) {
  EXPECT_EQ(FindAll(R"(\w+)", "e\u0301_1 \u216b \u2460"),
            (std::vector<std::string>{"e\u0301_1", "\u216b"}));
  EXPECT_EQ(FindAll(R"(\W)", "e\u0301!"), std::vector<std::string>{"!"});
  EXPECT_EQ(FindAll(R"(e\b)", "e\u0301 e"), std::vector<std::string>{"e"});
}

TEST(Regex, ScriptsAreTakenWithoutTheirExtensions) {
  // U+3001 is of no script of its own, but used with Han.
  EXPECT_EQ(FindAll(R"(\p{Han}+)", "\u6f22\u3001\u5b57"),
            (std::vector<std::string>{"\u6f22", "\u5b57"}));
  EXPECT_EQ(FindAll(R"([^\P{Han}\p{^Lu}])", "\u6f22A"), std::vector<std::string>{});
}

TEST(Regex, EmptyMatchesAreFoundOnceAtEachPlace) {
  EXPECT_EQ(FindAll("a*", "baé"), (std::vector<std::string>{"", "a", ""}));
  EXPECT_FALSE(Regex::Compile("").ok());
}

TEST(Regex, LinesBeginAndEndAtLineFeeds) {
  EXPECT_EQ(FindAll("^b$", "a\nb\nc"), std::vector<std::string>{"b"});
}

// ---- SentencePiece ------------------------------------------------------------------------------

std::string ModelError(const std::string& model) {
  const auto tokenizer = ParseSentencePiece(model, {});
  EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(tokenizer.status().message());
}

TEST(SentencePieceFile, ASmallModelWorks) {
  const auto tokenizer = ParseSentencePiece(
      SentencePieceFile(PieceField("▁", kNormalPiece) + PieceField("a", kNormalPiece, -1)), {});
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->Encode("a x", true).value(), (std::vector<int32_t>{1, 3, 4, 3, 0}));
  EXPECT_EQ((*tokenizer)->Decode({1, 3, 4, 3, 0}).value(), "a  \xE2\x81\x87 ");
}

TEST(SentencePieceFile, MalformedOnesAreRefused) {
  EXPECT_THAT(ModelError(""), HasSubstr("no pieces"));
  EXPECT_THAT(ModelError("hello"), HasSubstr("not a SentencePiece model"));
  EXPECT_THAT(ModelError(PieceField("a", kNormalPiece)), HasSubstr("unk is not defined"));
  EXPECT_THAT(ModelError(SentencePieceFile(PieceField("", kNormalPiece))),
              HasSubstr("piece \"\": expected 1 to 512 bytes"));
  EXPECT_THAT(ModelError(SentencePieceFile(PieceField({"a\0b", 3}, kUserDefinedPiece))),
              HasSubstr("without NUL"));
  EXPECT_THAT(ModelError(SentencePieceFile(PieceField("\xFF", kNormalPiece))), HasSubstr("UTF-8"));
  EXPECT_THAT(ModelError(SentencePieceFile(PieceField("a", kNormalPiece, NAN))),
              HasSubstr("finite score"));
  EXPECT_THAT(ModelError(SentencePieceFile(PieceField("a", static_cast<PieceKind>(9)))),
              HasSubstr("a kind from 1 to 6, got 0 and 9"));
  EXPECT_THAT(
      ModelError(SentencePieceFile(PieceField("a", kNormalPiece) + PieceField("a", kNormalPiece))),
      HasSubstr("a is already defined"));
  const std::string good = SentencePieceFile(PieceField("a", kNormalPiece));
  EXPECT_THAT(ModelError(good.substr(0, good.size() - 1)), HasSubstr("longer than the file"));
}

TEST(SentencePieceFile, ADenormalizerIsRefused) {
  EXPECT_THAT(ModelError(SentencePieceFile("") + BytesField(5, BytesField(2, "map"))),
              HasSubstr("denormalizer: not supported"));
}

TEST(SentencePieceFile, SymbolsThatBeginEachOtherTooOftenAreRefused) {
  std::string pieces;
  for (int length = 1; length <= 100; ++length) {
    pieces += PieceField(std::string(length, 'a'), kUserDefinedPiece);
  }
  EXPECT_THAT(ModelError(SentencePieceFile(pieces)), HasSubstr("user-defined symbols begin each"));
}

// A trie of 256 units with what stands behind it.
std::string CharsMap(const std::vector<std::pair<int, uint32_t>>& units, std::string_view texts) {
  std::string trie(1024, '\xFF');  // units that nothing leads to
  for (const auto& [at, unit] : units) std::memcpy(trie.data() + 4 * at, &unit, 4);
  const uint32_t size = 1024;
  return std::string(reinterpret_cast<const char*>(&size), 4) + trie + std::string(texts);
}
uint32_t Unit(uint32_t offset, uint32_t label, bool has_value) {
  return offset << 10 | (has_value ? 1u << 8 : 0) | label;
}

TEST(CharsMap, AGoodOneIsAccepted) {
  // 'a' becomes "b": the root's children are at 1 ^ label, the node's value at its offset.
  const std::string good = CharsMap(
      {{0, Unit(1, 0, false)}, {1 ^ 'a', Unit(3, 'a', true)}, {1 ^ 'a' ^ 3, 1u << 31}}, {"b\0", 2});
  EXPECT_TRUE(CheckCharsMap(good).ok()) << CheckCharsMap(good);
  const auto tokenizer = ParseSentencePiece(
      SentencePieceFile(PieceField("b", kNormalPiece), BytesField(2, good) + NumberField(3, 0)),
      {});
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->Encode("ab", false).value(), (std::vector<int32_t>{3, 3}));
}

TEST(CharsMap, BrokenOnesAreRefused) {
  const std::string cases[] = {
      "",
      "abc",
      std::string(3000, '\xFF'),
      CharsMap({}, ""),                                      // no texts
      CharsMap({{0, Unit(1 << 20, 0, false)}}, {"b\0", 2}),  // children beyond the trie
      // A node that is its own child.
      CharsMap({{0, Unit(1, 0, false)}, {1 ^ 'a', Unit('a', 'a', false)}, {1, Unit(0, 'a', false)}},
               {"b\0", 2}),
      // A text beyond the texts, and one that does not end.
      CharsMap({{0, Unit(1, 0, false)}, {1 ^ 'a', Unit(3, 'a', true)}, {1 ^ 'a' ^ 3, 5}},
               {"b\0", 2}),
      CharsMap({{0, Unit(1, 0, false)}, {1 ^ 'a', Unit(3, 'a', true)}, {1 ^ 'a' ^ 3, 0}}, "bcd"),
      // A text that makes others many times longer.
      CharsMap({{0, Unit(1, 0, false)}, {1 ^ 'a', Unit(3, 'a', true)}, {1 ^ 'a' ^ 3, 0}},
               std::string(100, 'x') + std::string(1, '\0')),
  };
  for (const std::string& blob : cases) {
    EXPECT_FALSE(CheckCharsMap(blob).ok()) << blob.size();
  }
}

}  // namespace
}  // namespace gla
