#include "engine/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "tests/engine/engine_fixture.h"

namespace gla {
namespace {

using ::testing::ElementsAre;

// Sequences without slots: the scheduler never looks at states.
class SchedulerTest : public ::testing::Test {
 protected:
  Sequence* Add(Scheduler& scheduler, int prompt, bool is_score = false) {
    GenerateParams params;
    params.prompt.resize(static_cast<size_t>(prompt));
    std::iota(params.prompt.begin(), params.prompt.end(), 100 * ++count_);
    auto sequence = std::make_unique<Sequence>(std::move(params), is_score, tokenizer_, nullptr);
    Sequence* raw = sequence.get();
    scheduler.Enqueue(std::move(sequence));
    return raw;
  }
  static int AdmitAll(Scheduler& scheduler) {
    int count = 0;
    while (scheduler.AdmitNext() != nullptr) ++count;
    return count;
  }
  // As the engine does with a step's results, all tokens being 7.
  static void Apply(const Step& step) {
    for (const StepPart& part : step.parts) {
      Sequence& sequence = *part.sequence;
      sequence.consumed += part.num_rows;
      if (part.counter < 0) continue;
      EXPECT_EQ(part.counter, sequence.num_generated);
      if (++sequence.num_generated == sequence.num_asked) sequence.last_token = 7;
    }
  }
  static std::vector<int> RowsOf(const Step& step) {
    std::vector<int> rows;
    for (const StepPart& part : step.parts) rows.push_back(part.num_rows);
    return rows;
  }

