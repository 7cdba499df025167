// One generation or scoring in flight.
//
// Made by the submitting thread; from the inbox on only the engine thread touches it. The scheduler
// owns it until its OnFinish.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "engine/engine.h"
#include "engine/sampler.h"
#include "engine/session.h"
#include "engine/state_pool.h"
#include "engine/text_stream.h"

namespace gla {

struct Sequence {
  Sequence(GenerateParams params_in, bool is_score, const Tokenizer& tokenizer, TokenSink* sink)
      : params(std::move(params_in)),
        is_score(is_score),
        sink(sink),
        text(tokenizer, std::move(params.stop)),
        adjustments(params.sampling) {}

  // What was asked for.
  RequestId id = 0;
  GenerateParams params;  // of a scoring: tokens in `prompt`, deadline, request_id
  const bool is_score;
  TokenSink* const sink;
  Instant arrival, deadline;
  int64_t queued_tokens = 0;  // its share of the bound on waiting tokens
  Session* session = nullptr;
  int64_t start_position = 0;  // the session's when the request came

  // How far it is, and how far it will be once the steps that are queued have run.
  StatePool::Slot slot;  // the working slot, from admission on
  int64_t consumed = 0;  // tokens run, prompt and generated
  int64_t planned = 0;   // consumed, and what queued steps run
  int num_generated = 0;
  int num_asked = 0;        // num_generated, and what queued steps sample
  int32_t last_token = -1;  // to be run next; ~i: the i-th sample of the step that is queued
  std::optional<FinishReason> end;      // its last token is made, and still has to be run
  std::optional<FinishReason> aborted;  // ends once the step that is queued has run
  TextStream text;
  TokenAdjustments adjustments;
  std::vector<float> score_logprobs;
  Instant scheduled, first_token_at, last_token_at;

  // Of a scoring the last token is only a target.
  int64_t prompt_rows() const {
    return static_cast<int64_t>(params.prompt.size()) - (is_score ? 1 : 0);
  }
  bool is_prefill() const { return consumed < prompt_rows(); }
  bool is_queued() const { return !slot; }
  bool is_in_flight() const { return planned > consumed; }
  int64_t position() const { return start_position + consumed; }

  // What it wants of the next step.
  bool wants_prompt_rows() const { return !aborted && planned < prompt_rows(); }
  // A row of a token that was generated. A session's state takes in the last one too, a one-shot
  // request has no use for it.
  bool wants_decode_row() const {
    if (aborted || is_score || planned < prompt_rows()) return false;
    const int num_known = end.has_value() ? num_generated : num_asked;
    return planned < prompt_rows() + num_known && (!knows_last_token() || session != nullptr);
  }
  // No token beyond those that are made or asked for is wanted.
  bool knows_last_token() const { return end.has_value() || num_asked >= params.max_new_tokens; }
  // What it samples next depends on a token that the host does not know yet.
  bool waits_for_token() const {
    return adjustments.follows_tokens() && num_asked > num_generated && !aborted &&
           !knows_last_token();
  }

  RequestTimings TimingsAt(Instant now) const;

  int32_t read_slot() const {
    if (planned > 0) return slot.index();
    return session != nullptr ? session->slot.index() : -1;
  }
};

inline RequestTimings Sequence::TimingsAt(Instant now) const {
  const Instant never{};
  RequestTimings timings;
  timings.total = SecondsBetween(arrival, now);
  timings.queue = SecondsBetween(arrival, scheduled == never ? now : scheduled);
  if (scheduled == never) return timings;
  const bool has_token = num_generated > 0;
  timings.prefill = SecondsBetween(scheduled, has_token ? first_token_at : now);
  if (!has_token) return timings;
  timings.decode = SecondsBetween(first_token_at, last_token_at);
  timings.time_to_first_token = SecondsBetween(arrival, first_token_at);
  return timings;
}

}  // namespace gla
