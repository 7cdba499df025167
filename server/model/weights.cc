#include "model/weights.h"

#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/weight_loader.h"

namespace gla {
namespace {

// The name of the norm on each head's output, as fla's layers name it.
const char* HeadNormName(const ModelConfig& config) {
  if (config.family == ModelFamily::kLinearAttention) return "norm";
  return config.use_output_gate && config.fuse_norm ? "g_norm_swish_gate" : "g_norm";
}

absl::Status LoadLayer(WeightLoader& loader, const ModelConfig& config, int index,
                       LayerWeights& out) {
  const std::string layer = absl::StrCat("model.layers.", index, ".");
  const std::string attn = layer + "attn.";
  const int hidden = config.hidden_size;
  const ProjectionLayout proj(config);

  GLA_ASSIGN_OR_RETURN(out.attn_norm, loader.Vector(layer + "attn_norm.weight", hidden));
  GLA_ASSIGN_OR_RETURN(out.in_proj, loader.Matrix({{attn + "q_proj.weight", proj.q},
                                                   {attn + "k_proj.weight", proj.k},
                                                   {attn + "v_proj.weight", proj.v},
                                                   {attn + "g_proj.weight", proj.g},
                                                   {attn + "gk_proj.0.weight", proj.gate}},
                                                  hidden));
  if (proj.gate > 0) {
    GLA_ASSIGN_OR_RETURN(out.gate_proj,
                         loader.Matrix({{attn + "gk_proj.1.weight", proj.k}}, proj.gate));
    GLA_ASSIGN_OR_RETURN(out.gate_bias, loader.Vector(attn + "gk_proj.1.bias", proj.k));
  }
  if (config.use_short_conv) {
    const int width = config.conv_size;
    GLA_ASSIGN_OR_RETURN(out.conv, loader.Floats({{attn + "q_conv1d.weight", {proj.q, 1, width}},
                                                  {attn + "k_conv1d.weight", {proj.k, 1, width}},
                                                  {attn + "v_conv1d.weight", {proj.v, 1, width}}}));
  }
  GLA_RETURN_IF_ERROR(LoadQkMaps(loader,
                                 {.map = config.feature_map,
                                  .head_key_dim = config.head_key_dim,
                                  .tied = config.tie_feature_map_qk},
                                 attn, out.q_map, out.k_map));
  if (config.output_norm && config.elementwise_affine) {
    GLA_ASSIGN_OR_RETURN(
        out.head_norm,
        loader.Vector(absl::StrCat(attn, HeadNormName(config), ".weight"), config.head_value_dim));
  }
  GLA_ASSIGN_OR_RETURN(out.out_proj, loader.Matrix({{attn + "o_proj.weight", hidden}},
                                                   config.num_heads * config.head_value_dim));

  GLA_ASSIGN_OR_RETURN(out.mlp_norm, loader.Vector(layer + "mlp_norm.weight", hidden));
  GLA_ASSIGN_OR_RETURN(out.gate_up,
                       loader.Matrix({{layer + "mlp.gate_proj.weight", config.intermediate_size},
                                      {layer + "mlp.up_proj.weight", config.intermediate_size}},
                                     hidden));
  GLA_ASSIGN_OR_RETURN(out.down, loader.Matrix({{layer + "mlp.down_proj.weight", hidden}},
                                               config.intermediate_size));
  return absl::OkStatus();
}

int64_t BytesOf(const FeatureMapWeights& map) {
  return map.layer1.bytes() + map.bias1.bytes() + map.layer2.bytes() + map.bias2.bytes();
}

}  // namespace

ProjectionLayout::ProjectionLayout(const ModelConfig& config)
    : q(config.num_heads * config.head_key_dim),
      k(config.num_kv_heads * config.head_key_dim),
      v(config.num_kv_heads * config.head_value_dim),
      g(config.use_output_gate ? config.num_heads * config.head_value_dim : 0),
      gate(config.family == ModelFamily::kGla ? config.gate_low_rank_dim : 0) {}

std::vector<float> RetentionDecay(int num_heads) {
  std::vector<float> decay(num_heads);
  for (int head = 0; head < num_heads; ++head) {
    decay[head] = std::log(1.0f - std::exp2(-5.0f - static_cast<float>(head)));
  }
  return decay;
}

int64_t ModelWeights::bytes() const {
  size_t sum = embeddings.bytes() + norm.bytes() + lm_head.bytes() + decay.bytes();
  for (const LayerWeights& layer : layers) {
    sum += layer.attn_norm.bytes() + layer.in_proj.bytes() + layer.gate_proj.bytes() +
           layer.gate_bias.bytes() + layer.conv.bytes() + BytesOf(layer.q_map) +
           BytesOf(layer.k_map) + layer.head_norm.bytes() + layer.out_proj.bytes() +
           layer.mlp_norm.bytes() + layer.gate_up.bytes() + layer.down.bytes();
  }
  return static_cast<int64_t>(sum);
}

absl::StatusOr<ModelWeights> LoadWeights(Device& device, const ModelConfig& config, DType act,
                                         WeightSource& source) {
  WeightLoader loader(device, act, source);
  ModelWeights weights;
  const char kEmbeddings[] = "model.embeddings.weight";
  GLA_ASSIGN_OR_RETURN(
      weights.embeddings,
      loader.Table(kEmbeddings, config.vocab_size, config.hidden_size, &weights.embeddings_dtype));
  weights.layers.resize(config.num_layers);
  for (int i = 0; i < config.num_layers; ++i) {
    GLA_RETURN_IF_ERROR(LoadLayer(loader, config, i, weights.layers[i]));
  }
  GLA_ASSIGN_OR_RETURN(weights.norm, loader.Vector("model.norm.weight", config.hidden_size));
  const std::string head = config.tie_word_embeddings ? kEmbeddings : "lm_head.weight";
  GLA_ASSIGN_OR_RETURN(weights.lm_head,
                       loader.Matrix({{head, config.vocab_size}}, config.hidden_size));
  if (config.family == ModelFamily::kRetNet) {
    GLA_ASSIGN_OR_RETURN(weights.decay,
                         loader.Upload("retention decay", RetentionDecay(config.num_heads)));
  }
  return weights;
}

absl::Status CheckWidths(const ModelConfig& config, const ModelWeights& weights) {
  absl::Status status;
  const auto expect = [&status](const std::string& where, const std::string& what, int64_t expected,
                                int64_t found) {
    if (!status.ok() || expected == found) return;
    status = absl::InvalidArgumentError(
        absl::StrCat(where, ": ", what, ": expected ", expected, ", found ", found));
  };
  const auto floats = [](const DeviceBuffer& buffer) {
    return static_cast<int64_t>(buffer.bytes() / sizeof(float));
  };
  const int64_t hidden = config.hidden_size;
  const ProjectionLayout proj(config);
  const int64_t heads = config.num_heads, kv_heads = config.num_kv_heads;
  const int map_factor = FeaturesPerKey(config.feature_map);

  expect("model", "embedding bytes for vocab_size rows of the residual's width",
         config.vocab_size * hidden * static_cast<int64_t>(SizeOf(weights.embeddings_dtype)),
         static_cast<int64_t>(weights.embeddings.bytes()));
  expect("model", "layers", config.num_layers, static_cast<int64_t>(weights.layers.size()));
  for (size_t i = 0; i < weights.layers.size() && status.ok(); ++i) {
    const LayerWeights& layer = weights.layers[i];
    const std::string where = absl::StrCat("layer ", i);
    const auto expect_here = [&](const char* what, int64_t expected, int64_t found) {
      expect(where, what, expected, found);
    };
    expect_here("attn_norm weight for the residual's width", hidden, floats(layer.attn_norm));
    expect_here("input width of the q, k, v, g and gate projections, after attn_norm", hidden,
                layer.in_proj.in());
    expect_here("output width of the q, k, v, g and gate projections", proj.width(),
                layer.in_proj.out());
    if (proj.gate > 0) {
      expect_here("input width of gk_proj.1, after gk_proj.0", proj.gate, layer.gate_proj.in());
      expect_here("output width of gk_proj.1, one gate per key dimension",
                  kv_heads * config.feature_dim, layer.gate_proj.out());
      expect_here("gk_proj.1 bias", layer.gate_proj.out(), floats(layer.gate_bias));
    }
    if (config.use_short_conv) {
      expect_here("short convolution weights for the q, k and v channels",
                  int64_t{proj.qkv()} * config.conv_size, floats(layer.conv));
    }
    for (const FeatureMapWeights* map : {&layer.q_map, &layer.k_map}) {
      if (map->layer1.bytes() == 0) continue;
      expect_here("input width of the feature map, after a head's projection", config.head_key_dim,
                  map->layer1.in());
      expect_here("output width of the feature map's layers", map->layer1.out(),
                  map->layer2.bytes() == 0 ? map->layer1.out() : map->layer2.out());
    }
    expect_here("key dimension of the recurrence, after the feature map",
                int64_t{config.head_key_dim} * map_factor, config.feature_dim);
    if (layer.head_norm.bytes() > 0) {
      expect_here("per-head norm weight for the recurrence's value dimension",
                  config.head_value_dim, floats(layer.head_norm));
    }
    // The norm gives [rows, heads, value dim]; the projection takes the heads merged.
    expect_here("input width of o_proj, after the per-head norm (heads * value dim)",
                heads * config.head_value_dim, layer.out_proj.in());
    if (proj.g > 0) {
      expect_here("width of the output gate, after the per-head norm",
                  heads * config.head_value_dim, proj.g);
    }
    expect_here("output width of o_proj, added to the residual", hidden, layer.out_proj.out());
    expect_here("mlp_norm weight for the residual's width", hidden, floats(layer.mlp_norm));
    expect_here("input width of the mlp, after mlp_norm", hidden, layer.gate_up.in());
    expect_here("output width of mlp gate and up", int64_t{2} * config.intermediate_size,
                layer.gate_up.out());
    expect_here("input width of mlp down, after gate * up", layer.gate_up.out() / 2,
                layer.down.in());
    expect_here("output width of mlp down, added to the residual", hidden, layer.down.out());
  }
  expect("model", "norm weight for the residual's width", hidden, floats(weights.norm));
  expect("model", "input width of lm_head, after the norm", hidden, weights.lm_head.in());
  expect("model", "output width of lm_head, one logit per token", config.vocab_size,
         weights.lm_head.out());
  return status;
}

}  // namespace gla
