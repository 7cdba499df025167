// The bits of a request do not depend on who else runs, nor on how the work is cut.
#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "tests/engine/engine_fixture.h"

namespace gla {
namespace {

using Turns = std::vector<GenerateParams>;

GenerateParams RandomParams(std::mt19937& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  // Lengths around a tile and a chunk too.
  const int lengths[] = {1, 2, 3, 5, 17, 31, 32, 33, 63, 64, 65, 66, 100, 129, 200};
  GenerateParams params = Greedy(Tokens(lengths[below(15)], below(1000)), 1 + below(20));
  params.logprobs = below(3) - 1;
  params.ignore_eos = below(2) == 0;
  if (below(3) == 0) return params;
  const float temperatures[] = {0.5f, 1.0f, 1.5f};
  params.sampling.temperature = temperatures[below(3)];
  params.sampling.seed = random();
  params.sampling.top_k = below(2) * 40;
  params.sampling.top_p = below(2) == 0 ? 1.0f : 0.9f;
  params.sampling.min_p = below(2) == 0 ? 0.0f : 0.02f;
  params.sampling.repetition_penalty = below(2) == 0 ? 1.0f : 1.2f;
  params.sampling.presence_penalty = below(2) == 0 ? 0.0f : 0.5f;
  params.sampling.frequency_penalty = below(2) == 0 ? 0.0f : 0.3f;
  if (below(2) == 0) params.sampling.logit_bias = {{7, 2.0f}, {100, -5.0f}};
  return params;
}

std::vector<Turns> RandomJobs(int count) {
  std::mt19937 random(20261123);
  std::vector<Turns> jobs(static_cast<size_t>(count));
  for (Turns& turns : jobs) {
    const int num_turns = random() % 3 == 0 ? 3 : 1;
    for (int i = 0; i < num_turns; ++i) turns.push_back(RandomParams(random));
  }
  return jobs;
}

// The outcomes of one job's turns: on a session when there are more than one.
std::vector<Outcome> RunJob(TestEngine& engine, Turns turns, const std::string& session) {
  const bool on_session = turns.size() > 1;
  if (on_session) {
    EXPECT_TRUE(engine.Create(session).ok());
  }
  std::vector<Outcome> outcomes;
  for (GenerateParams& params : turns) {
    if (on_session) params.session_id = session;
    outcomes.push_back(engine.Run(params));
  }
  if (on_session) {
    EXPECT_TRUE(engine.Delete(session).ok());
  }
  return outcomes;
}

void ExpectSame(const Outcome& a, const Outcome& b) {
  EXPECT_TRUE(a.finish.status.ok()) << a.finish.status;
  EXPECT_TRUE(b.finish.status.ok()) << b.finish.status;
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.text, b.text);
  EXPECT_EQ(a.finish.reason, b.finish.reason);
  EXPECT_EQ(a.finish.session_position, b.finish.session_position);
  ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
  for (size_t i = 0; i < a.logprobs.size(); ++i) {
    EXPECT_EQ(a.logprobs[i].logprob, b.logprobs[i].logprob);
    EXPECT_EQ(a.logprobs[i].top, b.logprobs[i].top);
  }
}

// Clients that join and leave at random, each job's outcome by its index.
std::vector<std::vector<Outcome>> RunTogether(TestEngine& engine, const std::vector<Turns>& jobs,
                                              size_t num_clients) {
  std::vector<std::vector<Outcome>> outcomes(jobs.size());
  std::vector<std::thread> clients;
  for (size_t client = 0; client < num_clients; ++client) {
    clients.emplace_back([&, client] {
      std::mt19937 random(static_cast<unsigned>(client));
      for (size_t job = client; job < jobs.size(); job += num_clients) {
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
        outcomes[job] = RunJob(engine, jobs[job], absl::StrCat("s", job));
      }
    });
  }
  for (std::thread& client : clients) client.join();
  return outcomes;
}

class IndependenceTest
    : public ::testing::TestWithParam<std::tuple<PrefillForm, StateFormat, DType>> {};

TEST_P(IndependenceTest, SixtyFourClientsThatJoinAndLeaveEqualTheirSoloRuns) {
  EngineSetup setup;
  setup.engine = {.max_num_seqs = 24,
                  .max_num_batched_tokens = 160,
                  .max_prefill_chunk = 70,
                  .num_slots = 24 + 64,
                  .poison_freed_slots = true};
  std::tie(setup.prefill_form, setup.state_format, setup.dtype) = GetParam();
  TestEngine engine(setup);
  const std::vector<Turns> jobs = RandomJobs(128);
  std::vector<std::vector<Outcome>> alone;
  for (const Turns& turns : jobs) alone.push_back(RunJob(engine, turns, "alone"));
  const auto before = engine.metrics().step_batch_size.Collect().histogram;
  const auto together = RunTogether(engine, jobs, 64);
  for (size_t job = 0; job < jobs.size(); ++job) {
    ASSERT_EQ(alone[job].size(), together[job].size());
    for (size_t turn = 0; turn < alone[job].size(); ++turn) {
      SCOPED_TRACE(absl::StrCat("job ", job, " turn ", turn));
      ExpectSame(alone[job][turn], together[job][turn]);
    }
  }
  const auto after = engine.metrics().step_batch_size.Collect().histogram;
  const double mean = (after.sample_sum - before.sample_sum) /
                      static_cast<double>(after.sample_count - before.sample_count);
  EXPECT_GT(mean, 2) << "they did not share steps";
  EXPECT_TRUE(engine.IsIdle());
  EXPECT_EQ(engine.metrics().numeric_guard_trips_total.Value(), 0);
}

INSTANTIATE_TEST_SUITE_P(
    Forms, IndependenceTest,
    ::testing::Combine(::testing::Values(PrefillForm::kRecurrent, PrefillForm::kChunkwise),
                       ::testing::Values(StateFormat::kFloat32, StateFormat::kInt16),
                       ::testing::Values(DType::kFloat32, DType::kBFloat16)),
    [](const auto& info) {
      const bool recurrent = std::get<0>(info.param) == PrefillForm::kRecurrent;
      return std::string(recurrent ? "recurrent" : "chunkwise") +
             (std::get<1>(info.param) == StateFormat::kInt16 ? "_int16_" : "_float32_") +
             NameOf(std::get<2>(info.param));
    });

TEST(Independence, InTheRecurrentFormTheCutOfAPromptDoesNotShow) {
  EngineSetup coarse, fine;
  coarse.engine.max_prefill_chunk = 128;
  fine.engine.max_prefill_chunk = 7;
  TestEngine one(coarse), other(fine);
  for (const int length : {1, 6, 7, 8, 65, 300}) {
    GenerateParams params = Sampled(Tokens(length), 10, 4);
    params.logprobs = 2;
    ExpectSame(one.Run(params), other.Run(params));
  }
}

TEST(Independence, ScoresDoNotDependOnWhatRunsBeside) {
  EngineSetup setup;
  setup.max_logit_rows = 40;
  TestEngine engine(setup);
  const std::vector<int32_t> text = Tokens(150);
  const std::vector<float> alone = engine.Score(text).finish.score_logprobs;
  std::vector<RecordingSink> beside(5);
  for (size_t i = 0; i < beside.size(); ++i) {
    ASSERT_TRUE(engine->Submit(Sampled(Tokens(40, 5), 60, i), &beside[i]).ok());
  }
  RecordingSink other_score;
  ScoreParams params;
  params.tokens = Tokens(90, 8);
  ASSERT_TRUE(engine->Submit(params, &other_score).ok());
  EXPECT_EQ(engine.Score(text).finish.score_logprobs, alone);
  for (RecordingSink& sink : beside) EXPECT_TRUE(sink.Get().finish.status.ok());
  EXPECT_EQ(other_score.Get().finish.score_logprobs,
            engine.Score(params.tokens).finish.score_logprobs);
}

}  // namespace
}  // namespace gla
