// The weights of one attention layer with gradients, and the check that its parts fit together.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kernels.h"
#include "model/attention_layer.h"
#include "model/qk_map.h"
#include "model/weight_loader.h"
#include "model/weight_source.h"

namespace gla {

// Widths of the blocks of the input projection's output, and of the operator's heads.
struct AttentionLayerLayout {
  explicit AttentionLayerLayout(const AttentionLayerConfig& config);
  int kv_heads;              // of the operator
  int q, k, v, g, low_rank;  // 0 when absent
  int gate;                  // elements of the operator's gate per row
  int qkv() const { return q + k + v; }
  int v_begin() const { return q + k; }
  int g_begin() const { return qkv(); }
  int low_rank_begin() const { return qkv() + g; }
  int width() const { return qkv() + g + low_rank; }
};

// Vectors are float32. An absent part has no memory.
struct AttentionLayerWeights {
  WeightLoader::Pair in_proj;      // rows q | k | v | g | gk_proj.0, see the layout; [.., D]
  WeightLoader::Pair gate_proj;    // GLA: gk_proj.1 [gate, low rank]; simple GLA: gk_proj [gate, D]
  DeviceBuffer gate_bias;          // [gate]
  DeviceBuffer conv, conv_bias;    // channels q | k | v
  FeatureMapWeights q_map, k_map;  // maps with linear layers
  DeviceBuffer head_norm;          // [V]
  WeightLoader::Pair out_proj;     // [D, H * V]
  DeviceBuffer decay;              // retention: [H] log decay
};

// Reads every weight that the config calls for, below `prefix`.
absl::StatusOr<AttentionLayerWeights> LoadAttentionLayer(Device& device,
                                                         const AttentionLayerConfig& config,
                                                         DType act, WeightSource& source,
                                                         const std::string& prefix);

// Every part's output against the input of the part that takes it, both ways. InvalidArgument says
// which layer and part, the width expected and the width found.
absl::Status CheckWidths(const AttentionLayerConfig& config, const AttentionLayerWeights& weights);

}  // namespace gla
