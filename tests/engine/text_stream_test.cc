#include "engine/text_stream.h"

#include <gtest/gtest.h>

#include "tests/engine/engine_fixture.h"

namespace gla {
namespace {

struct Cut {
  std::string text;
  std::string stop;  // empty: none matched
};

// `text` fed in pieces of `size` bytes.
Cut Feed(const std::vector<std::string>& stops, const std::string& text, size_t size) {
  StopMatcher matcher(stops);
  Cut cut;
  for (size_t at = 0; at < text.size() && matcher.matched() == nullptr; at += size) {
    cut.text += matcher.Add(text.substr(at, size));
  }
  if (matcher.matched() != nullptr) {
    cut.stop = *matcher.matched();
  } else {
    cut.text += matcher.Flush();
  }
  return cut;
}

void ExpectCut(const std::vector<std::string>& stops, const std::string& text,
               const std::string& want_text, const std::string& want_stop) {
  for (size_t size = 1; size <= text.size(); ++size) {
    const Cut cut = Feed(stops, text, size);
    EXPECT_EQ(cut.text, want_text) << "in pieces of " << size;
    EXPECT_EQ(cut.stop, want_stop) << "in pieces of " << size;
  }
}

TEST(StopMatcher, WithoutStopsNothingIsHeldBack) {
  StopMatcher matcher({});
  EXPECT_EQ(matcher.Add("abc"), "abc");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcher, CutsBeforeTheMatchHoweverTheTextComes) {
  ExpectCut({"END"}, "the ENEND of it", "the EN", "END");
  ExpectCut({"\n\n"}, "one\ntwo\n\nthree", "one\ntwo", "\n\n");
  ExpectCut({"x"}, "x", "", "x");
  ExpectCut({"nothing"}, "noth nothin", "noth nothin", "");
}

TEST(StopMatcher, SelfOverlappingStopsAreFoundAtTheirFirstEnd) {
  ExpectCut({"aab"}, "aaaab", "aa", "aab");
  ExpectCut({"abab"}, "abaabab!", "aba", "abab");
}

TEST(StopMatcher, TheMatchThatIsCompleteFirstWins) {
  ExpectCut({"bcde", "cd"}, "abcdef", "ab", "cd");
  ExpectCut({"world", "hello"}, "say hello world", "say ", "hello");
}

TEST(StopMatcher, OfMatchesThatEndTogetherTheLongestWins) {
  ExpectCut({"c", "abc", "bc"}, "xabcx", "x", "abc");
}

TEST(StopMatcher, HoldsBackOnlyWhatMayStillBecomeAMatch) {
  StopMatcher matcher({"STOP", "OPERA"});
  EXPECT_EQ(matcher.Add("a STO"), "a ");
  EXPECT_EQ(matcher.Add("R"), "STOR");
  EXPECT_EQ(matcher.Add("STO"), "");
  EXPECT_EQ(matcher.Add("OPER"), "STO");
  EXPECT_EQ(matcher.Add("S"), "OPER");
  EXPECT_EQ(matcher.Flush(), "S");
  EXPECT_EQ(matcher.matched(), nullptr);
}

TEST(StopMatcher, LetsGoOnWholeCharacters) {
  // "é" and "è" share their first byte; the text comes in whole characters.
  StopMatcher matcher({"\u00e9t\u00e9"});
  EXPECT_EQ(matcher.Add("l'\u00e9"), "l'");
  EXPECT_EQ(matcher.Add("t"), "");
  EXPECT_EQ(matcher.Add("\u00e8"), "\u00e9t\u00e8");
  EXPECT_EQ(matcher.Add("\u00e9t\u00e9"), "");
  EXPECT_NE(matcher.matched(), nullptr);
}

TEST(TextStream, FindsAStopAcrossTokensThatSplitCharacters) {
  const TestTokenizer tokenizer(
      {{10, "na\xc3"}, {11, "\xaf"}, {12, "ve \xf0\x9f"}, {13, "\x98\x80!"}});
  TextStream stream(tokenizer, {"\U0001F600"});
  EXPECT_EQ(stream.Add(10), "na");
  EXPECT_EQ(stream.Add(11), "\u00ef");
  EXPECT_EQ(stream.Add(12), "ve ");
  EXPECT_EQ(stream.Add(13), "");
  ASSERT_NE(stream.matched(), nullptr);
  EXPECT_EQ(*stream.matched(), "\U0001F600");
}

TEST(TextStream, FinishGivesWhatWasHeldBackAndTheBrokenCharacter) {
  const TestTokenizer tokenizer({{10, "an EN"}, {11, "\xe2\x82"}});
  TextStream stream(tokenizer, {"END"});
  EXPECT_EQ(stream.Add(10), "an ");
  EXPECT_EQ(stream.Add(11), "");
  EXPECT_EQ(stream.Finish(), "EN\ufffd");
}

}  // namespace
}  // namespace gla
