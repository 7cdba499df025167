// A step runs while the tokens of the one before it are not known yet: nobody can tell.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>

#include "tests/engine/engine_fixture.h"

namespace gla {
namespace {

using ::testing::ElementsAreArray;

std::vector<int32_t> Joined(std::vector<int32_t> text, const std::vector<int32_t>& more) {
  text.insert(text.end(), more.begin(), more.end());
  return text;
}

EngineSetup Ahead(bool run_ahead) {
  EngineSetup setup;
  setup.engine.run_ahead = run_ahead;
  return setup;
}

// The i-th of many requests of every kind; some on a session. `known_tokens` and `text` are what it
// gives without a stop.
GenerateParams ParamsOf(int i, const std::vector<int32_t>& known_tokens, const std::string& text) {
  GenerateParams params =
      Sampled(Tokens(1 + i * 13 % 70, i), 1 + i % 9 * 3, 1000 + static_cast<uint64_t>(i));
  params.logprobs = i % 3 - 1;
  switch (i % 8) {
    case 1:
      params.sampling.temperature = 0;
      break;
    case 2:
      params.sampling.repetition_penalty = 1.3f;
      break;
    case 3:
      params.sampling.frequency_penalty = 0.7f;
      params.sampling.presence_penalty = 0.4f;
      break;
    case 4:
      params.ignore_eos = false;
      params.sampling.logit_bias = {{2, 5.0f}};
      break;
    case 5:
      if (!known_tokens.empty()) params.stop_token_ids = {known_tokens[known_tokens.size() / 2]};
      break;
    case 6:
      if (text.size() > 8) params.stop = {text.substr(text.size() / 2, 5)};
      break;
    default:
      break;
  }
  if (i % 2 == 0) params.session_id = absl::StrCat("s", i % 5);
  return params;
}

void ExpectSame(const Outcome& a, const Outcome& b) {
  EXPECT_EQ(a.finish.status, b.finish.status);
  EXPECT_EQ(a.finish.reason, b.finish.reason);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.pieces, b.pieces);
  EXPECT_EQ(a.text, b.text);
  EXPECT_EQ(a.prefill, b.prefill);
  EXPECT_EQ(a.finish.stop_sequence, b.finish.stop_sequence);
  EXPECT_EQ(a.finish.tokens_restored, b.finish.tokens_restored);
  EXPECT_EQ(a.finish.tokens_prefilled, b.finish.tokens_prefilled);
  EXPECT_EQ(a.finish.tokens_generated, b.finish.tokens_generated);
  EXPECT_EQ(a.finish.session_position, b.finish.session_position);
  ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
  for (size_t i = 0; i < a.logprobs.size(); ++i) {
    EXPECT_EQ(a.logprobs[i].logprob, b.logprobs[i].logprob);
    EXPECT_EQ(a.logprobs[i].top, b.logprobs[i].top);
  }
}

TEST(RunAhead, GivesWhatWaitingForEachStepGives) {
  TestEngine ahead(Ahead(true)), waiting(Ahead(false));
  for (const char* id : {"s0", "s1", "s2", "s3", "s4"}) {
    ASSERT_TRUE(ahead.Create(id).ok());
    ASSERT_TRUE(waiting.Create(id).ok());
  }
  int ended_early = 0;
  for (int i = 0; i < 160; ++i) {
    SCOPED_TRACE(i);
    GenerateParams params = ParamsOf(i, {}, "");
    if (i % 8 == 5 || i % 8 == 6) {  // a stop that comes, from a run without it
      GenerateParams free = params;
      free.session_id = "";
      const Outcome known = waiting.Run(free);
      params = ParamsOf(i, known.tokens, known.text);
    }
    const Outcome outcome = ahead.Run(params);
    ExpectSame(outcome, waiting.Run(params));
    ended_early += outcome.tokens.size() > 1 && outcome.finish.reason != FinishReason::kLength;
  }
  EXPECT_GT(ended_early, 10);
  EXPECT_TRUE(ahead.IsIdle(5));
  EXPECT_TRUE(waiting.IsIdle(5));
}

TEST(RunAhead, PlansNoStepThatIsKnownToBeOfNoUse) {
  TestEngine engine;
  const auto steps = [&] {
    (void)engine.Find("");
    return engine.metrics().step_tokens.Collect().histogram.sample_count;
  };
  ASSERT_TRUE(engine.Create("s").ok());
  engine.Run(Greedy(Tokens(5), 4));
  EXPECT_EQ(steps(), 4u);  // the prompt gives the first token
  engine.Run(Greedy(Tokens(5), 4, "s"));
  EXPECT_EQ(steps(), 4u + 5u);
  engine.Score(Tokens(10));
  EXPECT_EQ(steps(), 4u + 5u + 1u);
  EXPECT_EQ(engine.metrics().generated_tokens_total.Value(), 8);
}

TEST(RunAhead, ASessionThatMeetsItsEndTokenGoesOnFromThere) {
  TestEngine engine;
  ASSERT_TRUE(engine.Create("s").ok());
  std::vector<int32_t> text;
  int in_the_middle = 0;
  for (int turn = 0; turn < 20; ++turn) {
    const std::vector<int32_t> prompt = Tokens(1 + turn % 3, turn);
    GenerateParams params = Sampled(prompt, 30, 50 + static_cast<uint64_t>(turn), "s");
    params.ignore_eos = false;
    params.sampling.logit_bias = {{2, 5.0f}};
    params.logprobs = 1;
    const Outcome outcome = engine.Run(params);
    ASSERT_TRUE(outcome.finish.status.ok()) << outcome.finish.status;
    in_the_middle += outcome.finish.reason == FinishReason::kEos && outcome.tokens.size() > 1;
    params.prompt = Joined(text, prompt);
    params.session_id = "";
    const Outcome whole = engine.Run(params);
    EXPECT_EQ(outcome.tokens, whole.tokens) << "turn " << turn;
    EXPECT_EQ(outcome.logprobs.back().top, whole.logprobs.back().top);
    text = Joined(Joined(text, prompt), outcome.tokens);
    EXPECT_EQ(outcome.finish.session_position, static_cast<int64_t>(text.size()));
  }
  EXPECT_GT(in_the_middle, 5);
}

TEST(RunAhead, APenaltyBesideOthersChangesNobodysTokens) {
  TestEngine engine;
  std::vector<GenerateParams> all;
  std::vector<std::vector<int32_t>> alone;
  for (int i = 0; i < 6; ++i) {
    all.push_back(Sampled(Tokens(3 + i * 20, i), 40 - i * 3, static_cast<uint64_t>(i)));
    if (i % 2 == 1) all.back().sampling.repetition_penalty = 1.5f;
    if (i == 4) all.back().sampling.logit_bias = {{9, 3.0f}};
    alone.push_back(engine.Run(all.back()).tokens);
  }
  std::vector<RecordingSink> sinks(all.size());
  for (size_t i = 0; i < all.size(); ++i) ASSERT_TRUE(engine->Submit(all[i], &sinks[i]).ok());
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_THAT(sinks[i].Get().tokens, ElementsAreArray(alone[i])) << i;
  }
}

