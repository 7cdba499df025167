// The linear-attention operators, forward and backward, with every argument checked.
//
//   S_t = diag(exp(gate_t)) S_{t-1} + k_t^T v_t      S: [K, V], one per key/value head
//   o_t = scale q_t S_t
//
// N sequences, T rows (tokens of all sequences), H query heads, G key/value heads (H % G == 0;
// query head h reads key/value head h / (H / G)), K key dimension, V value dimension. The states of
// retention with G < H are per query head, since each decays at its own rate: there S = H, else
// S = G. Sequences are packed, [T, heads, dim] with `cu_seqlens`, or batched, [B, T, heads, dim]
// with every sequence of the same length.
//
// A call that does not fit is InvalidArgument with the operator, the argument, what was expected
// and what was found ("gla: gate: expected shape [T, G, K] = [7, 2, 64] as k, found [7, 2]"); then
// nothing is allocated, launched or written. An absent optional input is a path of its own, never a
// tensor of zeros, and its gradient is absent in the result.
//
// Sources: Katharopoulos et al. 2020 (linear attention, arXiv 2006.16236), Sun et al. 2023 (RetNet,
// arXiv 2307.08621), Yang et al. 2023 (GLA, arXiv 2312.06635), Dao & Gu 2024 (scalar gates, arXiv
// 2405.21060). kernels/README.md has the maths of forward and backward.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kernels.h"

namespace gla {

// Row-major device memory that somebody else owns, and what it is said to hold.
struct Tensor {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape = {};
};

// The same, owned.
struct DeviceTensor {
  DeviceBuffer buffer = {};
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape = {};

  Tensor view() const { return {buffer.data(), dtype, shape}; }
};

enum class AttentionOp : uint8_t {
  kLinearAttention,  // no gate; optionally normalized
  kSimpleGla,        // log gate per head and step, or none
  kRetention,        // constant log decay per query head; no gradient, it is not learned
  kGla,              // log gate per key dimension and step, or none
};
const char* NameOf(AttentionOp op);  // "linear_attention", "simple_gla", "retention", "gla"

// "act" is one of float32, bfloat16, float16: the type of q, and of all that says act. No dimension
// is 0 but T: an empty sequence carries its state.
struct AttentionInputs {
  AttentionOp op = AttentionOp::kLinearAttention;
  Tensor q = {};  // [T, H, K] or [B, T, H, K] act
  Tensor k = {};  // [T, G, K] or [B, T, G, K] act
  Tensor v = {};  // [T, G, V] or [B, T, G, V] act
  // Log decay, <= 0, float32 or act. kSimpleGla: [T, G] or [B, T, G], optional. kGla: as k,
  // optional. kRetention: [H], required. kLinearAttention: must be absent.
  std::optional<Tensor> gate = {};
  std::optional<Tensor> initial_state = {};  // [N, S, K, V] float32; absent: zero
  // kLinearAttention only: o_t is divided by scale q_t . z_t + 1e-10, z_t = z_{t-1} + k_t.
  bool normalize = false;
  std::optional<Tensor> initial_key_sum = {};  // with `normalize`: z_0, [N, G, K] float32
  // Host, [N + 1], 0 = first <= ... <= last = T. Batched: empty.
  std::vector<int32_t> cu_seqlens = {};
  std::optional<float> scale = {};         // any finite number; absent: K^-0.5
  std::optional<AttentionForm> form = {};  // absent: DefaultForm(); `normalize`: recurrent only
};

// What a layer knows of its calls when it is built: the operator and the sizes, no tensors.
struct AttentionShape {
  AttentionOp op = AttentionOp::kLinearAttention;
  int64_t num_heads = 0, num_kv_heads = 0, key_dim = 0, value_dim = 0;  // H, G, K, V
  int64_t num_rows = 0, num_seqs = 1;  // T, N; of a layer: the most that one call will bring
  bool normalize = false;
  std::optional<AttentionForm> form = {};

  int64_t state_heads() const {  // S
    return op == AttentionOp::kRetention ? num_heads : num_kv_heads;
  }
};
// OK, or why no call of these sizes can be computed. The limits are the same for both backends.
absl::Status CheckAttentionShape(const AttentionShape& shape);

// OK, or why these inputs do not fit together; CheckAttentionShape() included. What both operators
// check before anything else. Looks at no device memory.
absl::Status CheckAttention(const AttentionInputs& inputs);
// REQUIRES: CheckAttention() accepts the inputs.
AttentionShape ShapeOf(const AttentionInputs& inputs);

// The form of a call that leaves the choice to the operator: recurrent when it normalizes or when
// its longest sequence has at most 64 tokens, else chunkwise. The bits of a sequence may then
// depend on the longest one of its call; who cannot have that names the form.
AttentionForm DefaultForm(bool normalize, int64_t longest_sequence);

struct AttentionResult {
  DeviceTensor o = {};                             // [T, H, V] or [B, T, H, V] act
  std::optional<DeviceTensor> final_state = {};    // [N, S, K, V] float32; present when wanted
  std::optional<DeviceTensor> final_key_sum = {};  // [N, G, K] float32; when wanted and `normalize`
};
// ResourceExhausted when the results or the workspace do not fit device memory; then nothing is
// launched. May wait for the device.
absl::StatusOr<AttentionResult> AttentionForward(Device& device, const AttentionInputs& inputs,
                                                 bool want_final_state);

// The gradients of a loss with respect to the results; at least one is present.
struct AttentionResultGradients {
  std::optional<Tensor> d_o = {};              // as o
  std::optional<Tensor> d_final_state = {};    // as final_state
  std::optional<Tensor> d_final_key_sum = {};  // as final_key_sum; with `normalize` only
};
// The gradients with respect to the inputs. What was not given has none.
struct AttentionGradients {
  DeviceTensor dq = {}, dk = {}, dv = {};              // as q, k, v
  std::optional<DeviceTensor> d_gate = {};             // as gate; never for kRetention
  std::optional<DeviceTensor> d_initial_state = {};    // as initial_state
  std::optional<DeviceTensor> d_initial_key_sum = {};  // as initial_key_sum
};
// Forward values are recomputed, so nothing of AttentionForward()'s work is needed. Errors as
// there.
absl::StatusOr<AttentionGradients> AttentionBackward(Device& device, const AttentionInputs& inputs,
                                                     const AttentionResultGradients& gradients);
// The check of `gradients` that AttentionBackward() makes after CheckAttention().
// REQUIRES: CheckAttention() accepts the inputs.
absl::Status CheckAttentionGradients(const AttentionInputs& inputs,
                                     const AttentionResultGradients& gradients);

}  // namespace gla
