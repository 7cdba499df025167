// Which heads, gates and state memory one item of the recurrence works on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

namespace gla {

// The key/value head of a state and the query heads [first, first + reps) that read it.
struct HeadMap {
  template <typename Args>
  HeadMap(const Args& a, int state_head)
      : state_head(state_head),
        group(state_head / (a.state_heads / a.num_kv_heads)),
        reps(a.num_heads / a.state_heads),
        first(state_head * reps) {}

  int state_head, group, reps, first;
};

// Where the log decays are.
struct GateView {
  explicit GateView(const LinearAttentionArgs& a)
      : kind(a.gate_kind), data(a.gate), dtype(a.gate_dtype), stride(a.gate_stride) {}
  explicit GateView(const LinearAttentionBackwardArgs& a)
      : kind(a.gate_kind),
        data(a.gate),
        dtype(a.gate_dtype),
        stride(a.gate_kind == GateKind::kPerKey ? int64_t{a.num_kv_heads} * a.key_dim
                                                : a.num_kv_heads) {}

  GateKind kind;
  const void* data;
  DType dtype;
  int64_t stride;  // kScalar, kPerKey: elements between rows
};

// Columns [col0, col0 + cols) of one state, [K, cols], where the work on it takes place: in the
// write slot, or in `scratch` when the final state is dropped (the read slot must stay as it is).
struct StateView {
  StateView(const LinearAttentionArgs& a, int seq, int state_head, int col0, int cols,
            float* scratch)
      : key_dim(a.key_dim), cols(cols) {
    const int64_t offset = (static_cast<int64_t>(state_head) * a.key_dim) * a.value_dim + col0;
    const int32_t read = a.seqs.read_slots[seq], write = a.seqs.write_slots[seq];
    if (read >= 0) initial = a.state + read * a.state_stride + offset;
    initial_stride = a.value_dim;
    data = write >= 0 ? a.state + write * a.state_stride + offset : scratch;
    stride = write >= 0 ? a.value_dim : cols;
  }

  // Puts the initial state, or zeros, in place.
  void Begin() const {
    if (initial == data) return;
    for (int k = 0; k < key_dim; ++k) {
      if (initial == nullptr) {
        std::fill_n(data + k * stride, cols, 0.0f);
      } else {
        std::memcpy(data + k * stride, initial + k * initial_stride, sizeof(float) * cols);
      }
    }
  }

  int key_dim, cols;
  const float* initial = nullptr;
  int64_t initial_stride;
  float* data;
  int64_t stride;
};

inline void BeginKeySum(const LinearAttentionArgs& a, int seq, int group, float* z) {
  const int32_t read = a.seqs.read_slots[seq];
  if (read < 0) {
    std::fill_n(z, a.key_dim, 0.0f);
  } else {
    std::memcpy(z,
                a.key_sum_state + read * a.state_stride + static_cast<int64_t>(group) * a.key_dim,
                sizeof(float) * a.key_dim);
  }
}

inline void EndKeySum(const LinearAttentionArgs& a, int seq, int group, const float* z) {
  const int32_t write = a.seqs.write_slots[seq];
  if (write < 0) return;
  std::memcpy(a.key_sum_state + write * a.state_stride + static_cast<int64_t>(group) * a.key_dim, z,
              sizeof(float) * a.key_dim);
}

}  // namespace gla
