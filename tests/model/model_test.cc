#include "model/model.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/weights.h"
#include "tests/model/reference_model.h"
#include "tests/testing/feed.h"
#include "tests/testing/near.h"
#include "tests/testing/tiny_model.h"

namespace gla {
namespace {

using ::testing::HasSubstr;
using ::testing::Values;

constexpr int kVocab = 97;
constexpr uint64_t kSeed = 7;

// A small config with the given keys added, through the parser as a checkpoint's would be.
ModelConfig ConfigOf(const std::string& family, const std::string& keys) {
  nlohmann::json json = {{"model_type", family},   {"vocab_size", kVocab},   {"hidden_size", 64},
                         {"num_hidden_layers", 2}, {"num_heads", 4},         {"expand_k", 0.5},
                         {"expand_v", 1.0},        {"intermediate_size", 96}};
  json.update(nlohmann::json::parse(keys));
  return ValueOrDie(ModelConfig::Parse(json.dump()));
}

std::vector<int32_t> RandomTokens(int count, int vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % vocab);
  return tokens;
}

template <typename T>
::testing::AssertionResult SameBits(const std::vector<T>& got, const std::vector<T>& want) {
  if (got.size() != want.size()) {
    return ::testing::AssertionFailure() << got.size() << " values, expected " << want.size();
  }
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0) {
      return ::testing::AssertionFailure()
             << "at " << i << " of " << got.size() << ": " << got[i] << ", expected " << want[i];
    }
  }
  return ::testing::AssertionSuccess();
}

// ---- Every option against the definition --------------------------------------------------------

struct Option {
  const char* family;
  const char* keys;
};
void PrintTo(const Option& option, std::ostream* out) { *out << option.family << option.keys; }

class ModelOption : public ::testing::TestWithParam<Option> {};

TEST_P(ModelOption, GivesTheLogitsOfItsDefinition) {
  const ModelConfig config = ConfigOf(GetParam().family, GetParam().keys);
  const std::vector<int32_t> tokens = RandomTokens(70, kVocab, 3);
  RandomWeightSource source(kSeed);
  const std::vector<double> expected = ReferenceModel(config, source).Logits(tokens);

  const auto device = OpenTestDevice();
  for (const PrefillForm form : {PrefillForm::kRecurrent, PrefillForm::kChunkwise}) {
    const auto model = MakeTinyModel(*device, {.prefill_form = form}, kSeed, config);
    Feeder feeder = ValueOrDie(Feeder::Create(*device, *model, 1));
    const std::vector<float> logits = feeder.Step({{0, tokens, true}}, LogitRows::kAll);
    EXPECT_TRUE(IsNear(logits, expected, 1e-4));
  }
  const auto model = MakeTinyModel(*device, {.dtype = DType::kBFloat16}, kSeed, config);
  Feeder feeder = ValueOrDie(Feeder::Create(*device, *model, 1));
  EXPECT_TRUE(IsNear(feeder.Step({{0, tokens, true}}, LogitRows::kAll), expected, 0.05));
}

INSTANTIATE_TEST_SUITE_P(
    Gla, ModelOption,
    Values(Option{"gla", R"({})"}, Option{"gla", R"({"num_kv_heads": 2})"},
           Option{"gla", R"({"num_kv_heads": 1, "use_short_conv": true, "conv_size": 3})"},
           Option{"gla", R"({"use_short_conv": true, "conv_size": 1})"},
           Option{"gla", R"({"feature_map": "relu"})"}, Option{"gla", R"({"feature_map": "silu"})"},
           Option{"gla", R"({"feature_map": "sigmoid", "num_kv_heads": 2})"},
           Option{"gla", R"({"feature_map": "sqrelu"})"},
           Option{"gla", R"({"feature_map": "gelu"})"}, Option{"gla", R"({"clamp_min": -0.04})"},
           Option{"gla", R"({"use_output_gate": false})"}, Option{"gla", R"({"fuse_norm": false})"},
           Option{"gla", R"({"elementwise_affine": false, "norm_eps": 0.01})"},
           Option{"gla", R"({"tie_word_embeddings": true})"},
           Option{"gla", R"({"expand_k": 0.3125, "expand_v": 0.5625, "num_hidden_layers": 1})"}));

