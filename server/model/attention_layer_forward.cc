#include <algorithm>
#include <utility>

#include "base/status_macros.h"
#include "model/attention_layer_impl.h"

namespace gla {

// ---- Building blocks of both ways ---------------------------------------------------------------

AttentionInputs AttentionLayer::Impl::OperatorInputs(const AttentionRecord& record) const {
  AttentionInputs in{.op = config.op,
                     .q = record.q.mapped.view(),
                     .k = record.k.mapped.view(),
                     .v = record.v.view(),
                     .initial_state = record.initial.recurrent,
                     .normalize = config.normalize,
                     .initial_key_sum = record.initial.key_sum,
                     .cu_seqlens = record.cu_seqlens,
                     .form = options.form};
  if (record.gate) in.gate = record.gate->view();
  if (config.op == AttentionOp::kRetention) {
    in.gate = Tensor{weights.decay.data(), DType::kFloat32, {config.num_heads}};
  }
  return in;
}

void AttentionLayer::Impl::Product(const PackedWeight& weight, Rows x, Rows y, int64_t rows,
                                   const DeviceBuffer* bias, bool accumulate) const {
  Matmul(device, {.x = x.data,
                  .weight = &weight,
                  .bias = bias == nullptr ? nullptr : bias->as<float>(),
                  .y = y.data,
                  .rows = static_cast<int>(rows),
                  .x_stride = x.stride,
                  .y_stride = y.stride,
                  .x_dtype = x.dtype,
                  .y_dtype = y.dtype,
                  .accumulate = accumulate});
}

void AttentionLayer::Impl::Copy(Rows x, Rows y, int64_t rows, int64_t cols) const {
  CopyColumns(device, {.x = x.data,
                       .y = y.data,
                       .rows = rows,
                       .cols = cols,
                       .x_stride = x.stride,
                       .y_stride = y.stride,
                       .x_dtype = x.dtype,
                       .y_dtype = y.dtype});
}

void AttentionLayer::Impl::Turn(const AttentionRecord& record, const DeviceTensor& heads,
                                bool inverse) const {
  Rotary(device, {.x = heads.buffer.data(),
                  .positions = record.positions.as<int64_t>(),
                  .rows = static_cast<int>(heads.shape[0]),
                  .heads = static_cast<int>(heads.shape[1]),
                  .dim = static_cast<int>(heads.shape[2]),
                  .x_stride = RowsOf(heads).stride,
                  .inverse = inverse,
                  .dtype = heads.dtype});
}

// ---- Forward ------------------------------------------------------------------------------------

AttentionRecord AttentionLayer::Impl::TakeRecord(LayerMemory& memory,
                                                 const AttentionLayerInput& input) const {
  const DType act = options.dtype;
  const int64_t rows = input.x.shape[0],
                num_offsets = static_cast<int64_t>(input.cu_seqlens.size());
  const int64_t heads = config.num_heads, kv_heads = layout.kv_heads, dim = config.head_key_dim;
  AttentionRecord record;
  record.cu_seqlens = input.cu_seqlens;
  record.initial = input.initial;
  record.proj = memory.Take({rows, layout.width()}, act);
  if (config.use_short_conv) {
    record.sequences = memory.Take((3 * num_offsets - 2) * static_cast<int64_t>(sizeof(int32_t)));
    record.conv = memory.Take({rows, layout.qkv()}, act);
  }
  if (config.op == AttentionOp::kRetention) {
    record.positions = memory.Take(rows * static_cast<int64_t>(sizeof(int64_t)));
  }
  const auto take_heads = [&](const FeatureMapWeights& map, int64_t num_heads) {
    AttentionRecord::Heads taken;
    if (map.layer1.bytes() > 0) taken.layer1 = memory.Take({rows, num_heads, dim}, act);
    if (map.layer2.bytes() > 0) taken.layer2 = memory.Take({rows, num_heads, dim}, act);
    taken.mapped = memory.Take({rows, num_heads, config.feature_dim()}, act);
    return taken;
  };
  record.q = take_heads(weights.q_map, heads);
  record.k = take_heads(weights.k_map, kv_heads);
  record.v = memory.Take({rows, kv_heads, config.head_value_dim}, act);
  if (layout.gate > 0) {
    std::vector<int64_t> shape = {rows, kv_heads};
    if (config.op == AttentionOp::kGla) shape.push_back(dim);
    record.gate = memory.Take(shape, DType::kFloat32);
  }
  return record;
}

void AttentionLayer::Impl::UploadSequences(const AttentionLayerInput& input, bool writes_conv,
                                           const AttentionRecord& record) const {
  const std::vector<int32_t>& cu = input.cu_seqlens;
  const int num_seqs = static_cast<int>(cu.size()) - 1;
  if (config.use_short_conv) {
    std::vector<int32_t> ints = cu;
    for (const bool used : {input.initial.conv.has_value(), writes_conv}) {
      for (int n = 0; n < num_seqs; ++n) ints.push_back(used ? n : -1);
    }
    device.Upload(record.sequences.data(), ints.data(), ints.size() * sizeof(int32_t));
  }
  if (config.op != AttentionOp::kRetention) return;
  std::vector<int64_t> positions;
  for (int n = 0; n < num_seqs; ++n) {
    const int64_t start = input.start_positions.empty() ? 0 : input.start_positions[n];
    for (int t = cu[n]; t < cu[n + 1]; ++t) positions.push_back(start + t - cu[n]);
  }
  device.Upload(record.positions.data(), positions.data(), positions.size() * sizeof(int64_t));
}

void AttentionLayer::Impl::Convolve(const AttentionRecord& record,
                                    std::optional<DeviceTensor>& final_state) const {
  const std::optional<Tensor>& initial = record.initial.conv;
  const std::vector<int32_t>& cu = record.cu_seqlens;
  const int num_seqs = static_cast<int>(cu.size()) - 1;
  float* state = nullptr;
  if (final_state) {  // in place
    state = final_state->buffer.as<float>();
    if (initial) device.Copy(state, initial->data, final_state->buffer.bytes());
  } else if (initial) {  // no slot is written
    state = const_cast<float*>(static_cast<const float*>(initial->data));
  }
  int longest = 0;
  for (int n = 0; n < num_seqs; ++n) longest = std::max(longest, cu[n + 1] - cu[n]);
  const auto* offsets = record.sequences.as<int32_t>();
  const Rows x = RowsOf(record.proj), y = RowsOf(record.conv);
  ShortConv(device, {.x = x.data,
                     .weight = weights.conv.as<float>(),
                     .bias = weights.conv_bias.as<float>(),
                     .y = y.data,
                     .state = state,
                     .state_stride = int64_t{config.conv_size - 1} * layout.qkv(),
                     .seqs = {.cu_seqlens = offsets,
                              .read_slots = offsets + num_seqs + 1,
                              .write_slots = offsets + 2 * num_seqs + 1,
                              .num_seqs = num_seqs,
                              .num_rows = cu.back(),
                              .max_len = longest},
                     .channels = layout.qkv(),
                     .width = config.conv_size,
                     .x_stride = x.stride,
                     .y_stride = y.stride,
                     .dtype = x.dtype});
}

// y = map(x) on each head; `scratch` has room for the heads of x without a gap between rows.
void AttentionLayer::Impl::MapFeatures(const FeatureMapWeights& map, Rows x, bool normalize,
                                       const AttentionRecord::Heads& y,
                                       const DeviceBuffer& scratch) const {
  const int64_t rows = y.mapped.shape[0], heads = y.mapped.shape[1], dim = config.head_key_dim;
  FeatureMapArgs args{.map = KernelOf(config.feature_map),
                      .x = x.data,
                      .y = y.mapped.buffer.data(),
                      .rows = static_cast<int>(rows),
                      .heads = static_cast<int>(heads),
                      .dim = config.head_key_dim,
                      .out_dim = config.feature_dim(),
                      .x_stride = x.stride,
                      .y_stride = RowsOf(y.mapped).stride,
                      .normalize = normalize,
                      .dtype = x.dtype};
  if (map.layer1.bytes() > 0) {
    // A head is a row of the map's layers.
    Copy(x, {scratch.data(), heads * dim, x.dtype}, rows, heads * dim);
    const Rows head_rows{scratch.data(), dim, x.dtype};
    args.x = y.layer1.buffer.data();
    args.x_stride = heads * dim;
    Product(map.layer1, head_rows, {y.layer1.buffer.data(), dim, x.dtype}, rows * heads,
            &map.bias1);
    if (map.layer2.bytes() > 0) {
      args.x2 = y.layer2.buffer.data();
      Product(map.layer2, head_rows, {y.layer2.buffer.data(), dim, x.dtype}, rows * heads,
              &map.bias2);
    }
  }
  ApplyFeatureMap(device, args);
}

// The operator's gate, of x (simple GLA) or of its low-rank projection (GLA).
void AttentionLayer::Impl::Gate(const AttentionRecord& record, Rows x) const {
  const Rows from = layout.low_rank > 0 ? RowsOf(record.proj).Columns(layout.low_rank_begin()) : x;
  GateProjection(device, {.x = from.data,
                          .weight = &weights.gate_proj.forward,
                          .bias = weights.gate_bias.as<float>(),
                          .y = record.gate->buffer.as<float>(),
                          .rows = static_cast<int>(record.gate->shape[0]),
                          .x_stride = from.stride,
                          .x_dtype = from.dtype,
                          .normalizer = config.gate_logit_normalizer,
                          .clamp_min = config.clamp_min ? &*config.clamp_min : nullptr});
}

// y [T, H * V] = norm(o) on each head, times the output gate.
void AttentionLayer::Impl::Norm(const AttentionRecord& record, Rows y) const {
  const Rows o = RowsOf(record.o), gate = RowsOf(record.proj).Columns(layout.g_begin());
  RmsNorm(device, {.x = o.data,
                   .weight = weights.head_norm.as<float>(),
                   .gate = layout.g > 0 ? gate.data : nullptr,
                   .y = y.data,
                   .rows = static_cast<int>(record.o.shape[0]),
                   .groups = config.num_heads,
                   .dim = config.head_value_dim,
                   .x_stride = o.stride,
                   .gate_stride = gate.stride,
                   .y_stride = y.stride,
                   .eps = config.norm_eps,
                   .x_dtype = o.dtype,
                   .y_dtype = y.dtype});
}

absl::StatusOr<AttentionLayerOutput> AttentionLayer::Impl::Forward(const AttentionLayerInput& input,
                                                                   bool want_final_state) const {
  const DType act = options.dtype;
  const int64_t rows = input.x.shape[0];
  const int64_t num_seqs = static_cast<int64_t>(input.cu_seqlens.size()) - 1;
  LayerMemory memory(device, config.op);
  AttentionLayerOutput output{.record = TakeRecord(memory, input)};
  AttentionRecord& record = output.record;
  AttentionLayerState<DeviceTensor>& final_state = output.final_state;
  if (want_final_state && carries_inputs()) {
    final_state.conv = memory.Take({num_seqs, config.conv_size - 1, layout.qkv()}, DType::kFloat32);
  }
  DeviceTensor head_rows, normed;
  if (weights.q_map.layer1.bytes() > 0) head_rows = memory.Take({rows, layout.q}, act);
  if (config.output_norm) {
    normed = memory.Take({rows, config.num_heads * int64_t{config.head_value_dim}}, act);
  }
  output.y = memory.Take({rows, config.hidden_size}, DType::kFloat32);
  GLA_RETURN_IF_ERROR(memory.status());
  GLA_RETURN_IF_ERROR(CheckAttention(OperatorInputs(record)));

  UploadSequences(input, final_state.conv.has_value(), record);
  const Rows x{const_cast<void*>(input.x.data), config.hidden_size, act};
  Product(weights.in_proj.forward, x, RowsOf(record.proj), rows);
  if (config.use_short_conv) Convolve(record, final_state.conv);
  const Rows qkv = RowsOf(config.use_short_conv ? record.conv : record.proj);
  MapFeatures(weights.q_map, qkv, config.norm_q, record.q, head_rows.buffer);
  MapFeatures(weights.k_map, qkv.Columns(layout.q), config.norm_k, record.k, head_rows.buffer);
  Copy(qkv.Columns(layout.v_begin()), RowsOf(record.v), rows, layout.v);
  if (config.op == AttentionOp::kRetention) {
    Turn(record, record.q.mapped, false);
    Turn(record, record.k.mapped, false);
  }
  if (record.gate) Gate(record, x);

  GLA_ASSIGN_OR_RETURN(AttentionResult result,
                       AttentionForward(device, OperatorInputs(record), want_final_state));
  record.o = std::move(result.o);
  final_state.recurrent = std::move(result.final_state);
  final_state.key_sum = std::move(result.final_key_sum);
  if (config.output_norm) Norm(record, RowsOf(normed));
  Product(weights.out_proj.forward, RowsOf(config.output_norm ? normed : record.o),
          RowsOf(output.y), rows);
  return output;
}

}  // namespace gla
