// The decode rows of a step: one token for each of many sequences.
//
// On a GPU such a step is bound by launches and by the bytes of weights and states. So its rows run
// by themselves, in rounded numbers, from a recording of their kernels, and where they serve the
// model by the fused kernels of kernels/decode.h: five to a layer.
#include <cmath>
#include <utility>

#include "model/model_impl.h"

namespace gla {
namespace {

constexpr int kFewRows = 256;  // see ModelOptions::batch_invariant

}  // namespace

void Model::Impl::SetDecode(const StepPlan& plan, char* states, const int32_t* sampled) {
  if (options.record_steps) RecordDecode(RoundedDecodeRows(plan.num_decode), states);
  SetDecodeInputs(plan, sampled);
}

void Model::Impl::RunDecode(const StepPlan& plan, char* states, int32_t* finite) {
  const int rows = RoundedDecodeRows(plan.num_decode);
  if (options.record_steps) {
    recordings.at(rows).Replay();
  } else {
    QueueDecode(rows, states);
  }
  JudgeRows(is_fused ? decode_activations.residual : residual, plan.num_decode, finite);
}

// (Not where decode rows too use cuBLASLt, whose workspace two streams would share: in many rows'
// products, and in those inside a feature map.)
bool Model::Impl::RunsBeside(int decode_rows) const {
  return is_fused && !RunsManyDecode(RoundedDecodeRows(decode_rows)) &&
         weights.layers[0].q_map.layer1.bytes() == 0;
}

void Model::Impl::SetDecodeInputs(const StepPlan& plan, const int32_t* sampled) {
  decode_inputs->Set(plan);
  const auto first = plan.tokens.begin();
  ResolveSampled({first, first + plan.num_decode}, decode_inputs->tokens, sampled);
}

bool Model::Impl::RunsManyDecode(int rows) const {
  return is_fused && !options.batch_invariant && rows > kFewRows;
}

void Model::Impl::QueueDecode(int rows, char* states) {
  step = &*decode_inputs;
  if (is_fused) {
    std::swap(static_cast<Activations&>(*this), decode_activations);
    if (RunsManyDecode(rows)) {
      QueueManyDecode(rows, states);
    } else {
      QueueFusedDecode(rows, states);
    }
    std::swap(static_cast<Activations&>(*this), decode_activations);
    return;
  }
  Layers(rows, states);
  Norm(weights.norm, residual, normed, rows);
  Product(weights.lm_head, normed, logits, rows);
}

// ---- Fused --------------------------------------------------------------------------------------

// A product of `x`; `normed`: of what the residual's last kernel left in `normed` and `squares`.
DecodeProductArgs Model::Impl::FusedProduct(const PackedWeight& weight, Rows x, bool normed) const {
  DecodeProductArgs args{};
  args.x = x.data;
  args.x_stride = x.stride;
  if (normed) args.squares = static_cast<const float*>(squares.data);
  args.eps = config.norm_eps;
  args.weight = &weight;
  return args;
}

DecodeAttentionArgs Model::Impl::FusedAttentionArgs(int layer, char* states) const {
  const LayerWeights& w = weights.layers[layer];
  DecodeAttentionArgs args{};
  if (config.family == ModelFamily::kGla) {
    const Rows gate_in = proj.Columns(proj_layout.gate_begin());
    args.gate_kind = GateKind::kPerKey;
    args.gate_in = gate_in.data;
    args.gate_in_stride = gate_in.stride;
    args.gate_weight = &w.gate_proj;
    args.gate_bias = w.gate_bias.as<float>();
    args.gate_normalizer = config.gate_logit_normalizer;
    args.gate_clamp_min = config.clamp_min ? &*config.clamp_min : nullptr;
  } else if (config.family == ModelFamily::kRetNet) {
    args.gate_kind = GateKind::kConstant;
    args.decay = weights.decay.as<float>();
  }
  args.state = states + layer * state.recurrent;
  args.state_format = state.format;
  args.state_stride = state.bytes;
  args.num_heads = config.num_heads;
  args.num_kv_heads = config.num_kv_heads;
  args.key_dim = config.feature_dim;
  args.value_dim = config.head_value_dim;
  args.state_heads = state.state_heads;
  args.scale = 1.0f / std::sqrt(static_cast<float>(config.feature_dim));
  args.normalize = config.output_norm;
  args.norm_weight = w.head_norm.as<float>();
  args.eps = config.norm_eps;
  if (proj_layout.g > 0) {
    args.output_gate = proj.Columns(proj_layout.g_begin()).data;
    args.output_gate_stride = proj.stride;
  }
  args.y = mixed_normed.data;
  args.y_stride = mixed_normed.stride;
  return args;
}

bool Model::Impl::ServesFusedDecode() const {
  if (options.dtype != DType::kBFloat16 || weights.embeddings_dtype != DType::kBFloat16 ||
      config.norm_feature_map || config.hidden_size % 16 != 0) {
    return false;
  }
  const LayerWeights& w = weights.layers[0];
  DecodeProductArgs store = FusedProduct(w.in_proj, normed, true);
  DecodeProductArgs head = FusedProduct(weights.lm_head, normed, true);
  head.y_dtype = DType::kFloat32;
  DecodeProductArgs add = FusedProduct(w.out_proj, mixed_normed, false);
  DecodeProductArgs down = FusedProduct(w.down, mlp, false);
  add.epilogue = down.epilogue = DecodeEpilogue::kResidual;
  DecodeProductArgs swiglu = FusedProduct(w.gate_up, normed, true);
  swiglu.epilogue = DecodeEpilogue::kSwiGlu;
  return decode_kernels->Serves(store) && decode_kernels->Serves(head) &&
         decode_kernels->Serves(add) && decode_kernels->Serves(down) &&
         decode_kernels->Serves(swiglu) && decode_kernels->Serves(FusedAttentionArgs(0, nullptr));
}

// Of the projection in `proj`, to `mixed_normed`.
void Model::Impl::FusedAttention(int layer, int rows, char* states) {
  const Mixed mix = Mix(layer, rows, states);
  DecodeAttentionArgs args = FusedAttentionArgs(layer, states);
  args.q = mix.q.data;
  args.k = mix.k.data;
  args.v = mix.v.data;
  args.q_stride = mix.q.stride;
  args.k_stride = mix.k.stride;
  args.v_stride = mix.v.stride;
  args.read_slots = step->seqs.read_slots;
  args.write_slots = step->seqs.write_slots;
  args.rows = rows;
  decode_kernels->Attention(device, args);
}

void Model::Impl::QueueManyDecode(int rows, char* states) {
  Embed(rows);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const LayerWeights& w = weights.layers[layer];
    Norm(w.attn_norm, residual, normed, rows);
    Product(w.in_proj, normed, proj, rows);
    FusedAttention(layer, rows, states);
    AddProduct(w.out_proj, mixed_normed, rows);
    Mlp(w, rows);
  }
  Norm(weights.norm, residual, normed, rows);
  Product(weights.lm_head, normed, logits, rows);
}

