#include "model/model.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/attention.h"
#include "model/model_impl.h"

namespace gla {
namespace {

// Bytes of a part of a slot, so that every part begins on 256.
int64_t Aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

AttentionOp OpOf(ModelFamily family) {
  switch (family) {
    case ModelFamily::kGla:
      return AttentionOp::kGla;
    case ModelFamily::kLinearAttention:
      return AttentionOp::kLinearAttention;
    case ModelFamily::kRetNet:
      return AttentionOp::kRetention;
  }
  return AttentionOp::kGla;
}

absl::Status CheckLimits(const ModelConfig& config, const ModelOptions& options) {
  if (options.dtype != DType::kFloat32 && options.dtype != DType::kBFloat16) {
    return absl::InvalidArgumentError(
        absl::StrCat("dtype: expected float32 or bfloat16, got ", NameOf(options.dtype)));
  }
  if (options.max_rows < 1 || options.max_seqs < 1 || options.max_logit_rows < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_rows, max_seqs and max_logit_rows: expected at least 1 each, got ",
                     options.max_rows, ", ", options.max_seqs, " and ", options.max_logit_rows));
  }
  if (options.state_format != StateFormat::kFloat32 && config.norm_feature_map) {
    return absl::InvalidArgumentError(
        "state_dtype: expected float32 for a model with a running key sum (norm_feature_map), got "
        "int16");
  }
  // Once for all layers and steps: a step trusts its sizes.
  return CheckAttentionShape({.op = OpOf(config.family),
                              .num_heads = config.num_heads,
                              .num_kv_heads = config.num_kv_heads,
                              .key_dim = config.feature_dim,
                              .value_dim = config.head_value_dim,
                              .num_rows = options.max_rows,
                              .num_seqs = options.max_seqs,
                              .normalize = config.norm_feature_map});
}

// The sequences that are not decode rows.
StepPlan WithoutDecode(const StepPlan& plan) {
  const int decode = plan.num_decode;
  const auto rest = [decode](const auto& all) {
    return std::decay_t<decltype(all)>(all.begin() + decode, all.end());
  };
  StepPlan out;
  out.tokens = rest(plan.tokens);
  out.cu_seqlens = rest(plan.cu_seqlens);
  out.read_slots = rest(plan.read_slots);
  out.write_slots = rest(plan.write_slots);
  out.start_positions = rest(plan.start_positions);
  out.logit_rows = rest(plan.logit_rows);
  for (int32_t& row : out.cu_seqlens) row -= decode;
  for (int32_t& row : out.logit_rows) row -= decode;
  return out;
}

}  // namespace

StateLayout::StateLayout(const ModelConfig& config, StateFormat format)
    : format(format),
      // A decay per query head makes the states of a group differ: one state per query head.
      state_heads(config.family == ModelFamily::kRetNet ? config.num_heads : config.num_kv_heads),
      recurrent(
          Aligned(StateBytes(format, state_heads, config.feature_dim, config.head_value_dim))),
      key_sum(config.norm_feature_map
                  ? Aligned(int64_t{4} * config.num_kv_heads * config.feature_dim)
                  : 0),
      conv(config.use_short_conv
               ? Aligned(int64_t{4} * (config.conv_size - 1) * ProjectionLayout(config).qkv())
               : 0),
      key_sums_begin(config.num_layers * recurrent),
      convs_begin(key_sums_begin + config.num_layers * key_sum),
      bytes(convs_begin + config.num_layers * conv) {}

Rows Model::Impl::AllocateRows(int64_t rows, int64_t width, DType dtype) {
  if (out_of_memory) return {};
  buffers.emplace_back(device, static_cast<size_t>(rows * width) * SizeOf(dtype));
  out_of_memory = !buffers.back().ok();
  return {buffers.back().data(), width, dtype};
}

Activations Model::Impl::AllocateActivations(int64_t rows) {
  const DType act = options.dtype;
  const int64_t hidden = config.hidden_size, heads = config.num_heads;
  Activations a;
  a.residual = AllocateRows(rows, hidden, DType::kFloat32);
  a.normed = AllocateRows(rows, hidden, act);
  a.proj = AllocateRows(rows, proj_layout.width(), act);
  if (config.use_short_conv) a.conv = AllocateRows(rows, proj_layout.qkv(), act);
  if (maps_features()) {
    a.features = AllocateRows(rows, (heads + config.num_kv_heads) * config.feature_dim, act);
  }
  if (weights.layers[0].q_map.layer1.bytes() > 0) {
    a.head_in = AllocateRows(rows * heads, config.head_key_dim, act);
    a.head_1 = AllocateRows(rows * heads, config.head_key_dim, act);
    a.head_2 = AllocateRows(rows * heads, config.head_key_dim, act);
  }
  if (proj_layout.gate > 0) a.gate = AllocateRows(rows, proj_layout.k, DType::kFloat32);
  a.mixed = AllocateRows(rows, heads * config.head_value_dim, act);
  a.mixed_normed = AllocateRows(rows, heads * config.head_value_dim, act);
  a.gate_up = AllocateRows(rows, int64_t{2} * config.intermediate_size, act);
  a.mlp = AllocateRows(rows, config.intermediate_size, act);
  return a;
}

