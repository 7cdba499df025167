// What requests and sessions promise, one fact at a time.
#include "engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <thread>

#include "tests/engine/engine_fixture.h"

namespace gla {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Message(const Outcome& outcome) { return std::string(outcome.finish.status.message()); }

// `prompt` and `generated` one after another.
std::vector<int32_t> Joined(std::vector<int32_t> prompt, const std::vector<int32_t>& generated) {
  prompt.insert(prompt.end(), generated.begin(), generated.end());
  return prompt;
}

// ---- One-shot requests --------------------------------------------------------------------------

TEST(Engine, GeneratesUpToTheLength) {
  TestEngine engine;
  const Outcome outcome = engine.Run(Sampled(Tokens(10), 7, 5));
  EXPECT_TRUE(outcome.finish.status.ok());
  EXPECT_EQ(outcome.finish.reason, FinishReason::kLength);
  EXPECT_EQ(outcome.tokens.size(), 7u);
  EXPECT_EQ(outcome.finishes, 1);
  EXPECT_EQ(outcome.finish.tokens_restored, 0);
  EXPECT_EQ(outcome.finish.tokens_prefilled, 10);
  EXPECT_EQ(outcome.finish.tokens_generated, 7);
  EXPECT_EQ(outcome.finish.seed, 5u);
  EXPECT_EQ(outcome.finish.session_id, "");
  std::string text;
  for (const int32_t token : outcome.tokens) text += absl::StrCat(" t", token);
  EXPECT_EQ(outcome.text, text);
  EXPECT_TRUE(engine.IsIdle());
  EXPECT_EQ(engine.finished("length"), 1);
  EXPECT_EQ(engine.metrics().generated_tokens_total.Value(), 7);
  EXPECT_EQ(engine.prompt_tokens(), 10);
}

TEST(Engine, TimingsAddUp) {
  ManualClock clock;
  EngineSetup setup;
  setup.engine.clock = clock.clock();
  TestEngine engine(setup);
  RecordingSink sink;
  sink.on_prefill = [&](int64_t) { clock.Advance(2); };
  sink.on_token = [&](int) { clock.Advance(0.5); };
  ASSERT_TRUE(engine->Submit(Greedy(Tokens(60), 3), &sink).ok());  // 32 rows, then 28
  const RequestTimings timings = sink.Get().finish.timings;
  EXPECT_EQ(timings.queue, 0);
  EXPECT_EQ(timings.prefill, 2);
  EXPECT_EQ(timings.time_to_first_token, 2);
  EXPECT_EQ(timings.decode, 1);
  EXPECT_EQ(timings.total, 3);
}

TEST(Engine, ReportsThePromptsProgress) {
  TestEngine engine;
  const Outcome outcome = engine.Run(Greedy(Tokens(100), 1));
  EXPECT_THAT(outcome.prefill, ElementsAre(32, 64, 96));
}

TEST(Engine, TheBeginTokenIsFedAtTheStartOnly) {
  TestEngine engine;
  GenerateParams with = Greedy(Tokens(5), 6, "s");
  with.bos_if_start = 1;
  ASSERT_TRUE(engine.Create("s").ok());
  const Outcome first = engine.Run(with);
  EXPECT_EQ(first.finish.tokens_prefilled, 6);
  EXPECT_EQ(first.tokens, engine.Run(Greedy(Joined({1}, Tokens(5)), 6)).tokens);
  EXPECT_EQ(engine.Run(with).finish.tokens_prefilled, 5);
  with.session_id = "";
  EXPECT_EQ(engine.Run(with).tokens, first.tokens);
}

TEST(Engine, TheEndTokenEndsAndIsReportedWithoutText) {
  TestEngine engine;
  const Outcome free = engine.Run(Sampled(Tokens(4), 20, 1));
  GenerateParams params = Sampled(Tokens(4), 20, 1);
  params.ignore_eos = false;
  params.sampling.logit_bias = {{2, 100.0f}};
  const Outcome outcome = engine.Run(params);
  EXPECT_EQ(outcome.finish.reason, FinishReason::kEos);
  EXPECT_THAT(outcome.tokens, ElementsAre(2));
  EXPECT_EQ(outcome.text, "");
  params.ignore_eos = true;
  EXPECT_EQ(engine.Run(params).tokens.size(), 20u);
  EXPECT_EQ(engine.finished("eos"), 1);
}

TEST(Engine, AStopTokenEndsAndGivesNoText) {
  TestEngine engine;
  const Outcome free = engine.Run(Sampled(Tokens(4), 10, 1));
  GenerateParams params = Sampled(Tokens(4), 10, 1);
  params.stop_token_ids = {free.tokens[3]};
  const Outcome outcome = engine.Run(params);
  EXPECT_EQ(outcome.finish.reason, FinishReason::kStop);
  EXPECT_EQ(outcome.finish.stop_sequence, "");
  EXPECT_THAT(outcome.tokens, ::testing::ElementsAreArray(free.tokens.data(), 4));
  EXPECT_EQ(outcome.text, free.pieces[0] + free.pieces[1] + free.pieces[2]);
}

TEST(Engine, AStopStringAcrossTokensEndsWithTheTokenThatCompletesIt) {
  TestEngine engine;
  const Outcome free = engine.Run(Sampled(Tokens(4), 10, 1));
  const std::string before = free.pieces[0] + free.pieces[1] + free.pieces[2];
  // The end of the third token and all but the last character of the fourth.
  const std::string stop = free.text.substr(before.size() - 2, free.pieces[3].size() + 1);
  ASSERT_EQ(free.text.find(stop), before.size() - 2);
  GenerateParams params = Sampled(Tokens(4), 10, 1);
  params.stop = {"never", stop};
  const Outcome outcome = engine.Run(params);
  EXPECT_EQ(outcome.finish.reason, FinishReason::kStop);
  EXPECT_EQ(outcome.finish.stop_sequence, stop);
  EXPECT_THAT(outcome.tokens, ::testing::ElementsAreArray(free.tokens.data(), 4));
  EXPECT_EQ(outcome.text, before.substr(0, before.size() - 2));
  EXPECT_EQ(outcome.finish.text, "");
}

TEST(Engine, TextHeldBackForAStopComesWithTheFinish) {
  TestEngine engine;
  const Outcome free = engine.Run(Sampled(Tokens(4), 3, 1));
  GenerateParams params = Sampled(Tokens(4), 3, 1);
  params.stop = {free.pieces[2] + " and more"};
  const Outcome outcome = engine.Run(params);
  EXPECT_EQ(outcome.finish.reason, FinishReason::kLength);
  EXPECT_EQ(outcome.finish.text, free.pieces[2]);
  EXPECT_EQ(outcome.text, free.text);
}

TEST(Engine, TextNeverSplitsACharacter) {
  EngineSetup setup;
  for (int32_t token = 0; token < 2048; ++token) {
    setup.spelt[token] = token % 2 == 0 ? "\xe2\x82" : "\xac";  // the halves of a euro sign
  }
  TestEngine engine(setup);
  const Outcome outcome = engine.Run(Sampled(Tokens(4), 50, 3));
  for (const std::string& piece : outcome.pieces) {
    EXPECT_TRUE(piece.empty() || (piece.back() & 0xc0) != 0xc0) << piece;
  }
  // Every byte comes out, as a part of a character or as one that stands for it.
  EXPECT_FALSE(outcome.text.empty());
}

TEST(Engine, LogprobsAreOfTheUnchangedDistribution) {
  TestEngine engine;
  GenerateParams params = Sampled(Tokens(6), 12, 9);
  params.logprobs = 3;
  params.sampling.temperature = 0.7f;
  params.sampling.repetition_penalty = 1.4f;
  const Outcome outcome = engine.Run(params);
  ASSERT_EQ(outcome.logprobs.size(), 12u);
  const Outcome score = engine.Score(Joined(Tokens(6), outcome.tokens));
  ASSERT_EQ(score.finish.score_logprobs.size(), 6u + 12u - 1u);
  for (size_t i = 0; i < 12; ++i) {
    EXPECT_EQ(outcome.logprobs[i].logprob, score.finish.score_logprobs[5 + i]) << i;
    ASSERT_EQ(outcome.logprobs[i].top.size(), 3u);
    EXPECT_GE(outcome.logprobs[i].top[0].second, outcome.logprobs[i].logprob);
  }
  params.logprobs = 0;
  EXPECT_TRUE(engine.Run(params).logprobs[0].top.empty());
}

TEST(Engine, ScoringLongerThanAStepEqualsItsSum) {
  TestEngine engine;
  const std::vector<int32_t> tokens = Tokens(400);
  const Outcome whole = engine.Score(tokens);
  ASSERT_TRUE(whole.finish.status.ok());
  ASSERT_EQ(whole.finish.score_logprobs.size(), 399u);
  EXPECT_FALSE(whole.prefill.empty());
  const Outcome begin = engine.Score({tokens.begin(), tokens.begin() + 150});
  for (size_t i = 0; i < 149; ++i) {
    ASSERT_EQ(begin.finish.score_logprobs[i], whole.finish.score_logprobs[i]) << i;
  }
  EXPECT_EQ(engine.metrics().scored_tokens_total.Value(), 399 + 149);
  EXPECT_TRUE(engine.IsIdle());
}

TEST(Engine, TooShortPromptsAreRefused) {
  TestEngine engine;
  EXPECT_EQ(engine.Run(Greedy({}, 1)).finish.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(engine.Score({5}).finish.status.code(), absl::StatusCode::kInvalidArgument);
}

// ---- Sessions -----------------------------------------------------------------------------------

TEST(EngineSession, ManyTurnsEqualOneRunOverTheWholeText) {
  TestEngine engine;
  ASSERT_TRUE(engine.Create("s").ok());
  std::vector<int32_t> text;
  for (int turn = 0; turn < 12; ++turn) {
    const std::vector<int32_t> prompt = Tokens(1 + turn * 7, turn);
    const double before = engine.prompt_tokens();
    GenerateParams params = Sampled(prompt, 1 + turn % 5, 100 + static_cast<uint64_t>(turn), "s");
    params.expected_position = static_cast<int64_t>(text.size());
    params.logprobs = 2;
    const Outcome outcome = engine.Run(params);
    ASSERT_TRUE(outcome.finish.status.ok());
    // Only the new tokens were run.
    EXPECT_EQ(engine.prompt_tokens() - before, static_cast<double>(prompt.size()));
    EXPECT_EQ(outcome.finish.tokens_prefilled, static_cast<int64_t>(prompt.size()));
    EXPECT_EQ(outcome.finish.tokens_restored, static_cast<int64_t>(text.size()));
    params.prompt = Joined(text, prompt);
    params.session_id = "";
    params.expected_position.reset();
    const Outcome whole = engine.Run(params);
    EXPECT_EQ(outcome.tokens, whole.tokens) << "turn " << turn;
    for (size_t i = 0; i < outcome.logprobs.size(); ++i) {
      EXPECT_EQ(outcome.logprobs[i].logprob, whole.logprobs[i].logprob);
      EXPECT_EQ(outcome.logprobs[i].top, whole.logprobs[i].top);
    }
    text = Joined(Joined(text, prompt), outcome.tokens);
    EXPECT_EQ(outcome.finish.session_position, static_cast<int64_t>(text.size()));
    EXPECT_EQ(engine.Find("s")->position, static_cast<int64_t>(text.size()));
  }
  EXPECT_EQ(engine.metrics().restored_tokens_total.Value() > 0, true);
  EXPECT_TRUE(engine.IsIdle(1));
}

TEST(EngineSession, HoldsASlotOnlyOnceItHasConsumed) {
  TestEngine engine;
  EXPECT_EQ(engine.Create("s")->state_bytes, 0);
  EXPECT_TRUE(engine.IsIdle(0));
  engine.Run(Greedy(Tokens(3), 2, "s"));
  EXPECT_GT(engine.Find("s")->state_bytes, 0);
  EXPECT_TRUE(engine.IsIdle(1));
  EXPECT_TRUE(engine.Delete("s").ok());
  EXPECT_TRUE(engine.IsIdle(0));
  EXPECT_EQ(engine.metrics().SessionsEnded("deleted").Value(), 1);
}

// A turn that ends by `params` leaves the session at every token it was given.
void ExpectConsumesWhatItReports(TestEngine& engine, GenerateParams params) {
  ASSERT_TRUE(engine.Create("s").ok());
  params.session_id = "s";
  const Outcome outcome = engine.Run(params);
  ASSERT_TRUE(outcome.finish.status.ok());
  const std::vector<int32_t> text = Joined(params.prompt, outcome.tokens);
  EXPECT_EQ(outcome.finish.session_position, static_cast<int64_t>(text.size()));
  EXPECT_EQ(engine.Run(Greedy({77}, 10, "s")).tokens,
            engine.Run(Greedy(Joined(text, {77}), 10)).tokens);
  ASSERT_TRUE(engine.Delete("s").ok());
}

TEST(EngineSession, ConsumesEveryReportedTokenHoweverTheTurnEnds) {
  TestEngine engine;
  const Outcome free = engine.Run(Sampled(Tokens(4), 10, 1));
  GenerateParams params = Sampled(Tokens(4), 10, 1);
  ExpectConsumesWhatItReports(engine, params);
  params.stop_token_ids = {free.tokens[4]};
  ExpectConsumesWhatItReports(engine, params);
  params.stop_token_ids.clear();
  params.stop = {free.pieces[3].substr(1) + free.pieces[4].substr(0, 2)};
  ExpectConsumesWhatItReports(engine, params);
  params.stop.clear();
  params.max_new_tokens = 1;
  ExpectConsumesWhatItReports(engine, params);
  params.ignore_eos = false;
  params.sampling.logit_bias = {{2, 100.0f}};
  ExpectConsumesWhatItReports(engine, params);
}

TEST(EngineSession, ASecondWriterIsAborted) {
  TestEngine engine;
  ASSERT_TRUE(engine.Create("s").ok());
  RecordingSink first, second;
  first.on_token = [&](int count) {
    if (count == 3) {
      EXPECT_TRUE(engine->Submit(Greedy({5}, 1, "s"), &second).ok());
    }
  };
  ASSERT_TRUE(engine->Submit(Sampled(Tokens(4), 20, 1, "s"), &first).ok());
  const Outcome refused = second.Get();
  EXPECT_EQ(refused.finish.status.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(ReasonOf(refused.finish.status), "SESSION_BUSY");
  EXPECT_TRUE(refused.tokens.empty());
  const Outcome outcome = first.Get();
  EXPECT_EQ(outcome.tokens, engine.Run(Sampled(Tokens(4), 20, 1)).tokens);
  EXPECT_EQ(outcome.finish.session_position, 24);
}

TEST(EngineSession, IsBusyFromSubmissionOn) {
  EngineSetup setup;
  setup.engine.max_num_seqs = 1;
  TestEngine engine(setup);
  ASSERT_TRUE(engine.Create("s").ok());
  RecordingSink running, queued, second;
  RequestId id = 0;
  running.on_token = [&](int count) {
    if (count == 1) {
      EXPECT_TRUE(engine->Submit(Greedy({5}, 1, "s"), &queued).ok());
    }
    if (count == 5) {
      EXPECT_TRUE(engine->Submit(Greedy({5}, 1, "s"), &second).ok());
    }
    if (count == 10) engine->Cancel(id);
  };
  engine.SubmitKnown(Greedy(Tokens(3), 1000), running, id);
  EXPECT_EQ(ReasonOf(second.Get().finish.status), "SESSION_BUSY");
  EXPECT_TRUE(queued.Get().finish.status.ok());
  EXPECT_EQ(running.Get().finish.reason, FinishReason::kCancelled);
}

TEST(EngineSession, AStalePositionChangesNothing) {
  TestEngine engine;
  ASSERT_TRUE(engine.Create("s").ok());
  engine.Run(Greedy(Tokens(3), 4, "s"));
  for (const int64_t wrong : {0, 6, 8}) {
    GenerateParams params = Greedy({5}, 1, "s");
    params.expected_position = wrong;
    const Outcome outcome = engine.Run(params);
    EXPECT_EQ(ReasonOf(outcome.finish.status), "STALE_POSITION");
    EXPECT_THAT(Message(outcome), HasSubstr("7"));
    EXPECT_THAT(Message(outcome), HasSubstr(std::to_string(wrong)));
  }
  EXPECT_EQ(engine.Find("s")->position, 7);
  EXPECT_FALSE(engine.Find("s")->busy);
  GenerateParams params = Greedy({5}, 1, "s");
  params.expected_position = 7;
  EXPECT_TRUE(engine.Run(params).finish.status.ok());
}

TEST(EngineSession, DeletingABusySessionCancelsItsRequest) {
  TestEngine engine;
  ASSERT_TRUE(engine.Create("s").ok());
  RecordingSink sink;
  std::promise<absl::Status> deleted;
  int tokens_at_delete = 0;
  sink.on_token = [&](int count) {
    tokens_at_delete = count;
    if (count == 5) {
      engine->DeleteSession("s", [&](absl::Status status) { deleted.set_value(status); });
    }
  };
  ASSERT_TRUE(engine->Submit(Greedy(Tokens(4), 1000, "s"), &sink).ok());
  const Outcome outcome = sink.Get();
  EXPECT_EQ(outcome.finish.status.code(), absl::StatusCode::kCancelled);
  EXPECT_THAT(Message(outcome), HasSubstr("deleted"));
  EXPECT_EQ(outcome.tokens.size(), 5u);
  EXPECT_TRUE(deleted.get_future().get().ok());
  EXPECT_EQ(ReasonOf(engine.Find("s").status()), "SESSION_NOT_FOUND");
  EXPECT_TRUE(engine.IsIdle());
}

TEST(EngineSession, UnknownSessionsAreNotFound) {
  TestEngine engine;
  EXPECT_EQ(ReasonOf(engine.Run(Greedy({5}, 1, "nobody")).finish.status), "SESSION_NOT_FOUND");
  EXPECT_EQ(ReasonOf(engine.Delete("nobody")), "SESSION_NOT_FOUND");
  EXPECT_TRUE(engine.IsIdle());
}

TEST(EngineSession, ExpiresWhenIdleAndIsRemembered) {
  ManualClock clock;
  EngineSetup setup;
  setup.engine.clock = clock.clock();
  setup.engine.default_session_ttl_seconds = 10;
  TestEngine engine(setup);
  ASSERT_TRUE(engine.Create("s").ok());
  ASSERT_TRUE(engine.Create("kept", 0).ok());
  engine.Run(Greedy({5}, 1, "s"));
  clock.Advance(9);
  EXPECT_EQ(engine.Find("s")->idle_seconds, 9);
  engine.Run(Greedy({5}, 1, "s"));
  clock.Advance(9);
  EXPECT_TRUE(engine.Find("s").ok());
  clock.Advance(1);
  EXPECT_EQ(ReasonOf(engine.Find("s").status()), "SESSION_EXPIRED");
  EXPECT_EQ(ReasonOf(engine.Run(Greedy({5}, 1, "s")).finish.status), "SESSION_EXPIRED");
  EXPECT_EQ(ReasonOf(engine.Delete("s")), "SESSION_EXPIRED");
  EXPECT_EQ(engine.metrics().SessionsEnded("expired").Value(), 1);
  EXPECT_TRUE(engine.IsIdle(0));
  EXPECT_EQ(engine->num_sessions(), 1);
  EXPECT_TRUE(engine.Create("s").ok());
}

TEST(EngineSession, ExpiryNeedsNoTraffic) {
  TestEngine engine;
  ASSERT_TRUE(engine.Create("s", 1).ok());
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (engine->num_sessions() > 0 && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  EXPECT_EQ(engine->num_sessions(), 0);
}

TEST(EngineSession, OneTooManyIsRefusedAndRequestsGoOn) {
  EngineSetup setup;
  setup.engine.max_num_seqs = 2;
  setup.engine.num_slots = 5;
  TestEngine engine(setup);
  EXPECT_EQ(engine->capacity_sessions(), 3);
  for (const char* id : {"a", "b", "c"}) {
    ASSERT_TRUE(engine.Create(id).ok());
    engine.Run(Greedy({5}, 1, id));
  }
  EXPECT_EQ(ReasonOf(engine.Create("d").status()), "SESSIONS_FULL");
  EXPECT_EQ(engine.metrics().Rejected("sessions_full").Value(), 1);
  // All slots are spoken for, and still every place can run.
  RecordingSink one, two;
  ASSERT_TRUE(engine->Submit(Greedy(Tokens(50), 20, "a"), &one).ok());
  ASSERT_TRUE(engine->Submit(Greedy(Tokens(50), 20), &two).ok());
  EXPECT_TRUE(one.Get().finish.status.ok());
  EXPECT_TRUE(two.Get().finish.status.ok());
  EXPECT_EQ(engine.List().size(), 3u);
  EXPECT_TRUE(engine.IsIdle(3));
}

// ---- Cancellation and deadlines -----------------------------------------------------------------

// The session is where the text of `consumed` tokens would have brought it.
void ExpectSessionHolds(TestEngine& engine, const std::vector<int32_t>& consumed) {
  ASSERT_EQ(engine.Find("s")->position, static_cast<int64_t>(consumed.size()));
  EXPECT_FALSE(engine.Find("s")->busy);
  EXPECT_EQ(engine.Run(Greedy({77}, 8, "s")).tokens,
            engine.Run(Greedy(Joined(consumed, {77}), 8)).tokens);
}

TEST(EngineCancel, InMidStreamTakesEffectWithinAStep) {
  TestEngine engine;
  ASSERT_TRUE(engine.Create("s").ok());
  RecordingSink sink;
  RequestId id = 0;
  sink.on_token = [&](int count) {
    if (count == 5) engine->Cancel(id);
  };
  engine.SubmitKnown(Sampled(Tokens(4), 1000, 3, "s"), sink, id);
  const Outcome outcome = sink.Get();
  EXPECT_EQ(outcome.finish.status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(outcome.finish.reason, FinishReason::kCancelled);
  EXPECT_EQ(outcome.tokens.size(), 5u);
  // The fifth token was being run already, and what came out of that is nobody's.
  EXPECT_EQ(outcome.finish.session_position, 9);
  ExpectSessionHolds(engine, Joined(Tokens(4), outcome.tokens));
  EXPECT_EQ(engine.finished("cancelled"), 1);
}

TEST(EngineCancel, InThePromptKeepsWhatWasRun) {
  TestEngine engine;
  ASSERT_TRUE(engine.Create("s").ok());
  RecordingSink sink;
  RequestId id = 0;
  sink.on_prefill = [&](int64_t done) {
    if (done == 64) engine->Cancel(id);
  };
  engine.SubmitKnown(Greedy(Tokens(1000), 5, "s"), sink, id);
  const Outcome outcome = sink.Get();
  EXPECT_EQ(outcome.finish.reason, FinishReason::kCancelled);
  EXPECT_EQ(outcome.finish.tokens_prefilled, 96);  // one chunk was on its way
  EXPECT_EQ(outcome.finish.session_position, 96);
  EXPECT_THAT(outcome.prefill, ElementsAre(32, 64));
  const std::vector<int32_t> text = Tokens(1000);
  ExpectSessionHolds(engine, {text.begin(), text.begin() + 96});
}

TEST(EngineCancel, InTheQueueLeavesTheSessionAsItWas) {
  EngineSetup setup;
  setup.engine.max_num_seqs = 1;
  TestEngine engine(setup);
  ASSERT_TRUE(engine.Create("s").ok());
  RecordingSink running, queued;
  running.on_token = [&](int count) {
    if (count == 1) {
      const RequestId id = *engine->Submit(Greedy({5}, 1, "s"), &queued);
      engine->Cancel(id);
      engine->Cancel(id);  // once more is nothing
    }
  };
  ASSERT_TRUE(engine->Submit(Greedy(Tokens(3), 20), &running).ok());
  const Outcome outcome = queued.Get();
  EXPECT_EQ(outcome.finish.reason, FinishReason::kCancelled);
  EXPECT_EQ(outcome.finish.tokens_prefilled, 0);
  EXPECT_EQ(running.Get().tokens.size(), 20u);
  EXPECT_EQ(engine.Find("s")->position, 0);
  EXPECT_FALSE(engine.Find("s")->busy);
  EXPECT_TRUE(engine.IsIdle());
}

TEST(EngineCancel, AfterTheLastTokenChangesNothing) {
  TestEngine engine;
  ASSERT_TRUE(engine.Create("s").ok());
  RecordingSink sink;
  RequestId id = 0;
  sink.on_token = [&](int count) {
    if (count == 3) engine->Cancel(id);
  };
  engine.SubmitKnown(Greedy(Tokens(4), 3, "s"), sink, id);
  const Outcome outcome = sink.Get();
  EXPECT_TRUE(outcome.finish.status.ok());
  EXPECT_EQ(outcome.finish.session_position, 7);
  engine->Cancel(id);
  engine->Cancel(id + 1000);
  ExpectSessionHolds(engine, Joined(Tokens(4), outcome.tokens));
}

TEST(EngineDeadline, PassedAtSubmission) {
  TestEngine engine;
  GenerateParams params = Greedy(Tokens(4), 5);
  params.deadline = absl::Now() - absl::Seconds(1);
  const Outcome outcome = engine.Run(params);
  EXPECT_EQ(outcome.finish.status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(outcome.tokens.empty());
  EXPECT_EQ(engine.prompt_tokens(), 0);
}

TEST(EngineDeadline, InTheQueue) {
  ManualClock clock;
  EngineSetup setup;
  setup.engine.max_num_seqs = 1;
  setup.engine.clock = clock.clock();
  TestEngine engine(setup);
  RecordingSink running, queued;
  running.on_token = [&](int count) {
    if (count == 1) {
      GenerateParams params = Greedy({5}, 1);
      params.deadline = absl::Now() + absl::Hours(1);
      EXPECT_TRUE(engine->Submit(params, &queued).ok());
    }
    if (count == 3) clock.Advance(3601);
  };
  ASSERT_TRUE(engine->Submit(Greedy(Tokens(3), 50), &running).ok());
  const Outcome outcome = queued.Get();
  EXPECT_EQ(outcome.finish.reason, FinishReason::kDeadline);
  EXPECT_EQ(outcome.finish.status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(Message(outcome), HasSubstr("queue"));
  EXPECT_EQ(running.Get().tokens.size(), 50u);
  EXPECT_EQ(engine.prompt_tokens(), 3);
  EXPECT_EQ(engine.finished("deadline"), 1);
}

TEST(EngineDeadline, InThePromptAndWhileGenerating) {
  ManualClock clock;
  EngineSetup setup;
  setup.engine.clock = clock.clock();
  TestEngine engine(setup);
  ASSERT_TRUE(engine.Create("s", 0).ok());
  GenerateParams params = Greedy(Tokens(100), 50, "s");
  params.deadline = absl::Now() + absl::Hours(1);
  RecordingSink in_prompt;
  in_prompt.on_prefill = [&](int64_t done) {
    if (done == 32) clock.Advance(3601);
  };
  ASSERT_TRUE(engine->Submit(params, &in_prompt).ok());
  Outcome outcome = in_prompt.Get();
  EXPECT_EQ(outcome.finish.reason, FinishReason::kDeadline);
  EXPECT_EQ(outcome.finish.session_position, 64);  // one chunk was on its way
  EXPECT_THAT(Message(outcome), HasSubstr("64 of 100 prompt tokens"));
  EXPECT_EQ(engine.prompt_tokens(), 64);

  params.session_id = "";
  params.deadline = absl::Now() + absl::Hours(1);
  RecordingSink in_decode;
  in_decode.on_token = [&](int count) {
    if (count == 7) clock.Advance(3601);
  };
  ASSERT_TRUE(engine->Submit(params, &in_decode).ok());
  outcome = in_decode.Get();
  EXPECT_EQ(outcome.finish.reason, FinishReason::kDeadline);
  EXPECT_EQ(outcome.tokens.size(), 7u);
  EXPECT_THAT(Message(outcome), HasSubstr("7 generated tokens"));
}

// ---- Bounds, drain, stop ------------------------------------------------------------------------

TEST(Engine, TheQueueIsBoundedByRequestsAndTokens) {
  EngineSetup setup;
  setup.engine.max_num_seqs = 2;
  setup.engine.max_queued_requests = 3;
  setup.engine.max_queued_tokens = 100;
  setup.start = false;
  TestEngine engine(setup);
  std::vector<RecordingSink> sinks(5);
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(engine->Submit(Greedy(Tokens(20), 2), &sinks[static_cast<size_t>(i)]).ok());
  }
  Outcome refused = engine.Run(Greedy(Tokens(21), 2));
  EXPECT_EQ(refused.finish.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(refused.finish.status), "TOKENS_FULL");
  ASSERT_TRUE(engine->Submit(Greedy(Tokens(20), 2), &sinks[4]).ok());
  refused = engine.Run(Greedy(Tokens(1), 2));
  EXPECT_EQ(ReasonOf(refused.finish.status), "QUEUE_FULL");
  EXPECT_GE(RetryMsOf(refused.finish.status), 200);
  engine->Start();
  for (RecordingSink& sink : sinks) EXPECT_TRUE(sink.Get().finish.status.ok());
  EXPECT_TRUE(engine.Run(Greedy(Tokens(100), 2)).finish.status.ok());
  EXPECT_TRUE(engine.IsIdle());
  EXPECT_EQ(engine.metrics().Rejected("queue_full").Value(), 1);
  EXPECT_EQ(engine.metrics().Rejected("tokens_full").Value(), 1);
}

TEST(Engine, APromptLongerThanTheWholeQueueIsNoMatterOfWaiting) {
  EngineSetup setup;
  setup.engine.max_queued_tokens = 100;
  TestEngine engine(setup);
  GenerateParams params = Greedy(Tokens(100), 2);
  EXPECT_TRUE(engine.Run(params).finish.status.ok());
  params.bos_if_start = 1;  // one token more
  for (const Outcome& refused : {engine.Run(params), engine.Score(Tokens(101))}) {
    EXPECT_EQ(refused.finish.status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(Message(refused), HasSubstr("at most 100 tokens"));
    EXPECT_THAT(Message(refused), HasSubstr("--max-num-queued-tokens"));
    EXPECT_EQ(ReasonOf(refused.finish.status), "PROMPT_TOO_LONG");
    EXPECT_EQ(RetryMsOf(refused.finish.status), -1);
  }
  EXPECT_TRUE(engine.IsIdle());
}

TEST(Engine, DrainFinishesWhatRunsAndWaitsAndRefusesWhatIsNew) {
  EngineSetup setup;
  setup.engine.max_num_seqs = 1;
  TestEngine engine(setup);
  ASSERT_TRUE(engine.Create("s").ok());
  RecordingSink running, queued, late;
  std::promise<void> drained;
  absl::Status refused;
  running.on_token = [&](int count) {
    if (count == 2) {
      EXPECT_TRUE(engine->Submit(Greedy({5}, 3, "s"), &queued).ok());
      engine->Drain([&] { drained.set_value(); });
      refused = engine->Submit(Greedy({5}, 1), &late).status();
    }
  };
  ASSERT_TRUE(engine->Submit(Greedy(Tokens(3), 20), &running).ok());
  drained.get_future().wait();
  EXPECT_EQ(running.Get().tokens.size(), 20u);
  EXPECT_EQ(queued.Get().finish.session_position, 4);
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(refused), "DRAINING");
  EXPECT_EQ(engine.Create("t").status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(engine.Find("s")->position, 4);  // sessions still answer
  std::promise<void> again;
  engine->Drain([&] { again.set_value(); });
  again.get_future().wait();
}

TEST(Engine, StopEndsEverythingAsUnavailable) {
  EngineSetup setup;
  setup.engine.max_num_seqs = 1;
  TestEngine engine(setup);
  RecordingSink running, queued;
  std::promise<void> started;
  running.on_token = [&](int count) {
    if (count == 1) started.set_value();
  };
  ASSERT_TRUE(engine->Submit(Greedy(Tokens(3), 1 << 30), &running).ok());
  ASSERT_TRUE(engine->Submit(Greedy(Tokens(3), 5), &queued).ok());
  started.get_future().wait();
  engine->Stop();
  EXPECT_EQ(running.Get().finish.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(queued.Get().finish.status.code(), absl::StatusCode::kUnavailable);
  engine->Stop();
  // Everything is still answered.
  EXPECT_EQ(engine.Run(Greedy({5}, 1)).finish.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(engine.Create("s").status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(engine.Delete("s").code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(engine.List().empty());
  std::promise<void> drained;
  engine->Drain([&] { drained.set_value(); });
  drained.get_future().wait();
  engine->Cancel(1);
  EXPECT_EQ(engine.finished("error"), 2);
}

TEST(Engine, AnEngineThatNeverStartedEndsWhatItWasGiven) {
  EngineSetup setup;
  setup.start = false;
  TestEngine engine(setup);
  RecordingSink sink;
  ASSERT_TRUE(engine->Submit(Greedy({5}, 1), &sink).ok());
  engine.Reset();
  EXPECT_EQ(sink.Get().finish.status.code(), absl::StatusCode::kUnavailable);
}

TEST(Engine, MayBeStoppedFromACallback) {
  TestEngine engine;
  std::promise<void> drained;
  engine->Drain([&] {
    engine->Stop();
    drained.set_value();
  });
  drained.get_future().wait();
}

TEST(Engine, AdmittedIsFinishedRunningAndQueued) {
  EngineSetup setup;
  setup.engine.max_num_seqs = 2;
  TestEngine engine(setup);
  ASSERT_TRUE(engine.Create("s").ok());
  std::vector<RecordingSink> sinks(12);
  double admitted = 0;
  for (size_t i = 0; i < sinks.size(); ++i) {
    GenerateParams params = Greedy(Tokens(5), 4, i % 3 == 0 ? "s" : "");
    if (i % 5 == 0) params.deadline = absl::Now();
    if (const auto id = engine->Submit(params, &sinks[i]); id.ok()) {
      ++admitted;
      if (i % 4 == 0) engine->Cancel(*id);
    }
  }
  for (RecordingSink& sink : sinks) EXPECT_EQ(sink.Get().finishes, 1);
  double finished = 0;
  for (const char* reason : {"length", "eos", "stop", "cancelled", "deadline", "error"}) {
    finished += engine.finished(reason);
  }
  EXPECT_EQ(finished, admitted);
  EXPECT_EQ(admitted, 12);
}

// ---- The engine itself --------------------------------------------------------------------------

TEST(Engine, PassesItsSelfTestAndLeavesNoTrace) {
  EngineSetup setup;
  setup.start = false;
  TestEngine engine(setup);
  EXPECT_TRUE(engine->SelfTest().ok());
  engine->Start();
  EXPECT_TRUE(engine.IsIdle());
}

TEST(Engine, BeatsWhileIdle) {
  TestEngine engine;
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  EXPECT_LT(engine->heartbeat_age_seconds(), 1.4);
}

TEST(Engine, RefusesOptionsThatDoNotFitTheModel) {
  const std::unique_ptr<Device> device = OpenTestDevice();
  const std::unique_ptr<Model> model =
      MakeTinyModel(*device, {.max_rows = 100,
                              .max_seqs = 8,
                              .max_logit_rows = 16,
                              .prefill_form = PrefillForm::kRecurrent});
  const TestTokenizer tokenizer;
  Metrics metrics({"0", "test", "test", "tiny", "gla", "float32"});
  const auto message = [&](const EngineOptions& options) {
    return std::string(
        Engine::Create(*device, *model, tokenizer, metrics, options).status().message());
  };
  const EngineOptions good = {.max_num_seqs = 8, .max_num_batched_tokens = 100, .num_slots = 9};
  EXPECT_EQ(message(good), "");
  EngineOptions bad = good;
  bad.max_num_seqs = 9;
  EXPECT_EQ(message(bad), "max_num_seqs: expected 1 .. 8, got 9");
  bad = good;
  bad.max_num_batched_tokens = 7;
  EXPECT_EQ(message(bad), "max_num_batched_tokens: expected 8 .. 100, got 7");
  bad = good;
  bad.num_slots = 8;
  EXPECT_THAT(message(bad), HasSubstr("state slots: expected 9"));
  bad = good;
  bad.num_slots = int64_t{1} << 30;
  EXPECT_THAT(message(bad), HasSubstr("no device memory"));
}

}  // namespace
}  // namespace gla
