// From a step's rows to tokens, log probabilities and whether they are finite, in one upload, at
// most a few kernels and one copy to the host, which need not be waited for: the next step can be
// queued meanwhile, and read the tokens where they are.
#pragma once

#include <array>
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
  // Whether entries() may change with a generated token: it has to be known before the next one is
  // sampled.
  bool follows_tokens() const { return sees_ || counts_; }
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

// Views into the sampler, valid until its next Start or Take.
struct SampleResults {
  absl::Span<const int32_t> finite;  // of the step's rows, where it was asked for; 0: not finite
  absl::Span<const int32_t> tokens;  // of the jobs; -1: the row's logits are not finite
  absl::Span<const float> logprobs;  // of the jobs' tokens (0 where no job wants any), then targets
  int top_n = 0;
  absl::Span<const int32_t> top_tokens;  // [jobs, top_n]
  absl::Span<const float> top_logprobs;  // [jobs, top_n]

  TokenLogprob LogprobOf(int job, int num_top) const;
};

struct SamplerLimits {
  int max_jobs;
  int max_logit_rows;  // jobs and targets
  int max_step_rows;   // whose `finite` may be asked for
  int vocab;
};

class Sampler {
 public:
  // ResourceExhausted without device memory.
  static absl::StatusOr<std::unique_ptr<Sampler>> Create(Device& device,
                                                         const SamplerLimits& limits);

  // Device memory [max_step_rows] for Model::Forward; read by the next Start.
  int32_t* finite() const { return outputs_.as<int32_t>(); }
  // Device memory: the tokens of the last Start's jobs. The next Start overwrites them, behind all
  // that is queued before it.
  const int32_t* sampled() const { return tokens(); }

  // The first rows of `logits` [.., vocab] (device memory) belong to `jobs`, the next ones are
  // judged by `targets`. `num_finite` rows were written to finite(). Queued, not waited for.
  // REQUIRES: at most one result is not taken yet.
  void Start(const float* logits, absl::Span<const SampleJob> jobs,
             absl::Span<const int32_t> targets, int num_finite = 0);
  // Waits for the oldest result that is not taken yet. REQUIRES: there is one.
  SampleResults Take();
  SampleResults Run(const float* logits, absl::Span<const SampleJob> jobs,
                    absl::Span<const int32_t> targets, int num_finite = 0) {
    Start(logits, jobs, targets, num_finite);
    return Take();
  }

 private:
  // What comes to the host of one Start: outputs_ from where they were asked for.
  struct Pending {
    size_t num_finite, num_jobs, num_rows;  // jobs and targets
    int top_n;                              // -1: nobody asked for log probabilities
    bool has_logprobs;
  };

  Sampler(Device& device, const SamplerLimits& limits);

  int32_t* tokens() const { return outputs_.as<int32_t>() + max_step_rows_; }
  void SampleJobs(const float* logits, absl::Span<const SampleJob> jobs, int32_t* tokens);
  // Jobs [begin, the result) fit into one call.
  size_t EndOfGroup(absl::Span<const SampleJob> jobs, size_t begin) const;
  void SampleGroup(const float* logits, absl::Span<const SampleJob> jobs, int32_t* tokens);
  // Of the jobs' tokens when top_n >= 0, and of the targets; `tokens` as in outputs_.
  void MeasureLogprobs(const float* logits, int32_t* tokens, size_t num_jobs, size_t num_targets,
                       int top_n);

  Device& device_;
  const int max_jobs_;
  const size_t max_step_rows_;
  const int vocab_;
  const size_t max_adjustments_;  // of one call; any one job fits
  DeviceBuffer inputs_;           // of one call: rows, adjustments, offsets
  // finite [max step rows], tokens [rows], logprobs [rows], top tokens and logprobs [jobs, top_n]
  DeviceBuffer outputs_;
  DeviceBuffer scratch_;  // [max_jobs, vocab]
  std::vector<uint8_t> upload_;
  // Of the Starts in turn, so that one is filled while the other is read.
  std::array<Readback, 2> readbacks_;
  std::array<Pending, 2> pending_;
  size_t num_started_ = 0, num_taken_ = 0;
  std::vector<float> logprobs_;  // copies of the floats among the results
  std::vector<float> top_logprobs_;
};

}  // namespace gla
