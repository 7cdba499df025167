// libgla_ops_<backend>.so: the linear-attention operators behind a C interface, for the scripts in
// this folder (ctypes). tests/bench/gla_ops.py declares the same structs in the same order.
//
// Pointers are memory of the device (the host's own with the CPU backend) and belong to the caller.
// Calls queue work on the device's own stream; gla_ops_synchronize() waits for it. What the caller
// queued elsewhere must be done before.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#include "kernels/kernels.h"
#include "tests/bench/timing.h"

#define GLA_OPS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// The fields of gla::LinearAttentionArgs; rows are contiguous in both directions.
struct Forward {
  const void *q, *k, *v, *gate;
  void* o;
  float *state, *key_sum_state;
  const int32_t *cu_seqlens, *read_slots, *write_slots;
  void* workspace;
  int64_t state_stride;
  int32_t num_seqs, num_rows, max_len;
  int32_t num_heads, num_kv_heads, key_dim, value_dim, state_heads;
  int32_t gate_kind, gate_dtype, dtype;
  float scale;
};

// The fields of gla::LinearAttentionBackwardArgs.
struct Backward {
  const void *q, *k, *v, *gate;
  const float* initial_state;
  const void* d_o;
  const float* d_final_state;
  void *dq, *dk, *dv, *d_gate;
  float* d_initial_state;
  const int32_t* cu_seqlens;
  void* workspace;
  int32_t num_seqs, num_rows, max_len;
  int32_t num_heads, num_kv_heads, key_dim, value_dim, state_heads;
  int32_t gate_kind, gate_dtype, dtype;
  float scale;
};

gla::LinearAttentionArgs ArgsOf(const Forward& f) {
  const int64_t heads = f.num_heads, kv_heads = f.num_kv_heads;
  const auto kind = static_cast<gla::GateKind>(f.gate_kind);
  const int64_t gate_stride = kind == gla::GateKind::kScalar   ? kv_heads
                              : kind == gla::GateKind::kPerKey ? kv_heads * f.key_dim
                                                               : 0;
  gla::LinearAttentionArgs args{.q = f.q,
                                .k = f.k,
                                .v = f.v,
                                .gate_kind = kind,
                                .gate = f.gate,
                                .gate_dtype = static_cast<gla::DType>(f.gate_dtype),
                                .o = f.o,
                                .state = f.state,
                                .key_sum_state = f.key_sum_state,
                                .state_stride = f.state_stride,
                                .seqs = {.cu_seqlens = f.cu_seqlens,
                                         .read_slots = f.read_slots,
                                         .write_slots = f.write_slots,
                                         .num_seqs = f.num_seqs,
                                         .num_rows = f.num_rows,
                                         .max_len = f.max_len},
                                .num_heads = f.num_heads,
                                .num_kv_heads = f.num_kv_heads,
                                .key_dim = f.key_dim,
                                .value_dim = f.value_dim,
                                .state_heads = f.state_heads,
                                .q_stride = heads * f.key_dim,
                                .k_stride = kv_heads * f.key_dim,
                                .v_stride = kv_heads * f.value_dim,
                                .o_stride = heads * f.value_dim,
                                .gate_stride = gate_stride,
                                .scale = f.scale,
                                .dtype = static_cast<gla::DType>(f.dtype)};
  args.workspace = f.workspace;
  return args;
}

gla::LinearAttentionBackwardArgs ArgsOf(const Backward& b) {
  return {.q = b.q,
          .k = b.k,
          .v = b.v,
          .gate_kind = static_cast<gla::GateKind>(b.gate_kind),
          .gate = b.gate,
          .gate_dtype = static_cast<gla::DType>(b.gate_dtype),
          .initial_state = b.initial_state,
          .d_o = b.d_o,
          .d_final_state = b.d_final_state,
          .dq = b.dq,
          .dk = b.dk,
          .dv = b.dv,
          .d_gate = b.d_gate,
          .d_initial_state = b.d_initial_state,
          .cu_seqlens = b.cu_seqlens,
          .num_seqs = b.num_seqs,
          .num_rows = b.num_rows,
          .max_len = b.max_len,
          .num_heads = b.num_heads,
          .num_kv_heads = b.num_kv_heads,
          .key_dim = b.key_dim,
          .value_dim = b.value_dim,
          .state_heads = b.state_heads,
          .scale = b.scale,
          .dtype = static_cast<gla::DType>(b.dtype),
          .workspace = b.workspace};
}

