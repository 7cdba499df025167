// Every kernel of the project: one Args struct and one function each, the same for both backends.
//
// Conventions. T rows (tokens of all sequences, packed), N sequences, R rows of logits, H query
// heads, G key/value heads (H % G == 0; query head h reads key/value head h / (H / G)), K key
// dimension, V value dimension, D hidden size. All pointers are device memory. `*_stride` is the
// distance between rows in elements; rows are contiguous inside. "act" is the activation type given
// by `dtype` (float32 or bfloat16; the linear-attention operators also float16); arithmetic and
// accumulation are float32 always. Optional inputs are null when absent, and that is a path of its
// own, never a tensor of zeros. A call with zero rows does nothing. Arguments are trusted: they are
// checked once, where the model is built or in attention.h; a violated REQUIRES aborts with file
// and line.
//
// Batch invariance: the value computed for a row depends only on that row's inputs (and, for the
// recurrence, on its sequence), never on how many other rows are in the call nor on where it
// stands. Every backend chooses its tiles and reduction orders so; tests/kernels checks bit for
// bit.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/device.h"

namespace gla {

// ---- Dense products -----------------------------------------------------------------------------

// One [rows, cols] block of a weight in host memory, row-major, as checkpoints store it.
struct HostMatrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rows = 0;
  int cols = 0;
};

// A dense weight [out, in] in device memory, in the layout this backend's products want.
class PackedWeight {
 public:
  // Stacks `blocks` (same `cols`) along the rows and stores them as `dtype` (float32 or bfloat16).
  // ok() is false when device memory is exhausted.
  PackedWeight() = default;
  PackedWeight(Device& device, const std::vector<HostMatrix>& blocks, DType dtype);
  bool ok() const { return buffer_.ok(); }
  int out() const { return out_; }
  int in() const { return in_; }
  DType dtype() const { return dtype_; }
  size_t bytes() const { return buffer_.bytes(); }
  const void* data() const { return buffer_.data(); }

 private:
  DeviceBuffer buffer_;
  int out_ = 0;
  int in_ = 0;
  DType dtype_ = DType::kFloat32;
};

// y = x W^T (+ bias) (+ y when `accumulate`).
struct MatmulArgs {
  const void* x;                // [rows, in] act (`x_dtype`)
  const PackedWeight* weight;   // [out, in]
  const float* bias = nullptr;  // [out]
  void* y;                      // [rows, out] `y_dtype`
  int rows;
  int64_t x_stride;
  int64_t y_stride;
  DType x_dtype;            // CUDA: the weight's own type
  DType y_dtype;            // float32, or `x_dtype`
  bool accumulate = false;  // y_dtype must be float32
};
void Matmul(Device& device, const MatmulArgs& args);

// ---- Rows ---------------------------------------------------------------------------------------

// y[t] = table[tokens[t]]
struct EmbedArgs {
  const int32_t* tokens;  // [T], each in [0, vocab)
  const void* table;      // [vocab, D] row-major `table_dtype`
  float* y;               // [T, D]
  int rows, dim;
  DType table_dtype;
};
void Embed(Device& device, const EmbedArgs& args);

// In place: tokens[t] = max(sampled[~tokens[t]], 0) where it is below 0. So a step can be queued
// before the host knows what the step before it sampled.
struct ResolveTokensArgs {
  int32_t* tokens;         // [T]
  const int32_t* sampled;  // one below 0 (a row that was not finite) gives token 0
  int rows;
};
void ResolveTokens(Device& device, const ResolveTokensArgs& args);

