// A layer with gradients computes what the server computes.
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "model/attention_layer.h"
#include "model/model.h"
#include "tests/model/layer_call.h"
#include "tests/testing/feed.h"

namespace gla::layer_test {
namespace {

class Around {
 public:
  explicit Around(const ModelConfig& config) : c_(config), source_(kSeed) {}

  Doubles Embedding(int token) {
    const Doubles table = Weight("model.embeddings.weight", {c_.vocab_size, c_.hidden_size});
    return {table.begin() + int64_t{token} * c_.hidden_size,
            table.begin() + int64_t{token + 1} * c_.hidden_size};
  }
  Doubles Norm(const std::string& name, const Doubles& x) {
    return reference::RmsNorm(x, Weight(name, {c_.hidden_size}), {}, c_.norm_eps, true);
  }
  // The logits, of the residual after the attention layer.
  Doubles Rest(Doubles residual) {
    const std::string mlp = "model.layers.0.mlp.";
    const Doubles x = Norm("model.layers.0.mlp_norm.weight", residual);
    Doubles gate = Linear(mlp + "gate_proj.weight", x, c_.intermediate_size);
    const Doubles up = Linear(mlp + "up_proj.weight", x, c_.intermediate_size);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = reference::Silu(gate[i]) * up[i];
    const Doubles down = Linear(mlp + "down_proj.weight", gate, c_.hidden_size);
    for (size_t i = 0; i < down.size(); ++i) residual[i] += down[i];
    return Linear("lm_head.weight", Norm("model.norm.weight", residual), c_.vocab_size);
  }

 private:
  Doubles Weight(const std::string& name, const std::vector<int64_t>& shape) {
    const HostWeight weight = *source_.Get(name, shape);
    const std::vector<uint8_t> bytes = ConvertWeight(weight.matrix, DType::kFloat32);
    const auto* floats = reinterpret_cast<const float*>(bytes.data());
    return {floats, floats + bytes.size() / sizeof(float)};
  }
  Doubles Linear(const std::string& name, const Doubles& x, int out) {
    const Doubles w = Weight(name, {out, static_cast<int64_t>(x.size())});
    Doubles y(out);
    for (int o = 0; o < out; ++o) {
      for (size_t i = 0; i < x.size(); ++i) y[o] += w[o * x.size() + i] * x[i];
    }
    return y;
  }

  const ModelConfig c_;
  RandomWeightSource source_;
};

TEST(AttentionLayer, IsTheServersLayer) {
  for (const char* keys :
       {R"("model_type": "gla", "num_kv_heads": 2, "clamp_min": -0.04, "feature_map": "relu")",
        R"("model_type": "gla", "use_short_conv": true, "use_output_gate": false)",
        R"("model_type": "linear_attn", "feature_map": "hedgehog", "norm_feature_map": true)",
        R"("model_type": "linear_attn", "num_kv_heads": 1, "norm_k": true)",
        R"("model_type": "retnet", "num_kv_heads": 2)"}) {
    SCOPED_TRACE(keys);
    const ModelConfig config = ValueOrDie(ModelConfig::Parse(absl::StrCat(
        R"({"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4,)",
        R"("expand_k": 0.5, "expand_v": 1.0, "intermediate_size": 48,)", keys, "}")));
    const std::vector<int32_t> tokens = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9};
    const auto model = MakeTinyModel(TestDevice(), {}, kSeed, config);
    Feeder feeder = ValueOrDie(Feeder::Create(TestDevice(), *model, 1));
    const std::vector<float> logits = feeder.Step({{0, tokens, true}}, LogitRows::kAll);

    Around around(config);
    std::vector<float> x;
    for (const int32_t token : tokens) {
      const Doubles row = around.Norm("model.layers.0.attn_norm.weight", around.Embedding(token));
      x.insert(x.end(), row.begin(), row.end());
    }
    RandomWeightSource source(kSeed);
    const auto layer = ValueOrDie(
        AttentionLayer::Load(TestDevice(), AttentionLayerConfig::Of(config),
                             {.form = AttentionForm::kRecurrent}, source, "model.layers.0.attn."));
    const DeviceBuffer device_x = Upload(x);
    const auto rows = static_cast<int32_t>(tokens.size());
    const AttentionLayerOutput output =
        ValueOrDie(layer->Forward(InputOf(device_x, rows, config.hidden_size), true));
    const std::vector<float> y = ToHost(output.y);
    Doubles want;
    for (int32_t t = 0; t < rows; ++t) {
      Doubles residual = around.Embedding(tokens[t]);
      for (int i = 0; i < 32; ++i) residual[i] += y[t * 32 + i];
      Append(want, around.Rest(residual));
    }
    EXPECT_TRUE(IsNear(logits, want, 1e-5));
    // The recurrent states stand first in a slot.
    const std::vector<float> state = ToHost(output.final_state.recurrent);
    std::vector<float> slot = feeder.State(0);
    slot.resize(state.size());
    EXPECT_TRUE(IsNear(state, slot, 1e-5));
  }
}

}  // namespace
}  // namespace gla::layer_test
