// The layer's gradient: forward's steps in reverse, each by the gradient of its kernel.
#include <utility>

#include "base/status_macros.h"
#include "model/attention_layer_impl.h"

namespace gla {

BackwardScratch AttentionLayer::Impl::TakeScratch(LayerMemory& memory,
                                                  const AttentionRecord& record,
                                                  bool reaches_o) const {
  const DType act = options.dtype;
  const int64_t rows = record.o.shape[0], dim = config.head_key_dim;
  BackwardScratch scratch;
  scratch.d_proj = memory.Take({rows, layout.width()}, act);
  if (reaches_o) {
    if (act != DType::kFloat32) scratch.dy = memory.Take({rows, config.hidden_size}, act);
    if (config.output_norm) scratch.d_merged = memory.Take(record.o.shape, act);
    scratch.d_o = memory.Take(record.o.shape, act);
  }
  if (config.use_short_conv) scratch.d_conv = memory.Take({rows, layout.qkv()}, act);
  if (record.gate) scratch.d_logits = memory.Take({rows, layout.gate}, act);
  if (weights.q_map.layer1.bytes() > 0) {
    scratch.d_layer1 = memory.Take({rows, config.num_heads, dim}, act);
    scratch.d_layer2 = memory.Take({rows, config.num_heads, dim}, act);
    scratch.d_heads = memory.Take({rows, config.num_heads, dim}, DType::kFloat32);
  }
  return scratch;
}

// d_o, and the output gate's columns of d_proj.
void AttentionLayer::Impl::OutputBackward(const AttentionRecord& record, const Tensor& dy,
                                          const BackwardScratch& scratch) const {
  const int64_t rows = record.o.shape[0];
  Rows d_y{const_cast<void*>(dy.data), config.hidden_size, dy.dtype};
  if (options.dtype != dy.dtype) {
    const Rows narrow = RowsOf(scratch.dy);
    Copy(d_y, narrow, rows, config.hidden_size);
    d_y = narrow;
  }
  const Rows d_merged = RowsOf(config.output_norm ? scratch.d_merged : scratch.d_o);
  Product(weights.out_proj.transposed, d_y, d_merged, rows);
  if (!config.output_norm) return;
  const bool is_gated = layout.g > 0;
  const Rows o = RowsOf(record.o), d_o = RowsOf(scratch.d_o);
  const Rows gate = RowsOf(record.proj).Columns(layout.g_begin());
  const Rows d_gate = RowsOf(scratch.d_proj).Columns(layout.g_begin());
  RmsNormBackward(device, {.x = o.data,
                           .weight = weights.head_norm.as<float>(),
                           .gate = is_gated ? gate.data : nullptr,
                           .dy = d_merged.data,
                           .dx = d_o.data,
                           .dgate = is_gated ? d_gate.data : nullptr,
                           .rows = static_cast<int>(rows),
                           .groups = config.num_heads,
                           .dim = config.head_value_dim,
                           .x_stride = o.stride,
                           .gate_stride = gate.stride,
                           .dy_stride = d_merged.stride,
                           .dx_stride = d_o.stride,
                           .dgate_stride = d_gate.stride,
                           .eps = config.norm_eps,
                           .x_dtype = o.dtype,
                           .y_dtype = d_merged.dtype});
}

// dx of y = map(x); x and dx are heads among other columns.
void AttentionLayer::Impl::MapBackward(const FeatureMapWeights& map, Rows x, bool normalize,
                                       const AttentionRecord::Heads& forward,
                                       const DeviceTensor& dy, Rows dx,
                                       const BackwardScratch& scratch) const {
  const int64_t rows = dy.shape[0], heads = dy.shape[1], dim = config.head_key_dim;
  FeatureMapBackwardArgs args{.map = KernelOf(config.feature_map),
                              .x = x.data,
                              .dy = dy.buffer.data(),
                              .dx = dx.data,
                              .rows = static_cast<int>(rows),
                              .heads = static_cast<int>(heads),
                              .dim = config.head_key_dim,
                              .out_dim = config.feature_dim(),
                              .x_stride = x.stride,
                              .dy_stride = RowsOf(dy).stride,
                              .dx_stride = dx.stride,
                              .normalize = normalize,
                              .dtype = x.dtype};
  if (map.layer1.bytes() == 0) return FeatureMapBackward(device, args);

  const bool has_layer2 = map.layer2.bytes() > 0;
  const Rows d_layer1{scratch.d_layer1.buffer.data(), dim, x.dtype};
  const Rows d_layer2{scratch.d_layer2.buffer.data(), dim, x.dtype};
  const Rows d_heads{scratch.d_heads.buffer.data(), dim, DType::kFloat32};
  args.x = forward.layer1.buffer.data();
  args.dx = d_layer1.data;
  if (has_layer2) {
    args.x2 = forward.layer2.buffer.data();
    args.dx2 = d_layer2.data;
  }
  args.x_stride = args.dx_stride = heads * dim;
  FeatureMapBackward(device, args);
  Product(map.layer1_transposed, d_layer1, d_heads, rows * heads);
  if (has_layer2) {
    Product(map.layer2_transposed, d_layer2, d_heads, rows * heads, nullptr, true);
  }
  Copy({d_heads.data, heads * dim, d_heads.dtype}, dx, rows, heads * dim);
}

void AttentionLayer::Impl::ConvolveBackward(
    const AttentionRecord& record, const std::optional<Tensor>& d_final_state,
    const BackwardScratch& scratch, const std::optional<DeviceTensor>& d_initial_state) const {
  const auto floats = [](const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const float*>(tensor->data) : nullptr;
  };
  const Rows x = RowsOf(record.proj), dy = RowsOf(scratch.d_conv), dx = RowsOf(scratch.d_proj);
  ShortConvBackward(
      device, {.x = x.data,
               .weight = weights.conv.as<float>(),
               .bias = weights.conv_bias.as<float>(),
               .initial_state = floats(record.initial.conv),
               .dy = dy.data,
               .d_final_state = floats(d_final_state),
               .dx = dx.data,
               .d_initial_state = d_initial_state ? d_initial_state->buffer.as<float>() : nullptr,
               .cu_seqlens = record.sequences.as<int32_t>(),
               .num_seqs = static_cast<int>(record.cu_seqlens.size()) - 1,
               .num_rows = record.cu_seqlens.back(),
               .channels = layout.qkv(),
               .width = config.conv_size,
               .x_stride = x.stride,
               .dy_stride = dy.stride,
               .dx_stride = dx.stride,
               .dtype = x.dtype});
}

// From the operator's gradients to the q, k and v columns: of d_conv, or of d_proj.
void AttentionLayer::Impl::QkvBackward(const AttentionRecord& record,
                                       const AttentionGradients& gradients,
                                       const BackwardScratch& scratch) const {
  if (config.op == AttentionOp::kRetention) {
    Turn(record, gradients.dq, true);
    Turn(record, gradients.dk, true);
  }
  const Rows qkv = RowsOf(config.use_short_conv ? record.conv : record.proj);
  const Rows d_qkv = RowsOf(config.use_short_conv ? scratch.d_conv : scratch.d_proj);
  MapBackward(weights.q_map, qkv, config.norm_q, record.q, gradients.dq, d_qkv, scratch);
  MapBackward(weights.k_map, qkv.Columns(layout.q), config.norm_k, record.k, gradients.dk,
              d_qkv.Columns(layout.q), scratch);
  Copy(RowsOf(gradients.dv), d_qkv.Columns(layout.v_begin()), record.v.shape[0], layout.v);
}

// dx, of d_proj and of the gate.
void AttentionLayer::Impl::InputBackward(const AttentionRecord& record,
                                         const std::optional<DeviceTensor>& d_gate,
                                         const BackwardScratch& scratch, Rows dx) const {
  const int64_t rows = record.o.shape[0];
  const Rows d_proj = RowsOf(scratch.d_proj), d_logits = RowsOf(scratch.d_logits);
  const bool is_low_rank = layout.low_rank > 0;
  if (record.gate) {
    LogSigmoidGateBackward(device, {.y = record.gate->buffer.as<float>(),
                                    .dy = d_gate->buffer.as<float>(),
                                    .dx = d_logits.data,
                                    .rows = static_cast<int>(rows),
                                    .dim = layout.gate,
                                    .normalizer = config.gate_logit_normalizer,
                                    .clamp_min = config.clamp_min ? &*config.clamp_min : nullptr,
                                    .dx_dtype = d_logits.dtype});
  }
  if (record.gate && is_low_rank) {
    Product(weights.gate_proj.transposed, d_logits, d_proj.Columns(layout.low_rank_begin()), rows);
  }
  Product(weights.in_proj.transposed, d_proj, dx, rows);
  if (record.gate && !is_low_rank) {
    Product(weights.gate_proj.transposed, d_logits, dx, rows, nullptr, true);
  }
}

absl::StatusOr<AttentionLayerGradients> AttentionLayer::Impl::Backward(
    const AttentionRecord& record, const AttentionLayerOutputGradients& gradients) const {
  const AttentionLayerState<Tensor>& d_final = gradients.d_final_state;
  // The gradient of the convolution's final state alone goes past the operator, which is then asked
  // with a d_o of zeros: so it is in the form that it wants, and the results come in theirs.
  const bool reaches_operator = gradients.dy || d_final.recurrent || d_final.key_sum;
  const bool reaches_o = gradients.dy || !reaches_operator;
  LayerMemory memory(device, config.op);
  AttentionLayerGradients result{
      .dx = memory.Take({record.o.shape[0], config.hidden_size}, DType::kFloat32)};
  if (record.initial.conv) {
    result.d_initial_state.conv = memory.Take(record.initial.conv->shape, DType::kFloat32);
  }
  const BackwardScratch scratch = TakeScratch(memory, record, reaches_o);
  GLA_RETURN_IF_ERROR(memory.status());
  AttentionResultGradients of_results{.d_final_state = d_final.recurrent,
                                      .d_final_key_sum = d_final.key_sum};
  if (reaches_o) of_results.d_o = scratch.d_o.view();
  const AttentionInputs inputs = OperatorInputs(record);
  GLA_RETURN_IF_ERROR(CheckAttentionGradients(inputs, of_results));

  if (gradients.dy) {
    OutputBackward(record, *gradients.dy, scratch);
  } else {
    device.Fill(scratch.d_proj.buffer.data(), 0, scratch.d_proj.buffer.bytes());
    if (reaches_o) device.Fill(scratch.d_o.buffer.data(), 0, scratch.d_o.buffer.bytes());
  }
  GLA_ASSIGN_OR_RETURN(AttentionGradients of_inputs, AttentionBackward(device, inputs, of_results));
  QkvBackward(record, of_inputs, scratch);
  if (config.use_short_conv) {
    ConvolveBackward(record, d_final.conv, scratch, result.d_initial_state.conv);
  }
  InputBackward(record, of_inputs.d_gate, scratch, RowsOf(result.dx));
  result.d_initial_state.recurrent = std::move(of_inputs.d_initial_state);
  result.d_initial_state.key_sum = std::move(of_inputs.d_initial_key_sum);
  return result;
}

}  // namespace gla
