// A model's weights on the device, and the check that its parts fit together.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kernels.h"
#include "model/model_config.h"
#include "model/qk_map.h"
#include "model/weight_source.h"

namespace gla {

// Vectors are float32. An absent part has no memory.
struct LayerWeights {
  DeviceBuffer attn_norm;          // [D]
  PackedWeight in_proj;            // rows q | k | v | g | gk_proj.0, see ProjectionLayout; [.., D]
  PackedWeight gate_proj;          // gk_proj.1 [G * head_key_dim, low rank]
  DeviceBuffer gate_bias;          // [G * head_key_dim]
  DeviceBuffer conv;               // channels q | k | v; [.., conv_size]
  FeatureMapWeights q_map, k_map;  // linear_attn
  DeviceBuffer head_norm;          // [V]
  PackedWeight out_proj;           // [D, H * V]
  DeviceBuffer mlp_norm;           // [D]
  PackedWeight gate_up;            // rows gate | up; [2 * intermediate, D]
  PackedWeight down;               // [D, intermediate]
};

struct ModelWeights {
  DeviceBuffer embeddings;  // [vocab, D] row-major
  DType embeddings_dtype = DType::kFloat32;
  std::vector<LayerWeights> layers;
  DeviceBuffer norm;     // [D]
  PackedWeight lm_head;  // [vocab, D]
  DeviceBuffer decay;    // retnet: [H] log decay per head

  int64_t bytes() const;
};

// Widths of the blocks of in_proj's output and where each begins. All 0 when absent.
struct ProjectionLayout {
  explicit ProjectionLayout(const ModelConfig& config);
  int q, k, v, g, gate;
  int k_begin() const { return q; }
  int v_begin() const { return q + k; }
  int qkv() const { return q + k + v; }
  int g_begin() const { return qkv(); }
  int gate_begin() const { return qkv() + g; }
  int width() const { return qkv() + g + gate; }
};

// Retention's log decay per head: log(1 - 2^(-5 - h)).
std::vector<float> RetentionDecay(int num_heads);

// Reads every weight that `config` calls for. `act` is the activations' type (see ModelOptions).
absl::StatusOr<ModelWeights> LoadWeights(Device& device, const ModelConfig& config, DType act,
                                         WeightSource& source);

// Every part's output against the input of the part that takes it. InvalidArgument says which layer
// and part, the width expected and the width found.
absl::Status CheckWidths(const ModelConfig& config, const ModelWeights& weights);

}  // namespace gla
