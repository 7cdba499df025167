// The inside of AttentionLayer: one function per block of the layer, each way.
#pragma once

#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "model/attention_layer.h"
#include "model/attention_layer_weights.h"
#include "model/rows.h"

namespace gla {

// The memory of one call, all of it allocated before anything is launched. After one failure
// nothing more is allocated.
class LayerMemory {
 public:
  LayerMemory(Device& device, AttentionOp op) : device_(device), op_(op) {}

  DeviceBuffer Take(int64_t bytes) {
    if (exhausted_) return {};
    bytes_ = bytes;
    DeviceBuffer buffer(device_, static_cast<size_t>(bytes));
    exhausted_ = !buffer.ok();
    return buffer;
  }
  DeviceTensor Take(const std::vector<int64_t>& shape, DType dtype) {
    const int64_t elements =
        std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    return {Take(elements * static_cast<int64_t>(SizeOf(dtype))), dtype, shape};
  }

  absl::Status status() const {
    if (!exhausted_) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        absl::StrCat(NameOf(op_), " layer: device memory: expected room for ", bytes_,
                     " bytes more, found ", device_.memory_free(), " free"));
  }

 private:
  Device& device_;
  AttentionOp op_;
  int64_t bytes_ = 0;  // of the last allocation
  bool exhausted_ = false;
};

// The rows of a tensor [T, ...], or none of one without memory.
inline Rows RowsOf(const DeviceTensor& tensor) {
  if (tensor.shape.empty()) return {};
  const int64_t width = std::accumulate(tensor.shape.begin() + 1, tensor.shape.end(), int64_t{1},
                                        std::multiplies<>());
  return {tensor.buffer.data(), width, tensor.dtype};
}

// What one call of Backward() works in. What it does not need has no memory.
struct BackwardScratch {
  DeviceTensor d_proj;                       // as proj
  DeviceTensor dy;                           // [T, D] act
  DeviceTensor d_merged, d_o;                // [T, H, V]
  DeviceTensor d_conv;                       // [T, q | k | v]
  DeviceTensor d_logits;                     // as gate, act
  DeviceTensor d_layer1, d_layer2, d_heads;  // [T, H, head_key_dim], the last one float32
};

struct AttentionLayer::Impl {
  Impl(Device& device, const AttentionLayerConfig& config, const AttentionLayerOptions& options)
      : device(device), config(config), options(options), layout(config) {}

  absl::Status CheckInput(const AttentionLayerInput& input) const;
  absl::Status CheckGradients(const AttentionRecord& record,
                              const AttentionLayerOutputGradients& gradients) const;
  absl::Status CheckConvState(const char* what, const std::optional<Tensor>& conv,
                              int64_t num_seqs) const;

  // Both ways.
  AttentionInputs OperatorInputs(const AttentionRecord& record) const;
  void Product(const PackedWeight& weight, Rows x, Rows y, int64_t rows,
               const DeviceBuffer* bias = nullptr, bool accumulate = false) const;
  void Copy(Rows x, Rows y, int64_t rows, int64_t cols) const;
  void Turn(const AttentionRecord& record, const DeviceTensor& heads, bool inverse) const;
  // Has a state of its convolution.
  bool carries_inputs() const { return config.use_short_conv && config.conv_size > 1; }

  // Forward.
  AttentionRecord TakeRecord(LayerMemory& memory, const AttentionLayerInput& input) const;
  void UploadSequences(const AttentionLayerInput& input, bool writes_conv,
                       const AttentionRecord& record) const;
  void Convolve(const AttentionRecord& record, std::optional<DeviceTensor>& final_state) const;
  void MapFeatures(const FeatureMapWeights& map, Rows x, bool normalize,
                   const AttentionRecord::Heads& y, const DeviceBuffer& scratch) const;
  void Gate(const AttentionRecord& record, Rows x) const;
  void Norm(const AttentionRecord& record, Rows y) const;
  absl::StatusOr<AttentionLayerOutput> Forward(const AttentionLayerInput& input,
                                               bool want_final_state) const;

  // Backward.
  BackwardScratch TakeScratch(LayerMemory& memory, const AttentionRecord& record,
                              bool reaches_o) const;
  void OutputBackward(const AttentionRecord& record, const Tensor& dy,
                      const BackwardScratch& scratch) const;
  void MapBackward(const FeatureMapWeights& map, Rows x, bool normalize,
                   const AttentionRecord::Heads& forward, const DeviceTensor& dy, Rows dx,
                   const BackwardScratch& scratch) const;
  void ConvolveBackward(const AttentionRecord& record, const std::optional<Tensor>& d_final_state,
                        const BackwardScratch& scratch,
                        const std::optional<DeviceTensor>& d_initial_state) const;
  void QkvBackward(const AttentionRecord& record, const AttentionGradients& gradients,
                   const BackwardScratch& scratch) const;
  void InputBackward(const AttentionRecord& record, const std::optional<DeviceTensor>& d_gate,
                     const BackwardScratch& scratch, Rows dx) const;
  absl::StatusOr<AttentionLayerGradients> Backward(
      const AttentionRecord& record, const AttentionLayerOutputGradients& gradients) const;

  Device& device;
  const AttentionLayerConfig config;
  const AttentionLayerOptions options;
  const AttentionLayerLayout layout;
  AttentionLayerWeights weights;
};

}  // namespace gla