INSTANTIATE_TEST_SUITE_P(
    LinearAttention, ModelOption,
    Values(Option{"linear_attn", R"({"feature_map": "elementwise_product"})"},
           Option{"linear_attn", R"({"feature_map": "elementwise_product", "num_kv_heads": 2})"},
           Option{"linear_attn", R"({"feature_map": "hedgehog", "tie_feature_map_qk": true})"},
           Option{"linear_attn", R"({"feature_map": "hedgehog", "norm_feature_map": true})"},
           Option{"linear_attn", R"({"feature_map": "t2r", "num_kv_heads": 1})"},
           Option{"linear_attn", R"({"feature_map": "dpfp"})"},
           Option{"linear_attn", R"({"feature_map": "elu", "norm_q": true, "norm_k": true})"},
           Option{"linear_attn",
                  R"({"feature_map": "elu", "norm_feature_map": true, "num_kv_heads": 2})"},
           Option{"linear_attn", R"({"feature_map": "relu", "norm_k": true})"},
           Option{"linear_attn", R"({"feature_map": "identity"})"},
           Option{"linear_attn", R"({"feature_map": "elu", "output_norm": "identity",
                                     "norm_feature_map": true})"},
           Option{"linear_attn", R"({"elementwise_affine": false})"}));

INSTANTIATE_TEST_SUITE_P(
    RetNet, ModelOption,
    Values(Option{"retnet", R"({})"}, Option{"retnet", R"({"num_kv_heads": 2})"},
           Option{"retnet", R"({"expand_k": 1.0, "expand_v": 2.0, "feature_map": "relu"})"},
           Option{"retnet", R"({"use_output_gate": false})"}));

// ---- Bits that may not change -------------------------------------------------------------------

struct Variant {
  Option option;
  DType dtype;
  PrefillForm form;
};
void PrintTo(const Variant& variant, std::ostream* out) {
  PrintTo(variant.option, out);
  *out << " " << NameOf(variant.dtype)
       << (variant.form == PrefillForm::kRecurrent ? " recurrent" : " chunkwise");
}

std::vector<Variant> Variants(PrefillForm form) {
  std::vector<Variant> variants;
  for (const Option& option :
       {Option{"gla", R"({})"},
        Option{"gla", R"({"num_kv_heads": 2, "use_short_conv": true, "feature_map": "relu"})"},
        Option{"linear_attn", R"({"num_kv_heads": 2})"},
        Option{"linear_attn", R"({"feature_map": "hedgehog", "norm_feature_map": true})"},
        Option{"retnet", R"({"num_kv_heads": 2})"}}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      variants.push_back({option, dtype, form});
    }
  }
  return variants;
}

class SameBitsTest : public ::testing::TestWithParam<Variant> {
 protected:
  SameBitsTest()
      : device_(OpenTestDevice()),
        model_(MakeTinyModel(
            *device_,
            {.dtype = GetParam().dtype, .max_logit_rows = 512, .prefill_form = GetParam().form},
            kSeed, ConfigOf(GetParam().option.family, GetParam().option.keys))) {}

