// One call of an operator in the kernels' words. For attention*.cc only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/attention.h"

namespace gla {

inline int64_t Elements(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

inline const float* Floats(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->data) : nullptr;
}

inline float* Floats(const std::optional<DeviceTensor>& tensor) {
  return tensor ? tensor->buffer.as<float>() : nullptr;
}

// The memory of one call, all of it allocated before anything is launched. After one failure
// nothing more is allocated.
class Memory {
 public:
  Memory(Device& device, AttentionOp op) : device_(device), op_(op) {}

  DeviceBuffer Take(int64_t bytes) {
    if (exhausted_) return {};
    bytes_ = bytes;
    DeviceBuffer buffer(device_, static_cast<size_t>(bytes));
    exhausted_ = !buffer.ok();
    return buffer;
  }
  DeviceBuffer TakeFloats(int64_t count) { return Take(count * 4); }
  DeviceTensor TakeTensor(const std::vector<int64_t>& shape, DType dtype) {
    return {Take(Elements(shape) * static_cast<int64_t>(SizeOf(dtype))), dtype, shape};
  }
  DeviceTensor TakeLike(const Tensor& tensor) { return TakeTensor(tensor.shape, tensor.dtype); }
  std::optional<DeviceTensor> TakeLike(const std::optional<Tensor>& tensor) {
    if (!tensor) return std::nullopt;
    return TakeLike(*tensor);
  }

  absl::Status status() const {
    if (!exhausted_) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        absl::StrCat(NameOf(op_), ": device memory: expected room for ", bytes_,
                     " bytes more, found ", device_.memory_free(), " free"));
  }

 private:
  Device& device_;
  AttentionOp op_;
  int64_t bytes_ = 0;  // of the last allocation
  bool exhausted_ = false;
};

// Offsets and slots on the device. Sequence n's state is in slot n.
class DeviceSequences {
 public:
  DeviceSequences(Memory& memory, const AttentionInputs& in, const AttentionShape& shape)
      : num_seqs_(static_cast<size_t>(shape.num_seqs)), ints_(in.cu_seqlens) {
    for (int64_t n = 0; ints_.size() <= num_seqs_; ++n) {  // batched
      ints_.push_back(static_cast<int32_t>(n * in.q.shape[1]));
    }
    for (size_t n = 0; n < num_seqs_; ++n) longest_ = std::max(longest_, ints_[n + 1] - ints_[n]);
    buffer_ = memory.Take(static_cast<int64_t>((3 * num_seqs_ + 1) * sizeof(int32_t)));
  }

  // Once, when all memory is taken: whether states are read and written.
  void Upload(Device& device, bool reads, bool writes) {
    for (const bool used : {reads, writes}) {
      for (size_t n = 0; n < num_seqs_; ++n) ints_.push_back(used ? static_cast<int32_t>(n) : -1);
    }
    device.Upload(buffer_.data(), ints_.data(), ints_.size() * sizeof(int32_t));
  }

  Sequences view() const {
    const int32_t* offsets = buffer_.as<int32_t>();
    return {.cu_seqlens = offsets,
            .read_slots = offsets + num_seqs_ + 1,
            .write_slots = offsets + 2 * num_seqs_ + 1,
            .num_seqs = static_cast<int>(num_seqs_),
            .num_rows = ints_[num_seqs_],
            .max_len = longest_};
  }

 private:
  size_t num_seqs_;
  std::vector<int32_t> ints_;  // offsets; then the slots that are read, and those that are written
  int longest_ = 0;
  DeviceBuffer buffer_;
};

inline float ScaleOf(const AttentionInputs& in, const AttentionShape& shape) {
  return in.scale.value_or(1 / std::sqrt(static_cast<float>(shape.key_dim)));
}

// Sizes and strides, without gate, results and states.
inline LinearAttentionArgs ForwardArgs(const AttentionShape& shape, DType dtype, float scale) {
  LinearAttentionArgs args{};
  args.num_heads = static_cast<int>(shape.num_heads);
  args.num_kv_heads = static_cast<int>(shape.num_kv_heads);
  args.key_dim = static_cast<int>(shape.key_dim);
  args.value_dim = static_cast<int>(shape.value_dim);
  args.state_heads = static_cast<int>(shape.state_heads());
  args.q_stride = shape.num_heads * shape.key_dim;
  args.k_stride = shape.num_kv_heads * shape.key_dim;
  args.v_stride = shape.num_kv_heads * shape.value_dim;
  args.o_stride = shape.num_heads * shape.value_dim;
  args.state_stride = shape.state_heads() * shape.key_dim * shape.value_dim;
  args.scale = scale;
  args.dtype = dtype;
  return args;
}

inline LinearAttentionBackwardArgs BackwardArgs(const AttentionShape& shape, DType dtype,
                                                float scale, const Sequences& seqs) {
  LinearAttentionBackwardArgs args{};
  args.cu_seqlens = seqs.cu_seqlens;
  args.num_seqs = seqs.num_seqs;
  args.num_rows = seqs.num_rows;
  args.max_len = seqs.max_len;
  args.num_heads = static_cast<int>(shape.num_heads);
  args.num_kv_heads = static_cast<int>(shape.num_kv_heads);
  args.key_dim = static_cast<int>(shape.key_dim);
  args.value_dim = static_cast<int>(shape.value_dim);
  args.state_heads = static_cast<int>(shape.state_heads());
  args.scale = scale;
  args.dtype = dtype;
  return args;
}

// The normalized operator, after checks and with the results' memory taken.
absl::Status NormalizedForward(Device& device, const AttentionInputs& in, Memory& memory,
                               AttentionResult& result);
absl::Status NormalizedBackward(Device& device, const AttentionInputs& in,
                                const AttentionResultGradients& gradients, Memory& memory,
                                AttentionGradients& result);

}  // namespace gla