// Every way out, at every token, with a step under way; others go on beside, and take the slots.
TEST(RunAhead, WhateverEndsARequestWhileItsStepRunsEndsItOnce) {
  ManualClock clock;
  EngineSetup setup;
  setup.engine.clock = clock.clock();
  setup.engine.max_num_seqs = 3;
  setup.engine.num_slots = 6;
  TestEngine engine(setup);
  const Outcome want = engine.Run(Sampled(Tokens(6), 30, 5));
  for (int way = 0; way < 3; ++way) {
    for (const char* session : {"", "s"}) {
      for (int at = 1; at <= 9; at += 2) {
        SCOPED_TRACE(absl::StrCat("way ", way, " session ", session, " at ", at));
        ASSERT_TRUE(engine.Create("s", 0).ok());
        RecordingSink sink, beside;
        ASSERT_TRUE(engine->Submit(Sampled(Tokens(6), 30, 5), &beside).ok());
        RequestId id = 0;
        GenerateParams params = Sampled(Tokens(4), 10, 7, session);
        if (way == 1) params.deadline = absl::Now() + absl::Hours(1);
        sink.on_token = [&](int count) {
          if (count != at) return;
          if (way == 0) engine->Cancel(id);
          if (way == 1) clock.Advance(3601);
          if (way == 2) engine->DeleteSession("s", [](auto) {});
        };
        engine.SubmitKnown(params, sink, id);
        const Outcome outcome = sink.Get();
        EXPECT_EQ(beside.Get().tokens, want.tokens);
        const bool goes_on = way == 2 && params.session_id.empty();
        EXPECT_EQ(outcome.tokens.size(), goes_on ? 10u : static_cast<size_t>(at));
        EXPECT_EQ(outcome.finish.reason, goes_on    ? FinishReason::kLength
                                         : way == 1 ? FinishReason::kDeadline
                                                    : FinishReason::kCancelled);
        EXPECT_EQ(engine.Run(Sampled(Tokens(6), 30, 5)).tokens, want.tokens);
        if (way != 2 && !params.session_id.empty()) {
          const std::vector<int32_t> text = Joined(Tokens(4), outcome.tokens);
          EXPECT_EQ(outcome.finish.session_position, static_cast<int64_t>(text.size()));
          EXPECT_EQ(engine.Run(Greedy({77}, 8, "s")).tokens,
                    engine.Run(Greedy(Joined(text, {77}), 8)).tokens);
        }
        if (way != 2) {
          ASSERT_TRUE(engine.Delete("s").ok());
        }
        EXPECT_TRUE(engine.IsIdle());
        EXPECT_EQ(sink.Get().finishes, 1);
      }
    }
  }
  EXPECT_EQ(engine.metrics().numeric_guard_trips_total.Value(), 0);
}

TEST(RunAhead, StopWithAStepUnderWay) {
  for (int at = 1; at < 6; ++at) {
    TestEngine engine;
    RecordingSink sink;
    std::promise<void> reached;
    sink.on_token = [&](int count) {
      if (count == at) {
        engine->Stop();
        reached.set_value();
      }
    };
    ASSERT_TRUE(engine->Submit(Greedy(Tokens(4), 1 << 20), &sink).ok());
    reached.get_future().wait();
    const Outcome outcome = sink.Get();
    EXPECT_EQ(outcome.tokens.size(), static_cast<size_t>(at));
    EXPECT_EQ(outcome.finish.status.code(), absl::StatusCode::kUnavailable);
    engine.Reset();
    EXPECT_EQ(sink.Get().finishes, 1);
  }
}

}  // namespace
}  // namespace gla
