// Decode rows: the same bits whoever else is in the step, recorded or not, and close to what the
// same tokens give as prompts.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "model/step_inputs.h"
#include "tests/testing/feed.h"
#include "tests/testing/tiny_model.h"

namespace gla {
namespace {

struct Case {
  const char* name;
  const char* family;
  const char* keys;
};

constexpr Case kCases[] = {
    {"gla", "gla", ""},
    {"gla_grouped", "gla", R"(, "num_kv_heads": 2)"},
    {"gla_conv", "gla", R"(, "use_short_conv": true)"},
    {"gla_no_gate", "gla", R"(, "use_output_gate": false)"},
    {"linear_attn", "linear_attn", ""},
    {"linear_attn_sums", "linear_attn", R"(, "norm_feature_map": true)"},
    {"retnet", "retnet", ""},
    {"linear_attn_t2r", "linear_attn", R"(, "feature_map": "t2r")"},
};

ModelConfig ConfigOf(const Case& option) {
  const std::string json = std::string(R"({"model_type": ")") + option.family +
                           R"(", "hidden_size": 256, "num_hidden_layers": 2, "num_heads": 4,
                              "vocab_size": 2048)" +
                           option.keys + "}";
  return ValueOrDie(ModelConfig::Parse(json));
}

struct Setup {
  Case option;
  DType dtype;
  StateFormat state;
};

class DecodeTest : public testing::TestWithParam<Setup> {
 protected:
  static constexpr int kSeqs = 37;

  ModelOptions Options() const {
    return {.dtype = GetParam().dtype,
            .max_rows = 256,
            .max_seqs = kSeqs,
            .state_format = GetParam().state};
  }
  std::unique_ptr<Model> MakeModel(const ModelOptions& options) {
    return MakeTinyModel(*device_, options, 3, ConfigOf(GetParam().option));
  }
  static int32_t TokenOf(int sequence, int step) {
    return (sequence * 7919 + step * 131 + 5) % 2048;
  }

  std::unique_ptr<Device> device_ = OpenTestDevice();
};

bool SameBits(const float* a, const float* b, size_t count) {
  return std::memcmp(a, b, count * sizeof(float)) == 0;
}

double RmsRatio(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += std::pow(double{got[i]} - want[i], 2), size += std::pow(double{want[i]}, 2);
  }
  return std::sqrt(error / size);
}

TEST_P(DecodeTest, ARowIsTheSameInEveryStepAndRecordedOrNot) {
  const auto model = MakeModel(Options());
  ModelOptions options = Options();
  options.record_steps = false;
  const auto unrecorded = MakeModel(options);
  Feeder all = ValueOrDie(Feeder::Create(*device_, *model, kSeqs));
  Feeder some = ValueOrDie(Feeder::Create(*device_, *model, kSeqs));
  Feeder eager = ValueOrDie(Feeder::Create(*device_, *unrecorded, kSeqs));
  const auto vocab = static_cast<size_t>(model->config().vocab_size);
  std::mt19937 random(1);
  for (int step = 0; step < 4; ++step) {
    std::vector<Feed> feeds;
    for (int n = 0; n < kSeqs; ++n) feeds.push_back({n, {TokenOf(n, step)}, step == 0});
    const std::vector<float> want = all.Step(feeds, LogitRows::kAll, kSeqs);
    for (const float x : want) ASSERT_TRUE(std::isfinite(x));
    EXPECT_TRUE(
        SameBits(eager.Step(feeds, LogitRows::kAll, kSeqs).data(), want.data(), want.size()));
    // In steps of random sizes and orders, beside a prompt.
    std::shuffle(feeds.begin(), feeds.end(), random);
    for (size_t first = 0; first < feeds.size();) {
      const size_t count = std::min<size_t>(1 + random() % 12, feeds.size() - first);
      std::vector<Feed> part(feeds.begin() + first, feeds.begin() + first + count);
      if (random() % 2 == 0) {
        // The prompt's slot is one whose row has been run, or will be run from the start.
        const size_t other = (first + count) % feeds.size();
        if (step == 0 && other > 0) part.push_back({feeds[other].slot, {1, 2, 3}, true});
      }
      const std::vector<float> got = some.Step(part, LogitRows::kAll, static_cast<int>(count));
      for (size_t i = 0; i < count; ++i) {
        EXPECT_TRUE(SameBits(&got[i * vocab], &want[part[i].slot * vocab], vocab));
      }
      first += count;
    }
    for (int n = 0; n < kSeqs; n += 5) {
      const std::vector<float> a = all.State(n), b = some.State(n), c = eager.State(n);
      EXPECT_EQ(std::memcmp(a.data(), c.data(), a.size() * 4), 0);
      if (step > 0) {
        EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * 4), 0) << n;
      }
    }
  }
}

