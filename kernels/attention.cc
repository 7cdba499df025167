// The operators: checks, memory, and one call of a kernel.
#include "kernels/attention.h"

#include <utility>

#include "kernels/attention_call.h"

namespace gla {
namespace {

GateKind KindOf(const AttentionInputs& in) {
  if (!in.gate) return GateKind::kNone;
  return in.op == AttentionOp::kSimpleGla   ? GateKind::kScalar
         : in.op == AttentionOp::kRetention ? GateKind::kConstant
                                            : GateKind::kPerKey;
}

bool IsChunkwise(const AttentionInputs& in, const Sequences& seqs) {
  return in.form.value_or(DefaultForm(in.normalize, seqs.max_len)) == AttentionForm::kChunkwise;
}

// Without a token a state ends as it begins, and so does its gradient.
void Carry(Device& device, const std::optional<Tensor>& from, std::optional<DeviceTensor>& to) {
  if (!to) return;
  if (from) {
    device.Copy(to->buffer.data(), from->data, to->buffer.bytes());
  } else {
    device.Fill(to->buffer.data(), 0, to->buffer.bytes());
  }
}

absl::Status Forward(Device& device, const AttentionInputs& in, Memory& memory,
                     AttentionResult& result) {
  const AttentionShape shape = ShapeOf(in);
  const bool reads = in.initial_state.has_value(), writes = result.final_state.has_value();
  DeviceSequences sequences(memory, in, shape);
  if (!memory.status().ok()) return memory.status();

  sequences.Upload(device, reads, writes);
  LinearAttentionArgs args = ForwardArgs(shape, in.q.dtype, ScaleOf(in, shape));
  args.q = in.q.data;
  args.k = in.k.data;
  args.v = in.v.data;
  args.o = result.o.buffer.data();
  args.seqs = sequences.view();
  args.gate_kind = KindOf(in);
  if (in.gate) {
    args.gate = in.gate->data;
    args.gate_dtype = in.gate->dtype;
    args.gate_stride = shape.num_kv_heads;
    if (in.op == AttentionOp::kGla) args.gate_stride *= shape.key_dim;
  }
  if (writes) {
    args.state = Floats(result.final_state);
    if (reads) device.Copy(args.state, in.initial_state->data, result.final_state->buffer.bytes());
  } else if (reads) {
    args.state = const_cast<float*>(Floats(in.initial_state));  // no slot is written
  }
  (IsChunkwise(in, args.seqs) ? ChunkLinearAttention : RecurrentLinearAttention)(device, args);
  return absl::OkStatus();
}

absl::Status Backward(Device& device, const AttentionInputs& in,
                      const AttentionResultGradients& gradients, Memory& memory,
                      AttentionGradients& result) {
  const AttentionShape shape = ShapeOf(in);
  DeviceSequences sequences(memory, in, shape);
  if (!memory.status().ok()) return memory.status();

  LinearAttentionBackwardArgs args =
      BackwardArgs(shape, in.q.dtype, ScaleOf(in, shape), sequences.view());
  args.q = in.q.data;
  args.k = in.k.data;
  args.v = in.v.data;
  args.gate_kind = KindOf(in);
  if (in.gate) {
    args.gate = in.gate->data;
    args.gate_dtype = in.gate->dtype;
  }
  args.initial_state = Floats(in.initial_state);
  if (gradients.d_o) args.d_o = gradients.d_o->data;
  args.d_final_state = Floats(gradients.d_final_state);
  args.dq = result.dq.buffer.data();
  args.dk = result.dk.buffer.data();
  args.dv = result.dv.buffer.data();
  if (result.d_gate) args.d_gate = result.d_gate->buffer.data();
  args.d_initial_state = Floats(result.d_initial_state);
  const bool chunkwise = IsChunkwise(in, sequences.view());
  const DeviceBuffer workspace = memory.Take(static_cast<int64_t>(LinearAttentionBackwardBytes(
      device, args, chunkwise ? AttentionForm::kChunkwise : AttentionForm::kRecurrent)));
  if (!memory.status().ok()) return memory.status();

  args.workspace = workspace.data();
  sequences.Upload(device, false, false);
  (chunkwise ? ChunkLinearAttentionBackward : RecurrentLinearAttentionBackward)(device, args);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<AttentionResult> AttentionForward(Device& device, const AttentionInputs& in,
                                                 bool want_final_state) {
  if (absl::Status status = CheckAttention(in); !status.ok()) return status;
  const AttentionShape shape = ShapeOf(in);
  const int64_t N = shape.num_seqs, S = shape.state_heads(), K = shape.key_dim;
  std::vector<int64_t> o_shape = in.q.shape;
  o_shape.back() = shape.value_dim;
  Memory memory(device, in.op);
  AttentionResult result{.o = memory.TakeTensor(o_shape, in.q.dtype)};
  if (want_final_state) {
    result.final_state = memory.TakeTensor({N, S, K, shape.value_dim}, DType::kFloat32);
    if (in.normalize) result.final_key_sum = memory.TakeTensor({N, S, K}, DType::kFloat32);
  }

  absl::Status status = memory.status();
  if (shape.num_rows == 0 && status.ok()) {
    Carry(device, in.initial_state, result.final_state);
    Carry(device, in.initial_key_sum, result.final_key_sum);
  } else if (status.ok()) {
    status = (in.normalize ? NormalizedForward : Forward)(device, in, memory, result);
  }
  if (!status.ok()) return status;
  return result;
}

absl::StatusOr<AttentionGradients> AttentionBackward(Device& device, const AttentionInputs& in,
                                                     const AttentionResultGradients& gradients) {
  if (absl::Status status = CheckAttention(in); !status.ok()) return status;
  if (absl::Status status = CheckAttentionGradients(in, gradients); !status.ok()) return status;
  Memory memory(device, in.op);
  AttentionGradients result{
      .dq = memory.TakeLike(in.q),
      .dk = memory.TakeLike(in.k),
      .dv = memory.TakeLike(in.v),
      .d_gate = in.op == AttentionOp::kRetention ? std::nullopt : memory.TakeLike(in.gate),
      .d_initial_state = memory.TakeLike(in.initial_state),
      .d_initial_key_sum = memory.TakeLike(in.initial_key_sum)};

  absl::Status status = memory.status();
  if (ShapeOf(in).num_rows == 0 && status.ok()) {
    Carry(device, gradients.d_final_state, result.d_initial_state);
    Carry(device, gradients.d_final_key_sum, result.d_initial_key_sum);
  } else if (status.ok()) {
    status = (in.normalize ? NormalizedBackward : Backward)(device, in, gradients, memory, result);
  }
  if (!status.ok()) return status;
  return result;
}

}  // namespace gla
