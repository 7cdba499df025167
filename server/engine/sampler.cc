#include "engine/sampler.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace gla {
namespace {

constexpr int kMaxTop = 20;                  // LogprobArgs::top_n
constexpr size_t kMaxAdjustments = 1 << 16;  // 1 MiB; more take further calls

}  // namespace

SampleRow ToSampleRow(const SamplingParams& params, int counter) {
  return {.temperature = params.temperature,
          .top_k = params.top_k,
          .top_p = params.top_p,
          .min_p = params.min_p,
          .repetition_penalty = params.repetition_penalty,
          .presence_penalty = params.presence_penalty,
          .frequency_penalty = params.frequency_penalty,
          .seed = params.seed,
          .counter = static_cast<uint64_t>(counter)};
}

TokenAdjustments::TokenAdjustments(const SamplingParams& params)
    : sees_(params.repetition_penalty != 1),
      counts_(params.presence_penalty != 0 || params.frequency_penalty != 0) {
  for (const auto& [token, bias] : params.logit_bias) EntryOf(token).bias = bias;
}

void TokenAdjustments::AddPrompt(absl::Span<const int32_t> tokens) {
  if (!sees_) return;
  for (const int32_t token : tokens) EntryOf(token).seen = 1;
}

void TokenAdjustments::AddGenerated(int32_t token) {
  if (!sees_ && !counts_) return;
  TokenAdjustment& entry = EntryOf(token);
  entry.seen = 1;
  ++entry.generated_count;
}

TokenAdjustment& TokenAdjustments::EntryOf(int32_t token) {
  const auto [it, is_new] = where_.try_emplace(token, entries_.size());
  if (is_new) entries_.push_back({.token = token, .generated_count = 0, .seen = 0, .bias = 0});
  return entries_[it->second];
}

TokenLogprob SampleResults::LogprobOf(int job, int num_top) const {
  TokenLogprob result = {.logprob = logprobs[static_cast<size_t>(job)], .top = {}};
  for (int i = 0; i < std::min(num_top, top_n); ++i) {
    const auto at = static_cast<size_t>(job * top_n + i);
    result.top.emplace_back(top_tokens[at], top_logprobs[at]);
  }
  return result;
}

absl::StatusOr<std::unique_ptr<Sampler>> Sampler::Create(Device& device,
                                                         const SamplerLimits& limits) {
  std::unique_ptr<Sampler> sampler(new Sampler(device, limits));
  if (sampler->inputs_.ok() && sampler->outputs_.ok() && sampler->scratch_.ok() &&
      sampler->readbacks_[0].ok() && sampler->readbacks_[1].ok()) {
    return sampler;
  }
  return absl::ResourceExhaustedError(absl::StrCat(
      "no device memory for sampling ", limits.max_jobs, " rows of ", limits.vocab, " logits"));
}

Sampler::Sampler(Device& device, const SamplerLimits& limits)
    : device_(device),
      max_jobs_(limits.max_jobs),
      max_step_rows_(static_cast<size_t>(limits.max_step_rows)),
      vocab_(limits.vocab),
      max_adjustments_(std::max(kMaxAdjustments, static_cast<size_t>(vocab_))),
      inputs_(device, static_cast<size_t>(max_jobs_) * (sizeof(SampleRow) + sizeof(int32_t)) +
                          max_adjustments_ * sizeof(TokenAdjustment) + sizeof(int32_t)),
      outputs_(device,
               sizeof(int32_t) * (max_step_rows_ + 2 * static_cast<size_t>(limits.max_logit_rows) +
                                  2 * static_cast<size_t>(max_jobs_) * kMaxTop)),
      scratch_(device,
               sizeof(float) * static_cast<size_t>(max_jobs_) * static_cast<size_t>(vocab_)),
      readbacks_{Readback(device, outputs_.bytes()), Readback(device, outputs_.bytes())} {}

void Sampler::Start(const float* logits, absl::Span<const SampleJob> jobs,
                    absl::Span<const int32_t> targets, int num_finite) {
  int top_n = -1;
  for (const SampleJob& job : jobs) top_n = std::max(top_n, job.logprobs);
  const size_t num_jobs = jobs.size(), num_rows = jobs.size() + targets.size();
  SampleJobs(logits, jobs, tokens());
  if (!targets.empty()) {
    device_.Upload(tokens() + num_jobs, targets.data(), targets.size() * sizeof(int32_t));
  }
  MeasureLogprobs(logits, tokens(), num_jobs, targets.size(), top_n);

  // Only what was asked for travels, and what lies between.
  const bool has_logprobs = top_n >= 0 || !targets.empty();
  const size_t num_top = num_jobs * static_cast<size_t>(std::max(top_n, 0));
  const size_t num_values = has_logprobs ? 2 * num_rows + 2 * num_top : num_rows;
  const int32_t* const begin = num_finite > 0 ? finite() : tokens();
  const auto bytes = static_cast<size_t>(tokens() + num_values - begin) * sizeof(int32_t);
  const size_t place = num_started_++ % 2;
  readbacks_[place].Start(begin, bytes);
  pending_[place] = {.num_finite = static_cast<size_t>(num_finite),
                     .num_jobs = num_jobs,
                     .num_rows = num_rows,
                     .top_n = top_n,
                     .has_logprobs = has_logprobs};
}