  const TestTokenizer tokenizer_;
  int count_ = 0;
};

TEST_F(SchedulerTest, AdmitsInOrderUpToTheLimit) {
  Scheduler scheduler({.max_num_seqs = 2});
  Sequence* first = Add(scheduler, 3);
  Sequence* second = Add(scheduler, 3);
  Sequence* third = Add(scheduler, 3);
  EXPECT_EQ(scheduler.AdmitNext(), first);
  EXPECT_EQ(scheduler.AdmitNext(), second);
  EXPECT_EQ(scheduler.AdmitNext(), nullptr);
  EXPECT_THAT(scheduler.All(), ElementsAre(first, second, third));
  EXPECT_NE(scheduler.Remove(*first), nullptr);
  EXPECT_EQ(scheduler.AdmitNext(), third);
  EXPECT_EQ(scheduler.num_waiting(), 0);
}

TEST_F(SchedulerTest, LaysOutOnePrompt) {
  Scheduler scheduler({});
  Sequence* sequence = Add(scheduler, 4);
  sequence->start_position = 50;
  AdmitAll(scheduler);
  Step step = scheduler.Plan();
  EXPECT_THAT(step.plan.tokens, ElementsAre(100, 101, 102, 103));
  EXPECT_THAT(step.plan.cu_seqlens, ElementsAre(0, 4));
  EXPECT_THAT(step.plan.read_slots, ElementsAre(-1));
  EXPECT_THAT(step.plan.start_positions, ElementsAre(50));
  EXPECT_THAT(step.plan.logit_rows, ElementsAre(3));
  EXPECT_EQ(step.num_samples, 1);
  EXPECT_EQ(step.num_prompt_rows, 4);
  Apply(step);
  step = scheduler.Plan();
  EXPECT_THAT(step.plan.tokens, ElementsAre(7));
  EXPECT_THAT(step.plan.start_positions, ElementsAre(54));
  EXPECT_EQ(step.num_prompt_rows, 0);
}

TEST_F(SchedulerTest, EveryGenerationGetsItsRowAndPromptsTheRest) {
  Scheduler scheduler({.max_num_seqs = 4, .max_num_batched_tokens = 10, .max_prefill_chunk = 6});
  Add(scheduler, 1);
  Add(scheduler, 1);
  AdmitAll(scheduler);
  Apply(scheduler.Plan());
  Sequence* old_prompt = Add(scheduler, 9);
  Sequence* new_prompt = Add(scheduler, 9);
  AdmitAll(scheduler);
  const Step step = scheduler.Plan();
  EXPECT_THAT(RowsOf(step), ElementsAre(1, 1, 6, 2));  // the oldest prompt first
  EXPECT_EQ(step.parts[2].sequence, old_prompt);
  EXPECT_EQ(step.parts[3].sequence, new_prompt);
  EXPECT_THAT(step.plan.logit_rows, ElementsAre(0, 1));
  EXPECT_EQ(step.plan.num_rows(), 10);
  Apply(step);
  EXPECT_THAT(RowsOf(scheduler.Plan()), ElementsAre(1, 1, 3, 5));
}

TEST_F(SchedulerTest, PromptsGetOnWhileAllOthersGenerate) {
  Scheduler scheduler({.max_num_seqs = 4, .max_num_batched_tokens = 4});
  for (int i = 0; i < 3; ++i) Add(scheduler, 1);
  AdmitAll(scheduler);
  Apply(scheduler.Plan());
  Sequence* prompt = Add(scheduler, 5);
  AdmitAll(scheduler);
  for (int i = 0; i < 5; ++i) Apply(scheduler.Plan());
  EXPECT_EQ(prompt->num_generated, 1);
}

TEST_F(SchedulerTest, TheLastTokenOfASessionTurnRunsAndSamplesNothing) {
  Scheduler scheduler({});
  Session session;
  Sequence* sequence = Add(scheduler, 2);
  sequence->session = &session;
  AdmitAll(scheduler);
  Apply(scheduler.Plan());
  sequence->end = FinishReason::kStop;
  const Step step = scheduler.Plan();
  EXPECT_THAT(step.plan.tokens, ElementsAre(7));
  EXPECT_THAT(step.plan.logit_rows, ElementsAre(0));  // as every row that generates
  EXPECT_EQ(step.plan.num_decode, 1);
  EXPECT_EQ(step.parts[0].counter, -1);
  EXPECT_TRUE(step.judges_rows());
  EXPECT_TRUE(scheduler.Plan().is_empty());
}

TEST_F(SchedulerTest, PlansAheadOfTheTokens) {
  Scheduler scheduler({.max_prefill_chunk = 6});
  Sequence* first = Add(scheduler, 1);
  AdmitAll(scheduler);
  const Step prompt = scheduler.Plan();
  Sequence* second = Add(scheduler, 8);
  second->start_position = 20;
  AdmitAll(scheduler);
  // One step after another is planned before the one before it is applied.
  const Step beside = scheduler.Plan();
  Apply(prompt);
  EXPECT_EQ(beside.plan.tokens[0], ~0);
  EXPECT_EQ(beside.plan.num_decode, 1);
  EXPECT_EQ(beside.parts[0].counter, 1);
  EXPECT_THAT(RowsOf(beside), ElementsAre(1, 6));
  EXPECT_THAT(beside.plan.logit_rows, ElementsAre(0));
  const Step end = scheduler.Plan();
  Apply(beside);
  EXPECT_THAT(end.plan.tokens, ElementsAre(~0, 206, 207));
  EXPECT_THAT(end.plan.start_positions, ElementsAre(2, 26));
  EXPECT_THAT(end.plan.logit_rows, ElementsAre(0, 2));
  EXPECT_EQ(end.parts[1].start, 6);
  const Step both = scheduler.Plan();
  EXPECT_THAT(both.plan.tokens, ElementsAre(~0, ~1));
  EXPECT_EQ(both.plan.num_decode, 2);
  EXPECT_THAT(both.plan.start_positions, ElementsAre(3, 28));
  // The first one ends: then the other one's sample is the second one still.
  Apply(end);
  EXPECT_NE(scheduler.Remove(*first), nullptr);
  const Step alone = scheduler.Plan();
  EXPECT_THAT(alone.plan.tokens, ElementsAre(~1));
  EXPECT_EQ(alone.parts[0].sequence, second);
  EXPECT_EQ(alone.parts[0].counter, 2);
}

TEST_F(SchedulerTest, RunsNothingBeyondTheLastTokenThatIsWanted) {
  for (const bool on_session : {false, true}) {
    Scheduler scheduler({});
    Session session;
    Sequence* sequence = Add(scheduler, 2);
    if (on_session) sequence->session = &session;
    sequence->params.max_new_tokens = 2;
    AdmitAll(scheduler);
    const Step first = scheduler.Plan(), second = scheduler.Plan(), third = scheduler.Plan();
    EXPECT_EQ(first.parts[0].counter, 0);
    EXPECT_EQ(second.parts[0].counter, 1);
    EXPECT_EQ(third.is_empty(), !on_session);
    if (on_session) {
      EXPECT_THAT(third.plan.tokens, ElementsAre(~0));
      EXPECT_EQ(third.parts[0].counter, -1);
      EXPECT_TRUE(scheduler.Plan().is_empty());
    }
  }
}

TEST_F(SchedulerTest, AnEndThatIsLearntLateNeedsNoFurtherRow) {
  Scheduler scheduler({});
  Session session;
  Sequence* sequence = Add(scheduler, 2);
  sequence->session = &session;
  AdmitAll(scheduler);
  const Step step = scheduler.Plan(), ahead = scheduler.Plan();
  Apply(step);
  sequence->end = FinishReason::kEos;
  EXPECT_TRUE(scheduler.Plan().is_empty());
  EXPECT_TRUE(sequence->is_in_flight());
}

TEST_F(SchedulerTest, APenaltyWaitsForTheTokens) {
  Scheduler scheduler({});
  GenerateParams params;
  params.prompt = {5, 6};
  params.sampling.repetition_penalty = 1.2f;
  params.max_new_tokens = 2;
  scheduler.Enqueue(std::make_unique<Sequence>(std::move(params), false, tokenizer_, nullptr));
  AdmitAll(scheduler);
  EXPECT_FALSE(scheduler.waits_for_tokens());
  const Step first = scheduler.Plan();
  EXPECT_TRUE(scheduler.waits_for_tokens());
  Apply(first);
  EXPECT_FALSE(scheduler.waits_for_tokens());
  const Step last = scheduler.Plan();
  EXPECT_FALSE(scheduler.waits_for_tokens());  // nothing more is sampled
}

TEST_F(SchedulerTest, OneThatIsAbortedGetsNoRows) {
  Scheduler scheduler({.max_prefill_chunk = 6});
  Add(scheduler, 1)->aborted = FinishReason::kCancelled;
  Sequence* prompt = Add(scheduler, 20);
  AdmitAll(scheduler);
  EXPECT_THAT(RowsOf(scheduler.Plan()), ElementsAre(6));
  prompt->aborted = FinishReason::kDeadline;
  EXPECT_TRUE(scheduler.Plan().is_empty());
}

TEST_F(SchedulerTest, ScoringWantsAllRowsButNeverThePlacesOfGenerations) {
  Scheduler scheduler({.max_num_seqs = 3, .max_logit_rows = 8});
  Add(scheduler, 2);
  Sequence* score = Add(scheduler, 20, /*is_score=*/true);
  Sequence* late = Add(scheduler, 3, /*is_score=*/true);
  AdmitAll(scheduler);
  Step step = scheduler.Plan();
  // One place for the generation; the last token of a scoring is only a target.
  EXPECT_THAT(RowsOf(step), ElementsAre(2, 7));
  EXPECT_EQ(step.num_samples, 1);
  EXPECT_EQ(step.num_score_rows, 7);
  EXPECT_EQ(step.parts[1].first_logit, 1);
  EXPECT_EQ(step.parts[1].num_logits, 7);
  Apply(step);
  Apply(scheduler.Plan());
  step = scheduler.Plan();
  EXPECT_THAT(RowsOf(step), ElementsAre(1, 5, 2));
  Apply(step);
  EXPECT_FALSE(score->is_prefill());
  EXPECT_FALSE(late->is_prefill());
  EXPECT_EQ(late->consumed, 2);
}

TEST_F(SchedulerTest, ScoringsStandBehindPromptsWhateverTheirAge) {
  Scheduler scheduler({});
  Sequence* score = Add(scheduler, 4, /*is_score=*/true);
  Sequence* prompt = Add(scheduler, 4);
  AdmitAll(scheduler);
  const Step step = scheduler.Plan();
  EXPECT_EQ(step.parts[0].sequence, prompt);
  EXPECT_EQ(step.parts[1].sequence, score);
  EXPECT_THAT(step.plan.logit_rows, ElementsAre(3, 4, 5, 6));
}

// Where a prompt of `length` is cut while `others` sequences generate beside it.
std::vector<int64_t> Cuts(Scheduler& scheduler, Sequence* prompt,
                          const std::function<void(const Step&)>& apply) {
  std::vector<int64_t> cuts;
  while (prompt->is_prefill()) {
    const int64_t before = prompt->consumed;
    apply(scheduler.Plan());
    if (prompt->consumed > before) cuts.push_back(prompt->consumed);
  }
  return cuts;
}

TEST_F(SchedulerTest, AlignedChunksEndAtTiles) {
  for (const int length : {1, 2, 63, 64, 65, 66, 128, 129, 191, 193, 300}) {
    for (const int others : {0, 1, 5, 7}) {
      for (const int budget : {72, 100, 200, 1000}) {
        Scheduler scheduler({.max_num_seqs = 8,
                             .max_num_batched_tokens = budget,
                             .max_prefill_chunk = 150,
                             .align_chunks = true});
        for (int i = 0; i < others; ++i) Add(scheduler, 1);
        AdmitAll(scheduler);
        if (others > 0) Apply(scheduler.Plan());
        Sequence* prompt = Add(scheduler, length);
        AdmitAll(scheduler);
        int64_t previous = 0;
        for (const int64_t cut : Cuts(scheduler, prompt, Apply)) {
          if (cut < length) {
            EXPECT_EQ(cut % 64, 0) << length << " beside " << others;
          }
          previous = cut;
        }
        EXPECT_EQ(previous, length);
      }
    }
  }
}

TEST_F(SchedulerTest, WholeChunksAreCutAtTheSameRowsWhateverElseRuns) {
  for (const bool align : {false, true}) {
    std::vector<int64_t> alone;
    for (const int others : {0, 1, 3}) {
      Scheduler scheduler({.max_num_seqs = 4,
                           .max_num_batched_tokens = 160,
                           .max_prefill_chunk = 128,
                           .max_logit_rows = 96,
                           .align_chunks = align,
                           .whole_chunks = true});
      for (int i = 0; i < others; ++i) Add(scheduler, i == 1 ? 500 : 1);
      AdmitAll(scheduler);
      if (others > 0) Apply(scheduler.Plan());
      Sequence* prompt = Add(scheduler, 300);
      AdmitAll(scheduler);
      const std::vector<int64_t> cuts = Cuts(scheduler, prompt, Apply);
      std::vector<int64_t> distinct(cuts);
      distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
      if (others == 0) alone = distinct;
      EXPECT_EQ(distinct, alone) << others;
    }
    EXPECT_THAT(alone, ElementsAre(128, 256, 300));
  }
}

}  // namespace
}  // namespace gla