// y = x / sqrt(mean(x^2) + eps) * weight, times gate * sigmoid(gate) when a gate is given.
// (RMSNorm, Zhang & Sennrich 2019; the gated form is fla's FusedRMSNormGated with swish.)
// Rows may be grouped: row r of the [rows * groups, dim] view is group r % groups of row r /
// groups, at x + (r / groups) * x_stride + (r % groups) * dim. Per-head norms use groups = H, dim =
// V.
struct RmsNormArgs {
  const void* x;                  // [rows, groups, dim] `x_dtype`
  const float* weight = nullptr;  // [dim]; null: no learned scale
  const void* gate = nullptr;     // [rows, groups, dim] `y_dtype`; null: no gate
  void* y;                        // [rows, groups, dim] `y_dtype`
  int rows, groups, dim;
  int64_t x_stride, gate_stride = 0, y_stride;
  float eps;
  bool normalize = true;  // false: y = x (* swish(gate)); fla's output_norm = identity
  DType x_dtype, y_dtype;
};
void RmsNorm(Device& device, const RmsNormArgs& args);

// y = gate * sigmoid(gate) * up
struct SwiGluArgs {
  const void* gate;  // [rows, dim] act
  const void* up;    // [rows, dim] act
  void* y;           // [rows, dim] act
  int rows, dim;
  int64_t gate_stride, up_stride, y_stride;
  DType dtype;
};
void SwiGlu(Device& device, const SwiGluArgs& args);

// y = max(log(sigmoid(x + bias)) / normalizer, clamp_min): the log decay of GLA, <= 0.
struct LogSigmoidGateArgs {
  const float* x;               // [rows, dim]
  const float* bias = nullptr;  // [dim]
  float* y;                     // [rows, dim]; may be `x`
  int rows, dim;
  float normalizer;
  const float* clamp_min = nullptr;  // HOST pointer to one value; null: no clamp
};
void LogSigmoidGate(Device& device, const LogSigmoidGateArgs& args);

// y = max(log(sigmoid(x W^T + bias)) / normalizer, clamp_min): the same of a projection.
struct GateProjectionArgs {
  const void* x;                // [rows, in] act (`x_dtype`)
  const PackedWeight* weight;   // [out, in]
  const float* bias = nullptr;  // [out]
  float* y;                     // [rows, out]
  int rows;
  int64_t x_stride;
  DType x_dtype;  // CUDA: the weight's own type
  float normalizer;
  const float* clamp_min = nullptr;  // HOST pointer to one value; null: no clamp
};
void GateProjection(Device& device, const GateProjectionArgs& args);

// Element-wise part of a feature map on heads (linear layers inside a map are Matmul calls).
enum class FeatureMap : uint8_t {
  kIdentity,
  kRelu,  // max(x, 0)
  kElu,   // elu(x) + 1
  kSilu,  // x sigmoid(x)
  kSigmoid,
  kSquaredRelu,
  kGelu,      // tanh approximation, as fla's fast_gelu
  kProduct,   // x * x2 (elementwise_product: the two linear layers' outputs)
  kSoftmax2,  // softmax over [2x, -2x], out_dim = 2 dim (hedgehog, after its linear layer)
  kDpfp,      // relu[x, -x] times its rolls by 1..4, out_dim = 8 dim
};
struct FeatureMapArgs {
  FeatureMap map;
  const void* x;             // [rows, heads, dim] act
  const void* x2 = nullptr;  // kProduct only: same shape and stride as x
  void* y;                   // [rows, heads, out_dim] act; may be `x` when out_dim == dim
  int rows, heads, dim;
  int out_dim;  // dim, 2 dim (kSoftmax2) or 8 dim (kDpfp)
  int64_t x_stride, y_stride;
  bool normalize = false;  // y /= sum(y) + 1e-4 over each head (fla: norm_q, norm_k)
  DType dtype;
};
void ApplyFeatureMap(Device& device, const FeatureMapArgs& args);

// Rotary position embedding in place, halves paired (i, i + K/2), base 10000 (RoFormer; fla's
// RotaryEmbedding, interleaved = false). Row t is at position positions[t]. `inverse` turns back:
// the gradient of a rotation is the rotation by the opposite angles.
struct RotaryArgs {
  void* x;                   // [rows, heads, dim] act
  const int64_t* positions;  // [rows]
  int rows, heads, dim;
  int64_t x_stride;
  float base = 10000.0f;
  // Round each base^(-2 i / K) to bfloat16: what fla computes after a model was cast to bfloat16
  // and back to float32 (the cast rounds its table too).
  bool bfloat16_frequencies = false;
  bool inverse = false;
  DType dtype;
};
void Rotary(Device& device, const RotaryArgs& args);

