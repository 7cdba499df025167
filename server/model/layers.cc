#include <cmath>

#include "model/model_impl.h"
#include "model/qk_map.h"

namespace gla {

// ---- Building blocks ----------------------------------------------------------------------------

void Model::Impl::Norm(const DeviceBuffer& weight, Rows x, Rows y, int rows) {
  RmsNorm(device, {.x = x.data,
                   .weight = weight.as<float>(),
                   .y = y.data,
                   .rows = rows,
                   .groups = 1,
                   .dim = config.hidden_size,
                   .x_stride = x.stride,
                   .y_stride = y.stride,
                   .eps = config.norm_eps,
                   .x_dtype = x.dtype,
                   .y_dtype = y.dtype});
}

void Model::Impl::Product(const PackedWeight& weight, Rows x, Rows y, int rows,
                          const DeviceBuffer* bias) {
  Matmul(device, {.x = x.data,
                  .weight = &weight,
                  .bias = bias == nullptr ? nullptr : bias->as<float>(),
                  .y = y.data,
                  .rows = rows,
                  .x_stride = x.stride,
                  .y_stride = y.stride,
                  .x_dtype = x.dtype,
                  .y_dtype = y.dtype});
}

// residual += x W^T
void Model::Impl::AddProduct(const PackedWeight& weight, Rows x, int rows) {
  Matmul(device, {.x = x.data,
                  .weight = &weight,
                  .y = residual.data,
                  .rows = rows,
                  .x_stride = x.stride,
                  .y_stride = residual.stride,
                  .x_dtype = x.dtype,
                  .y_dtype = residual.dtype,
                  .accumulate = true});
}

// y = map(x) on each of `heads` heads: x [rows, heads, head_key_dim], y [rows, heads, feature_dim].
void Model::Impl::MapFeatures(const FeatureMapWeights& map, Rows x, int heads, bool normalize,
                              Rows y, int rows) {
  const int dim = config.head_key_dim;
  FeatureMapArgs args{.map = FeatureMap::kIdentity,
                      .x = x.data,
                      .y = head_in.data,
                      .rows = rows,
                      .heads = heads,
                      .dim = dim,
                      .out_dim = dim,
                      .x_stride = x.stride,
                      .y_stride = int64_t{heads} * dim,
                      .dtype = options.dtype};
  if (map.layer1.bytes() > 0) {
    // A head is a row of the map's layers, so heads must follow each other without a gap.
    ApplyFeatureMap(device, args);
    const int head_rows = rows * heads;
    Product(map.layer1, head_in, head_1, head_rows, &map.bias1);
    args.x = head_1.data;
    args.x_stride = args.y_stride;
    if (map.layer2.bytes() > 0) {
      Product(map.layer2, head_in, head_2, head_rows, &map.bias2);
      args.x2 = head_2.data;
    }
  }
  args.map = KernelOf(config.feature_map);
  args.y = y.data;
  args.y_stride = y.stride;
  args.out_dim = config.feature_dim;
  args.normalize = normalize;
  ApplyFeatureMap(device, args);
}

LinearAttentionArgs Model::Impl::RecurrenceArgs(int64_t qk_stride, int64_t v_stride) const {
  LinearAttentionArgs args{};
  args.state_stride = state.bytes / 4;
  args.num_heads = config.num_heads;
  args.num_kv_heads = config.num_kv_heads;
  args.key_dim = config.feature_dim;
  args.value_dim = config.head_value_dim;
  args.state_heads = state.state_heads;
  args.q_stride = args.k_stride = qk_stride;
  args.v_stride = v_stride;
  args.o_stride = mixed.stride;
  args.gate_stride = gate.stride;
  args.scale = 1.0f / std::sqrt(static_cast<float>(config.feature_dim));
  args.dtype = options.dtype;
  if (config.family == ModelFamily::kGla) {
    args.gate_kind = GateKind::kPerKey;
  } else if (config.family == ModelFamily::kRetNet) {
    args.gate_kind = GateKind::kConstant;
    args.gate = weights.decay.data();
  }
  return args;
}

void Model::Impl::Recurrence(int layer, Rows q, Rows k, Rows v, char* states) {
  LinearAttentionArgs args = RecurrenceArgs(q.stride, v.stride);
  char* const slots_begin = states + layer * state.recurrent;
  const bool unpacks = state.format != StateFormat::kFloat32;
  args.state = reinterpret_cast<float*>(slots_begin);
  if (unpacks) {
    args.state = unpacked.as<float>();
    args.state_stride = int64_t{state.state_heads} * config.feature_dim * config.head_value_dim;
  }
  args.workspace = chunk_workspace.data();
  if (config.norm_feature_map) {
    args.key_sum_state =
        reinterpret_cast<float*>(states + state.key_sums_begin + layer * state.key_sum);
  }
  for (const Run& run : step->runs) {
    args.q = q.From(run.first_row).data;
    args.k = k.From(run.first_row).data;
    args.v = v.From(run.first_row).data;
    args.o = mixed.From(run.first_row).data;
    if (config.family == ModelFamily::kGla) args.gate = gate.From(run.first_row).data;
    args.seqs = run.seqs;
    if (unpacks) {
      args.seqs.read_slots = args.seqs.write_slots = unpacked_slots.as<int32_t>();
      UnpackStates(device, {.slots_begin = slots_begin,
                            .slot_stride = state.bytes,
                            .slots = run.seqs.read_slots,
                            .states = unpacked.as<float>(),
                            .num_states = run.seqs.num_seqs,
                            .heads = state.state_heads,
                            .key_dim = config.feature_dim,
                            .value_dim = config.head_value_dim,
                            .format = state.format});
    }
    if (run.is_chunkwise) {
      ChunkLinearAttention(device, args);
    } else {
      RecurrentLinearAttention(device, args);
    }
    if (unpacks) {
      PackStates(device, {.states = unpacked.as<float>(),
                          .slots_begin = slots_begin,
                          .slot_stride = state.bytes,
                          .slots = run.seqs.write_slots,
                          .num_states = run.seqs.num_seqs,
                          .heads = state.state_heads,
                          .key_dim = config.feature_dim,
                          .value_dim = config.head_value_dim,
                          .format = state.format});
    }
  }
}

// ---- The two halves of a layer ------------------------------------------------------------------

Model::Impl::Mixed Model::Impl::Mix(int layer, int rows, char* states) {
  const LayerWeights& w = weights.layers[layer];
  const int heads = config.num_heads, kv_heads = config.num_kv_heads;
  Rows qkv = proj;
  if (config.use_short_conv) {
    ShortConv(device,
              {.x = proj.data,
               .weight = w.conv.as<float>(),
               .y = conv.data,
               .state = reinterpret_cast<float*>(states + state.convs_begin + layer * state.conv),
               .state_stride = state.bytes / 4,
               .seqs = step->seqs,
               .channels = proj_layout.qkv(),
               .width = config.conv_size,
               .x_stride = proj.stride,
               .y_stride = conv.stride,
               .dtype = options.dtype});
    qkv = conv;
  }
  Mixed mix = {qkv, qkv.Columns(proj_layout.k_begin()), qkv.Columns(proj_layout.v_begin())};
  if (maps_features()) {
    const Rows mapped_k = features.Columns(int64_t{heads} * config.feature_dim);
    MapFeatures(w.q_map, mix.q, heads, config.norm_q, features, rows);
    MapFeatures(w.k_map, mix.k, kv_heads, config.norm_k, mapped_k, rows);
    mix.q = features;
    mix.k = mapped_k;
  }
  if (config.family == ModelFamily::kRetNet) {
    // Keys follow the queries, so one call turns the heads of both.
    Rotary(device, {.x = mix.q.data,
                    .positions = step->positions,
                    .rows = rows,
                    .heads = heads + kv_heads,
                    .dim = config.feature_dim,
                    .x_stride = mix.q.stride,
                    .bfloat16_frequencies = options.rotary_bfloat16_frequencies,
                    .dtype = options.dtype});
  }
  return mix;
}

// residual += o_proj(head_norm(recurrence(q, k, v, gate)) * swish(g)), of attn_norm(residual).
void Model::Impl::Attention(int layer, int rows, char* states) {
  const LayerWeights& w = weights.layers[layer];
  const int heads = config.num_heads;
  Norm(w.attn_norm, residual, normed, rows);
  Product(w.in_proj, normed, proj, rows);
  const Mixed mix = Mix(layer, rows, states);
  if (proj_layout.gate > 0) {
    const Rows low_rank = proj.Columns(proj_layout.gate_begin());
    GateProjection(device, {.x = low_rank.data,
                            .weight = &w.gate_proj,
                            .bias = w.gate_bias.as<float>(),
                            .y = static_cast<float*>(gate.data),
                            .rows = rows,
                            .x_stride = low_rank.stride,
                            .x_dtype = low_rank.dtype,
                            .normalizer = config.gate_logit_normalizer,
                            .clamp_min = config.clamp_min ? &*config.clamp_min : nullptr});
  }
  Recurrence(layer, mix.q, mix.k, mix.v, states);

  if (!config.output_norm && proj_layout.g == 0) {
    AddProduct(w.out_proj, mixed, rows);
    return;
  }
  RmsNorm(device, {.x = mixed.data,
                   .weight = w.head_norm.as<float>(),
                   .gate = proj_layout.g > 0 ? proj.Columns(proj_layout.g_begin()).data : nullptr,
                   .y = mixed_normed.data,
                   .rows = rows,
                   .groups = heads,
                   .dim = config.head_value_dim,
                   .x_stride = mixed.stride,
                   .gate_stride = proj.stride,
                   .y_stride = mixed_normed.stride,
                   .eps = config.norm_eps,
                   .normalize = config.output_norm,
                   .x_dtype = mixed.dtype,
                   .y_dtype = mixed_normed.dtype});
  AddProduct(w.out_proj, mixed_normed, rows);
}

// residual += down(swish(gate) * up), of mlp_norm(residual).
void Model::Impl::Mlp(const LayerWeights& w, int rows) {
  Norm(w.mlp_norm, residual, normed, rows);
  Product(w.gate_up, normed, gate_up, rows);
  SwiGlu(device, {.gate = gate_up.data,
                  .up = gate_up.Columns(config.intermediate_size).data,
                  .y = mlp.data,
                  .rows = rows,
                  .dim = config.intermediate_size,
                  .gate_stride = gate_up.stride,
                  .up_stride = gate_up.stride,
                  .y_stride = mlp.stride,
                  .dtype = options.dtype});
  AddProduct(w.down, mlp, rows);
}

}  // namespace gla
