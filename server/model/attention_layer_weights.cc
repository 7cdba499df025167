#include "model/attention_layer_weights.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/attention_layer_check.h"
#include "model/weights.h"

namespace gla {
namespace {

// The name of the norm on each head's output, as fla's layers name it.
const char* HeadNormName(const AttentionLayerConfig& config) {
  if (config.op == AttentionOp::kLinearAttention) return "norm";
  return config.use_output_gate && config.fuse_norm ? "g_norm_swish_gate" : "g_norm";
}

// Grouped heads, each for as many query heads as read it, where the operator wants one per query
// head.
WeightLoader::Block GroupedBlock(const AttentionLayerConfig& config, const std::string& name,
                                 int head_rows) {
  const int repeats = AttentionLayerLayout(config).kv_heads / config.num_kv_heads;
  return {.name = name,
          .rows = int64_t{config.num_kv_heads} * head_rows,
          .repeats = repeats,
          .head_rows = head_rows};
}

// The convolutions' tensors called `name` ("weight", "bias") one after another; each block's rows
// are of the dimensions in `row`.
absl::StatusOr<DeviceBuffer> LoadConv(WeightLoader& loader, const AttentionLayerConfig& config,
                                      const std::string& prefix, const std::string& name,
                                      const std::vector<int64_t>& row) {
  const int queries = config.num_heads * config.head_key_dim;
  std::vector<float> all;
  for (const WeightLoader::Block& block :
       {WeightLoader::Block{prefix + "q_conv1d." + name, queries},
        GroupedBlock(config, prefix + "k_conv1d." + name, config.head_key_dim),
        GroupedBlock(config, prefix + "v_conv1d." + name, config.head_value_dim)}) {
    std::vector<int64_t> shape = {block.rows};
    shape.insert(shape.end(), row.begin(), row.end());
    GLA_ASSIGN_OR_RETURN(const std::vector<float> values, loader.HostFloats(block, shape));
    all.insert(all.end(), values.begin(), values.end());
  }
  return loader.Upload(prefix + "q_conv1d." + name, all);
}

}  // namespace

AttentionLayerLayout::AttentionLayerLayout(const AttentionLayerConfig& config)
    // One state cannot decay at the rates of several query heads.
    : kv_heads(config.op == AttentionOp::kSimpleGla && config.use_gate ? config.num_heads
                                                                       : config.num_kv_heads),
      q(config.num_heads * config.head_key_dim),
      k(kv_heads * config.head_key_dim),
      v(kv_heads * config.head_value_dim),
      g(config.use_output_gate ? config.num_heads * config.head_value_dim : 0),
      low_rank(config.op == AttentionOp::kGla && config.use_gate ? config.gate_low_rank_dim : 0),
      gate(!config.use_gate                       ? 0
           : config.op == AttentionOp::kSimpleGla ? kv_heads
                                                  : kv_heads * config.head_key_dim) {}

absl::StatusOr<AttentionLayerWeights> LoadAttentionLayer(Device& device,
                                                         const AttentionLayerConfig& config,
                                                         DType act, WeightSource& source,
                                                         const std::string& prefix) {
  WeightLoader loader(device, act, source);
  AttentionLayerWeights weights;
  const AttentionLayerLayout layout(config);
  const int hidden = config.hidden_size;
  GLA_ASSIGN_OR_RETURN(
      weights.in_proj,
      loader.MatrixPair({{prefix + "q_proj.weight", layout.q},
                         GroupedBlock(config, prefix + "k_proj.weight", config.head_key_dim),
                         GroupedBlock(config, prefix + "v_proj.weight", config.head_value_dim),
                         {prefix + "g_proj.weight", layout.g},
                         {prefix + "gk_proj.0.weight", layout.low_rank}},
                        hidden));
  if (layout.gate > 0) {
    const bool is_low_rank = layout.low_rank > 0;
    const std::string name = prefix + (is_low_rank ? "gk_proj.1." : "gk_proj.");
    GLA_ASSIGN_OR_RETURN(weights.gate_proj,
                         loader.MatrixPair({{name + "weight", layout.gate}},
                                           is_low_rank ? layout.low_rank : hidden));
    GLA_ASSIGN_OR_RETURN(weights.gate_bias, loader.Vector(name + "bias", layout.gate));
  }
  if (config.use_short_conv) {
    GLA_ASSIGN_OR_RETURN(weights.conv,
                         LoadConv(loader, config, prefix, "weight", {1, config.conv_size}));
  }
  if (config.conv_bias) {
    GLA_ASSIGN_OR_RETURN(weights.conv_bias, LoadConv(loader, config, prefix, "bias", {}));
  }
  GLA_RETURN_IF_ERROR(LoadQkMaps(loader,
                                 {.map = config.feature_map,
                                  .head_key_dim = config.head_key_dim,
                                  .tied = config.tie_feature_map_qk,
                                  .with_gradients = true},
                                 prefix, weights.q_map, weights.k_map));
  if (config.output_norm && config.elementwise_affine) {
    GLA_ASSIGN_OR_RETURN(weights.head_norm,
                         loader.Vector(absl::StrCat(prefix, HeadNormName(config), ".weight"),
                                       config.head_value_dim));
  }
  GLA_ASSIGN_OR_RETURN(weights.out_proj,
                       loader.MatrixPair({{prefix + "o_proj.weight", hidden}},
                                         config.num_heads * int64_t{config.head_value_dim}));
  if (config.op == AttentionOp::kRetention) {
    GLA_ASSIGN_OR_RETURN(weights.decay,
                         loader.Upload("retention decay", RetentionDecay(config.num_heads)));
  }
  return weights;
}

absl::Status CheckWidths(const AttentionLayerConfig& config, const AttentionLayerWeights& weights) {
  LayerChecker check(config.op);
  const AttentionLayerLayout layout(config);
  const auto floats = [](const DeviceBuffer& buffer) {
    return static_cast<int64_t>(buffer.bytes() / sizeof(float));
  };
  // `before`, `after`: what the projection's input comes from and its output is for.
  const auto expect_pair = [&](const std::string& name, const std::string& before,
                               const std::string& after, int64_t in, int64_t out,
                               const WeightLoader::Pair& pair) {
    check.ExpectEqual("input width of " + name + before, in, pair.forward.in());
    check.ExpectEqual("output width of " + name + after, out, pair.forward.out());
    check.ExpectEqual("input width of the gradient of " + name, out, pair.transposed.in());
    check.ExpectEqual("output width of the gradient of " + name, in, pair.transposed.out());
  };
  const int64_t hidden = config.hidden_size;
  const int64_t merged = int64_t{config.num_heads} * config.head_value_dim;
  expect_pair("the q, k, v, g and gate projections", "", "", hidden, layout.width(),
              weights.in_proj);
  if (config.op == AttentionOp::kGla && config.use_gate) {
    expect_pair("gk_proj.1", ", after gk_proj.0", ", one gate per key dimension", layout.low_rank,
                int64_t{layout.kv_heads} * config.feature_dim(), weights.gate_proj);
  } else if (layout.gate > 0) {
    expect_pair("gk_proj", "", ", one gate per query head", hidden, config.num_heads,
                weights.gate_proj);
  }
  check.ExpectEqual("bias of the gate projection", layout.gate, floats(weights.gate_bias));
  const int64_t channels = config.use_short_conv ? layout.qkv() : 0;
  check.ExpectEqual("short convolution weights for the q, k and v channels",
                    channels * config.conv_size, floats(weights.conv));
  check.ExpectEqual("short convolution biases for the q, k and v channels",
                    config.conv_bias ? channels : 0, floats(weights.conv_bias));
  for (const FeatureMapWeights* map : {&weights.q_map, &weights.k_map}) {
    if (map->layer1.bytes() == 0) continue;
    check.ExpectEqual("input width of the feature map, after a head's projection",
                      config.head_key_dim, map->layer1.in());
    check.ExpectEqual("output width of the feature map's layers", config.head_key_dim,
                      map->layer1.out());
  }
  if (weights.head_norm.bytes() > 0) {
    check.ExpectEqual("per-head norm weight for the operator's value dimension",
                      config.head_value_dim, floats(weights.head_norm));
  }
  // The norm gives [rows, heads, value dim]; the projection takes the heads merged.
  expect_pair("o_proj", ", after the per-head norm (heads * value dim)", "", merged, hidden,
              weights.out_proj);
  if (layout.g > 0) {
    check.ExpectEqual("width of the output gate, after the per-head norm", merged, layout.g);
  }
  return check.status();
}

}  // namespace gla
