// What becomes of a step's logits: Engine::Core's second half.
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/core.h"

namespace gla {
namespace {

std::string LogitsAt(int64_t step, int64_t position) {
  return absl::StrCat("logits at step ", step, " (token position ", position, ")");
}

}  // namespace

Engine::Core::QueuedStep Engine::Core::Queue(Step step) {
  std::vector<SampleJob> jobs;
  std::vector<int32_t> targets;
  for (const StepPart& part : step.parts) {
    const Sequence& sequence = *part.sequence;
    if (part.num_logits == 0) continue;
    if (sequence.is_score) {
      const auto next = sequence.params.prompt.begin() + part.start + 1;
      targets.insert(targets.end(), next, next + part.num_logits);
    } else if (part.counter < 0) {
      jobs.emplace_back();
    } else {
      jobs.push_back({.row = ToSampleRow(sequence.params.sampling, part.counter),
                      .adjustments = sequence.adjustments.entries(),
                      .logprobs = sequence.params.logprobs});
    }
  }
  const bool judges_rows = step.judges_rows();
  int32_t* const finite = judges_rows ? sampler_->finite() : nullptr;
  const float* logits = model_.Forward(step.plan, pool_->states(), finite, sampler_->sampled());
  sampler_->Start(logits, jobs, targets, judges_rows ? step.plan.num_rows() : 0);
  return {std::move(step), now_};
}

void Engine::Core::Deliver(const QueuedStep& queued) {
  // There is always something to read, and never more than one step is queued behind this one: a
  // cancellation must not find a queue of steps ahead of it.
  const SampleResults results = sampler_->Take();
  now_ = options_.clock();
  CountStep(queued.step, std::max(queued.queued, last_delivered_));
  last_delivered_ = now_;
  for (const StepPart& part : queued.step.parts) {
    // Whoever has ended meanwhile has no use for it.
    const auto it = sequences_.find(part.id);
    if (it != sequences_.end()) Advance(*it->second, part, results);
  }
}

int64_t Engine::Core::FirstNonFinite(const StepPart& part, int num_rows,
                                     const SampleResults& results) {
  for (int i = 0; i < num_rows; ++i) {
    if (results.finite[static_cast<size_t>(part.first_row + i)] == 0) return i;
  }
  return -1;
}

void Engine::Core::CountStep(const Step& step, Instant began) {
  const int prompt_rows = step.num_prompt_rows + step.num_score_rows;
  const int rows = step.plan.num_rows();
  metrics_.step_batch_size.Observe(step.plan.num_seqs());
  metrics_.step_tokens.Observe(rows);
  metrics_.prompt_tokens_total.Increment(step.num_prompt_rows);
  metrics_.scored_tokens_total.Increment(step.num_score_rows);
  const char* kind = prompt_rows == 0 ? "decode" : prompt_rows == rows ? "prefill" : "mixed";
  metrics_.StepDuration(kind).Observe(SecondsBetween(began, now_));
}

void Engine::Core::Advance(Sequence& sequence, const StepPart& part, const SampleResults& results) {
  const int64_t start = sequence.position();
  sequence.consumed += part.num_rows;
  const auto first = static_cast<size_t>(part.first_logit);
  // The last rows of a part have logits, which judge them. Where only the state is wanted of it, it
  // does not matter what those would be.
  const bool is_last = sequence.end.has_value() || sequence.aborted.has_value();
  const int num_judged = part.num_rows - (is_last ? 0 : part.num_logits);
  if (const int64_t row = FirstNonFinite(part, num_judged, results); row >= 0) {
    FinishNonFinite(sequence, absl::StrCat("activations at token position ", start + row));
  } else if (sequence.is_score) {
    AdvanceScore(sequence, results.logprobs.subspan(first, static_cast<size_t>(part.num_logits)));
  } else if (sequence.end.has_value()) {
    Finish(sequence, *sequence.end, absl::OkStatus());  // its state holds its last token now
  } else if (sequence.aborted.has_value()) {
    FinishAborted(sequence, *sequence.aborted);
  } else if (part.num_logits == 0) {
    sequence.sink->OnPrefill(sequence.consumed, sequence.prompt_rows());
  } else if (results.tokens[first] < 0) {
    FinishNonFinite(sequence, LogitsAt(sequence.num_generated, sequence.position() - 1));
  } else {
    std::optional<TokenLogprob> logprob;
    if (sequence.params.logprobs >= 0) {
      logprob = results.LogprobOf(part.first_logit, sequence.params.logprobs);
    }
    AddToken(sequence, results.tokens[first], std::move(logprob));
  }
}

void Engine::Core::AdvanceScore(Sequence& sequence, absl::Span<const float> logprobs) {
  for (const float logprob : logprobs) {
    const auto step = static_cast<int64_t>(sequence.score_logprobs.size());
    if (!std::isfinite(logprob)) return FinishNonFinite(sequence, LogitsAt(step, step));
    sequence.score_logprobs.push_back(logprob);
  }
  if (sequence.is_prefill()) {
    sequence.sink->OnPrefill(sequence.consumed, sequence.prompt_rows());
  } else {
    Finish(sequence, FinishReason::kLength, absl::OkStatus());
  }
}

void Engine::Core::AddToken(Sequence& sequence, int32_t token,
                            std::optional<TokenLogprob> logprob) {
  TokenEvent event = {.token = token, .text = "", .logprob = std::move(logprob)};
  // A later one may be asked for already.
  if (++sequence.num_generated == sequence.num_asked) sequence.last_token = token;
  sequence.adjustments.AddGenerated(token);
  sequence.end = EndBy(sequence, token);
  if (!sequence.end.has_value()) {
    event.text = sequence.text.Add(token);
    if (sequence.text.matched() != nullptr) {
      sequence.end = FinishReason::kStop;
    } else if (sequence.num_generated >= sequence.params.max_new_tokens) {
      sequence.end = FinishReason::kLength;
    }
  }
  CountToken(sequence);
  sequence.sink->OnToken(event);
  // A session's state has to take the last token in first.
  if (sequence.end.has_value() && sequence.session == nullptr) {
    Finish(sequence, *sequence.end, absl::OkStatus());
  }
}

std::optional<FinishReason> Engine::Core::EndBy(const Sequence& sequence, int32_t token) const {
  const auto has = [token](const auto& tokens) {
    return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
  };
  if (!sequence.params.ignore_eos && has(end_tokens_)) return FinishReason::kEos;
  if (has(sequence.params.stop_token_ids)) return FinishReason::kStop;
  return std::nullopt;
}

void Engine::Core::CountToken(Sequence& sequence) {
  metrics_.generated_tokens_total.Increment();
  if (sequence.num_generated == 1) {
    sequence.first_token_at = now_;
    metrics_.prefill_time_seconds.Observe(SecondsBetween(sequence.scheduled, now_));
    metrics_.time_to_first_token_seconds.Observe(SecondsBetween(sequence.arrival, now_));
  } else {
    metrics_.inter_token_latency_seconds.Observe(SecondsBetween(sequence.last_token_at, now_));
  }
  sequence.last_token_at = now_;
}

void Engine::Core::FinishNonFinite(Sequence& sequence, const std::string& what) {
  metrics_.numeric_guard_trips_total.Increment();
  Finish(sequence, FinishReason::kError, absl::InternalError(absl::StrCat("non-finite ", what)));
}

absl::Status Engine::Core::SelfTest() {
  const StatePool::Slot slot = pool_->Acquire();
  const SampleJob greedy;
  StepPlan plan;  // a prompt, then one step from its state
  plan.tokens.assign(static_cast<size_t>(std::min(4, options_.max_num_batched_tokens)), 0);
  plan.read_slots = {-1};
  for (int step = 0; step < 2; ++step) {
    plan.cu_seqlens = {0, plan.num_rows()};
    plan.write_slots = {slot.index()};
    plan.start_positions = {step * 4};
    plan.logit_rows = {plan.num_rows() - 1};
    plan.num_decode = step;
    const float* logits =
        model_.Forward(plan, pool_->states(), sampler_->finite(), sampler_->sampled());
    if (sampler_->Run(logits, {greedy}, {}, plan.num_rows()).tokens[0] < 0) {
      return absl::InternalError(
          absl::StrCat("self-test: non-finite logits at step ", step, " on ", device_.name()));
    }
    plan.tokens = {~0};
    plan.read_slots = {slot.index()};
  }
  return absl::OkStatus();
}

}  // namespace gla
