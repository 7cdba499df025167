#include "engine/inbox.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/engine/engine_fixture.h"

namespace gla {
namespace {

class InboxTest : public ::testing::Test {
 protected:
  absl::StatusOr<RequestId> Submit(int64_t tokens) {
    auto sequence = std::make_unique<Sequence>(GenerateParams(), false, tokenizer_, nullptr);
    sequence->queued_tokens = tokens;
    return inbox_.Submit(std::move(sequence));
  }
  double Rejected(const std::string& reason) { return metrics_.Rejected(reason).Value(); }

  const TestTokenizer tokenizer_;
  Metrics metrics_{{"0", "test", "test", "tiny", "gla", "float32"}};
  Inbox inbox_{{.max_requests = 3, .max_tokens = 100}, metrics_};
};

void ExpectRefused(const absl::Status& status, absl::StatusCode code, const std::string& reason) {
  EXPECT_EQ(status.code(), code);
  EXPECT_EQ(ReasonOf(status), reason);
  EXPECT_GE(RetryMsOf(status), 200);
  EXPECT_LE(RetryMsOf(status), 2000);
}

TEST_F(InboxTest, BoundsRequestsInFlightExactly) {
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(Submit(1).ok());
  ExpectRefused(Submit(1).status(), absl::StatusCode::kResourceExhausted, "QUEUE_FULL");
  inbox_.Take(Instant::min());  // taken is not finished
  EXPECT_FALSE(Submit(1).ok());
  inbox_.RequestFinished();
  EXPECT_TRUE(Submit(1).ok());
  EXPECT_FALSE(Submit(1).ok());
  EXPECT_EQ(Rejected("queue_full"), 3);
  EXPECT_EQ(inbox_.num_requests(), 3);
}

TEST_F(InboxTest, BoundsWaitingTokensExactly) {
  EXPECT_TRUE(Submit(60).ok());
  EXPECT_TRUE(Submit(40).ok());
  ExpectRefused(Submit(1).status(), absl::StatusCode::kResourceExhausted, "TOKENS_FULL");
  inbox_.TokensAdmitted(60);
  EXPECT_FALSE(Submit(61).ok());
  EXPECT_TRUE(Submit(60).ok());
  EXPECT_EQ(inbox_.num_tokens(), 100);
  EXPECT_EQ(Rejected("tokens_full"), 2);
}

TEST_F(InboxTest, RefusesNewWorkWhileDraining) {
  EXPECT_TRUE(Submit(1).ok());
  inbox_.StopAccepting();
  ExpectRefused(Submit(1).status(), absl::StatusCode::kUnavailable, "DRAINING");
  EXPECT_EQ(Rejected("draining"), 1);
  EXPECT_EQ(inbox_.Take(Instant::min()).size(), 1u);
}

TEST_F(InboxTest, KeepsTheOrderOfMessages) {
  const RequestId id = *Submit(1);
  inbox_.Cancel(id);
  inbox_.Post([](const absl::Status&) {});
  const std::vector<Message> messages = inbox_.Take(Instant::min());
  ASSERT_EQ(messages.size(), 3u);
  EXPECT_EQ(messages[0].index(), 0u);
  EXPECT_EQ(std::get<CancelMessage>(messages[1]).id, id);
  EXPECT_EQ(messages[2].index(), 2u);
}

TEST_F(InboxTest, TakeWaitsForAMessageOrTheTime) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
  EXPECT_TRUE(inbox_.Take(until).empty());
  EXPECT_GE(std::chrono::steady_clock::now(), until);
  std::thread other([this] { inbox_.Cancel(1); });
  EXPECT_EQ(inbox_.Take(std::chrono::steady_clock::now() + std::chrono::minutes(1)).size(), 1u);
  other.join();
  inbox_.Stop();
  EXPECT_TRUE(inbox_.Take(Instant::max()).empty());
}

TEST_F(InboxTest, AClosedInboxAnswersAtOnce) {
  absl::Status seen;
  inbox_.Post([&](const absl::Status& status) { seen = status; });
  EXPECT_EQ(inbox_.Close().size(), 1u);
  EXPECT_TRUE(seen.ok());  // who closes answers what was left
  inbox_.Post([&](const absl::Status& status) { seen = status; });
  EXPECT_EQ(seen.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Submit(1).status().code(), absl::StatusCode::kUnavailable);
  inbox_.Cancel(1);
  EXPECT_TRUE(inbox_.Close().empty());
}

}  // namespace
}  // namespace gla
