// config.json, as flash-linear-attention writes it, as one validated struct.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/kernels.h"

namespace gla {

enum class ModelFamily { kGla, kLinearAttention, kRetNet };
std::string_view NameOf(ModelFamily family);  // "gla", "linear_attn", "retnet": model_type

// How queries and keys are mapped before the recurrence, fla's names.
enum class QkMap {
  kNone,
  kIdentity,
  kRelu,
  kElu,
  kSilu,
  kSigmoid,
  kSquaredRelu,
  kGelu,
  kElementwiseProduct,
  kHedgehog,
  kT2r,
  kDpfp,
};
// How many features a map makes of one key dimension: 1, 2 or 8.
int FeaturesPerKey(QkMap map);

struct ModelConfig {
  ModelFamily family = ModelFamily::kGla;
  int vocab_size = 0;
  int hidden_size = 0;  // D
  int num_layers = 0;
  int num_heads = 0;          // H
  int num_kv_heads = 0;       // G, divides H
  int head_key_dim = 0;       // per head, before the feature map
  int feature_dim = 0;        // K: per head, after the feature map
  int head_value_dim = 0;     // V
  int intermediate_size = 0;  // of the SwiGLU
  float norm_eps = 1e-6f;
  bool elementwise_affine = true;
  bool tie_word_embeddings = false;
  bool use_output_gate = true;  // gla, retnet
  bool fuse_norm = true;        // names the output norm: g_norm_swish_gate or g_norm
  bool use_short_conv = false;
  int conv_size = 4;
  QkMap feature_map = QkMap::kNone;
  bool tie_feature_map_qk = false;      // linear_attn
  bool norm_q = false, norm_k = false;  // linear_attn
  bool norm_feature_map = false;        // linear_attn: normalize by the running key sum
  bool output_norm = true;              // linear_attn: rmsnorm (true) or identity
  std::optional<float> clamp_min;       // gla
  float gate_logit_normalizer = 16.0f;  // gla
  int gate_low_rank_dim = 16;           // gla
  int bos_token_id = -1;                // -1: none
  int eos_token_id = -1;                // the first of eos_token_ids
  std::vector<int> eos_token_ids;       // any of them ends a text; may be empty
  int max_position_embeddings = 0;      // informative; a state has no length

  // Parses and validates. InvalidArgument names the key, what was expected and what was found; what
  // is not supported (hybrid attn layers, attnres_block_size, use_gv, an unknown model_type or key
  // that changes the computation) is refused by name.
  static absl::StatusOr<ModelConfig> Parse(std::string_view json);
  static absl::StatusOr<ModelConfig> Load(const std::string& folder);  // folder/config.json

  int64_t num_parameters() const;
};

}  // namespace gla
