// From rows of logits to tokens and log probabilities, in one upload, at most a few kernels and one
// download.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/engine.h"
#include "kernels/device.h"
#include "kernels/kernels.h"

namespace gla {

// The row of the Sample kernel for the token of index `counter`.
SampleRow ToSampleRow(const SamplingParams& params, int counter);

// The tokens whose logits one generation changes: its bias, and what it has seen when a penalty is
// on.
class TokenAdjustments {
 public:
  explicit TokenAdjustments(const SamplingParams& params);
  void AddPrompt(absl::Span<const int32_t> tokens);
  void AddGenerated(int32_t token);
  absl::Span<const TokenAdjustment> entries() const { return entries_; }

 private:
  TokenAdjustment& EntryOf(int32_t token);

  const bool sees_;    // a repetition penalty
  const bool counts_;  // a presence or frequency penalty
  std::vector<TokenAdjustment> entries_;
  std::unordered_map<int32_t, size_t> where_;
};

// What is wanted of one row of logits of a generation.
struct SampleJob {
  SampleRow row;
  absl::Span<const TokenAdjustment> adjustments;
  int logprobs = -1;  // -1: none; n: of the token and the n likeliest
};

// Views into the sampler, valid until its next Run.
struct SampleResults {
  absl::Span<const int32_t> tokens;  // of the jobs; -1: the row's logits are not finite
  absl::Span<const float> logprobs;  // of the jobs' tokens (0 where no job wants any), then targets
  int top_n = 0;
  absl::Span<const int32_t> top_tokens;  // [jobs, top_n]
  absl::Span<const float> top_logprobs;  // [jobs, top_n]

  TokenLogprob LogprobOf(int job, int num_top) const;
};

class Sampler {
 public:
  // Room for `max_jobs` jobs and `max_rows` rows in all. ResourceExhausted without device memory.
  static absl::StatusOr<std::unique_ptr<Sampler>> Create(Device& device, int max_jobs, int max_rows,
                                                         int vocab);

  // The first rows of `logits` [.., vocab] (device memory) belong to `jobs`, the next ones are
  // judged by `targets`. Waits for the device.
  SampleResults Run(const float* logits, absl::Span<const SampleJob> jobs,
                    absl::Span<const int32_t> targets);

 private:
  Sampler(Device& device, int max_jobs, int max_rows, int vocab);

  void SampleJobs(const float* logits, absl::Span<const SampleJob> jobs);
  // Jobs [begin, the result) fit into one call.
  size_t EndOfGroup(absl::Span<const SampleJob> jobs, size_t begin) const;
  void SampleGroup(const float* logits, absl::Span<const SampleJob> jobs, int32_t* tokens);
  // Of the jobs' tokens when top_n >= 0, and of the targets.
  void MeasureLogprobs(const float* logits, size_t num_jobs, size_t num_targets, int top_n);

  Device& device_;
  const int max_jobs_;
  const int vocab_;
  const size_t max_adjustments_;  // of one call; any one job fits
  DeviceBuffer inputs_;           // of one call: rows, adjustments, offsets
  DeviceBuffer outputs_;  // tokens [rows], logprobs [rows], top tokens and logprobs [jobs, top_n]
  DeviceBuffer scratch_;  // [max_jobs, vocab]
  std::vector<uint8_t> upload_;
  std::vector<int32_t> results_;  // as in outputs_
  std::vector<float> logprobs_;   // copies of the floats among them
  std::vector<float> top_logprobs_;
};

}  // namespace gla
