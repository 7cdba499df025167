// Generate, Score, Tokenize, Detokenize and GetModelInfo over a real socket.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <set>
#include <thread>

#include "test_server.h"

namespace gla {
namespace {

class GenerateTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new TestServer(); }
  static void TearDownTestSuite() { delete server_; }

  // Nothing runs and no slot is held but those of sessions.
  static bool IsIdle() {
    return server_->Metric("gla_requests_running") == 0 &&
           server_->Metric("gla_requests_queued") == 0 &&
           server_->Metric("gla_state_slots{state=\"used\"}") ==
               server_->Metric("gla_state_slots{state=\"pinned\"}");
  }

  static TestServer* server_;
};
TestServer* GenerateTest::server_ = nullptr;

TEST_F(GenerateTest, StreamsTokensAndEndsWithFinish) {
  const Answer answer = Generate(*server_, Greedy({1, 100, 200}, 20));
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.token_ids.size(), 20u);
  EXPECT_FALSE(answer.text.empty());
  EXPECT_TRUE(answer.finished);
  EXPECT_EQ(answer.finish.reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(answer.finish.usage().tokens_prefilled(), 3);
  EXPECT_EQ(answer.finish.usage().tokens_generated(), 20);
  EXPECT_EQ(answer.finish.usage().tokens_restored(), 0);
  EXPECT_GT(answer.finish.timings().time_to_first_token(), 0);
  EXPECT_GE(answer.finish.timings().total(), answer.finish.timings().time_to_first_token());
}

TEST_F(GenerateTest, TheSameSeedGivesTheSameTokensAndADrawnSeedIsReturned) {
  v1::GenerateRequest request = Greedy({1, 5, 9}, 16);
  request.mutable_sampling()->set_temperature(1.5);
  const Answer drawn = Generate(*server_, request);
  request.mutable_sampling()->set_seed(drawn.finish.seed());
  EXPECT_EQ(Generate(*server_, request).token_ids, drawn.token_ids);
  std::set<uint64_t> seeds;
  request.mutable_sampling()->clear_seed();
  for (int i = 0; i < 4; ++i) seeds.insert(Generate(*server_, request).finish.seed());
  EXPECT_EQ(seeds.size(), 4u);
}

TEST_F(GenerateTest, TextGetsTheBeginTokenAtTheStartOnly) {
  v1::TokenizeRequest tokenize;
  tokenize.set_text("In the beginning");
  v1::TokenizeResponse with_begin;
  grpc::ClientContext context;
  ASSERT_TRUE(server_->inference->Tokenize(&context, tokenize, &with_begin).ok());
  v1::GenerateRequest request = Greedy({}, 4);
  request.set_text("In the beginning");
  const Answer from_text = Generate(*server_, request);
  EXPECT_EQ(from_text.finish.usage().tokens_prefilled(), with_begin.token_ids_size());
  const Answer from_ids =
      Generate(*server_, Greedy({with_begin.token_ids().begin(), with_begin.token_ids().end()}, 4));
  EXPECT_EQ(from_text.token_ids, from_ids.token_ids);

  grpc::ClientContext create;
  v1::Session session;
  ASSERT_TRUE(server_->sessions->CreateSession(&create, {}, &session).ok());
  request.set_session_id(session.session_id());
  EXPECT_EQ(Generate(*server_, request).finish.usage().tokens_prefilled(),
            with_begin.token_ids_size());
  EXPECT_EQ(Generate(*server_, request).finish.usage().tokens_prefilled(),
            with_begin.token_ids_size() - 1);
}

TEST_F(GenerateTest, LogprobsComeWithEachToken) {
  v1::GenerateRequest request = Greedy({1, 5, 9}, 6);
  request.set_logprobs(3);
  const Answer answer = Generate(*server_, request);
  ASSERT_EQ(answer.logprobs.size(), 6u);
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(answer.logprobs[i].token_id(), answer.token_ids[i]);
    EXPECT_LE(answer.logprobs[i].logprob(), 0);
    ASSERT_EQ(answer.logprobs[i].top_token_ids_size(), 3);
    EXPECT_EQ(answer.logprobs[i].top_token_ids(0), answer.token_ids[i]);  // greedy
    EXPECT_GE(answer.logprobs[i].top_logprobs(0), answer.logprobs[i].top_logprobs(1));
  }
  EXPECT_TRUE(Generate(*server_, Greedy({1}, 2)).logprobs.empty());
}

TEST_F(GenerateTest, StopTokenEndsTheStream) {
  const std::vector<int> free = Generate(*server_, Greedy({1, 5, 9}, 8)).token_ids;
  v1::GenerateRequest request = Greedy({1, 5, 9}, 8);
  request.add_stop_token_ids(free[3]);
  const Answer answer = Generate(*server_, request);
  EXPECT_EQ(answer.finish.reason(), v1::FINISH_REASON_STOP_SEQUENCE);
  EXPECT_EQ(answer.token_ids.back(), free[3]);
}