absl::Status Model::Impl::Allocate() {
  // Decode rows are run in rounded numbers.
  const int64_t decode_rows = decode_kernels == nullptr ? 0 : RoundedDecodeRows(options.max_seqs);
  const int64_t rows = std::max<int64_t>(options.max_rows, decode_rows);
  const int64_t logit_rows = std::max<int64_t>(options.max_logit_rows, decode_rows);
  const int64_t hidden = config.hidden_size;
  static_cast<Activations&>(*this) = AllocateActivations(std::max(rows, logit_rows));
  last = AllocateRows(logit_rows, hidden, DType::kFloat32);
  logits = AllocateRows(logit_rows, config.vocab_size, DType::kFloat32);

  if (!out_of_memory && options.prefill_form == PrefillForm::kChunkwise) {
    const Rows& v = config.use_short_conv ? conv : proj;
    LinearAttentionArgs args =
        RecurrenceArgs(maps_features() ? features.stride : v.stride, v.stride);
    args.seqs.num_rows = args.seqs.max_len = options.max_rows;
    args.seqs.num_seqs = options.max_seqs;
    chunk_workspace = DeviceBuffer(device, ChunkLinearAttentionBytes(device, args));
    out_of_memory = !chunk_workspace.ok();
  }
  if (!out_of_memory && state.format != StateFormat::kFloat32) {
    const int seqs = max_run_seqs();
    std::vector<int32_t> slots(seqs);
    std::iota(slots.begin(), slots.end(), 0);
    unpacked = DeviceBuffer(
        device, seqs * static_cast<size_t>(StateBytes(StateFormat::kFloat32, state.state_heads,
                                                      config.feature_dim, config.head_value_dim)));
    unpacked_slots = DeviceBuffer(device, slots.size() * sizeof(int32_t));
    out_of_memory = !unpacked.ok() || !unpacked_slots.ok();
    if (!out_of_memory) {
      device.Upload(unpacked_slots.data(), slots.data(), unpacked_slots.bytes());
    }
  }
  if (!out_of_memory) {
    inputs.emplace(device, options.max_rows, options.max_seqs, options.max_logit_rows);
    out_of_memory = !inputs->ok();
  }
  if (!out_of_memory && decode_rows > 0) {
    decode_inputs.emplace(device, static_cast<int>(decode_rows), max_run_seqs());
    out_of_memory = !decode_inputs->ok();
    // The fused kernels count the elements of all rows in 32 bits.
    const int64_t widest = std::max({proj.stride, conv.stride, features.stride, mlp.stride});
    is_fused = decode_rows * widest < int64_t{1} << 31 && ServesFusedDecode();
  }
  if (is_fused) {
    decode_activations = AllocateActivations(decode_rows);
    decode_activations.squares = AllocateRows(decode_rows, hidden / 16, DType::kFloat32);
  }
  if (!out_of_memory) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("no device memory for the activations of ", rows,
                                                   " rows and ", logit_rows, " rows of logits; ",
                                                   device.memory_free(), " bytes are free"));
}

const float* Model::Impl::Forward(const StepPlan& plan, char* states, int32_t* finite,
                                  const int32_t* sampled) {
  const int rows = plan.num_rows(), logit_rows = plan.num_logit_rows();
  if (rows > options.max_rows || plan.num_seqs() > options.max_seqs ||
      logit_rows > options.max_logit_rows) {
    std::fprintf(stderr,
                 "model: a plan of %d rows, %d sequences, %d logit rows is beyond %d, %d, %d\n",
                 rows, plan.num_seqs(), logit_rows, options.max_rows, options.max_seqs,
                 options.max_logit_rows);
    std::abort();
  }
  const int decode = decode_inputs.has_value() ? plan.num_decode : 0;
  const bool all_decode = decode == plan.num_seqs();
  if (decode > 0) SetDecode(plan, states, sampled);
  std::optional<StepPlan> rest;
  if (decode > 0 && !all_decode) rest = WithoutDecode(plan);
  const StepPlan& others = rest.has_value() ? *rest : plan;
  if (!all_decode) SetRows(others, states, sampled);
  const auto run_decode = [&] { RunDecode(plan, states, finite); };
  const auto run_rows = [&] { RunRows(others, states); };
  if (decode > 0 && !all_decode && RunsBeside(decode)) {
    device.SideBySide(run_rows, run_decode);
  } else {
    if (decode > 0) run_decode();
    if (!all_decode) run_rows();
  }
  if (!all_decode) FinishRows(others, finite == nullptr ? nullptr : finite + decode, decode);
  return static_cast<const float*>(logits.data);
}