void Model::Impl::QueueFusedDecode(int rows, char* states) {
  float* const stream = static_cast<float*>(residual.data);
  float* const sums = static_cast<float*>(squares.data);
  decode_kernels->Embed(device, {.tokens = step->tokens,
                                 .table = weights.embeddings.data(),
                                 .norm = weights.layers[0].attn_norm.as<float>(),
                                 .residual = stream,
                                 .x = normed.data,
                                 .squares = sums,
                                 .rows = rows,
                                 .dim = config.hidden_size});
  const bool is_mixed_by_kernels =
      config.use_short_conv || maps_features() || config.family == ModelFamily::kRetNet;
  const auto store = [&](const PackedWeight& weight, Rows x, bool is_normed, Rows y,
                         DecodeEpilogue epilogue, bool next_is_other = false) {
    DecodeProductArgs args = FusedProduct(weight, x, is_normed);
    args.next_is_other = next_is_other;
    args.epilogue = epilogue;
    args.y = y.data;
    args.y_dtype = y.dtype;
    args.y_stride = y.stride;
    args.rows = rows;
    decode_kernels->Product(device, args);
  };
  const auto add = [&](const PackedWeight& weight, Rows x, const DeviceBuffer& next_norm) {
    DecodeProductArgs args = FusedProduct(weight, x, false);
    args.epilogue = DecodeEpilogue::kResidual;
    args.residual = stream;
    args.next_norm = next_norm.as<float>();
    args.next_x = normed.data;
    args.next_squares = sums;
    args.rows = rows;
    decode_kernels->Product(device, args);
  };
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const LayerWeights& w = weights.layers[layer];
    const bool is_last = layer + 1 == config.num_layers;
    store(w.in_proj, normed, true, proj, DecodeEpilogue::kStore, is_mixed_by_kernels);
    FusedAttention(layer, rows, states);
    add(w.out_proj, mixed_normed, w.mlp_norm);
    store(w.gate_up, normed, true, mlp, DecodeEpilogue::kSwiGlu);
    add(w.down, mlp, is_last ? weights.norm : weights.layers[layer + 1].attn_norm);
  }
  store(weights.lm_head, normed, true, logits, DecodeEpilogue::kStore, true);
}

}  // namespace gla
