// The inside of Model: activation memory, and one function per block of the network.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/decode.h"
#include "kernels/device.h"
#include "kernels/kernels.h"
#include "model/decode_inputs.h"
#include "model/model.h"
#include "model/rows.h"
#include "model/step_inputs.h"
#include "model/weights.h"

namespace gla {

// One slot: every layer's recurrent state, then the key sums, then the convolutions' states. In
// bytes; every part begins on 256.
struct StateLayout {
  StateLayout(const ModelConfig& config, StateFormat format);

  StateFormat format;                // of the recurrent states; the others are float32
  int state_heads;                   // of LinearAttentionArgs
  int64_t recurrent, key_sum, conv;  // per layer
  int64_t key_sums_begin, convs_begin;
  int64_t bytes;
};

// The activations of T rows.
struct Activations {
  Rows residual;                 // [T, D] float32
  Rows normed;                   // [T, D]
  Rows squares;                  // [T, D / 16] float32, see kernels/decode.h
  Rows proj;                     // [T, q | k | v | g | gk_proj.0]
  Rows conv;                     // [T, q | k | v]
  Rows features;                 // [T, q | k] after the feature map
  Rows head_in, head_1, head_2;  // [T * H, head_key_dim], inside a feature map
  Rows gate;                     // [T, G * K] float32
  Rows mixed;                    // [T, H * V]
  Rows mixed_normed;             // [T, H * V]
  Rows gate_up;                  // [T, 2 * intermediate]
  Rows mlp;                      // [T, intermediate]
};

// The base is what the kernels of the rows that are being queued use.
struct Model::Impl : Activations {
  Impl(Device& device, const ModelConfig& config, const ModelOptions& options)
      : device(device),
        config(config),
        options(options),
        proj_layout(config),
        state(config, options.state_format) {}

  static absl::StatusOr<std::unique_ptr<Model>> Build(Device& device, const ModelConfig& config,
                                                      const ModelOptions& options,
                                                      WeightSource& source);
  absl::Status Allocate();

  // After one failure nothing more is allocated; Allocate() says so at its end.
  Rows AllocateRows(int64_t rows, int64_t width, DType dtype);
  Activations AllocateActivations(int64_t rows);

  const float* Forward(const StepPlan& plan, char* states, int32_t* finite, const int32_t* sampled);
  // All rows of the plan by the kernels of kernels.h: their inputs; the layers; and whether they
  // are finite and logits, from row `first_logit` on.
  void SetRows(const StepPlan& plan, char* states, const int32_t* sampled);
  void RunRows(const StepPlan& plan, char* states);
  void FinishRows(const StepPlan& plan, int32_t* finite, int first_logit);
  // Puts what was sampled in place of the tokens below 0.
  void ResolveSampled(const std::vector<int32_t>& tokens, int32_t* device_tokens,
                      const int32_t* sampled);
  void Embed(int rows);  // the step's tokens, into the residual stream
  void Layers(int rows, char* states);
  void JudgeRows(Rows x, int rows, int32_t* finite);  // what the layers left there
  // See Model::Record; and one number of decode rows, and one shape of others, unless it has been
  // recorded on these states.
  void Record(char* states);
  void ForgetRecordings(const char* states);  // of other states than these
  void RecordDecode(int rows, char* states);
  void RecordRows(const StepShape& shape, char* states);
  bool MayRecord() const { return options.record_steps && decode_inputs.has_value(); }
  // Of a plan without decode rows; none where it is not recorded.
  std::optional<StepShape> ShapeOf(const StepPlan& plan) const;
  int max_shape_seqs() const { return std::min(options.max_seqs, max_run_seqs()); }
  bool is_chunkwise() const;
  // The plan's decode rows, recorded; see decode.cc: their inputs, and the rest.
  void SetDecode(const StepPlan& plan, char* states, const int32_t* sampled);
  void RunDecode(const StepPlan& plan, char* states, int32_t* finite);
  // Whether decode rows may run beside others.
  bool RunsBeside(int decode_rows) const;
  void SetDecodeInputs(const StepPlan& plan, const int32_t* sampled);
  void QueueDecode(int rows, char* states);
  bool RunsManyDecode(int rows) const;
  void QueueFusedDecode(int rows, char* states);
  // Only the attention fused.
  void QueueManyDecode(int rows, char* states);
  void FusedAttention(int layer, int rows, char* states);
  DecodeProductArgs FusedProduct(const PackedWeight& weight, Rows x, bool normed) const;
  DecodeAttentionArgs FusedAttentionArgs(int layer, char* states) const;
  bool ServesFusedDecode() const;

  void Attention(int layer, int rows, char* states);
  void Mlp(const LayerWeights& w, int rows);
  void Norm(const DeviceBuffer& weight, Rows x, Rows y, int rows);
  void Product(const PackedWeight& weight, Rows x, Rows y, int rows,
               const DeviceBuffer* bias = nullptr);
  void AddProduct(const PackedWeight& weight, Rows x, int rows);
  void MapFeatures(const FeatureMapWeights& map, Rows x, int heads, bool normalize, Rows y,
                   int rows);
  // All that is the same for every layer and run.
  LinearAttentionArgs RecurrenceArgs(int64_t qk_stride, int64_t v_stride) const;
  void Recurrence(int layer, Rows q, Rows k, Rows v, char* states);
  // Queries, keys and values of a layer from its projection, which they overwrite in part.
  struct Mixed {
    Rows q, k, v;
  };
  Mixed Mix(int layer, int rows, char* states);

  // Sequences of one run: all, or as many as are unpacked at once.
  int max_run_seqs() const { return state.format == StateFormat::kFloat32 ? INT32_MAX : 32; }
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
  std::optional<DecodeInputs> decode_inputs;
  const StepView* step = nullptr;  // what is being queued: one of the two above
  // Kernels of their own for decode rows, and whether they serve this model.
  const DecodeKernels* const decode_kernels = DecodeKernels::Get();
  bool is_fused = false;
  std::map<int, Recording> recordings;            // of decode rows, by their number
  std::map<StepShape, Recording> row_recordings;  // of others
  const char* recorded_states = nullptr;

  std::vector<DeviceBuffer> buffers;  // the activations' memory
  bool out_of_memory = false;
  // Of decode rows with kernels of their own, which may run beside the others.
  Activations decode_activations;
  DeviceBuffer chunk_workspace;  // of the chunkwise form
  DeviceBuffer unpacked;         // states of a run, float32, when they rest in another format
  DeviceBuffer unpacked_slots;   // 0, 1, 2, ..
  Rows last;                     // [R, D] float32
  Rows logits;                   // [R, vocab] float32
};

}  // namespace gla
