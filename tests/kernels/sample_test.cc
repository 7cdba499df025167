#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/testing/near.h"

namespace gla {
namespace {

using reference::Doubles;
constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::nanf("");

using Adjustments = std::vector<std::vector<TokenAdjustment>>;  // of each row; empty: none at all

std::vector<int32_t> Sampled(const std::vector<float>& logits, int vocab,
                             const std::vector<SampleRow>& rows,
                             const Adjustments& adjustments = {}) {
  std::vector<TokenAdjustment> flat;
  std::vector<int32_t> offsets = {0};
  for (size_t r = 0; r < rows.size(); ++r) {
    if (r < adjustments.size()) {
      flat.insert(flat.end(), adjustments[r].begin(), adjustments[r].end());
    }
    offsets.push_back(static_cast<int32_t>(flat.size()));
  }
  DeviceBuffer dlogits = Upload(logits), drows = Upload(rows), dflat = Upload(flat);
  DeviceBuffer doffsets = Upload(offsets), scratch = Poisoned(logits.size(), DType::kFloat32);
  DeviceBuffer tokens(TestDevice(), rows.size() * sizeof(int32_t));
  Sample(TestDevice(), {.logits = dlogits.as<float>(),
                        .rows = drows.as<SampleRow>(),
                        .adjustments = dflat.as<TokenAdjustment>(),
                        .adjustment_offsets = doffsets.as<int32_t>(),
                        .scratch = scratch.as<float>(),
                        .tokens = tokens.as<int32_t>(),
                        .num_rows = static_cast<int>(rows.size()),
                        .vocab = vocab});
  EXPECT_TRUE(IsSameBits(Download<float>(dlogits, logits.size()), logits)) << "logits were changed";
  return Download<int32_t>(tokens, rows.size());
}

// The same logits drawn `draws` times with counters 0, 1, 2, ...
std::vector<int32_t> Draws(const std::vector<float>& logits, SampleRow row, int draws,
                           const std::vector<TokenAdjustment>& adjustments = {}) {
  std::vector<float> all;
  std::vector<SampleRow> rows;
  for (int i = 0; i < draws; ++i) {
    all.insert(all.end(), logits.begin(), logits.end());
    row.counter = i;
    rows.push_back(row);
  }
  return Sampled(all, static_cast<int>(logits.size()), rows, Adjustments(draws, adjustments));
}

int Greedy(const std::vector<float>& logits, SampleRow row = {},
           const std::vector<TokenAdjustment>& adjustments = {}) {
  return Sampled(logits, static_cast<int>(logits.size()), {row}, {adjustments})[0];
}

std::set<int> Seen(const std::vector<int32_t>& tokens) { return {tokens.begin(), tokens.end()}; }

// Whether `token` is where the definition draws, but for rounding at the edge of its share.
void ExpectDraw(int token, const std::vector<float>& logits, const SampleRow& row) {
  const Doubles weights = reference::Weights(logits, row);
  double total = 0, before = 0;
  for (double w : weights) total += w;
  ASSERT_GE(token, 0);
  ASSERT_LT(token, static_cast<int>(logits.size()));
  ASSERT_GT(weights[token], 0) << "token " << token << " is not to be drawn";
  for (int i = 0; i < token; ++i) before += weights[i];
  const double u = reference::PhiloxUniform(row.seed, row.counter), slack = 2e-5;
  EXPECT_GE(u, before / total - slack);
  EXPECT_LE(u, (before + weights[token]) / total + slack);
}

// ---- Greedy -------------------------------------------------------------------------------------

TEST(Sample, GreedyTakesTheLargestAndTheLowestIdOnATie) {
  EXPECT_EQ(Greedy({1, 3, 2}), 1);
  EXPECT_EQ(Greedy({1, 3, 2, 3, 3}), 1);
  EXPECT_EQ(Greedy({-0.0f, 0.0f}), 0);
  EXPECT_EQ(Greedy({0.0f, -0.0f}), 0);
  EXPECT_EQ(Greedy({-kInf, -5, -kInf}), 1);
  EXPECT_EQ(Greedy({-1e30f}), 0);
  std::vector<float> wide = Normal(152064, 1, 1);
  wide[151000] = wide[99999] = 50;
  EXPECT_EQ(Greedy(wide), 99999);
}

TEST(Sample, LogitsThatAreNoNumbersGiveMinusOne) {
  for (float temperature : {0.0f, 1.0f}) {
    const SampleRow row = {.temperature = temperature};
    for (int vocab : {4, 100, 1000}) {
      for (int at : {0, vocab / 2, vocab - 1}) {
        std::vector<float> logits = Normal(vocab, 1, 2);
        logits[at] = kNan;
        EXPECT_EQ(Greedy(logits, row), -1) << "NaN at " << at << " of " << vocab;
        logits[at] = -kNan;
        EXPECT_EQ(Greedy(logits, row), -1) << "-NaN at " << at << " of " << vocab;
        logits[at] = kInf;
        EXPECT_EQ(Greedy(logits, row), -1) << "+inf at " << at << " of " << vocab;
      }
      EXPECT_EQ(Greedy(std::vector<float>(vocab, -kInf), row), -1);
      EXPECT_EQ(Greedy(std::vector<float>(vocab, kNan), row), -1);
    }
    // The neighbours in the batch do not notice.
    EXPECT_EQ(Sampled({0, 40, 0, kNan, 0, 0, 0, 0, 40}, 3, {row, row, row}),
              (std::vector<int32_t>{1, -1, 2}));
  }
}

TEST(Sample, BannedTokensAreNeverDrawn) {
  const SampleRow row = {.temperature = 5};
  EXPECT_EQ(Seen(Draws({1, -kInf, 1, -kInf}, row, 300)), (std::set<int>{0, 2}));
  EXPECT_EQ(Seen(Draws({1, 9, 1, 9}, row, 300, {{1, 0, 0, -kInf}, {3, 0, 0, -kInf}})),
            (std::set<int>{0, 2}));
  EXPECT_EQ(Greedy({1, 2}, {}, {{0, 0, 0, -kInf}, {1, 0, 0, -kInf}}), -1);
}

// ---- Penalties ----------------------------------------------------------------------------------

TEST(Sample, RepetitionPenaltyDividesPositiveAndMultipliesNegativeLogits) {
  const TokenAdjustment seen = {.token = 0, .generated_count = 0, .seen = 1, .bias = 0};
  EXPECT_EQ(Greedy({2, 1.5f}, {.repetition_penalty = 1.25f}, {seen}), 0);   // 1.6
  EXPECT_EQ(Greedy({2, 1.5f}, {.repetition_penalty = 1.4f}, {seen}), 1);    // 1.43
  EXPECT_EQ(Greedy({-1, -1.2f}, {.repetition_penalty = 1.1f}, {seen}), 0);  // -1.1
  EXPECT_EQ(Greedy({-1, -1.2f}, {.repetition_penalty = 1.3f}, {seen}), 1);  // -1.3
  const TokenAdjustment unseen = {.token = 0, .generated_count = 0, .seen = 0, .bias = 0};
  EXPECT_EQ(Greedy({2, 1.5f}, {.repetition_penalty = 9}, {unseen}), 0);
}

TEST(Sample, PresenceAndFrequencyPenaltiesAreSubtracted) {
  const auto generated = [](int count) {
    return std::vector<TokenAdjustment>{
        {.token = 0, .generated_count = count, .seen = 1, .bias = 0}};
  };
  EXPECT_EQ(Greedy({2, 1.5f}, {.presence_penalty = 0.4f}, generated(7)), 0);   // 1.6
  EXPECT_EQ(Greedy({2, 1.5f}, {.presence_penalty = 0.6f}, generated(1)), 1);   // 1.4
  EXPECT_EQ(Greedy({2, 1.5f}, {.presence_penalty = 0.6f}, generated(0)), 0);   // prompt only
  EXPECT_EQ(Greedy({2, 1.5f}, {.frequency_penalty = 0.1f}, generated(4)), 0);  // 1.6
  EXPECT_EQ(Greedy({2, 1.5f}, {.frequency_penalty = 0.1f}, generated(6)), 1);  // 1.4
  // 2 / 1.25 - 0.2 - 2 * 0.1 = 1.2
  const SampleRow all = {
      .repetition_penalty = 1.25f, .presence_penalty = 0.2f, .frequency_penalty = 0.1f};
  EXPECT_EQ(Greedy({2, 1.19f}, all, generated(2)), 0);
  EXPECT_EQ(Greedy({2, 1.21f}, all, generated(2)), 1);
}

TEST(Sample, BiasIsAddedFirst) {
  // (1 + 1) / 1.25 = 1.6, where a bias added last would give 1.8
  const SampleRow row = {.repetition_penalty = 1.25f};
  EXPECT_EQ(Greedy({1, 1.7f}, row, {{.token = 0, .generated_count = 0, .seen = 1, .bias = 1}}), 1);
  EXPECT_EQ(Greedy({1, 1.5f}, row, {{.token = 0, .generated_count = 0, .seen = 1, .bias = 1}}), 0);
}

TEST(Sample, AdjustmentsBelongToTheirRow) {
  const std::vector<TokenAdjustment> up1 = {{1, 0, 0, 50}}, up2 = {{2, 0, 0, 50}, {0, 0, 0, -1}};
  EXPECT_EQ(Sampled(std::vector<float>(12, 0.0f), 3, {{}, {}, {}, {}}, {up1, {}, up2, up1}),
            (std::vector<int32_t>{1, 0, 2, 1}));
}

// ---- Truncation ---------------------------------------------------------------------------------

std::vector<float> LogOf(const std::vector<float>& probabilities) {
  std::vector<float> logits;
  for (float p : probabilities) logits.push_back(std::log(p));
  return logits;
}

TEST(Sample, TopKKeepsExactlyTheKLikeliest) {
  const auto logits = LogOf({0.1f, 0.4f, 0.05f, 0.3f, 0.15f});
  const std::set<int> expected[] = {
      {0, 1, 2, 3, 4}, {1}, {1, 3}, {1, 3, 4}, {0, 1, 3, 4}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}};
  for (int k = 0; k <= 6; ++k) {
    EXPECT_EQ(Seen(Draws(logits, {.temperature = 1, .top_k = k}, 600)), expected[k]) << "k " << k;
  }
}

TEST(Sample, TopKKeepsTheLowestIdsOfATie) {
  EXPECT_EQ(Seen(Draws({1, 1, 1, 1, 1, 1}, {.temperature = 1, .top_k = 3}, 400)),
            (std::set<int>{0, 1, 2}));
  EXPECT_EQ(Seen(Draws({0, 1, 0, 2, 1, 1}, {.temperature = 9, .top_k = 3}, 400)),
            (std::set<int>{1, 3, 4}));
}

TEST(Sample, TopPKeepsTheTokenThatReachesIt) {
  const auto logits = LogOf({0.2f, 0.4f, 0.1f, 0.3f});
  const auto kept = [&](float top_p) {
    return Seen(Draws(logits, {.temperature = 1, .top_p = top_p}, 600));
  };
  EXPECT_EQ(kept(0.0f), (std::set<int>{1}));
  EXPECT_EQ(kept(0.35f), (std::set<int>{1}));
  EXPECT_EQ(kept(0.45f), (std::set<int>{1, 3}));
  EXPECT_EQ(kept(0.65f), (std::set<int>{1, 3}));
  EXPECT_EQ(kept(0.75f), (std::set<int>{0, 1, 3}));
  EXPECT_EQ(kept(0.95f), (std::set<int>{0, 1, 2, 3}));
  // A tie is cut by id.
  EXPECT_EQ(Seen(Draws({1, 1, 1, 1}, {.temperature = 1, .top_p = 0.6f}, 400)),
            (std::set<int>{0, 1, 2}));
}

TEST(Sample, TopPIsTakenOfWhatTopKLeaves) {
  // After top-k 2: 0.571 and 0.429, so the first alone reaches 0.5.
  const SampleRow row = {.temperature = 1, .top_k = 2, .top_p = 0.5f};
  EXPECT_EQ(Seen(Draws(LogOf({0.4f, 0.3f, 0.2f, 0.1f}), row, 400)), (std::set<int>{0}));
}

TEST(Sample, MinPIsRelativeToTheLikeliest) {
  const auto logits = LogOf({0.2f, 0.4f, 0.1f, 0.3f});
  const auto kept = [&](float min_p) {
    return Seen(Draws(logits, {.temperature = 1, .min_p = min_p}, 600));
  };
  EXPECT_EQ(kept(1.0f), (std::set<int>{1}));
  EXPECT_EQ(kept(0.7f), (std::set<int>{1, 3}));
  EXPECT_EQ(kept(0.45f), (std::set<int>{0, 1, 3}));
  EXPECT_EQ(kept(0.2f), (std::set<int>{0, 1, 2, 3}));
  // Temperature comes first: at 2 the ratios are the square roots.
  EXPECT_EQ(Seen(Draws(logits, {.temperature = 2, .min_p = 0.6f}, 600)), (std::set<int>{0, 1, 3}));
}

// ---- Draws --------------------------------------------------------------------------------------

TEST(Philox, GivesTheKnownAnswers) {
  // From the Random123 distribution's known-answer tests.
  auto words = reference::Philox({{0, 0, 0, 0}}, 0, 0);
  EXPECT_EQ(words.w[0], 0x6627e8d5u);
  EXPECT_EQ(words.w[3], 0x9b00dbd8u);
  words = reference::Philox({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u);
  EXPECT_EQ(words.w[0], 0x408f276du);
  EXPECT_EQ(words.w[3], 0x6d5451fdu);
  words = reference::Philox({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u,
                            0x299f31d0u);
  EXPECT_EQ(words.w[0], 0xd16cfe09u);
  EXPECT_EQ(words.w[3], 0x24126ea1u);
}

TEST(Sample, DrawsWherePhiloxPoints) {
  // Seeds and counters that use all their bits.
  const uint64_t seeds[] = {0, 1, 0x123456789abcdef0ull, ~0ull};
  const uint64_t counters[] = {0, 1, 77, 0xfedcba9876543210ull};
  std::vector<SampleRow> settings = {
      {.temperature = 1},
      {.temperature = 0.3f},
      {.temperature = 3},
      {.temperature = 1, .top_k = 40},
      {.temperature = 1, .top_p = 0.9f},
      {.temperature = 1, .min_p = 0.05f},
      {.temperature = 1.5f, .top_k = 200, .top_p = 0.8f, .min_p = 0.02f}};
  for (int vocab : {1, 2, 63, 1000, 2048, 50000}) {
    std::vector<float> logits;
    std::vector<SampleRow> rows;
    for (SampleRow row : settings) {
      for (uint64_t seed : seeds) {
        for (uint64_t counter : counters) {
          if (vocab > 10000 && seed != counter) continue;
          row.seed = seed;
          row.counter = counter;
          const auto one = Normal(vocab, 2, static_cast<uint32_t>(rows.size() + vocab));
          logits.insert(logits.end(), one.begin(), one.end());
          rows.push_back(row);
        }
      }
    }
    const auto tokens = Sampled(logits, vocab, rows);
    for (size_t r = 0; r < rows.size(); ++r) {
      SCOPED_TRACE(::testing::Message() << "vocab " << vocab << " row " << r);
      ExpectDraw(tokens[r], {logits.begin() + r * vocab, logits.begin() + (r + 1) * vocab},
                 rows[r]);
      if (r % 9 != 0) continue;  // alone it gives the same
      EXPECT_EQ(Sampled({logits.begin() + r * vocab, logits.begin() + (r + 1) * vocab}, vocab,
                        {rows[r]})[0],
                tokens[r]);
    }
    EXPECT_EQ(Sampled(logits, vocab, rows), tokens) << "the same call twice";
  }
}

TEST(Sample, FollowsTheProbabilities) {
  const int vocab = 40, draws = 20000;
  const auto logits = Normal(vocab, 1, 3);
  for (const SampleRow& row :
       {SampleRow{.temperature = 1, .seed = 5}, SampleRow{.temperature = 0.7f, .seed = 6},
        SampleRow{.temperature = 1.3f, .top_k = 20, .top_p = 0.9f, .min_p = 0.05f, .seed = 7}}) {
    std::vector<int> counts(vocab, 0);
    for (int token : Draws(logits, row, draws)) ++counts.at(token);
    const Doubles weights = reference::Weights(logits, row);
    double total = 0, chi_square = 0;
    for (double w : weights) total += w;
    int freedom = -1;
    for (int i = 0; i < vocab; ++i) {
      const double expected = draws * weights[i] / total;
      if (expected == 0) {
        EXPECT_EQ(counts[i], 0) << "token " << i;
        continue;
      }
      ++freedom;
      chi_square += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    EXPECT_LT(chi_square, freedom + 4 * std::sqrt(2.0 * freedom))
        << freedom << " degrees of freedom";
  }
}

TEST(Sample, ExtremeTemperaturesStayDefined) {
  EXPECT_EQ(Seen(Draws({1, 2, 1.9f}, {.temperature = 1e-38f}, 50)), (std::set<int>{1}));
  EXPECT_EQ(Seen(Draws({1, 1, -kInf}, {.temperature = 1e30f}, 200)), (std::set<int>{0, 1}));
  EXPECT_EQ(Seen(Draws({3e38f, -3e38f, 1}, {.temperature = 1}, 50)), (std::set<int>{0}));
}

TEST(Sample, NoRowsIsNoWork) { EXPECT_TRUE(Sampled({}, 100, {}).empty()); }

// ---- Logprobs -----------------------------------------------------------------------------------

struct LogprobResult {
  std::vector<float> logprobs, top_logprobs;
  std::vector<int32_t> top_tokens;
};
LogprobResult RunLogprobs(const std::vector<float>& logits, int vocab,
                          const std::vector<int32_t>& targets, int top_n) {
  const size_t rows = targets.size(), top = rows * top_n;
  DeviceBuffer dlogits = Upload(logits), dtargets = Upload(targets);
  DeviceBuffer out = Poisoned(rows, DType::kFloat32), top_logprobs = Poisoned(top, DType::kFloat32);
  DeviceBuffer top_tokens(TestDevice(), top * sizeof(int32_t));
  Logprobs(TestDevice(), {.logits = dlogits.as<float>(),
                          .targets = dtargets.as<int32_t>(),
                          .logprobs = out.as<float>(),
                          .top_tokens = top_tokens.as<int32_t>(),
                          .top_logprobs = top_logprobs.as<float>(),
                          .num_rows = static_cast<int>(rows),
                          .vocab = vocab,
                          .top_n = top_n});
  return {Download<float>(out, rows), Download<float>(top_logprobs, top),
          Download<int32_t>(top_tokens, top)};
}

TEST(Logprobs, EqualArithmeticWithAndWithoutTargetAndTop) {
  for (int vocab : {1, 7, 50, 2048, 50001}) {
    const int rows = vocab > 10000 ? 3 : 12;
    auto logits = Normal(rows * vocab, 4, 1);
    for (float& x : logits) x += 100;  // the constant must cancel
    std::vector<int32_t> targets;
    for (int r = 0; r < rows; ++r) targets.push_back(r % 4 == 3 ? -1 : (r * 7919) % vocab);
    for (int top_n : {0, 1, 5, 20}) {
      if (top_n > vocab) continue;
      const LogprobResult got = RunLogprobs(logits, vocab, targets, top_n);
      for (int r = 0; r < rows; ++r) {
        const std::vector<float> row(logits.begin() + r * vocab, logits.begin() + (r + 1) * vocab);
        const std::vector<int> ranked = reference::Ranked(row);
        double sum = 0;
        for (float x : row) sum += std::exp(static_cast<double>(x) - row[ranked[0]]);
        const double log_sum = std::log(sum) + row[ranked[0]];
        EXPECT_NEAR(got.logprobs[r], targets[r] < 0 ? 0 : row[targets[r]] - log_sum, 2e-5);
        for (int n = 0; n < top_n; ++n) {
          EXPECT_EQ(got.top_tokens[r * top_n + n], ranked[n]);
          EXPECT_NEAR(got.top_logprobs[r * top_n + n], row[ranked[n]] - log_sum, 2e-5);
        }
      }
    }
  }
}

TEST(Logprobs, TiesGoToTheLowestId) {
  const LogprobResult got = RunLogprobs({1, 2, 1, 2, 1, -kInf}, 6, {5}, 6);
  EXPECT_EQ(got.top_tokens, (std::vector<int32_t>{1, 3, 0, 2, 4, 5}));
  EXPECT_EQ(got.logprobs[0], -kInf);
}

TEST(Logprobs, ARowsBitsDependOnNothingButTheRow) {
  const int rows = 30, vocab = 2048;
  const auto logits = Normal(rows * vocab, 3, 2);
  const LogprobResult all = RunLogprobs(logits, vocab, std::vector<int32_t>(rows, 100), 5);
  for (int r = 0; r < rows; ++r) {
    const LogprobResult one = RunLogprobs(
        {logits.begin() + r * vocab, logits.begin() + (r + 1) * vocab}, vocab, {100}, 5);
    EXPECT_EQ(one.logprobs[0], all.logprobs[r]);
    EXPECT_TRUE(
        IsSameBits(one.top_logprobs, std::vector<float>(all.top_logprobs.begin() + 5 * r,
                                                        all.top_logprobs.begin() + 5 * r + 5)));
  }
}

}  // namespace
}  // namespace gla
