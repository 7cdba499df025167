// The inside of Model: activation memory, and one function per block of the network.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kernels.h"
#include "model/model.h"
#include "model/rows.h"
#include "model/step_inputs.h"
#include "model/weights.h"

namespace gla {

// One slot: every layer's recurrent state, then the key sums, then the convolutions' states.
struct StateLayout {
  explicit StateLayout(const ModelConfig& config);

  int state_heads;                   // of LinearAttentionArgs
  int64_t recurrent, key_sum, conv;  // floats per layer
  int64_t key_sums_begin, convs_begin;
  int64_t floats;
};

struct Model::Impl {
  Impl(Device& device, const ModelConfig& config, const ModelOptions& options)
      : device(device), config(config), options(options), proj_layout(config), state(config) {}

  static absl::StatusOr<std::unique_ptr<Model>> Build(Device& device, const ModelConfig& config,
                                                      const ModelOptions& options,
                                                      WeightSource& source);
  absl::Status Allocate();

  // After one failure nothing more is allocated; Allocate() says so at its end.
  Rows AllocateRows(int64_t rows, int64_t width, DType dtype);

  const float* Forward(const StepPlan& plan, float* states, int32_t* finite,
                       const int32_t* sampled);
  void Attention(int layer, int rows, float* states);
  void Mlp(const LayerWeights& w, int rows);
  void Norm(const DeviceBuffer& weight, Rows x, Rows y, int rows);
  void Product(const PackedWeight& weight, Rows x, Rows y, int rows,
               const DeviceBuffer* bias = nullptr);
  void AddProduct(const PackedWeight& weight, Rows x, int rows);
  void MapFeatures(const FeatureMapWeights& map, Rows x, int heads, bool normalize, Rows y,
                   int rows);
  // All that is the same for every layer and run.
  LinearAttentionArgs RecurrenceArgs(int64_t qk_stride, int64_t v_stride) const;
  void Recurrence(int layer, Rows q, Rows k, Rows v, float* states);

  bool maps_features() const {
    return config.feature_map != QkMap::kNone || config.norm_q || config.norm_k;
  }

  Device& device;
  const ModelConfig config;
  const ModelOptions options;
  const ProjectionLayout proj_layout;
  const StateLayout state;
  ModelWeights weights;

  std::optional<StepInputs> inputs;
  std::vector<DeviceBuffer> buffers;  // the memory of the activations below
  bool out_of_memory = false;
  Rows residual;                 // [T, D] float32
  Rows normed;                   // [T, D]
  Rows proj;                     // [T, q | k | v | g | gk_proj.0]
  Rows conv;                     // [T, q | k | v]
  Rows features;                 // [T, q | k] after the feature map
  Rows head_in, head_1, head_2;  // [T * H, head_key_dim], inside a feature map
  Rows gate;                     // [T, G * K] float32
  DeviceBuffer chunk_workspace;  // of the chunkwise form
  Rows mixed;                    // [T, H * V]
  Rows mixed_normed;             // [T, H * V]
  Rows gate_up;                  // [T, 2 * intermediate]
  Rows mlp;                      // [T, intermediate]
  Rows last;                     // [R, D] float32
  Rows logits;                   // [R, vocab] float32
};

}  // namespace gla
