#include "engine/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "tests/testing/tiny_model.h"

namespace gla {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr int kVocab = 70000;  // so that one job may fill a call's room for adjustments

bool operator==(const TokenAdjustment& a, const TokenAdjustment& b) {
  return a.token == b.token && a.generated_count == b.generated_count && a.seen == b.seen &&
         a.bias == b.bias;
}

TEST(TokenAdjustments, AreEmptyWithoutPenaltiesAndBias) {
  TokenAdjustments adjustments({});
  adjustments.AddPrompt({1, 2, 3});
  adjustments.AddGenerated(4);
  EXPECT_THAT(adjustments.entries(), IsEmpty());
}

TEST(TokenAdjustments, RepetitionSeesPromptAndGeneratedTokens) {
  SamplingParams params;
  params.repetition_penalty = 1.5;
  params.logit_bias = {{9, -2.0f}, {5, 3.0f}};
  TokenAdjustments adjustments(params);
  adjustments.AddPrompt({5, 6, 5});
  adjustments.AddGenerated(6);
  adjustments.AddGenerated(7);
  adjustments.AddGenerated(6);
  ASSERT_THAT(adjustments.entries(), SizeIs(4));
  EXPECT_TRUE((adjustments.entries()[0] == TokenAdjustment{9, 0, 0, -2.0f}));
  EXPECT_TRUE((adjustments.entries()[1] == TokenAdjustment{5, 0, 1, 3.0f}));
  EXPECT_TRUE((adjustments.entries()[2] == TokenAdjustment{6, 2, 1, 0}));
  EXPECT_TRUE((adjustments.entries()[3] == TokenAdjustment{7, 1, 1, 0}));
}

TEST(TokenAdjustments, PresenceAndFrequencyCountOnlyWhatWasGenerated) {
  SamplingParams params;
  params.presence_penalty = 0.5;
  TokenAdjustments adjustments(params);
  adjustments.AddPrompt({5, 6});
  EXPECT_THAT(adjustments.entries(), IsEmpty());
  adjustments.AddGenerated(6);
  ASSERT_THAT(adjustments.entries(), SizeIs(1));
  EXPECT_EQ(adjustments.entries()[0].generated_count, 1);
}

class SamplerTest : public ::testing::Test {
 protected:
  SamplerTest() : logits_(*device_, sizeof(float) * kRows * kVocab) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0, 3);
    host_.resize(size_t{kRows} * kVocab);
    for (float& value : host_) value = normal(random);
    Upload();
  }
  void Upload() { device_->Upload(logits_.data(), host_.data(), host_.size() * sizeof(float)); }
  std::unique_ptr<Sampler> Make(int max_jobs) {
    return ValueOrDie(Sampler::Create(
        *device_,
        {.max_jobs = max_jobs, .max_logit_rows = kRows, .max_step_rows = 8, .vocab = kVocab}));
  }
  const float* logits(int row) { return logits_.as<float>() + int64_t{row} * kVocab; }
  float Logprob(int row, int32_t token) {
    double sum = 0;
    for (int i = 0; i < kVocab; ++i) sum += std::exp(double{host_[row * kVocab + i]});
    return static_cast<float>(host_[row * kVocab + token] - std::log(sum));
  }

  static constexpr int kRows = 6;
  const std::unique_ptr<Device> device_ = OpenTestDevice();
  std::vector<float> host_;
  const DeviceBuffer logits_;
};

TEST_F(SamplerTest, SamplesWithoutLogprobs) {
  const auto sampler = Make(4);
  const std::vector<SampleJob> jobs(3);  // greedy
  const SampleResults results = sampler->Run(logits(0), jobs, {});
  for (int row = 0; row < 3; ++row) {
    const auto* first = &host_[row * kVocab];
    EXPECT_EQ(results.tokens[row], std::max_element(first, first + kVocab) - first);
  }
  EXPECT_THAT(results.logprobs, IsEmpty());
}

TEST_F(SamplerTest, MeasuresJobsAndTargetsSideBySide) {
  const auto sampler = Make(4);
  std::vector<SampleJob> jobs(2);
  jobs[0].logprobs = 0;
  jobs[1].logprobs = 3;
  const std::vector<int32_t> targets = {11, 69999, 0};
  const SampleResults results = sampler->Run(logits(0), jobs, targets);
  ASSERT_THAT(results.logprobs, SizeIs(5));
  EXPECT_THAT(results.LogprobOf(0, 0).top, IsEmpty());
  const TokenLogprob second = results.LogprobOf(1, 3);
  EXPECT_NEAR(second.logprob, Logprob(1, results.tokens[1]), 1e-4);
  ASSERT_THAT(second.top, SizeIs(3));
  EXPECT_EQ(second.top[0].first, results.tokens[1]);
  EXPECT_EQ(second.top[0].second, second.logprob);
  EXPECT_GE(second.top[1].second, second.top[2].second);
  for (int i = 0; i < 3; ++i) {
    EXPECT_NEAR(results.logprobs[2 + i], Logprob(2 + i, targets[i]), 1e-4);
  }
  const float beside = results.logprobs[3];
  const SampleResults only_targets = sampler->Run(logits(3), {}, {69999});
  EXPECT_EQ(only_targets.logprobs[0], beside);
}