// ---- Sequences and their states -----------------------------------------------------------------

// Which rows are which sequence's, and where its state rests. Sequence n owns rows
// [cu_seqlens[n], cu_seqlens[n + 1]); empty sequences are allowed (their state is still carried
// from the read slot to the write slot). read_slots[n]: the slot whose state it starts from; -1:
// starts from zero and no memory is read. write_slots[n]: the slot that receives its final state
// (may equal the read slot: in place);
//   -1: the final state is dropped.
// REQUIRES: write slots that are not -1 are distinct, and no write slot is another sequence's read
// slot.
struct Sequences {
  const int32_t* cu_seqlens;   // [N + 1]
  const int32_t* read_slots;   // [N]
  const int32_t* write_slots;  // [N]
  int num_seqs;
  int num_rows;  // cu_seqlens[N], or more: then the rows behind belong to no sequence
  int max_len;   // longest sequence in this call, or more
};

// How a recurrent state rests in its slot.
//   kFloat32  [heads, K, V] float32
//   kInt16    [heads, K, V] integers plus 2^15 in 16 bits, and behind it (from the next multiple of
//             16 bytes) [heads, ceil(V / 64), K] float32 scales, one for 64 neighbours along V:
//               value = integer * scale, scale = m / 32767, integer = round(value * (32767 / m)),
//             m the largest absolute value of the 64, each step in float32, ties to even. m below
//             2^-100: the scale is 0, hence all 64. A value that is not finite makes it NaN.
//             PackStates() does just this. DecodeKernels::Attention() may round the scale, the
//             quotient and the product otherwise: a value rests within 0.52 of its scale, and where
//             the scale is 0 or NaN the integers mean nothing.
enum class StateFormat : uint8_t { kFloat32, kInt16 };
constexpr int kStateTile = 64;      // neighbours that share a scale
constexpr int kInt16Zero = 0x8000;  // what is added to an integer of kInt16
// Bytes from a state to its scales.
constexpr int64_t Int16ScalesAt(int heads, int key_dim, int value_dim) {
  return (int64_t{2} * heads * key_dim * value_dim + 15) / 16 * 16;
}
// Bytes of one state, without padding behind it.
constexpr int64_t StateBytes(StateFormat format, int heads, int key_dim, int value_dim) {
  const int64_t rows = int64_t{heads} * key_dim;
  if (format == StateFormat::kFloat32) return 4 * rows * value_dim;
  return Int16ScalesAt(heads, key_dim, value_dim) +
         4 * rows * ((value_dim + kStateTile - 1) / kStateTile);
}

// states[n] = the state in slots[n] (-1: zero), for the kernels that compute on float32.
struct UnpackStatesArgs {
  const void* slots_begin;  // first slot's state; 16-byte aligned
  int64_t slot_stride;      // BYTES between slots; a multiple of 16
  const int32_t* slots;     // [N]
  float* states;            // [N, heads, K, V]
  int num_states, heads, key_dim, value_dim;
  StateFormat format;
};
void UnpackStates(Device& device, const UnpackStatesArgs& args);

// The state in slots[n] (-1: none) = states[n].
struct PackStatesArgs {
  const float* states;   // [N, heads, K, V]
  void* slots_begin;     // as in UnpackStatesArgs
  int64_t slot_stride;   // BYTES
  const int32_t* slots;  // [N], distinct where not -1
  int num_states, heads, key_dim, value_dim;
  StateFormat format;
};
void PackStates(Device& device, const PackStatesArgs& args);