  Feeder MakeFeeder(int num_slots) {
    return ValueOrDie(Feeder::Create(*device_, *model_, num_slots));
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Model> model_;
};
using EveryForm = SameBitsTest;
using RecurrentForm = SameBitsTest;

TEST_P(EveryForm, ASequenceIsTheSameAloneAndInAnyBatch) {
  // First texts of several lengths, then a step of continuations where some decode one token.
  const std::vector<int> lengths = {1, 70, 3, 129, 1, 1, 64};
  const int count = static_cast<int>(lengths.size());
  Feeder together = MakeFeeder(count), alone = MakeFeeder(count);
  for (const bool fresh : {true, false}) {
    std::vector<Feed> feeds;
    for (int n = 0; n < count; ++n) {
      const int length = fresh ? lengths[n] : lengths[count - 1 - n];
      feeds.push_back({n, RandomTokens(length, kVocab, 10 * n + fresh), fresh});
    }
    const std::vector<float> all = together.Step(feeds, LogitRows::kAll);
    std::vector<float> one_by_one;
    for (const Feed& feed : feeds) {
      const std::vector<float> rows = alone.Step({feed}, LogitRows::kAll);
      one_by_one.insert(one_by_one.end(), rows.begin(), rows.end());
    }
    EXPECT_TRUE(SameBits(all, one_by_one));
    for (int n = 0; n < count; ++n) EXPECT_TRUE(SameBits(together.State(n), alone.State(n)));
  }
}

TEST_P(EveryForm, ATokenMayStandWhereTheLastStepSampledIt) {
  Feeder feeder = MakeFeeder(4);
  StepPlan plan;
  plan.tokens = {9, 0, 30, 5, 6, 7};
  plan.cu_seqlens = {0, 1, 2, 3, 6};
  plan.read_slots = {-1, -1, -1, -1};
  plan.write_slots = {0, 1, 2, 3};
  plan.start_positions = {0, 0, 0, 0};
  plan.logit_rows = {0, 1, 2, 5};
  plan.num_decode = 3;
  const std::vector<float> want = feeder.Run(plan);
  plan.tokens = {~2, ~1, 30, 5, 6, 7};
  const std::vector<int32_t> sampled = {77, -1, 9};
  const DeviceBuffer there(*device_, sampled.size() * sizeof(int32_t));
  device_->Upload(there.data(), sampled.data(), there.bytes());
  EXPECT_TRUE(SameBits(feeder.Run(plan, there.as<int32_t>()), want));
}

TEST_P(EveryForm, AnAbsentReadSlotIsTheZeroState) {
  Feeder feeder = MakeFeeder(2);
  device_->Fill(feeder.states(), 0, 2 * model_->state_bytes());
  const std::vector<int32_t> tokens = RandomTokens(67, kVocab, 5);
  EXPECT_TRUE(SameBits(feeder.Step({{0, tokens, true}}, LogitRows::kAll),
                       feeder.Step({{1, tokens, false}}, LogitRows::kAll)));
  EXPECT_TRUE(SameBits(feeder.State(0), feeder.State(1)));
}

TEST_P(EveryForm, ReadsOneSlotAndWritesAnother) {
  Feeder feeder = MakeFeeder(3);
  // All bytes written, so that the slots can be compared whole.
  device_->Fill(feeder.states(), 0, 3 * model_->state_bytes());
  feeder.Step({{0, RandomTokens(5, kVocab, 1), true}}, LogitRows::kLast);
  const std::vector<float> before = feeder.State(0), untouched = feeder.State(2);
  StepPlan plan;
  plan.tokens = RandomTokens(66, kVocab, 2);
  plan.cu_seqlens = {0, 66};
  plan.read_slots = {0};
  plan.write_slots = {1};
  plan.start_positions = {5};
  plan.logit_rows = {65};
  const std::vector<float> logits = feeder.Run(plan);
  EXPECT_TRUE(SameBits(feeder.State(0), before));
  const std::vector<float> after = feeder.State(1);

  plan.write_slots = {-1};  // dropped
  EXPECT_TRUE(SameBits(feeder.Run(plan), logits));
  EXPECT_TRUE(SameBits(feeder.State(0), before));
  EXPECT_TRUE(SameBits(feeder.State(1), after));
  EXPECT_TRUE(SameBits(feeder.State(2), untouched));

  plan.write_slots = {0};  // in place
  EXPECT_TRUE(SameBits(feeder.Run(plan), logits));
  EXPECT_TRUE(SameBits(feeder.State(0), after));
}

TEST_P(EveryForm, WantedRowsAreTheSameAsAmongAllRows) {
  Feeder feeder = MakeFeeder(2);
  const std::vector<Feed> feeds = {{0, RandomTokens(9, kVocab, 1), true},
                                   {1, RandomTokens(1, kVocab, 2), true}};
  const std::vector<float> all = feeder.Step(feeds, LogitRows::kAll);
  const std::vector<float> last = feeder.Step(feeds, LogitRows::kLast);
  const std::vector<float> expected(all.begin() + 8 * kVocab, all.end());
  EXPECT_TRUE(SameBits(last, expected));
}

TEST_P(RecurrentForm, HowATextIsCutChangesNoBit) {
  const std::vector<int32_t> tokens = RandomTokens(150, kVocab, 9);
  Feeder feeder = MakeFeeder(2);
  const std::vector<float> whole = feeder.Step({{0, tokens, true}}, LogitRows::kAll);
  std::mt19937 random(4);
  std::vector<float> pieces;
  for (size_t start = 0; start < tokens.size();) {
    const size_t length = std::min<size_t>(random() % 40 + 1, tokens.size() - start);
    const auto from = tokens.begin() + static_cast<int64_t>(start);
    const std::vector<float> rows = feeder.Step(
        {{1, {from, from + static_cast<int64_t>(length)}, start == 0}}, LogitRows::kAll);
    pieces.insert(pieces.end(), rows.begin(), rows.end());
    start += length;
  }
  EXPECT_TRUE(SameBits(pieces, whole));
  EXPECT_TRUE(SameBits(feeder.State(1), feeder.State(0)));
}

INSTANTIATE_TEST_SUITE_P(Recurrent, EveryForm,
                         ::testing::ValuesIn(Variants(PrefillForm::kRecurrent)));
INSTANTIATE_TEST_SUITE_P(Chunkwise, EveryForm,
                         ::testing::ValuesIn(Variants(PrefillForm::kChunkwise)));
INSTANTIATE_TEST_SUITE_P(Recurrent, RecurrentForm,
                         ::testing::ValuesIn(Variants(PrefillForm::kRecurrent)));

// ---- The trained model --------------------------------------------------------------------------

TEST(Bard, GivesTheReferencesLogitsAndGreedyContinuations) {
  const std::string folder = GLA_SOURCE_DIR "/tests/golden/reference";
  std::ifstream file(folder + "/expected.json");
  const nlohmann::json expected = nlohmann::json::parse(file);
  const Checkpoint tensors = ValueOrDie(Checkpoint::OpenFile(folder + "/expected.safetensors"));
  const auto device = OpenTestDevice();
  const auto model = LoadBard(*device);
  const int vocab = model->config().vocab_size;
  ASSERT_EQ(expected["greedy"].size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    const auto prompt = expected["greedy"][i]["prompt_ids"].get<std::vector<int32_t>>();
    const auto greedy = expected["greedy"][i]["greedy_ids"].get<std::vector<int32_t>>();
    const TensorView* reference = tensors.Find(absl::StrCat("logits_", i));
    ASSERT_NE(reference, nullptr);
    std::vector<float> want(prompt.size() * vocab);
    ASSERT_EQ(reference->bytes, want.size() * sizeof(float));
    std::memcpy(want.data(), reference->data, reference->bytes);

    Feeder feeder = ValueOrDie(Feeder::Create(*device, *model, 1));
    std::vector<float> logits = feeder.Step({{0, prompt, true}}, LogitRows::kAll);
    for (size_t j = 0; j < want.size(); ++j) ASSERT_NEAR(logits[j], want[j], 1e-3) << "at " << j;
    std::vector<int32_t> got;
    while (got.size() < greedy.size()) {
      got.push_back(ArgMax(&logits[logits.size() - vocab], vocab));
      logits = feeder.Step({{0, {got.back()}, false}}, LogitRows::kLast);
    }
    EXPECT_EQ(got, greedy);
  }
}

TEST(Model, StateBytesAreAllLayersStatesInFloat32) {
  const auto device = OpenTestDevice();
  // 2 layers * 4 heads * K 8 * V 16 floats.
  EXPECT_EQ(MakeTinyModel(*device, {}, kSeed, ConfigOf("gla", "{}"))->state_bytes(), 4 * 1024);
  // Grouped heads keep one state per key/value head.
  const auto grouped = ConfigOf("gla", R"({"num_kv_heads": 2})");
  EXPECT_EQ(MakeTinyModel(*device, {}, kSeed, grouped)->state_bytes(), 4 * 512);
}

// ---- What is refused ----------------------------------------------------------------------------

TEST(Model, RefusesOptionsOutOfRange) {
  const auto device = OpenTestDevice();
  EXPECT_THAT(
      Model::Random(*device, TinyConfig(), 1, {.dtype = DType::kFloat16}).status().ToString(),
      HasSubstr("INVALID_ARGUMENT: dtype: expected float32 or bfloat16, got float16"));
  EXPECT_THAT(Model::Random(*device, TinyConfig(), 1, {.max_rows = 0}).status().ToString(),
              HasSubstr("INVALID_ARGUMENT: max_rows"));
}

TEST(Model, RefusesHeadsThatTheRecurrenceCannotHold) {
  const auto device = OpenTestDevice();
  ModelConfig config = TinyConfig();
  config.head_key_dim = config.feature_dim = 4096;
  EXPECT_THAT(Model::Random(*device, config, 1, {}).status().ToString(),
              HasSubstr("INVALID_ARGUMENT: gla: key dimension: expected 1 to 2048, found 4096"));
  config.head_key_dim = config.feature_dim = 512;
  config.num_heads = 64;
  config.num_kv_heads = 1;
  EXPECT_THAT(Model::Random(*device, config, 1, {}).status().ToString(),
              HasSubstr("expected at most 16384, found 64 * 512"));
}

TEST(Model, SaysWhenDeviceMemoryRunsOut) {
  const auto device = OpenTestDevice();
  ModelConfig config = TinyConfig();
  config.hidden_size = 512;  // of 2 * 10^9 rows: 4 TB
  const absl::Status status =
      Model::Random(*device, config, 1, {.max_rows = 2'000'000'000}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(status.ToString(), HasSubstr("activations of 2000000000 rows"));
}

// The parser lets no such config through; a config made by hand meets the second fence.
TEST(Widths, PartsThatDoNotMeetAreNamed) {
  const auto device = OpenTestDevice();
  ModelConfig config = TinyConfig();
  config.feature_dim = 24;
  EXPECT_THAT(Model::Random(*device, config, 1, {}).status().ToString(),
              HasSubstr("layer 0: output width of gk_proj.1, one gate per key dimension: expected "
                        "48, found 32"));
  config = TinyConfig();
  config.family = ModelFamily::kRetNet;
  config.feature_map = QkMap::kDpfp;
  EXPECT_THAT(Model::Random(*device, config, 1, {}).status().ToString(),
              HasSubstr("layer 0: key dimension of the recurrence, after the feature map: expected "
                        "128, found 16"));
  config = TinyConfig();
  config.num_heads = 3;
  EXPECT_THAT(Model::Random(*device, config, 1, {}).status().ToString(),
              HasSubstr("gla: heads of k: expected a divisor of the 3 heads of q, found 2"));
}

TEST(Widths, MergedHeadsMustFitTheOutputProjection) {
  const auto device = OpenTestDevice();
  const ModelConfig config = TinyConfig();
  RandomWeightSource source(1);
  ModelWeights weights = ValueOrDie(LoadWeights(*device, config, DType::kFloat32, source));
  EXPECT_TRUE(CheckWidths(config, weights).ok());
  // A projection that takes one head's 32 values where two heads give 64.
  const std::vector<float> values(64 * 32);
  weights.layers[1].out_proj =
      PackedWeight(*device, {{values.data(), DType::kFloat32, 64, 32}}, DType::kFloat32);
  EXPECT_THAT(CheckWidths(config, weights).ToString(),
              HasSubstr("INVALID_ARGUMENT: layer 1: input width of o_proj, after the per-head norm "
                        "(heads * value dim): expected 64, found 32"));
}

}  // namespace
}  // namespace gla