TEST_F(GenerateTest, PrefillIsReportedWhenAskedFor) {
  v1::GenerateRequest request = Greedy(std::vector<int>(3000, 7), 2);
  request.set_report_prefill(true);
  grpc::ClientContext context;
  const auto reader = server_->inference->Generate(&context, request);
  v1::GenerateResponse message;
  int64_t last = 0;
  while (reader->Read(&message)) {
    if (!message.has_prefill()) continue;
    EXPECT_GT(message.prefill().tokens_done(), last);
    EXPECT_EQ(message.prefill().tokens_total(), 3000);
    EXPECT_EQ(message.token_ids_size(), 0);
    last = message.prefill().tokens_done();
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_GT(last, 0);
}

TEST_F(GenerateTest, TheRequestIdComesBackAsMetadata) {
  v1::GenerateRequest request = Greedy({1}, 1);
  request.set_request_id("my-id");
  grpc::ClientContext context;
  const auto reader = server_->inference->Generate(&context, request);
  reader->WaitForInitialMetadata();
  const auto& metadata = context.GetServerInitialMetadata();
  const auto it = metadata.find("x-request-id");
  ASSERT_NE(it, metadata.end());
  EXPECT_EQ(it->second, "my-id");
  v1::GenerateResponse message;
  while (reader->Read(&message)) {
  }
  EXPECT_TRUE(reader->Finish().ok());
}

TEST_F(GenerateTest, ADeadlineEndsARunningStream) {
  const Answer answer = Generate(*server_, Greedy({1}, 8192), 0.2);
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_GT(answer.token_ids.size(), 0u);
  EXPECT_TRUE(WaitFor(IsIdle));
}

TEST_F(GenerateTest, ADeadlineInThePastIsDeadlineExceeded) {
  EXPECT_EQ(Generate(*server_, Greedy({1}, 10), -1).status.error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(WaitFor(IsIdle));
}

TEST_F(GenerateTest, ACancelledStreamLeavesTheBatchAtOnce) {
  const double before =
      server_->Metric("gla_requests_total{code=\"CANCELLED\",method=\"Generate\"}");
  grpc::ClientContext context;
  const auto reader = server_->inference->Generate(&context, Greedy({1}, 8192));
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  context.TryCancel();
  EXPECT_TRUE(WaitFor(IsIdle));
  while (reader->Read(&message)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(WaitFor([&] {
    return server_->Metric("gla_requests_total{code=\"CANCELLED\",method=\"Generate\"}") ==
           before + 1;
  }));
}

TEST_F(GenerateTest, AClientThatGoesAwayEndsItsStreams) {
  auto channel = server_->NewChannel();
  auto stub = v1::InferenceService::NewStub(channel);
  auto context = std::make_unique<grpc::ClientContext>();
  auto reader = stub->Generate(context.get(), Greedy({1}, 8192));
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_EQ(server_->Metric("gla_requests_running"), 1);
  reader.reset();
  context.reset();
  stub.reset();
  channel.reset();
  EXPECT_TRUE(WaitFor(IsIdle));
}

TEST_F(GenerateTest, AReaderThatDoesNotReadGetsAllTokensLater) {
  const std::vector<int> expected = Generate(*server_, Greedy({1, 2}, 200)).token_ids;
  grpc::ClientContext context;
  const auto reader = server_->inference->Generate(&context, Greedy({1, 2}, 200));
  EXPECT_TRUE(WaitFor(IsIdle));
  std::vector<int> got;
  v1::GenerateResponse message;
  while (reader->Read(&message)) {
    got.insert(got.end(), message.token_ids().begin(), message.token_ids().end());
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(got, expected);
}

TEST_F(GenerateTest, CancelsAndEndsRaceWithoutHarm) {
  std::atomic<int> ok = 0, cancelled = 0, other = 0;
  std::vector<std::thread> clients;
  for (int c = 0; c < 8; ++c) {
    clients.emplace_back([&, c] {
      for (int i = 0; i < 25; ++i) {
        grpc::ClientContext context;
        const auto reader = server_->inference->Generate(&context, Greedy({c, i}, 1 + i % 7));
        v1::GenerateResponse message;
        for (int k = 0; k < (c + i) % 5 && reader->Read(&message); ++k) {
        }
        if (i % 2 == 0) context.TryCancel();
        while (reader->Read(&message)) {
        }
        const grpc::StatusCode code = reader->Finish().error_code();
        ++(code == grpc::StatusCode::OK          ? ok
           : code == grpc::StatusCode::CANCELLED ? cancelled
                                                 : other);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(other, 0);
  EXPECT_EQ(ok + cancelled, 200);
  EXPECT_TRUE(WaitFor(IsIdle));
  EXPECT_TRUE(WaitFor([&] { return server_->server->num_calls() == 0; }));
}

TEST_F(GenerateTest, OverflowIsResourceExhaustedWithARetryDelay) {
  TestServer small({"--max-num-seqs=1", "--max-num-queued-reqs=1"});
  grpc::ClientContext first, second;
  const auto running = small.inference->Generate(&first, Greedy({1}, 8192));
  v1::GenerateResponse message;
  ASSERT_TRUE(running->Read(&message));
  const auto waiting = small.inference->Generate(&second, Greedy({1}, 8192));
  ASSERT_TRUE(WaitFor([&] { return small.Metric("gla_requests_queued") == 1; }));
  grpc::ClientContext third;
  const auto refused = small.inference->Generate(&third, Greedy({1}, 1));
  EXPECT_FALSE(refused->Read(&message));
  const grpc::Status status = refused->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(ReasonIn(status), "QUEUE_FULL");
  EXPECT_GT(DetailOf<google::rpc::RetryInfo>(status).retry_delay().nanos() +
                DetailOf<google::rpc::RetryInfo>(status).retry_delay().seconds(),
            0);
  EXPECT_EQ(third.GetServerTrailingMetadata().count("grpc-retry-pushback-ms"), 1u);
  EXPECT_EQ(small.Metric("gla_rejections_total{reason=\"queue_full\"}"), 1);
  first.TryCancel();
  second.TryCancel();
}

TEST_F(GenerateTest, ScoreGivesTheLogprobsOfGenerate) {
  v1::GenerateRequest request = Greedy({1, 5, 9}, 5);
  request.set_logprobs(0);
  const Answer answer = Generate(*server_, request);
  v1::ScoreRequest score;
  for (const int id : {1, 5, 9}) score.mutable_token_ids()->add_ids(id);
  for (const int id : answer.token_ids) score.mutable_token_ids()->add_ids(id);
  grpc::ClientContext context;
  v1::ScoreResponse response;
  ASSERT_TRUE(server_->inference->Score(&context, score, &response).ok());
  ASSERT_EQ(response.logprobs_size(), 7);
  ASSERT_EQ(response.token_ids_size(), 8);
  double total = 0;
  for (const float logprob : response.logprobs()) total += logprob;
  EXPECT_NEAR(response.total_logprob(), total, 1e-4);
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_NEAR(response.logprobs(static_cast<int>(i) + 2), answer.logprobs[i].logprob(), 1e-5);
  }
}

TEST_F(GenerateTest, ScoreOfTextStartsWithTheBeginToken) {
  v1::ScoreRequest request;
  request.set_text("Now is the winter of our discontent");
  grpc::ClientContext context;
  v1::ScoreResponse response;
  ASSERT_TRUE(server_->inference->Score(&context, request, &response).ok());
  EXPECT_EQ(response.token_ids(0), 1);
  EXPECT_EQ(response.logprobs_size(), response.token_ids_size() - 1);
}

TEST_F(GenerateTest, ScoreCanBeCancelled) {
  v1::ScoreRequest request;
  for (int i = 0; i < 32768; ++i) request.mutable_token_ids()->add_ids(i % 2048);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
  v1::ScoreResponse response;
  EXPECT_EQ(server_->inference->Score(&context, request, &response).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(WaitFor(IsIdle));
}

TEST_F(GenerateTest, DetokenizeUndoesTokenize) {
  v1::TokenizeRequest tokenize;
  tokenize.set_text("All the world's a stage.");
  v1::TokenizeResponse tokens;
  grpc::ClientContext first, second;
  ASSERT_TRUE(server_->inference->Tokenize(&first, tokenize, &tokens).ok());
  EXPECT_EQ(tokens.token_ids(0), 1);
  EXPECT_EQ(tokens.pieces_size(), tokens.token_ids_size());
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_token_ids() = tokens.token_ids();
  v1::DetokenizeResponse text;
  ASSERT_TRUE(server_->inference->Detokenize(&second, detokenize, &text).ok());
  EXPECT_EQ(text.text(), tokenize.text());
}

TEST_F(GenerateTest, ModelInfoTellsWhatIsServed) {
  grpc::ClientContext context;
  v1::GetModelInfoResponse info;
  ASSERT_TRUE(server_->inference->GetModelInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.model(), "bard-6m");
  EXPECT_EQ(info.family(), "gla");
  EXPECT_EQ(info.dtype(), "float32");
  EXPECT_EQ(info.backend(), "cpu");
  EXPECT_EQ(info.vocab_size(), 2048);
  EXPECT_EQ(info.max_num_seqs(), 16);
  EXPECT_EQ(info.max_new_tokens(), 8192);
  EXPECT_EQ(info.max_prompt_tokens(), 32768);
  EXPECT_EQ(info.bos_token_id(), 1);
  EXPECT_GT(info.parameters(), 5'000'000);
  EXPECT_EQ(info.capacity_sessions(), (64 << 20) / info.state_bytes_per_session() - 16);
  EXPECT_FALSE(info.version().empty());
  EXPECT_FALSE(info.replica_id().empty());
}

TEST_F(GenerateTest, MethodsOfLaterVersionsAreUnimplemented) {
  grpc::ClientContext context;
  v1::ForkSessionRequest request;
  v1::Session response;
  EXPECT_EQ(server_->sessions->ForkSession(&context, request, &response).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
}

}  // namespace
}  // namespace gla