SampleResults Sampler::Take() {
  const size_t place = num_taken_++ % 2;
  const auto [num_finite, num_jobs, num_rows, top_n, has_logprobs] = pending_[place];
  const auto* const values = static_cast<const int32_t*>(readbacks_[place].Wait());
  const int32_t* const sampled = values + (num_finite > 0 ? max_step_rows_ : 0);

  SampleResults results;
  results.finite = {values, num_finite};
  results.tokens = {sampled, num_jobs};
  if (!has_logprobs) return results;
  const size_t num_top = num_jobs * static_cast<size_t>(std::max(top_n, 0));
  logprobs_.resize(num_rows);
  top_logprobs_.resize(num_top);
  std::memcpy(logprobs_.data(), sampled + num_rows, num_rows * sizeof(float));
  results.logprobs = logprobs_;
  if (num_top == 0) return results;
  std::memcpy(top_logprobs_.data(), sampled + 2 * num_rows + num_top, num_top * sizeof(float));
  results.top_n = top_n;
  results.top_tokens = {sampled + 2 * num_rows, num_top};
  results.top_logprobs = top_logprobs_;
  return results;
}

void Sampler::SampleJobs(const float* logits, absl::Span<const SampleJob> jobs, int32_t* tokens) {
  // Rows are independent, so how they are grouped does not show.
  for (size_t begin = 0; begin < jobs.size();) {
    const size_t end = EndOfGroup(jobs, begin);
    SampleGroup(logits + begin * static_cast<size_t>(vocab_), jobs.subspan(begin, end - begin),
                tokens + begin);
    begin = end;
  }
}

size_t Sampler::EndOfGroup(absl::Span<const SampleJob> jobs, size_t begin) const {
  size_t end = begin, adjustments = 0;
  while (end < jobs.size() && end - begin < static_cast<size_t>(max_jobs_)) {
    adjustments += jobs[end].adjustments.size();
    if (adjustments > max_adjustments_) break;
    ++end;
  }
  return end;
}

void Sampler::SampleGroup(const float* logits, absl::Span<const SampleJob> jobs, int32_t* tokens) {
  size_t num_adjustments = 0;
  for (const SampleJob& job : jobs) num_adjustments += job.adjustments.size();
  const size_t adjustments_at = jobs.size() * sizeof(SampleRow);
  const size_t offsets_at = adjustments_at + num_adjustments * sizeof(TokenAdjustment);
  upload_.resize(offsets_at + (jobs.size() + 1) * sizeof(int32_t));

  uint8_t* row = upload_.data();
  uint8_t* adjustment = upload_.data() + adjustments_at;
  uint8_t* offset = upload_.data() + offsets_at;
  int32_t count = 0;
  std::memcpy(offset, &count, sizeof(count));
  for (const SampleJob& job : jobs) {
    std::memcpy(row, &job.row, sizeof(SampleRow));
    row += sizeof(SampleRow);
    const size_t bytes = job.adjustments.size() * sizeof(TokenAdjustment);
    if (bytes > 0) std::memcpy(adjustment, job.adjustments.data(), bytes);
    adjustment += bytes;
    count += static_cast<int32_t>(job.adjustments.size());
    offset += sizeof(int32_t);
    std::memcpy(offset, &count, sizeof(count));
  }
  device_.Upload(inputs_.data(), upload_.data(), upload_.size());

  const auto* inputs = inputs_.as<uint8_t>();
  Sample(device_, {.logits = logits,
                   .rows = reinterpret_cast<const SampleRow*>(inputs),
                   .adjustments = reinterpret_cast<const TokenAdjustment*>(inputs + adjustments_at),
                   .adjustment_offsets = reinterpret_cast<const int32_t*>(inputs + offsets_at),
                   .scratch = scratch_.as<float>(),
                   .tokens = tokens,
                   .num_rows = static_cast<int>(jobs.size()),
                   .vocab = vocab_});
}

void Sampler::MeasureLogprobs(const float* logits, int32_t* tokens, size_t num_jobs,
                              size_t num_targets, int top_n) {
  const size_t num_rows = num_jobs + num_targets;
  auto* logprobs = reinterpret_cast<float*>(tokens + num_rows);
  if (top_n >= 0 && num_jobs > 0) {
    const size_t num_top = num_jobs * static_cast<size_t>(top_n);
    Logprobs(device_, {.logits = logits,
                       .targets = tokens,
                       .logprobs = logprobs,
                       .top_tokens = num_top == 0 ? nullptr : tokens + 2 * num_rows,
                       .top_logprobs = num_top == 0 ? nullptr : logprobs + num_rows + num_top,
                       .num_rows = static_cast<int>(num_jobs),
                       .vocab = vocab_,
                       .top_n = top_n});
  }
  if (num_targets > 0) {
    Logprobs(device_, {.logits = logits + num_jobs * static_cast<size_t>(vocab_),
                       .targets = tokens + num_jobs,
                       .logprobs = logprobs + num_jobs,
                       .num_rows = static_cast<int>(num_targets),
                       .vocab = vocab_});
  }
}

}  // namespace gla