void Run(gla::Device& device, const Forward& forward, gla::AttentionForm form) {
  const gla::LinearAttentionArgs args = ArgsOf(forward);
  if (form == gla::AttentionForm::kRecurrent) {
    gla::RecurrentLinearAttention(device, args);
  } else {
    gla::ChunkLinearAttention(device, args);
  }
}

void Run(gla::Device& device, const Backward& backward, gla::AttentionForm form) {
  const gla::LinearAttentionBackwardArgs args = ArgsOf(backward);
  if (form == gla::AttentionForm::kRecurrent) {
    gla::RecurrentLinearAttentionBackward(device, args);
  } else {
    gla::ChunkLinearAttentionBackward(device, args);
  }
}

}  // namespace

// The device, or null and the reason in `error`.
GLA_OPS_EXPORT gla::Device* gla_ops_open(int ordinal, int num_threads, char* error,
                                         size_t error_bytes) {
  std::string reason;
  auto device = gla::Device::Open({.ordinal = ordinal, .num_threads = num_threads}, &reason);
  if (device == nullptr && error_bytes > 0) {
    const size_t n = std::min(reason.size(), error_bytes - 1);
    std::memcpy(error, reason.data(), n);
    error[n] = '\0';
  }
  return device.release();
}

// Sizes of the structs, for the caller to compare with its own declaration.
GLA_OPS_EXPORT int gla_ops_forward_struct_bytes() { return sizeof(Forward); }
GLA_OPS_EXPORT int gla_ops_backward_struct_bytes() { return sizeof(Backward); }

GLA_OPS_EXPORT void gla_ops_close(gla::Device* device) { delete device; }

GLA_OPS_EXPORT const char* gla_ops_backend() { return gla::Device::backend(); }

GLA_OPS_EXPORT const char* gla_ops_device_name(gla::Device* device) {
  return device->name().c_str();
}

// Bytes of device memory that anybody uses now.
GLA_OPS_EXPORT uint64_t gla_ops_memory_in_use(gla::Device* device) {
  return device->memory_total() - device->memory_free();
}

GLA_OPS_EXPORT void gla_ops_synchronize(gla::Device* device) { device->Synchronize(); }

// `form`: 0 recurrent, 1 chunkwise, as gla::AttentionForm.
GLA_OPS_EXPORT void gla_ops_forward(gla::Device* device, const Forward* forward, int form) {
  Run(*device, *forward, static_cast<gla::AttentionForm>(form));
}

// Bytes of workspace for calls with these pointers.
GLA_OPS_EXPORT uint64_t gla_ops_forward_bytes(gla::Device* device, const Forward* forward,
                                              int form) {
  if (static_cast<gla::AttentionForm>(form) == gla::AttentionForm::kRecurrent) return 0;
  return gla::ChunkLinearAttentionBytes(*device, ArgsOf(*forward));
}
GLA_OPS_EXPORT uint64_t gla_ops_backward_bytes(gla::Device* device, const Backward* backward,
                                               int form) {
  return gla::LinearAttentionBackwardBytes(*device, ArgsOf(*backward),
                                           static_cast<gla::AttentionForm>(form));
}

GLA_OPS_EXPORT void gla_ops_backward(gla::Device* device, const Backward* backward, int form) {
  Run(*device, *backward, static_cast<gla::AttentionForm>(form));
}

// Milliseconds of each of `repeats` runs of forward, backward, or one after the other (null: that
// one is left out) into `milliseconds`. `replay`: captured once and replayed; returns -1 where the
// backend cannot, else 0.
GLA_OPS_EXPORT int gla_ops_time(gla::Device* device, const Forward* forward, int forward_form,
                                const Backward* backward, int backward_form, int repeats,
                                int replay, double* milliseconds) {
  if (replay != 0 && !gla::bench::HasReplay()) return -1;
  const auto work = [&] {
    if (forward != nullptr) gla_ops_forward(device, forward, forward_form);
    if (backward != nullptr) gla_ops_backward(device, backward, backward_form);
  };
  const auto times = gla::bench::Time(*device, work, repeats, replay != 0);
  std::copy(times.begin(), times.end(), milliseconds);
  return 0;
}
