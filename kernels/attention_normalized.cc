// Linear attention divided by its running key sum.
//
// Forward: the recurrent kernel keeps the key sum beside the state, at one distance for both, so
// the call works on slots [state, key sum] and the results are copied out of them.
//
// Backward: the key sum is one more column of the state, that of values that are all 1. With
// v' = [v, 1] and S' = [S, z] the plain recurrence gives o' = scale q S' = [n, d - 1e-10] and
// o = n / d, so d_o' = [d_o / d, -(d_o . o) / d], and its gradients are the gradients: the last
// column of dS'_0 is that of z_0. In float32 from end to end, since a denominator rounded to
// bfloat16 would spoil every gradient of its row.
#include "kernels/attention_call.h"

namespace gla {
namespace {

// [rows, cols] of float32 on its way into and out of wider rows.
void CopyIn(Device& device, const float* x, float* y, int64_t rows, int64_t cols,
            int64_t y_stride) {
  CopyColumns(device,
              {.x = x, .y = y, .rows = rows, .cols = cols, .x_stride = cols, .y_stride = y_stride});
}
void CopyOut(Device& device, const float* x, int64_t x_stride, float* y, int64_t rows,
             int64_t cols) {
  CopyColumns(device,
              {.x = x, .y = y, .rows = rows, .cols = cols, .x_stride = x_stride, .y_stride = cols});
}

// A contiguous tensor as float32: itself, or a copy for which memory is taken.
class Widened {
 public:
  Widened(Memory& memory, const Tensor& tensor) : tensor_(tensor) {
    if (tensor.dtype != DType::kFloat32) copy_ = memory.TakeFloats(Elements(tensor.shape));
  }
  const void* Get(Device& device) const {
    if (tensor_.dtype == DType::kFloat32) return tensor_.data;
    const int64_t count = Elements(tensor_.shape);
    CopyColumns(device, {.x = tensor_.data,
                         .y = copy_.data(),
                         .rows = 1,
                         .cols = count,
                         .x_stride = count,
                         .y_stride = count,
                         .x_dtype = tensor_.dtype});
    return copy_.data();
  }

 private:
  const Tensor& tensor_;
  DeviceBuffer copy_;
};

// A result that is computed as float32: itself, or rounded from such memory at the end.
class Narrowed {
 public:
  Narrowed(Memory& memory, DeviceTensor& tensor) : tensor_(tensor) {
    if (tensor.dtype != DType::kFloat32) wide_ = memory.TakeFloats(Elements(tensor.shape));
  }
  void* data() const { return wide_.bytes() > 0 ? wide_.data() : tensor_.buffer.data(); }
  void Finish(Device& device) const {
    if (wide_.bytes() == 0) return;
    const int64_t count = Elements(tensor_.shape);
    CopyColumns(device, {.x = wide_.data(),
                         .y = tensor_.buffer.data(),
                         .rows = 1,
                         .cols = count,
                         .x_stride = count,
                         .y_stride = count,
                         .y_dtype = tensor_.dtype});
  }