// Causal depthwise convolution of width W over each sequence, then SiLU when `silu`:
// y[t, c] = silu(sum_w weight[c, w] x[t - (W - 1) + w, c] (+ bias[c])).
// The state of a slot is the last W - 1 inputs, oldest first, [W - 1, C] float32 at
// state + slot * state_stride.
struct ShortConvArgs {
  const void* x;                // [rows, C] act
  const float* weight;          // [C, W]
  const float* bias = nullptr;  // [C]
  void* y;                      // [rows, C] act; not `x`
  float* state;                 // first slot's, [W - 1, C]
  int64_t state_stride;         // floats between slots
  Sequences seqs;
  int channels, width;  // width in [1, 8]
  int64_t x_stride, y_stride;
  bool silu = true;
  DType dtype;
};
void ShortConv(Device& device, const ShortConvArgs& args);

enum class GateKind : uint8_t {
  kNone,      // linear attention, no decay; `gate` is null
  kConstant,  // [H] log decay per head, the same at every step (retention); G == H
  kScalar,    // [rows, G] log decay per head and step (simple GLA)
  kPerKey,    // [rows, G, K] log decay per key dimension and step (GLA)
};

// The recurrence of the family, for every sequence n and query head h of group g:
//   S_t = diag(exp(gate_t)) S_{t-1} + k_t^T v_t        S: [K, V], one per key/value head
//   o_t = scale q_t S_t
// With kConstant and G < H (grouped heads of RetNet) the decay differs per query head, so there the
// state is kept per query head: state [H, K, V]; `state_heads` says which.
// With `key_sum_state` (linear attention, normalize): z_t = z_{t-1} + k_t and
//   o_t = scale q_t S_t / (scale q_t . z_t + 1e-10)                    (fla:
//   normalize_with_z_state)
// Sources: Yang et al. 2023 (GLA, arXiv 2312.06635), Sun et al. 2023 (RetNet, arXiv 2307.08621).
struct LinearAttentionArgs {
  const void* q;  // [rows, H, K] act
  const void* k;  // [rows, G, K] act
  const void* v;  // [rows, G, V] act
  GateKind gate_kind = GateKind::kNone;
  const void* gate = nullptr;          // see GateKind; log decay, <= 0
  DType gate_dtype = DType::kFloat32;  // float32, or `dtype`
  void* o;                             // [rows, H, V] act
  float* state;                        // first slot's, [state_heads, K, V], V contiguous
  float* key_sum_state = nullptr;      // first slot's, [G, K]; null: not normalized
  int64_t state_stride;                // floats between slots, for both
  Sequences seqs;
  int num_heads, num_kv_heads, key_dim, value_dim;  // H, G, K, V
  int state_heads;                                  // G, or H (see above)
  int64_t q_stride, k_stride, v_stride, o_stride;
  int64_t gate_stride = 0;  // kScalar, kPerKey
  float scale;
  DType dtype;
  // ChunkLinearAttention: device memory of ChunkLinearAttentionBytes(), 256-byte aligned; null: a
  // slower way that needs none.
  void* workspace = nullptr;
};
// Token by token: the bits of o_t and S_t depend only on the sequence's own inputs and starting
// state, not on how it is cut into calls.
void RecurrentLinearAttention(Device& device, const LinearAttentionArgs& args);
// In tiles of tokens (CUDA 64, fla's chunk_size; CPU 16) counted from each sequence's first row;
// equal to the recurrent form up to rounding. Not with `key_sum_state`.
void ChunkLinearAttention(Device& device, const LinearAttentionArgs& args);
// Bytes of workspace with which ChunkLinearAttention is fastest; 0: it has no use for any. The
// pointers must be aligned as the call's own; more rows, sequences and a longer sequence than the
// call's are allowed.
size_t ChunkLinearAttentionBytes(Device& device, const LinearAttentionArgs& args);

enum class AttentionForm : uint8_t { kRecurrent, kChunkwise };

