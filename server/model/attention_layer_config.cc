#include <cmath>

#include "absl/strings/str_cat.h"
#include "model/attention_layer.h"
#include "model/attention_layer_check.h"

namespace gla {
namespace {

constexpr int kMaxConvSize = 8;  // of the ShortConv kernel
constexpr int kMaxSize = 1 << 24;

}  // namespace

AttentionLayerConfig AttentionLayerConfig::Of(const ModelConfig& model) {
  AttentionLayerConfig config;
  config.op = model.family == ModelFamily::kLinearAttention ? AttentionOp::kLinearAttention
              : model.family == ModelFamily::kRetNet        ? AttentionOp::kRetention
                                                            : AttentionOp::kGla;
  config.hidden_size = model.hidden_size;
  config.num_heads = model.num_heads;
  config.num_kv_heads = model.num_kv_heads;
  config.head_key_dim = model.head_key_dim;
  config.head_value_dim = model.head_value_dim;
  config.feature_map = model.feature_map;
  config.tie_feature_map_qk = model.tie_feature_map_qk;
  config.norm_q = model.norm_q;
  config.norm_k = model.norm_k;
  config.normalize = model.norm_feature_map;
  config.use_gate = model.family == ModelFamily::kGla;
  config.gate_low_rank_dim = model.gate_low_rank_dim;
  config.gate_logit_normalizer = model.gate_logit_normalizer;
  config.clamp_min = model.clamp_min;
  config.use_output_gate = model.use_output_gate;
  config.fuse_norm = model.fuse_norm;
  config.output_norm = model.output_norm;
  config.elementwise_affine = model.elementwise_affine;
  config.norm_eps = model.norm_eps;
  config.use_short_conv = model.use_short_conv;
  config.conv_size = model.conv_size;
  return config;
}

absl::Status AttentionLayerConfig::Check() const {
  const bool is_linear = op == AttentionOp::kLinearAttention, is_gla = op == AttentionOp::kGla;
  LayerChecker check(op);
  check.ExpectSize("hidden_size", kMaxSize, hidden_size);
  check.ExpectSize("num_heads", kMaxSize, num_heads);
  check.ExpectSize("num_kv_heads", kMaxSize, num_kv_heads);
  if (!check.status().ok()) return check.status();
  check.Expect(num_heads % num_kv_heads == 0, "num_kv_heads",
               absl::StrCat("a divisor of num_heads = ", num_heads), num_kv_heads);
  check.ExpectSize("head_key_dim", kMaxSize / num_heads, head_key_dim);
  check.ExpectSize("head_value_dim", kMaxSize / num_heads, head_value_dim);
  check.ExpectOffUnless(is_linear, "tie_feature_map_qk", tie_feature_map_qk);
  check.ExpectOffUnless(is_linear, "norm_q", norm_q);
  check.ExpectOffUnless(is_linear, "norm_k", norm_k);
  check.ExpectOffUnless(is_linear, "normalize", normalize);
  check.ExpectOffUnless(is_gla || op == AttentionOp::kSimpleGla, "use_gate", use_gate);
  check.ExpectOffUnless(!is_linear, "use_output_gate", use_output_gate);
  check.ExpectOffUnless(!is_linear, "use_short_conv", use_short_conv);
  check.ExpectOffUnless(use_short_conv, "conv_bias", conv_bias);
  check.Expect(output_norm || is_linear, "output_norm", "true", "false");
  check.ExpectSize("gate_low_rank_dim", kMaxSize, gate_low_rank_dim);
  check.Expect(std::isfinite(gate_logit_normalizer) && gate_logit_normalizer > 0,
               "gate_logit_normalizer", "a positive number", gate_logit_normalizer);
  check.Expect(!clamp_min || (is_gla && *clamp_min <= 0), "clamp_min",
               is_gla ? "at most 0" : "none", clamp_min.value_or(0));
  check.Expect(std::isfinite(norm_eps) && norm_eps >= 0, "norm_eps", "a number of at least 0",
               norm_eps);
  check.ExpectSize("conv_size", kMaxConvSize, conv_size);
  check.Expect(op != AttentionOp::kRetention || feature_dim() % 2 == 0,
               "key dimension of a head, turned in pairs", "an even number", feature_dim());
  return check.status();
}

}  // namespace gla