 private:
  DeviceTensor& tensor_;
  DeviceBuffer wide_;
};

// [state, key sum] in rows of V + 1, of what was given; the rest is zero. REQUIRES: one was given.
void JoinStates(Device& device, const std::optional<Tensor>& state,
                const std::optional<Tensor>& key_sum, const DeviceBuffer& joined, int64_t rows,
                int64_t value_dim) {
  CopyIn(device, Floats(state), joined.as<float>(), rows, value_dim, value_dim + 1);
  CopyIn(device, Floats(key_sum), joined.as<float>() + value_dim, rows, 1, value_dim + 1);
}

}  // namespace

absl::Status NormalizedForward(Device& device, const AttentionInputs& in, Memory& memory,
                               AttentionResult& result) {
  const AttentionShape shape = ShapeOf(in);
  const bool reads = in.initial_state || in.initial_key_sum;
  const bool writes = result.final_state.has_value();
  const int64_t keys = shape.num_kv_heads * shape.key_dim, floats = keys * shape.value_dim;
  const int64_t stride = (floats + keys + 3) / 4 * 4;              // states at 16 bytes
  const int64_t num_slots = reads || writes ? shape.num_seqs : 1;  // the kernel wants an address
  DeviceSequences sequences(memory, in, shape);
  const DeviceBuffer slots = memory.TakeFloats(num_slots * stride);
  if (!memory.status().ok()) return memory.status();

  sequences.Upload(device, reads, writes);
  LinearAttentionArgs args = ForwardArgs(shape, in.q.dtype, ScaleOf(in, shape));
  args.q = in.q.data;
  args.k = in.k.data;
  args.v = in.v.data;
  args.o = result.o.buffer.data();
  args.seqs = sequences.view();
  args.state = slots.as<float>();
  args.key_sum_state = args.state + floats;
  args.state_stride = stride;
  if (reads) {
    CopyIn(device, Floats(in.initial_state), args.state, num_slots, floats, stride);
    CopyIn(device, Floats(in.initial_key_sum), args.key_sum_state, num_slots, keys, stride);
  }
  RecurrentLinearAttention(device, args);
  if (writes) {
    CopyOut(device, args.state, stride, Floats(result.final_state), num_slots, floats);
    CopyOut(device, args.key_sum_state, stride, Floats(result.final_key_sum), num_slots, keys);
  }
  return absl::OkStatus();
}

absl::Status NormalizedBackward(Device& device, const AttentionInputs& in,
                                const AttentionResultGradients& gradients, Memory& memory,
                                AttentionGradients& result) {
  const AttentionShape shape = ShapeOf(in);
  const int64_t V = shape.value_dim, rows = shape.num_rows;
  const int64_t state_rows = shape.num_seqs * shape.num_kv_heads * shape.key_dim;
  const bool has_initial = in.initial_state || in.initial_key_sum;
  const bool has_final = gradients.d_final_state || gradients.d_final_key_sum;
  AttentionShape joined = shape;  // v', S'
  joined.value_dim = V + 1;

  DeviceSequences sequences(memory, in, shape);
  const Widened q(memory, in.q), k(memory, in.k);
  const Narrowed dq(memory, result.dq), dk(memory, result.dk);
  const DeviceBuffer v = memory.TakeFloats(rows * shape.num_kv_heads * (V + 1));
  const DeviceBuffer dv = memory.TakeFloats(rows * shape.num_kv_heads * (V + 1));
  const DeviceBuffer sums = memory.TakeFloats(gradients.d_o ? rows * shape.num_heads * (V + 1) : 0);
  const DeviceBuffer initial = memory.TakeFloats(has_initial ? state_rows * (V + 1) : 0);
  const DeviceBuffer d_initial = memory.TakeFloats(has_initial ? state_rows * (V + 1) : 0);
  const DeviceBuffer d_final = memory.TakeFloats(has_final ? state_rows * (V + 1) : 0);
  if (!memory.status().ok()) return memory.status();

  LinearAttentionBackwardArgs args =
      BackwardArgs(joined, DType::kFloat32, ScaleOf(in, shape), sequences.view());
  args.v = v.data();
  args.initial_state = initial.as<float>();
  args.d_o = sums.data();
  args.d_final_state = d_final.as<float>();
  args.dq = dq.data();
  args.dk = dk.data();
  args.dv = dv.data();
  args.d_initial_state = d_initial.as<float>();
  const DeviceBuffer workspace = memory.Take(
      static_cast<int64_t>(LinearAttentionBackwardBytes(device, args, AttentionForm::kRecurrent)));
  if (!memory.status().ok()) return memory.status();

  args.workspace = workspace.data();
  sequences.Upload(device, has_initial, false);
  args.q = q.Get(device);
  args.k = k.Get(device);
  const int64_t value_rows = rows * shape.num_kv_heads;
  CopyColumns(device, {.x = in.v.data,
                       .y = v.data(),
                       .rows = value_rows,
                       .cols = V,
                       .x_stride = V,
                       .y_stride = V + 1,
                       .x_dtype = in.v.dtype});
  CopyColumns(
      device,
      {.value = 1, .y = v.as<float>() + V, .rows = value_rows, .cols = 1, .y_stride = V + 1});
  if (has_initial) {
    JoinStates(device, in.initial_state, in.initial_key_sum, initial, state_rows, V);
  }
  if (has_final) {
    JoinStates(device, gradients.d_final_state, gradients.d_final_key_sum, d_final, state_rows, V);
  }
  if (gradients.d_o) {
    LinearAttentionArgs forward = ForwardArgs(joined, DType::kFloat32, ScaleOf(in, shape));
    forward.q = args.q;
    forward.k = args.k;
    forward.v = args.v;
    forward.o = sums.data();
    forward.state = initial.as<float>();
    forward.seqs = sequences.view();
    RecurrentLinearAttention(device, forward);
    QuotientGradient(device, {.d_o = gradients.d_o->data,
                              .sums = sums.as<float>(),
                              .rows = rows * shape.num_heads,
                              .dim = static_cast<int>(V),
                              .dtype = gradients.d_o->dtype});
  }
  RecurrentLinearAttentionBackward(device, args);

  dq.Finish(device);
  dk.Finish(device);
  CopyColumns(device, {.x = dv.data(),
                       .y = result.dv.buffer.data(),
                       .rows = value_rows,
                       .cols = V,
                       .x_stride = V + 1,
                       .y_stride = V,
                       .y_dtype = result.dv.dtype});
  if (result.d_initial_state) {
    CopyOut(device, d_initial.as<float>(), V + 1, Floats(result.d_initial_state), state_rows, V);
  }
  if (result.d_initial_key_sum) {
    CopyOut(device, d_initial.as<float>() + V, V + 1, Floats(result.d_initial_key_sum), state_rows,
            1);
  }
  return absl::OkStatus();
}

}  // namespace gla