TEST_P(DecodeTest, APromptIsTheSameBesideDecodeRowsAndAlone) {
  ModelOptions options = Options();
  options.prefill_form = PrefillForm::kChunkwise;
  const auto model = MakeModel(options);
  const int decode = 9;
  Feeder beside = ValueOrDie(Feeder::Create(*device_, *model, decode + 1));
  Feeder alone = ValueOrDie(Feeder::Create(*device_, *model, decode + 1));
  const auto vocab = static_cast<size_t>(model->config().vocab_size);
  for (int step = 0; step < 4; ++step) {
    Feed prompt = {decode, {}, step == 0};
    for (int i = 0; i < 150; ++i) prompt.tokens.push_back(TokenOf(i, step));
    std::vector<Feed> feeds;
    for (int n = 0; n < decode; ++n) feeds.push_back({n, {TokenOf(n, step)}, step == 0});
    feeds.push_back(prompt);
    const std::vector<float> got = beside.Step(feeds, LogitRows::kLast, decode);
    const std::vector<float> want = alone.Step({prompt}, LogitRows::kLast);
    EXPECT_TRUE(SameBits(&got[decode * vocab], want.data(), vocab));
    const std::vector<float> a = beside.State(decode), b = alone.State(decode);
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * 4), 0);
  }
}

// A recording serves plans of about its size: each is met first, recorded, then replayed for
// others.
TEST_P(DecodeTest, PromptsAreTheSameRecordedOrNot) {
  const std::vector<int> lengths[] = {{40},    {63},          {1, 63, 20}, {30, 2, 40},
                                      {70, 5}, {3, 110},      {300},       {257},
                                      {700},   {520, 100, 1}, {2, 600, 30}};
  for (const PrefillForm form : {PrefillForm::kRecurrent, PrefillForm::kChunkwise}) {
    ModelOptions options = Options();
    options.max_rows = 700;
    options.prefill_form = form;
    const auto model = MakeModel(options);
    options.record_steps = false;
    const auto unrecorded = MakeModel(options);
    Feeder recorded = ValueOrDie(Feeder::Create(*device_, *model, 4));
    Feeder eager = ValueOrDie(Feeder::Create(*device_, *unrecorded, 4));
    const int rounds = std::string(Device::backend()) == "cuda" ? 4 : 1;  // a CPU records nothing
    for (int round = 0; round < rounds; ++round) {
      for (const std::vector<int>& plan : lengths) {
        std::vector<Feed> feeds;
        for (const int length : plan) {
          const auto slot = static_cast<int>(feeds.size() + round) % 4;
          feeds.push_back({slot, {}, round == 0 || length == 1});
          // Other lengths of the same rounded sizes.
          for (int i = 0; i < length - std::min(round, length - 1); ++i) {
            feeds.back().tokens.push_back(TokenOf(i + slot, round));
          }
        }
        const std::vector<float> got = recorded.Step(feeds, LogitRows::kLast);
        const std::vector<float> want = eager.Step(feeds, LogitRows::kLast);
        EXPECT_TRUE(SameBits(got.data(), want.data(), want.size())) << round << ": " << plan[0];
        for (int slot = 0; slot < 4; ++slot) {
          if (round == 0 && slot >= static_cast<int>(plan.size())) continue;
          const std::vector<float> a = recorded.State(slot), b = eager.State(slot);
          EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * 4), 0) << round << ": " << plan[0];
        }
      }
    }
  }
}

TEST_P(DecodeTest, EqualsTheSameTokensAsAPrompt) {
  const auto model = MakeModel(Options());
  Feeder decoded = ValueOrDie(Feeder::Create(*device_, *model, 3));
  Feeder prompted = ValueOrDie(Feeder::Create(*device_, *model, 3));
  std::vector<Feed> prompts(3);
  std::vector<float> last;
  for (int step = 0; step < 20; ++step) {
    std::vector<Feed> feeds;
    for (int n = 0; n < 3; ++n) {
      feeds.push_back({n, {TokenOf(n, step)}, step == 0});
      prompts[n].slot = n;
      prompts[n].fresh = true;
      prompts[n].tokens.push_back(TokenOf(n, step));
    }
    last = decoded.Step(feeds, LogitRows::kLast, 3);
  }
  const double limit = GetParam().dtype == DType::kBFloat16      ? 0.02
                       : GetParam().state == StateFormat::kInt16 ? 0.002
                                                                 : 1e-5;
  EXPECT_LT(RmsRatio(last, prompted.Step(prompts, LogitRows::kLast)), limit);
}