void Model::Impl::ResolveSampled(const std::vector<int32_t>& tokens, int32_t* device_tokens,
                                 const int32_t* sampled) {
  if (std::none_of(tokens.begin(), tokens.end(), [](int32_t token) { return token < 0; })) return;
  ResolveTokens(
      device,
      {.tokens = device_tokens, .sampled = sampled, .rows = static_cast<int>(tokens.size())});
}

// The normalized form keeps a running key sum, which only the recurrent kernel has.
bool Model::Impl::is_chunkwise() const {
  return options.prefill_form == PrefillForm::kChunkwise && !config.norm_feature_map;
}

std::optional<StepShape> Model::Impl::ShapeOf(const StepPlan& plan) const {
  if (!MayRecord() || plan.num_seqs() > max_run_seqs()) return std::nullopt;
  return StepShape::Around(plan, options.max_rows, max_shape_seqs());
}

void Model::Impl::SetRows(const StepPlan& plan, char* states, const int32_t* sampled) {
  const std::optional<StepShape> shape = ShapeOf(plan);
  if (shape.has_value()) RecordRows(*shape, states);
  inputs->Set(plan, is_chunkwise(), max_run_seqs(), shape);
  ResolveSampled(plan.tokens, inputs->tokens, sampled);
}

void Model::Impl::RunRows(const StepPlan& plan, char* states) {
  step = &*inputs;
  const std::optional<StepShape> shape = ShapeOf(plan);
  if (shape.has_value()) {
    row_recordings.at(*shape).Replay();
  } else {
    Layers(plan.num_rows(), states);
  }
}

void Model::Impl::FinishRows(const StepPlan& plan, int32_t* finite, int first_logit) {
  const int logit_rows = plan.num_logit_rows();
  step = &*inputs;
  JudgeRows(residual, plan.num_rows(), finite);
  // Only the rows whose logits are wanted pay for the vocabulary.
  GatherRows(device, {.x = static_cast<const float*>(residual.data),
                      .rows = step->logit_rows,
                      .y = static_cast<float*>(last.data),
                      .num_rows = logit_rows,
                      .dim = config.hidden_size});
  Norm(weights.norm, last, normed, logit_rows);
  Product(weights.lm_head, normed, logits.From(first_logit), logit_rows);
}

void Model::Impl::JudgeRows(Rows x, int rows, int32_t* finite) {
  if (finite == nullptr) return;
  FiniteRows(device, {.x = static_cast<const float*>(x.data),
                      .finite = finite,
                      .rows = rows,
                      .dim = config.hidden_size});
}

void Model::Impl::Embed(int rows) {
  gla::Embed(device, {.tokens = step->tokens,
                      .table = weights.embeddings.data(),
                      .y = static_cast<float*>(residual.data),
                      .rows = rows,
                      .dim = config.hidden_size,
                      .table_dtype = weights.embeddings_dtype});
}

void Model::Impl::Layers(int rows, char* states) {
  Embed(rows);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    Attention(layer, rows, states);
    Mlp(weights.layers[layer], rows);
  }
}

// ---- Model --------------------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<Model>> Model::Impl::Build(Device& device, const ModelConfig& config,
                                                          const ModelOptions& options,
                                                          WeightSource& source) {
  GLA_RETURN_IF_ERROR(CheckLimits(config, options));
  auto impl = std::make_unique<Impl>(device, config, options);
  GLA_ASSIGN_OR_RETURN(impl->weights, LoadWeights(device, config, options.dtype, source));
  GLA_RETURN_IF_ERROR(CheckWidths(config, impl->weights));
  GLA_RETURN_IF_ERROR(impl->Allocate());
  device.Synchronize();
  return std::unique_ptr<Model>(new Model(std::move(impl)));
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;

absl::StatusOr<std::unique_ptr<Model>> Model::Load(Device& device, const ModelConfig& config,
                                                   Checkpoint& checkpoint,
                                                   const ModelOptions& options) {
  CheckpointSource source(checkpoint);
  GLA_ASSIGN_OR_RETURN(auto model, Impl::Build(device, config, options, source));
  GLA_RETURN_IF_ERROR(checkpoint.CheckAllUsed());
  return model;
}

absl::StatusOr<std::unique_ptr<Model>> Model::Random(Device& device, const ModelConfig& config,
                                                     uint64_t seed, const ModelOptions& options) {
  RandomWeightSource source(seed);
  return Impl::Build(device, config, options, source);
}

const ModelConfig& Model::config() const { return impl_->config; }
const ModelOptions& Model::options() const { return impl_->options; }
int64_t Model::state_bytes() const { return impl_->state.bytes; }
int64_t Model::weight_bytes() const { return impl_->weights.bytes(); }
int64_t Model::embedding_bytes() const {
  return static_cast<int64_t>(impl_->weights.embeddings.bytes());
}

void Model::Record(void* states) { impl_->Record(static_cast<char*>(states)); }

const float* Model::Forward(const StepPlan& plan, void* states, int32_t* finite,
                            const int32_t* sampled) {
  return impl_->Forward(plan, static_cast<char*>(states), finite, sampled);
}

}  // namespace gla