// The gradients of sum(o * d_o) + sum(S_T * d_final_state), o and S as LinearAttentionArgs defines
// them (not normalized), with S_0 = initial_state. With dS_t the gradient with respect to S_t:
//   dS_t = exp(gate_{t+1}) dS_{t+1} + scale q_t^T do_t           dS_T: d_final_state + the last
//   term dq_t = scale S_t do_t    dk_t = dS_t v_t    dv_t = k_t dS_t  dS_0 = exp(gate_1) dS_1
//   dgate_t = sum over V of exp(gate_t) S_{t-1} * dS_t           (summed over K too when scalar)
// With G < H the results of a key/value head are the sums over its query heads; with a state per
// query head (kConstant) so is its share of dk and dv.
// Tensors are contiguous. Absent inputs and results are null: a path of their own.
struct LinearAttentionBackwardArgs {
  const void* q;  // [T, H, K] act
  const void* k;  // [T, G, K] act
  const void* v;  // [T, G, V] act
  GateKind gate_kind = GateKind::kNone;
  const void* gate = nullptr;            // see GateKind: [H], [T, G] or [T, G, K]
  DType gate_dtype = DType::kFloat32;    // float32, or `dtype`
  const float* initial_state = nullptr;  // [N, state_heads, K, V]; null: zero
  const void* d_o = nullptr;             // [T, H, V] act; null: zero
  const float* d_final_state = nullptr;  // [N, state_heads, K, V]; null: zero
  void* dq;                              // [T, H, K] act
  void* dk;                              // [T, G, K] act
  void* dv;                              // [T, G, V] act
  void* d_gate = nullptr;                // as `gate`; null exactly with kNone and kConstant
  float* d_initial_state = nullptr;      // [N, state_heads, K, V]; null: not wanted
  const int32_t* cu_seqlens;             // [N + 1]
  int num_seqs, num_rows, max_len;       // N, T, the longest sequence
  int num_heads, num_kv_heads, key_dim, value_dim;  // H, G, K, V
  int state_heads;                                  // G; H with kConstant
  float scale;
  DType dtype;      // float32, bfloat16 or float16
  void* workspace;  // device memory, LinearAttentionBackwardBytes(); 256-byte aligned
};
// Bytes of `workspace` for this call. The pointers must be the call's own: which are null and how
// they are aligned decides.
size_t LinearAttentionBackwardBytes(Device& device, const LinearAttentionBackwardArgs& args,
                                    AttentionForm form);
void RecurrentLinearAttentionBackward(Device& device, const LinearAttentionBackwardArgs& args);
void ChunkLinearAttentionBackward(Device& device, const LinearAttentionBackwardArgs& args);

// ---- Around the recurrence, for the operators (attention.h) -------------------------------------

// y[r, c] = x[r, c] in y's type, for columns that may be part of wider rows.
struct CopyColumnsArgs {
  const void* x = nullptr;  // [rows, cols] `x_dtype`; null: `value` everywhere
  float value = 0;
  void* y;  // [rows, cols] `y_dtype`; not `x`
  int64_t rows, cols;
  int64_t x_stride = 0, y_stride;
  DType x_dtype = DType::kFloat32, y_dtype = DType::kFloat32;  // any
};
void CopyColumns(Device& device, const CopyColumnsArgs& args);

// The gradient through o = n / d, d including the 1e-10 of LinearAttentionArgs: a row of `sums`
// comes as [n, d - 1e-10] and leaves as [d_o / d, -(d_o . o) / d].
struct QuotientGradientArgs {
  const void* d_o;  // [rows, dim] `dtype`, contiguous
  float* sums;      // [rows, dim + 1], contiguous
  int64_t rows;
  int dim;
  DType dtype;
};
void QuotientGradient(Device& device, const QuotientGradientArgs& args);

// ---- Gradients of rows --------------------------------------------------------------------------

// The gradients of sum(y * dy) with respect to a kernel's inputs, weights excepted. Names are those
// of the forward kernel; what it computes on the way is computed again, from its inputs. Two need
// no kernel of their own: a product's input gradient dx = dy W is the Matmul with the weight packed
// transposed, and a rotation's is Rotary with `inverse`.