TEST_F(SamplerTest, ANonFiniteRowIsMinusOneAndLeavesItsNeighboursAlone) {
  const auto sampler = Make(4);
  const std::vector<SampleJob> jobs(3);
  const SampleResults before = sampler->Run(logits(0), jobs, {});
  const std::vector<int32_t> tokens(before.tokens.begin(), before.tokens.end());
  host_[1 * kVocab + 5] = std::numeric_limits<float>::infinity();
  Upload();
  EXPECT_THAT(sampler->Run(logits(0), jobs, {}).tokens, ElementsAre(tokens[0], -1, tokens[2]));
}

TEST_F(SamplerTest, WhatTheModelSaidOfItsRowsTravelsAlong) {
  const auto sampler = Make(4);
  const std::vector<int32_t> finite = {1, 0, 1, 1, 0};
  std::vector<SampleJob> jobs(2);
  jobs[1].logprobs = 2;
  const auto set = [&] {
    device_->Upload(sampler->finite(), finite.data(), finite.size() * sizeof(int32_t));
  };
  const SampleResults alone = sampler->Run(logits(0), jobs, {7});
  const std::vector<int32_t> tokens(alone.tokens.begin(), alone.tokens.end());
  const std::vector<float> logprobs(alone.logprobs.begin(), alone.logprobs.end());
  const auto top = alone.LogprobOf(1, 2).top;
  EXPECT_THAT(alone.finite, IsEmpty());
  set();
  const SampleResults beside = sampler->Run(logits(0), jobs, {7}, 5);
  EXPECT_THAT(beside.finite, ElementsAreArray(finite));
  EXPECT_THAT(beside.tokens, ElementsAreArray(tokens));
  EXPECT_THAT(beside.logprobs, ElementsAreArray(logprobs));
  EXPECT_EQ(beside.LogprobOf(1, 2).top, top);
  set();
  EXPECT_THAT(sampler->Run(logits(0), {}, {}, 5).finite, ElementsAreArray(finite));
}

TEST_F(SamplerTest, TwoResultsMayBeUnderWay) {
  const auto sampler = Make(4);
  std::vector<SampleJob> jobs(3);
  jobs[2].logprobs = 2;
  const auto tokens_of = [](absl::Span<const int32_t> tokens) {
    return std::vector<int32_t>(tokens.begin(), tokens.end());
  };
  const auto with_logprobs = tokens_of(sampler->Run(logits(0), jobs, {5}).tokens);
  const float target = sampler->Run(logits(0), jobs, {5}).logprobs[3];
  jobs.resize(2);
  const auto without = tokens_of(sampler->Run(logits(4), jobs, {}).tokens);

  const std::vector<int32_t> finite = {1, 0, 1};
  const std::vector<SampleJob> three(3, SampleJob{.row = {}, .adjustments = {}, .logprobs = 2});
  for (int round = 0; round < 3; ++round) {
    device_->Upload(sampler->finite(), finite.data(), finite.size() * sizeof(int32_t));
    sampler->Start(logits(0), three, {5}, 3);
    sampler->Start(logits(4), jobs, {});
    // In device memory are the last one's tokens.
    std::vector<int32_t> sampled(2);
    device_->Download(sampled.data(), sampler->sampled(), sampled.size() * sizeof(int32_t));
    EXPECT_EQ(sampled, without);
    const SampleResults first = sampler->Take();
    EXPECT_THAT(first.finite, ElementsAreArray(finite));
    EXPECT_THAT(first.tokens, ElementsAreArray(with_logprobs));
    EXPECT_EQ(first.logprobs[3], target);
    EXPECT_THAT(first.LogprobOf(2, 2).top, SizeIs(2));
    const SampleResults second = sampler->Take();
    EXPECT_THAT(second.finite, IsEmpty());
    EXPECT_THAT(second.tokens, ElementsAreArray(without));
    EXPECT_THAT(second.logprobs, IsEmpty());
  }
}

TEST_F(SamplerTest, MoreAdjustmentsThanFitIntoOneCallChangeNothing) {
  const auto sampler = Make(kRows);
  SamplingParams params;
  params.temperature = 0.8f;
  params.repetition_penalty = 1.3f;
  std::vector<TokenAdjustments> adjustments;
  std::vector<SampleJob> jobs;
  for (int row = 0; row < kRows; ++row) {
    adjustments.emplace_back(params);
    for (int32_t token = row; token < kVocab; token += row + 1)
      adjustments[row].AddGenerated(token);
  }
  for (int row = 0; row < kRows; ++row) {
    params.seed = static_cast<uint64_t>(row);
    jobs.push_back({.row = ToSampleRow(params, row),
                    .adjustments = adjustments[row].entries(),
                    .logprobs = -1});
  }
  const SampleResults together = sampler->Run(logits(0), jobs, {});
  const std::vector<int32_t> tokens(together.tokens.begin(), together.tokens.end());
  for (int row = 0; row < kRows; ++row) {
    EXPECT_EQ(sampler->Run(logits(row), {jobs[row]}, {}).tokens[0], tokens[row]) << row;
  }
}

}  // namespace
}  // namespace gla
