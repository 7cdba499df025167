#include "engine/session.h"

#include <gtest/gtest.h>

#include "engine/sequence.h"
#include "tests/engine/engine_fixture.h"

namespace gla {
namespace {

using std::chrono::seconds;

class SessionTableTest : public ::testing::Test {
 protected:
  absl::Status Open(const std::string& id, std::optional<int64_t> expected = {}) {
    return table_.Open(**table_.Find(id), expected, writer_);
  }

  const Instant start_{std::chrono::hours(1)};
  const TestTokenizer tokenizer_;
  Sequence writer_{{}, false, tokenizer_, nullptr};
  SessionTable table_{3, 900, 4096};
};

TEST_F(SessionTableTest, CreatesUpToItsCapacity) {
  EXPECT_TRUE(table_.Create("a", {}, start_).ok());
  EXPECT_TRUE(table_.Create("b", {}, start_).ok());
  EXPECT_TRUE(table_.Create("c", {}, start_).ok());
  const absl::Status full = table_.Create("d", {}, start_).status();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(full), "SESSIONS_FULL");
  EXPECT_GE(RetryMsOf(full), 200);
  EXPECT_LE(RetryMsOf(full), 2000);
  EXPECT_EQ(table_.Create("a", {}, start_).status().code(), absl::StatusCode::kAlreadyExists);
  table_.Erase(**table_.Find("b"));
  EXPECT_TRUE(table_.Create("d", {}, start_).ok());
}

TEST_F(SessionTableTest, OneWriterAtATime) {
  ASSERT_TRUE(table_.Create("a", {}, start_).ok());
  EXPECT_TRUE(Open("a").ok());
  const absl::Status busy = Open("a");
  EXPECT_EQ(busy.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(ReasonOf(busy), "SESSION_BUSY");
  table_.Close(**table_.Find("a"), start_);
  EXPECT_TRUE(Open("a").ok());
}

TEST_F(SessionTableTest, AStalePositionIsRefusedWithBothNumbers) {
  Session* session = *table_.Create("a", {}, start_);
  session->position = 41;
  const absl::Status stale = Open("a", 40);
  EXPECT_EQ(ReasonOf(stale), "STALE_POSITION");
  EXPECT_NE(stale.message().find("40"), absl::string_view::npos);
  EXPECT_NE(stale.message().find("41"), absl::string_view::npos);
  EXPECT_EQ(session->writer, nullptr);
  EXPECT_TRUE(Open("a", 41).ok());
}

TEST_F(SessionTableTest, ExpiresWhatHasBeenIdleForItsTime) {
  ASSERT_TRUE(table_.Create("short", 10, start_).ok());
  ASSERT_TRUE(table_.Create("long", 100, start_).ok());
  ASSERT_TRUE(table_.Create("never", 0, start_).ok());
  EXPECT_EQ(table_.Expire(start_ + seconds(9)), 0);
  EXPECT_EQ(table_.Expire(start_ + seconds(10)), 1);
  EXPECT_EQ(ReasonOf(table_.Find("short").status()), "SESSION_EXPIRED");
  EXPECT_EQ(ReasonOf(table_.Find("stranger").status()), "SESSION_NOT_FOUND");
  EXPECT_EQ(table_.Expire(start_ + std::chrono::hours(24 * 365)), 1);
  EXPECT_TRUE(table_.Find("never").ok());
}

TEST_F(SessionTableTest, ABusySessionDoesNotExpireAndItsUseCountsFromTheEnd) {
  Session* session = *table_.Create("a", 10, start_);
  ASSERT_TRUE(Open("a").ok());
  EXPECT_EQ(table_.Expire(start_ + seconds(1000)), 0);
  table_.Close(*session, start_ + seconds(1000));
  EXPECT_EQ(table_.Expire(start_ + seconds(1009)), 0);
  EXPECT_EQ(table_.Expire(start_ + seconds(1010)), 1);
}

TEST_F(SessionTableTest, ATimeToLiveOfAllTheSecondsThereAreIsNever) {
  ASSERT_TRUE(table_.Create("a", INT64_MAX, start_).ok());
  EXPECT_EQ(table_.Expire(start_ + std::chrono::hours(24 * 365 * 50)), 0);
}

TEST_F(SessionTableTest, AnExpiredIdMayBeTakenAgain) {
  ASSERT_TRUE(table_.Create("a", 1, start_).ok());
  EXPECT_EQ(table_.Expire(start_ + seconds(1)), 1);
  ASSERT_TRUE(table_.Create("a", 1, start_ + seconds(2)).ok());
  table_.Erase(**table_.Find("a"));
  EXPECT_EQ(ReasonOf(table_.Find("a").status()), "SESSION_NOT_FOUND");
}

TEST_F(SessionTableTest, ListsById) {
  ASSERT_TRUE(table_.Create("b", 5, start_).ok());
  ASSERT_TRUE(table_.Create("a", 6, start_).ok());
  (*table_.Find("b"))->position = 7;
  ASSERT_TRUE(Open("a").ok());
  const std::vector<SessionInfo> all = table_.List(start_ + seconds(3));
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].id, "a");
  EXPECT_TRUE(all[0].busy);
  EXPECT_EQ(all[0].idle_seconds, 0);
  EXPECT_EQ(all[1].id, "b");
  EXPECT_EQ(all[1].position, 7);
  EXPECT_EQ(all[1].idle_seconds, 3);
  EXPECT_EQ(all[1].age_seconds, 3);
  EXPECT_EQ(all[1].idle_ttl_seconds, 5);
  EXPECT_EQ(all[1].state_bytes, 0);
}

TEST(RecentIds, ForgetsTheOldest) {
  RecentIds ids(2);
  ids.Add("a");
  ids.Add("b");
  ids.Add("a");  // now the newest
  ids.Add("c");
  EXPECT_TRUE(ids.Contains("a"));
  EXPECT_FALSE(ids.Contains("b"));
  EXPECT_TRUE(ids.Contains("c"));
  ids.Remove("a");
  EXPECT_FALSE(ids.Contains("a"));
}

}  // namespace
}  // namespace gla