// With r = 1 / sqrt(mean(x^2) + eps) and u = dy * weight * gate * sigmoid(gate):
//   dx = r u - r^3 x mean(x u)                                   not `normalize`: dx = u
//   dgate = dy * x r weight * sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
struct RmsNormBackwardArgs {
  const void* x;                  // [rows, groups, dim] `x_dtype`
  const float* weight = nullptr;  // [dim]; null: no learned scale
  const void* gate = nullptr;     // [rows, groups, dim] `y_dtype`; null: no gate
  const void* dy;                 // [rows, groups, dim] `y_dtype`
  void* dx;                       // [rows, groups, dim] `x_dtype`
  void* dgate = nullptr;          // [rows, groups, dim] `y_dtype`; null exactly when `gate` is
  int rows, groups, dim;
  int64_t x_stride, gate_stride = 0, dy_stride, dx_stride, dgate_stride = 0;
  float eps;
  bool normalize = true;
  DType x_dtype, y_dtype;
};
void RmsNormBackward(Device& device, const RmsNormBackwardArgs& args);

// From the gate itself, since sigmoid(x + bias) = exp(normalizer y):
//   dx = dy (1 - exp(normalizer y)) / normalizer                 0 where y is clamp_min
struct LogSigmoidGateBackwardArgs {
  const float* y;   // [rows, dim] the forward's result
  const float* dy;  // [rows, dim]
  void* dx;         // [rows, dim] `dx_dtype`; may be `dy` when float32
  int rows, dim;
  float normalizer;
  const float* clamp_min = nullptr;  // HOST pointer to one value; null: no clamp
  DType dx_dtype;
};
void LogSigmoidGateBackward(Device& device, const LogSigmoidGateBackwardArgs& args);

// dx = J^T dy of the map on each head (0 where a relu's input is 0). With `normalize`, y = m / D,
// D = sum(m) + 1e-4 of the bare map m:  dm = (dy - sum(dy y)) / D, and J is the bare map's.
struct FeatureMapBackwardArgs {
  FeatureMap map;
  const void* x;             // [rows, heads, dim] act
  const void* x2 = nullptr;  // kProduct only: same shape and stride as x
  const void* dy;            // [rows, heads, out_dim] act
  void* dx;                  // [rows, heads, dim] act
  void* dx2 = nullptr;       // kProduct only: same shape and stride as dx
  int rows, heads, dim;
  int out_dim;  // dim, 2 dim (kSoftmax2) or 8 dim (kDpfp)
  int64_t x_stride, dy_stride, dx_stride;
  bool normalize = false;
  DType dtype;
};
void FeatureMapBackward(Device& device, const FeatureMapBackwardArgs& args);

// With p[t] what the convolution gives before silu, dp[t] = dy[t] silu'(p[t]), and the inputs of a
// sequence counted from -(W - 1), where those of the initial state begin:
//   dx[s, c] = sum_w weight[c, w] dp[s + (W - 1) - w, c]
//              + d_final_state[s - (len - (W - 1)), c]           for the last W - 1 inputs
// States are [N, W - 1, C], contiguous. A short sequence passes d_final_state on to its initial
// one.
struct ShortConvBackwardArgs {
  const void* x;                         // [rows, C] act
  const float* weight;                   // [C, W]
  const float* bias = nullptr;           // [C]
  const float* initial_state = nullptr;  // null: zero
  const void* dy;                        // [rows, C] act
  const float* d_final_state = nullptr;  // null: zero
  void* dx;                              // [rows, C] act; neither `x` nor `dy`
  float* d_initial_state = nullptr;      // null: not wanted
  const int32_t* cu_seqlens;             // [N + 1]
  int num_seqs, num_rows;                // N, cu_seqlens[N]
  int channels, width;                   // width in [1, 8]
  int64_t x_stride, dy_stride, dx_stride;
  bool silu = true;
  DType dtype;
};
void ShortConvBackward(Device& device, const ShortConvBackwardArgs& args);

// ---- From logits to tokens ----------------------------------------------------------------------