std::vector<Setup> EverySetup() {
  std::vector<Setup> setups;
  for (const Case& option : kCases) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const StateFormat state : {StateFormat::kFloat32, StateFormat::kInt16}) {
        if (state == StateFormat::kInt16 && std::string(option.name) == "linear_attn_sums")
          continue;
        setups.push_back({option, dtype, state});
      }
    }
  }
  return setups;
}

INSTANTIATE_TEST_SUITE_P(Models, DecodeTest, testing::ValuesIn(EverySetup()), [](const auto& info) {
  return std::string(info.param.option.name) + "_" + NameOf(info.param.dtype) +
         (info.param.state == StateFormat::kInt16 ? "_int16" : "");
});

// Both ways are as far from float32 as bfloat16 is.
TEST(BatchInvariant, NoGivesTheSameUpToRounding) {
  const auto device = OpenTestDevice();
  const int seqs = 260;
  const auto logits_of = [&](DType dtype, bool invariant) {
    const auto model = MakeTinyModel(*device,
                                     {.dtype = dtype,
                                      .max_rows = seqs,
                                      .max_seqs = seqs,
                                      .max_logit_rows = seqs,
                                      .batch_invariant = invariant},
                                     3, ConfigOf(kCases[0]));
    Feeder feeder = ValueOrDie(Feeder::Create(*device, *model, seqs));
    std::vector<float> logits;
    for (int step = 0; step < 5; ++step) {
      std::vector<Feed> feeds;
      for (int n = 0; n < seqs; ++n)
        feeds.push_back({n, {(n * 29 + step * 131) % 2048}, step == 0});
      logits = feeder.Step(feeds, LogitRows::kAll, seqs);
    }
    return logits;
  };
  const std::vector<float> want = logits_of(DType::kFloat32, true);
  const double error = RmsRatio(logits_of(DType::kBFloat16, true), want);
  EXPECT_LT(error, 0.05);
  EXPECT_LT(RmsRatio(logits_of(DType::kBFloat16, false), want), 1.3 * error + 1e-3);
}

TEST(StepShape, IsAroundThePlanAndOneOfAll) {
  for (const int max_rows : {40, 256, 700, 4096}) {
    for (const int max_seqs : {1, 5, 37, 500}) {
      const std::vector<StepShape> all = StepShape::All(max_rows, max_seqs);
      for (const int longest : {1, 63, 64, 65, 400, 512, 513, 640, 1024, 1025}) {
        for (const int others : {0, 1, 7, 8, 36, 63, 64, 499}) {
          if (longest + others > max_rows || 1 + others > max_seqs) continue;
          StepPlan plan;
          plan.tokens.assign(longest + others, 0);
          plan.read_slots.assign(1 + others, -1);
          plan.cu_seqlens = {0};
          for (int n = 0; n < others; ++n) plan.cu_seqlens.push_back(n + 1);
          plan.cu_seqlens.push_back(longest + others);
          const auto shape = StepShape::Around(plan, max_rows, max_seqs);
          ASSERT_EQ(shape.has_value(), longest + others <= 1024 && others < 64);
          if (!shape.has_value()) continue;
          EXPECT_GE(shape->rows, longest + others);
          EXPECT_LE(shape->rows, std::min(max_rows, longest + others + 127));
          EXPECT_GE(shape->seqs, 1 + others);
          EXPECT_LE(shape->seqs, max_seqs);
          EXPECT_GE(shape->max_len, longest);
          EXPECT_EQ(std::count(all.begin(), all.end(), *shape), 1) << longest << ", " << others;
        }
      }
    }
  }
}

TEST(StateFormats, ARunningKeySumIsFloat32Only) {
  const auto device = OpenTestDevice();
  const auto model =
      Model::Random(*device, ConfigOf(kCases[5]), 1, {.state_format = StateFormat::kInt16});
  ASSERT_EQ(model.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(model.status().message().find("expected float32"), std::string::npos);
}

}  // namespace
}  // namespace gla
