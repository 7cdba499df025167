// What a layer with gradients refuses, and how it says so.
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/attention_layer.h"
#include "model/attention_layer_weights.h"
#include "tests/model/layer_call.h"

namespace gla::layer_test {
namespace {

using ::testing::HasSubstr;

TEST(AttentionLayer, WithoutAGradientThereIsNothingToDo) {
  const AttentionLayerConfig config = ConfigOf(AttentionOp::kGla, kShapes[0]);
  const Call call(config, {3}, DType::kFloat32);
  const auto layer = MakeLayer(config);
  const DeviceBuffer x = Upload(call.x);
  const AttentionLayerOutput output =
      ValueOrDie(layer->Forward(InputOf(x, 3, config.hidden_size), false));
  EXPECT_FALSE(output.final_state.recurrent.has_value());
  EXPECT_THAT(layer->Backward(output.record, {}).status().ToString(),
              HasSubstr("INVALID_ARGUMENT: gla layer: gradients: expected at least one of dy and "
                        "d_final_state, found none"));
}

struct Refusal {
  const char* message;
  void (*spoil)(AttentionLayerConfig&);
};

TEST(AttentionLayer, RefusesConfigsByName) {
  const Refusal refusals[] = {
      {"gla layer: hidden_size: expected 1 to 16777216, found 0",
       [](AttentionLayerConfig& c) { c.hidden_size = 0; }},
      {"gla layer: num_kv_heads: expected a divisor of num_heads = 4, found 3",
       [](AttentionLayerConfig& c) { c.num_kv_heads = 3; }},
      {"gla layer: num_kv_heads: expected 1 to 16777216, found -1",
       [](AttentionLayerConfig& c) { c.num_kv_heads = -1; }},
      {"gla layer: head_key_dim: expected 1 to 4194304, found 0",
       [](AttentionLayerConfig& c) { c.head_key_dim = 0; }},
      {"gla layer: normalize: expected false, found true",
       [](AttentionLayerConfig& c) { c.normalize = true; }},
      {"gla layer: norm_k: expected false, found true",
       [](AttentionLayerConfig& c) { c.norm_k = true; }},
      {"gla layer: output_norm: expected true, found false",
       [](AttentionLayerConfig& c) { c.output_norm = false; }},
      {"gla layer: conv_bias: expected false, found true",
       [](AttentionLayerConfig& c) { c.conv_bias = true; }},
      {"gla layer: conv_size: expected 1 to 8, found 9",
       [](AttentionLayerConfig& c) { c.conv_size = 9; }},
      {"gla layer: clamp_min: expected at most 0, found 1",
       [](AttentionLayerConfig& c) { c.clamp_min = 1; }},
      {"gla layer: gate_logit_normalizer: expected a positive number, found 0",
       [](AttentionLayerConfig& c) { c.gate_logit_normalizer = 0; }},
      {"simple_gla layer: clamp_min: expected none, found -1",
       [](AttentionLayerConfig& c) {
         c.op = AttentionOp::kSimpleGla;
         c.clamp_min = -1;
       }},
      {"linear_attention layer: use_gate: expected false, found true",
       [](AttentionLayerConfig& c) { c.op = AttentionOp::kLinearAttention; }},
      {"linear_attention layer: use_output_gate: expected false, found true",
       [](AttentionLayerConfig& c) {
         c.op = AttentionOp::kLinearAttention;
         c.use_gate = false;
       }},
      {"retention layer: key dimension of a head, turned in pairs: expected an even number, found "
       "7",
       [](AttentionLayerConfig& c) {
         c.op = AttentionOp::kRetention;
         c.use_gate = false;
         c.head_key_dim = 7;
       }},
      // What the operator holds.
      {"gla: key dimension: expected 1 to 2048, found 4096",
       [](AttentionLayerConfig& c) { c.head_key_dim = 4096; }},
      // Parts that do not meet.
      {"gla layer: output width of gk_proj.1, one gate per key dimension: expected 24, found 12",
       [](AttentionLayerConfig& c) { c.feature_map = QkMap::kHedgehog; }},
  };
  for (const Refusal& refusal : refusals) {
    AttentionLayerConfig config = ConfigOf(AttentionOp::kGla, kShapes[1]);
    refusal.spoil(config);
    RandomWeightSource source(kSeed);
    const auto layer = AttentionLayer::Load(TestDevice(), config, {}, source, kPrefix);
    EXPECT_EQ(layer.status().ToString(), absl::StrCat("INVALID_ARGUMENT: ", refusal.message));
  }
  RandomWeightSource source(kSeed);
  EXPECT_THAT(AttentionLayer::Load(TestDevice(), ConfigOf(AttentionOp::kGla, kShapes[1]),
                                   {.dtype = DType::kFloat16}, source, kPrefix)
                  .status()
                  .ToString(),
              HasSubstr("gla layer: dtype: expected float32 or bfloat16, found float16"));
}

TEST(AttentionLayer, MergedHeadsMustFitTheOutputProjection) {
  const AttentionLayerConfig config = ConfigOf(AttentionOp::kRetention, kShapes[1]);
  RandomWeightSource source(kSeed);
  AttentionLayerWeights weights =
      ValueOrDie(LoadAttentionLayer(TestDevice(), config, DType::kFloat32, source, kPrefix));
  EXPECT_TRUE(CheckWidths(config, weights).ok());
  // A projection that takes one head's 10 values where four heads give 40.
  const std::vector<float> values(24 * 40);
  const auto pack = [&](int rows, int cols) {
    return PackedWeight(TestDevice(), {{values.data(), DType::kFloat32, rows, cols}},
                        DType::kFloat32);
  };
  weights.out_proj.forward = pack(24, 10);
  EXPECT_EQ(CheckWidths(config, weights).ToString(),
            "INVALID_ARGUMENT: retention layer: input width of o_proj, after the per-head norm "
            "(heads * value dim): expected 40, found 10");
  weights.out_proj.forward = pack(24, 40);
  weights.out_proj.transposed = pack(24, 40);
  EXPECT_EQ(
      CheckWidths(config, weights).ToString(),
      "INVALID_ARGUMENT: retention layer: input width of the gradient of o_proj: expected 24, "
      "found 40");
}

TEST(AttentionLayer, RefusesInputsByName) {
  AttentionLayerConfig config = ConfigOf(AttentionOp::kGla, kShapes[1]);
  config.use_short_conv = true;
  const auto gla = MakeLayer(config);
  const auto retention = MakeLayer(ConfigOf(AttentionOp::kRetention, kShapes[1]));
  const DeviceBuffer memory = Upload(std::vector<float>(4096));
  const auto tensor = [&](std::vector<int64_t> shape, DType dtype = DType::kFloat32) {
    return Tensor{memory.data(), dtype, std::move(shape)};
  };
  const auto refused = [&](const AttentionLayer& layer, const AttentionLayerInput& input) {
    return layer.Forward(input, true).status().ToString();
  };
  AttentionLayerInput good = InputOf(memory, 5, 24);
  good.cu_seqlens = {0, 2, 5};
  ASSERT_TRUE(gla->Forward(good, true).ok());
  AttentionLayerInput bad = good;
  bad.x = tensor({5, 23});
  EXPECT_EQ(refused(*gla, bad),
            "INVALID_ARGUMENT: gla layer: x: expected shape [T, hidden_size] = [5, 24], found [5, "
            "23]");
  bad.x = tensor({5, 1, 24});
  EXPECT_THAT(refused(*gla, bad), HasSubstr("= [5, 24], found [5, 1, 24]"));
  bad.x = tensor({});
  EXPECT_THAT(refused(*gla, bad), HasSubstr("= [0, 24], found []"));
  bad.x = tensor({5, 24}, DType::kBFloat16);
  EXPECT_EQ(refused(*gla, bad),
            "INVALID_ARGUMENT: gla layer: x: expected dtype float32, found bfloat16");
  bad.x = {nullptr, DType::kFloat32, {5, 24}};
  EXPECT_THAT(refused(*gla, bad), HasSubstr("x: expected data of [5, 24], found a null pointer"));
  bad.x = tensor({int64_t{1} << 40, 24});
  EXPECT_THAT(refused(*gla, bad), HasSubstr("gla layer: x: expected at most"));

  bad = good;
  bad.cu_seqlens = {};
  EXPECT_THAT(refused(*gla, bad), HasSubstr("gla layer: cu_seqlens: expected N + 1 offsets"));
  bad.cu_seqlens = {0, 4};
  EXPECT_THAT(refused(*gla, bad), HasSubstr("cu_seqlens: expected the last offset T = 5"));
  bad.cu_seqlens = {0, 3, 2, 5};
  EXPECT_THAT(refused(*gla, bad), HasSubstr("cu_seqlens: expected offset 2 of at least 3"));

  bad = good;
  bad.start_positions = {0, 2};
  EXPECT_THAT(refused(*gla, bad), HasSubstr("start_positions: expected none, found 2"));
  bad.start_positions = {0};
  EXPECT_THAT(refused(*retention, bad),
              HasSubstr("start_positions: expected none, or one for each of 2 sequences, found 1"));

  bad = good;
  bad.initial.recurrent = tensor({2, 4, 6, 10});  // per query head; the layer has two groups
  EXPECT_THAT(refused(*gla, bad),
              HasSubstr("initial_state: expected shape [N, S, K, V] = [2, 2, 6, 10]"));
  bad = good;
  bad.initial.key_sum = tensor({2, 2, 6});
  EXPECT_THAT(refused(*gla, bad), HasSubstr("initial_key_sum: expected none without normalize"));
  bad = good;
  bad.initial.conv = tensor({2, 4, 56});
  EXPECT_EQ(refused(*gla, bad),
            "INVALID_ARGUMENT: gla layer: initial.conv: expected shape [N, conv_size - 1, channels "
            "of q, k and v] = [2, 3, 56], found [2, 4, 56]");
  EXPECT_THAT(refused(*retention, bad),
              HasSubstr("retention layer: initial.conv: expected none without a short convolution "
                        "of more than one input, found [2, 4, 56]"));

  const AttentionLayerOutput output = ValueOrDie(gla->Forward(good, true));
  const auto refused_gradients = [&](const AttentionLayerOutputGradients& gradients) {
    return gla->Backward(output.record, gradients).status().ToString();
  };
  EXPECT_THAT(refused_gradients({.dy = tensor({4, 24})}),
              HasSubstr("gla layer: dy: expected shape [T, hidden_size] = [5, 24], found [4, 24]"));
  EXPECT_THAT(refused_gradients({.dy = tensor({5, 24}, DType::kBFloat16)}),
              HasSubstr("gla layer: dy: expected dtype float32, found bfloat16"));
  AttentionLayerOutputGradients gradients{.dy = tensor({5, 24})};
  gradients.d_final_state.recurrent = tensor({2, 2, 6, 9});
  EXPECT_THAT(refused_gradients(gradients),
              HasSubstr("d_final_state: expected shape [N, S, K, V] = [2, 2, 6, 10]"));
  gradients.d_final_state = {.conv = tensor({1, 3, 56})};
  EXPECT_THAT(refused_gradients(gradients), HasSubstr("d_final_state.conv: expected shape"));
}

TEST(AttentionLayer, NamesATensorOfAnotherShape) {
  const ModelConfig model = ValueOrDie(ModelConfig::Load(kBardFolder));
  Checkpoint checkpoint = ValueOrDie(Checkpoint::Open(kBardFolder));
  CheckpointSource source(checkpoint);
  AttentionLayerConfig config = AttentionLayerConfig::Of(model);
  const auto load = [&] {
    return AttentionLayer::Load(TestDevice(), config, {}, source, "model.layers.0.attn.").status();
  };
  EXPECT_TRUE(load().ok());
  config.head_value_dim /= 2;
  EXPECT_THAT(load().ToString(), HasSubstr("model.layers.0.attn.v_proj.weight: expected"));
}

}  // namespace
}  // namespace gla::layer_test
