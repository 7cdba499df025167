// The kernels of a decode step: one token for each of many sequences, bfloat16, few launches.
//
// A step of one token is bound by launches and by the bytes of weights and states, so these kernels
// fuse what kernels.h keeps apart, and each starts to fetch its weights or states while the one
// before still runs. Only the CUDA backend has them: on a CPU a launch costs nothing.
//
// The residual stream travels as three things, so that no kernel is needed for a norm alone:
//   residual [rows, D] float32
//   x        [rows, D] bfloat16: residual * weight of the norm that comes next
//   squares  [rows, D / 16] float32: sums of residual^2 over 16 neighbours
// The product that reads x multiplies its sums by 1 / sqrt(sum(squares) / D + eps).
//
// A step begins with the embedding. After it products and attention may run ahead of each other as
// far as they read what no kernel of the step writes: weights, slots, and of states what one call
// of attention alone touches. Products that others follow are marked (`next_is_other`).
//
// Batch invariance holds as in kernels.h: the bits of a row do not depend on `rows`.
// Pointers are device memory, aligned to 16 bytes, strides are in elements and multiples of 8.
#pragma once

#include <cstdint>

#include "kernels/device.h"
#include "kernels/kernels.h"

namespace gla {

struct DecodeEmbedArgs {
  const int32_t* tokens;  // [rows]
  const void* table;      // [vocab, D] bfloat16
  const float* norm;      // [D] weight of the first norm
  float* residual;        // [rows, D] contiguous, like the next two
  void* x;                // [rows, D] bfloat16
  float* squares;         // [rows, D / 16]
  int rows, dim;          // dim % 16 == 0
};

enum class DecodeEpilogue : uint8_t {
  kStore,     // y = product
  kSwiGlu,    // the weight is [gate; up]: y = gate * sigmoid(gate) * up
  kResidual,  // residual += product, and x and squares for the next norm
};

// product = (x W^T) * (squares == nullptr ? 1 : 1 / sqrt(sum(squares) / in + eps))
struct DecodeProductArgs {
  const void* x;  // [rows, in] bfloat16
  int64_t x_stride;
  const float* squares = nullptr;  // [rows, in / 16]
  float eps = 0;
  const PackedWeight* weight;  // [out, in] bfloat16; kSwiGlu: out counts gate and up
  DecodeEpilogue epilogue = DecodeEpilogue::kStore;
  void* y = nullptr;                 // kStore: [rows, out]; kSwiGlu: [rows, out / 2]
  DType y_dtype = DType::kBFloat16;  // kStore: or float32
  int64_t y_stride = 0;
  float* residual = nullptr;         // kResidual: [rows, out]
  const float* next_norm = nullptr;  // kResidual: [out]
  void* next_x = nullptr;            // kResidual: [rows, out] bfloat16
  float* next_squares = nullptr;     // kResidual: [rows, out / 16]
  bool next_is_other = false;        // what follows is no kernel of this header
  int rows;
};

// One token of each sequence n: the recurrence of LinearAttentionArgs (T = 1) on the state of
// read_slots[n] (-1: zero), written to write_slots[n] (-1: dropped; may be the read slot), with its
// gate before it and the norm and gate per head behind it:
//   y = o / sqrt(mean(o^2) + eps) * norm_weight, times swish(output_gate) when there is one
struct DecodeAttentionArgs {
  const void* q;  // [rows, H, K] bfloat16
  const void* k;  // [rows, G, K]
  const void* v;  // [rows, G, V]
  int64_t q_stride, k_stride, v_stride;
  GateKind gate_kind = GateKind::kNone;
  // kPerKey, as GLA makes it: gate = max(logsigmoid(gate_in W^T + gate_bias) / normalizer,
  // clamp_min), W [G * K, rank]. kConstant: `decay`. kScalar: `gate`.
  const void* gate_in = nullptr;  // [rows, rank] bfloat16
  int64_t gate_in_stride = 0;
  const PackedWeight* gate_weight = nullptr;  // [G * K, rank] bfloat16
  const float* gate_bias = nullptr;           // [G * K]
  float gate_normalizer = 1;
  const float* gate_clamp_min = nullptr;  // HOST pointer to one value; null: no clamp
  const float* decay = nullptr;           // [H] log decay
  const float* gate = nullptr;            // [rows, G] log decay
  int64_t gate_stride = 0;
  void* state;  // first slot's; see StateFormat
  StateFormat state_format = StateFormat::kFloat32;
  int64_t state_stride;       // BYTES between slots, a multiple of 256
  const int32_t* read_slots;  // [rows]
  const int32_t* write_slots;
  int num_heads, num_kv_heads, key_dim, value_dim;  // H, G, K, V
  int state_heads;                                  // G, or H with kConstant
  float scale;
  bool normalize = true;               // false: y = o (* swish(output_gate))
  const float* norm_weight = nullptr;  // [V]; null: no learned scale
  float eps = 0;
  const void* output_gate = nullptr;  // [rows, H, V] bfloat16; null: none
  int64_t output_gate_stride = 0;
  void* y;  // [rows, H, V] bfloat16; zeros in rows whose slots are both -1
  int64_t y_stride;
  int rows;
};

class DecodeKernels {
 public:
  // The backend's; null when it has none.
  static const DecodeKernels* Get();
  virtual ~DecodeKernels() = default;

  // Whether these sizes, types and kinds are served. Pointers and `rows` do not matter.
  virtual bool Serves(const DecodeProductArgs& args) const = 0;
  virtual bool Serves(const DecodeAttentionArgs& args) const = 0;

  virtual void Embed(Device& device, const DecodeEmbedArgs& args) const = 0;
  virtual void Product(Device& device, const DecodeProductArgs& args) const = 0;
  virtual void Attention(Device& device, const DecodeAttentionArgs& args) const = 0;
};

}  // namespace gla
