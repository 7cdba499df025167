// One attention layer, forward and backward with respect to its input and its initial state; the
// weights are frozen.
//
//   q, k, v = x Wq^T, x Wk^T, x Wv^T              each through its short convolution, if any
//   q, k    = map(q), map(k)                      and turned by their positions (retention)
//   gate    = max(log sigmoid(x Wgk^T + b) / normalizer, clamp)     simple GLA, GLA (low rank)
//   o       = operator(q, k, v, gate)             kernels/attention.h; [T, H, V]
//   y       = merge(norm(o) * swish(x Wg^T)) Wo^T     merge: [T, H, V] to [T, H * V]
//
// The layers are those of flash-linear-attention (fla/layers), their tensors named as there. Simple
// GLA has a gate per query head, so with grouped heads its k and v are made per query head and its
// states are per query head too.
//
// What does not fit is InvalidArgument with the layer, the part, what was expected and what was
// found. A layer is const once built; used by one thread at a time, its device's.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "kernels/device.h"
#include "kernels/kernels.h"
#include "model/model_config.h"
#include "model/weight_source.h"

namespace gla {

// Options of fla's layers, by their names where they have one.
struct AttentionLayerConfig {
  AttentionOp op = AttentionOp::kGla;
  int hidden_size = 0;                  // D
  int num_heads = 0, num_kv_heads = 0;  // H, and G which divides it
  int head_key_dim = 0;                 // per head, before the feature map
  int head_value_dim = 0;               // V
  QkMap feature_map = QkMap::kNone;
  bool tie_feature_map_qk = false;      // linear attention
  bool norm_q = false, norm_k = false;  // linear attention: features divided by their sum
  bool normalize = false;               // linear attention: by the running key sum
  bool use_gate = true;                 // simple GLA, GLA; false: no decay
  int gate_low_rank_dim = 16;           // GLA
  float gate_logit_normalizer = 16;
  std::optional<float> clamp_min = {};  // GLA
  bool use_output_gate = true;          // not linear attention
  bool fuse_norm = true;                // names the output norm: g_norm_swish_gate or g_norm
  bool output_norm = true;              // linear attention may have none
  bool elementwise_affine = true;
  float norm_eps = 1e-5f;
  bool use_short_conv = false;  // not linear attention
  int conv_size = 4;
  bool conv_bias = false;

  // The attention layer of a model.
  static AttentionLayerConfig Of(const ModelConfig& model);

  // K: per head, after the feature map.
  int feature_dim() const { return head_key_dim * FeaturesPerKey(feature_map); }
  // What the config says that no layer can be. InvalidArgument names layer and option.
  absl::Status Check() const;
};

struct AttentionLayerOptions {
  DType dtype = DType::kFloat32;  // of activations and their gradients; or bfloat16
  // Of the operator, both ways. Absent: DefaultForm() of each call.
  std::optional<AttentionForm> form = {};
};

// The states of N sequences, float32: Tensor where the caller's, DeviceTensor where ours. What is
// absent of an initial state is zero; an absent gradient of a final state is, too.
template <typename T>
struct AttentionLayerState {
  // [N, S, K, V]. S = H with retention and with a gated simple GLA, else G.
  std::optional<T> recurrent = {};
  // [N, G, K]. Linear attention with `normalize`.
  std::optional<T> key_sum = {};
  // [N, conv_size - 1, channels q | k | v], the last inputs of the short convolution, oldest first.
  // The k and v channels are of S heads with a gated simple GLA, else of G.
  std::optional<T> conv = {};
};

struct AttentionLayerInput {
  Tensor x = {};                         // [T, D] act
  std::vector<int32_t> cu_seqlens = {};  // host, [N + 1], 0 = first <= ... <= last = T
  // Retention: the position of each sequence's first row, [N]; empty: all 0.
  std::vector<int64_t> start_positions = {};
  AttentionLayerState<Tensor> initial = {};
};

// What Backward() needs of a forward pass. It refers to the initial state, which must not change
// until then.
struct AttentionRecord {
  std::vector<int32_t> cu_seqlens = {};
  AttentionLayerState<Tensor> initial = {};
  DeviceBuffer sequences = {};  // int32: cu_seqlens, then read and write slots of the convolution
  DeviceBuffer positions = {};  // int64 [T], retention
  DeviceTensor proj = {};       // [T, q | k | v | g | gk_proj.0]
  DeviceTensor conv = {};       // [T, q | k | v]
  struct Heads {
    DeviceTensor layer1 = {}, layer2 = {};  // [T, heads, head_key_dim], linear layers of the map
    DeviceTensor mapped = {};               // [T, heads, K], as the operator takes them
  } q = {}, k = {};
  DeviceTensor v = {};                    // [T, heads, V]
  std::optional<DeviceTensor> gate = {};  // float32, as the operator takes it
  DeviceTensor o = {};                    // [T, H, V]
};

struct AttentionLayerOutput {
  DeviceTensor y = {};                                 // [T, D] float32
  AttentionLayerState<DeviceTensor> final_state = {};  // when wanted: every part the layer has
  AttentionRecord record = {};
};

// At least one is present.
struct AttentionLayerOutputGradients {
  std::optional<Tensor> dy = {};  // as y
  AttentionLayerState<Tensor> d_final_state = {};
};
struct AttentionLayerGradients {
  DeviceTensor dx = {};                                    // [T, D] float32
  AttentionLayerState<DeviceTensor> d_initial_state = {};  // exactly the parts that were given
};

class AttentionLayer {
 public:
  // Reads the tensors below `prefix` ("model.layers.0.attn."). ResourceExhausted when device memory
  // runs out, here and below.
  static absl::StatusOr<std::unique_ptr<AttentionLayer>> Load(Device& device,
                                                              const AttentionLayerConfig& config,
                                                              const AttentionLayerOptions& options,
                                                              WeightSource& source,
                                                              const std::string& prefix);

  ~AttentionLayer();

  const AttentionLayerConfig& config() const;

  // Nothing is launched when an argument does not fit.
  absl::StatusOr<AttentionLayerOutput> Forward(const AttentionLayerInput& input,
                                               bool want_final_state) const;
  // REQUIRES: `record` is of this layer's Forward().
  absl::StatusOr<AttentionLayerGradients> Backward(
      const AttentionRecord& record, const AttentionLayerOutputGradients& gradients) const;

 private:
  struct Impl;
  explicit AttentionLayer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace gla