// Sampling of one row. Applied in this order (as vLLM does): logit bias; repetition, then presence
// and frequency penalties; temperature; top-k; top-p; min-p; draw. Both backends implement exactly:
//   l_i    the logit; of an adjusted token: + bias; then, when seen, / repetition_penalty if
//   positive,
//          else * repetition_penalty; then - frequency_penalty * generated_count, and
//          - presence_penalty when generated_count > 0.
//          The row is invalid (token -1) when an l_i is NaN or +inf, or all are -inf.
//   order  likelier = larger l_i, on a tie the lower id. Greedy takes the likeliest.
//   e_i    exp((l_i - max l) / temperature), float32; the likeliest has e = 1.
//   top-k  keeps the k likeliest.
//   top-p  of those, the shortest run of likeliest tokens whose sum of e is >= top_p times the sum
//   of
//          those; the token that reaches it is kept, and the likeliest always.
//   min-p  of those, the tokens with e_i >= min_p.
//   draw   u in [0, 1): word 0 of Philox4x32-10 (Salmon et al. 2011), 10 rounds, with key words
//          (low, high) of `seed` and counter words (low, high) of `counter`, 0, 0; times 2^-32. The
//          token is the first, in the order of ids, at which the running sum of the kept e_i is
//          > u * (sum of the kept e_i); the last kept one with e > 0 should rounding leave none.
struct SampleRow {
  float temperature = 0;         // 0: greedy (the largest logit, lowest id on a tie)
  int32_t top_k = 0;             // 0: off
  float top_p = 1;               // 1: off
  float min_p = 0;               // 0: off
  float repetition_penalty = 1;  // logits of seen tokens: > 0 divided, < 0 multiplied; 1: off
  float presence_penalty = 0;    // subtracted once from tokens generated so far
  float frequency_penalty = 0;   // subtracted per time a token was generated so far
  uint64_t seed = 0;             // Philox4x32-10 key
  uint64_t counter = 0;          // Philox counter: the index of the token in its generation
};
// A token whose logit is changed in one row.
struct TokenAdjustment {
  int32_t token;
  int32_t generated_count;  // times generated in this request; presence and frequency penalties
  int32_t seen;             // 1: in prompt or generated: repetition penalty applies
  float bias;               // added first
};
struct SampleArgs {
  const float* logits;                 // [R, vocab]; not changed
  const SampleRow* rows;               // [R]
  const TokenAdjustment* adjustments;  // all rows' one after another, distinct tokens in each row
  const int32_t* adjustment_offsets;   // [R + 1]
  float* scratch;                      // [R, vocab]
  int32_t* tokens;                     // [R] out; -1 when a logit of the row is NaN or +inf, or all
                                       // are -inf
  int num_rows, vocab;
};
void Sample(Device& device, const SampleArgs& args);

// log_softmax of the unchanged logits at `targets`, and the `top_n` likeliest tokens (by logit,
// lowest id first on a tie).
struct LogprobArgs {
  const float* logits;            // [R, vocab]
  const int32_t* targets;         // [R]; -1: no target, logprob is 0
  float* logprobs;                // [R] out, nats
  int32_t* top_tokens = nullptr;  // [R, top_n] out
  float* top_logprobs = nullptr;  // [R, top_n] out
  int num_rows, vocab;
  int top_n = 0;  // 0 .. 20
};
void Logprobs(Device& device, const LogprobArgs& args);

// out[r] = x[rows[r]]: the rows whose logits are wanted.
struct GatherRowsArgs {
  const float* x;       // [T, D]
  const int32_t* rows;  // [R]
  float* y;             // [R, D]
  int num_rows, dim;
};
void GatherRows(Device& device, const GatherRowsArgs& args);

// finite[t] = 1 when every value of row t is finite, else 0.
struct FiniteRowsArgs {
  const float* x;   // [rows, D]
  int32_t* finite;  // [rows]
  int rows, dim;
};
void FiniteRows(Device& device, const FiniteRowsArgs& args);

}  // namespace gla
