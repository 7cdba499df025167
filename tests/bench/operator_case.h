// One linear-attention operator, forward or backward, at one shape: inputs, call, check and counts.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"

namespace gla::bench {

enum class Pass : uint8_t { kForward, kBackward };

// `batch` sequences of `length` tokens, each with a state that is read and written. Forward: in
// place, in slots that do not follow the sequences' order. Backward: with the gradients of both
// results, for all inputs. q, k, v are about N(0, 1), the log gates logsigmoid(N(0, 1)) / 16.
struct OperatorConfig {
  GateKind gate_kind = GateKind::kNone;  // not kConstant
  Pass pass = Pass::kForward;
  AttentionForm form = AttentionForm::kRecurrent;
  int batch = 1, length = 1;
  int heads = 1, key_dim = 1, value_dim = 1;
  DType dtype = DType::kFloat32;
  DType gate_dtype = DType::kFloat32;
};

class OperatorCase {
 public:
  // Enough sets of inputs for a round through them to move at least `min_bytes`, so that none is
  // found in a cache; results are poisoned. RESOURCE_EXHAUSTED when they do not fit the device.
  static absl::StatusOr<std::unique_ptr<OperatorCase>> Create(Device& device,
                                                              const OperatorConfig& config,
                                                              size_t min_bytes);

  // Runs the first set and compares some columns and rows of two heads with the naive recurrence in
  // double precision. Once, before any Queue(). The largest RMS ratio of a result; INTERNAL with
  // the result's name when it is beyond the tolerance of the type.
  absl::StatusOr<double> Check();

  // Queues the call on every set, one after the other.
  void Queue();

  int num_sets() const { return num_sets_; }
  size_t workspace_bytes() const { return workspace_.bytes(); }
  // Of one call: each input read once and each result written once.
  double bytes() const { return bytes_; }
  // Of one call: what the tiled form with tiles of 64 needs; one token: the recurrence.
  double flops() const;

 private:
  enum Id {  // the tensors of a set; those that a pass does not have are empty
    kQ,
    kK,
    kV,
    kGate,
    kState,  // forward: the slots; backward: the initial states
    kDO,
    kDFinalState,
    kO,
    kDq,
    kDk,
    kDv,
    kDGate,
    kDInitialState,
    kNumTensors
  };
  struct TensorInfo {
    size_t count = 0;
    DType dtype = DType::kFloat32;
    size_t offset = 0;             // within a set
    std::vector<float> host = {};  // inputs: what was uploaded, until Check()
  };
  struct Slice;
  class Errors;

  using Found = std::array<std::vector<float>, kNumTensors>;  // results, by Id

  OperatorCase(Device& device, const OperatorConfig& config);
  void Layout();
  absl::Status MakeInputs(size_t min_bytes);
  template <typename T>
  T* at(int set, Id id) const {
    if (tensors_[id].count == 0) return nullptr;
    return reinterpret_cast<T*>(sets_.as<char>() + set * set_bytes_ + tensors_[id].offset);
  }
  LinearAttentionArgs ForwardArgs(int set) const;
  LinearAttentionBackwardArgs BackwardArgs(int set) const;
  void Call(int set);

  float scale() const { return 1 / std::sqrt(static_cast<float>(config_.key_dim)); }
  int slot(int seq) const { return config_.pass == Pass::kForward ? config_.batch - 1 - seq : seq; }
  // Where [row, head] of a tensor stands, and row `i` of a state.
  size_t row_of(int seq, int t, int head) const {
    return (static_cast<size_t>(seq) * config_.length + t) * config_.heads + head;
  }
  size_t state_row(int seq, int head, int i) const {
    return ((static_cast<size_t>(slot(seq)) * config_.heads + head) * config_.key_dim + i) *
           config_.value_dim;
  }
  std::vector<float> Download(Id id);
  Slice SliceOf(int seq, int head, int first_row, int rows, int first_column, int columns) const;
  void CheckColumns(int seq, int head, const Found& found, Errors& errors) const;
  void CheckRows(int seq, int head, const Found& found, Errors& errors) const;

  Device& device_;
  const OperatorConfig config_;
  TensorInfo tensors_[kNumTensors];
  size_t set_bytes_ = 0;
  double bytes_ = 0;
  int num_sets_ = 0;
  DeviceBuffer sets_, cu_seqlens_, slots_, workspace_;
};

}  // namespace gla::bench
