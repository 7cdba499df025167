#include "model/model_config.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "model/config_reader.h"
#include "model/model_file.h"
#include "model/strict_json.h"

namespace gla {
namespace {

using nlohmann::json;

constexpr size_t kMaxConfigBytes = 1 << 20;
constexpr size_t kMaxConfigValues = 100'000;

// Far beyond any real model, and small enough that no product of them overflows 64 bits.
constexpr int kMaxVocab = 1 << 22;
constexpr int kMaxHidden = 1 << 16;
constexpr int kMaxLayers = 1024;
constexpr int kMaxHeads = 4096;
constexpr int kMaxIntermediate = 1 << 22;
constexpr double kMaxExpand = 16;
constexpr double kMaxHiddenRatio = 64;
constexpr int kMaxConvSize = 8;        // of the ShortConv kernel
constexpr int kMaxRetNetKeyDim = 256;  // fla's own limit

// What fla's configuration classes fill in for a key that is absent.
struct Defaults {
  double expand_k, expand_v, hidden_ratio;
  int num_heads;
  const char* feature_map;  // null: none
};
Defaults DefaultsOf(ModelFamily family) {
  switch (family) {
    case ModelFamily::kGla:
      return {0.5, 1, 4, 4, nullptr};
    case ModelFamily::kLinearAttention:
      return {1, 1, 4, 4, "elementwise_product"};
    case ModelFamily::kRetNet:
      return {1, 2, 2, 8, nullptr};
  }
  return {};
}

struct NamedMap {
  std::string_view name;
  QkMap map;
};
// fla's own table of activations. Its gelu is the tanh approximation.
constexpr NamedMap kGlaMaps[] = {{"relu", QkMap::kRelu},          {"sigmoid", QkMap::kSigmoid},
                                 {"silu", QkMap::kSilu},          {"swish", QkMap::kSilu},
                                 {"sqrelu", QkMap::kSquaredRelu}, {"gelu", QkMap::kGelu}};
// RetNet takes its names from the transformers library, whose gelu is the exact one (not
// supported).
constexpr NamedMap kRetNetMaps[] = {{"relu", QkMap::kRelu},
                                    {"sigmoid", QkMap::kSigmoid},
                                    {"silu", QkMap::kSilu},
                                    {"swish", QkMap::kSilu},
                                    {"relu2", QkMap::kSquaredRelu},
                                    {"linear", QkMap::kIdentity},
                                    {"gelu_new", QkMap::kGelu},
                                    {"gelu_fast", QkMap::kGelu},
                                    {"gelu_pytorch_tanh", QkMap::kGelu}};
constexpr NamedMap kLinearMaps[] = {{"elementwise_product", QkMap::kElementwiseProduct},
                                    {"elu", QkMap::kElu},
                                    {"relu", QkMap::kRelu},
                                    {"identity", QkMap::kIdentity},
                                    {"hedgehog", QkMap::kHedgehog},
                                    {"t2r", QkMap::kT2r},
                                    {"dpfp", QkMap::kDpfp}};
absl::Span<const NamedMap> MapsOf(ModelFamily family) {
  switch (family) {
    case ModelFamily::kGla:
      return kGlaMaps;
    case ModelFamily::kLinearAttention:
      return kLinearMaps;
    case ModelFamily::kRetNet:
      return kRetNetMaps;
  }
  return {};
}

// Keys that fla and transformers write and that do not change what the model computes: training,
// choice of kernel, bookkeeping, and defaults of generation (which requests set here).
constexpr std::string_view kIgnoredKeys[] = {
    // fla
    "attn_mode", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy",
    "initializer_range", "use_l2warp", "use_cache",
    // transformers: bookkeeping
    "_name_or_path", "name_or_path", "_attn_implementation", "_attn_implementation_autoset",
    "_commit_hash", "architectures", "attn_implementation", "auto_map", "chunk_size_feed_forward",
    "dtype", "finetuning_task", "id2label", "is_decoder", "label2id", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type",
    "return_dict", "return_dict_in_generate", "sep_token_id", "task_specific_params",
    "tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version",
    "use_bfloat16",
    // transformers: generation
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p"};

void RefuseUnsupported(ConfigReader& reader, ModelFamily family) {
  reader.Only("attn", nullptr, "hybrid models with softmax attention layers are not supported");
  reader.Only("attnres_block_size", nullptr, "attention residuals are not supported");
  reader.Only("hidden_act", "swish", "other activations are not supported");
  reader.Only("add_cross_attention", false, "cross attention is not supported");
  reader.Only("is_encoder_decoder", false, "encoder-decoder models are not supported");
  reader.Only("tie_encoder_decoder", false, "encoder-decoder models are not supported");
  reader.Only("pruned_heads", json::object(), "pruned heads are not supported");
  reader.Only("quantization_config", nullptr, "quantized weights are not supported");
  if (family != ModelFamily::kGla) return;
  // fla's layer reads neither: it always has the key gate and never a value gate. A config that
  // says otherwise describes another model than the one its weights were trained in.
  reader.Only("use_gk", true, "the layer always has its key gate");
  reader.Only("use_gv", false, "value gates are not supported");
  // Fixed inside fla's layer.
  reader.Only("gate_logit_normalizer", 16, "another value is not supported");
  reader.Only("gate_low_rank_dim", 16, "another value is not supported");
}

QkMap ReadFeatureMap(ConfigReader& reader, ModelFamily family) {
  const json* value = reader.Take("feature_map");
  const char* absent = DefaultsOf(family).feature_map;
  const json name = value != nullptr ? *value : absent != nullptr ? json(absent) : json(nullptr);
  std::vector<std::string> names;
  if (family != ModelFamily::kLinearAttention) {
    if (name.is_null()) return QkMap::kNone;
    names.push_back("null");
  }
  for (const NamedMap& known : MapsOf(family)) {
    if (name.is_string() && name.get_ref<const std::string&>() == known.name) return known.map;
    names.push_back(absl::StrCat("\"", std::string(known.name), "\""));
  }
  reader.Fail("feature_map", absl::StrCat("one of ", absl::StrJoin(names, ", ")),
              DescribeJson(name));
  return QkMap::kNone;
}

// `hidden_size * expand`, which must be an integer that the heads divide.
int ProjectedDim(ConfigReader& reader, std::string_view key, double absent,
                 const ModelConfig& config) {
  const double expand = reader.Number(key, absent, 1e-6, kMaxExpand);
  const double exact = config.hidden_size * expand;
  const int dim = static_cast<int>(std::lround(exact));
  if (dim < 1 || std::abs(exact - dim) > 1e-9 * exact) {
    reader.Fail(key, "hidden_size * this to be an integer", absl::StrCat(exact));
    return config.num_heads;
  }
  if (dim % config.num_heads != 0) {
    reader.Fail("num_heads",
                absl::StrCat("a divisor of hidden_size * ", std::string(key), " = ", dim),
                absl::StrCat(config.num_heads));
    return config.num_heads;
  }
  return dim;
}

void ReadHeads(ConfigReader& reader, ModelConfig& config) {
  const Defaults defaults = DefaultsOf(config.family);
  config.num_heads = reader.Int("num_heads", defaults.num_heads, 1, kMaxHeads);
  config.num_kv_heads = reader.OptionalInt("num_kv_heads", 1, kMaxHeads).value_or(config.num_heads);
  if (config.num_heads % config.num_kv_heads != 0) {
    reader.Fail("num_kv_heads", absl::StrCat("a divisor of num_heads = ", config.num_heads),
                absl::StrCat(config.num_kv_heads));
  }
  config.head_key_dim =
      ProjectedDim(reader, "expand_k", defaults.expand_k, config) / config.num_heads;
  config.head_value_dim =
      ProjectedDim(reader, "expand_v", defaults.expand_v, config) / config.num_heads;
  config.feature_map = ReadFeatureMap(reader, config.family);
  config.feature_dim = config.head_key_dim * FeaturesPerKey(config.feature_map);
  if (config.family != ModelFamily::kRetNet) return;
  if (config.head_key_dim % 2 != 0 || config.head_key_dim > kMaxRetNetKeyDim) {
    reader.Fail("expand_k",
                absl::StrCat("an even key dimension of each head, at most ", kMaxRetNetKeyDim),
                absl::StrCat("hidden_size * expand_k / num_heads = ", config.head_key_dim));
  }
}

void ReadMlp(ConfigReader& reader, ModelConfig& config) {
  double ratio = DefaultsOf(config.family).hidden_ratio;
  if (const json* value = reader.Take("hidden_ratio"); value != nullptr) {
    // The MLP has a default of its own for a ratio that is null.
    ratio = value->is_null() ? 4 : reader.Number("hidden_ratio", ratio, 1e-6, kMaxHiddenRatio);
  }
  if (const auto size = reader.OptionalInt("intermediate_size", 1, kMaxIntermediate)) {
    config.intermediate_size = *size;
    return;
  }
  const int wanted = static_cast<int>(config.hidden_size * ratio * 2 / 3);
  config.intermediate_size = 256 * std::max((wanted + 255) / 256, 1);
}

void ReadTokens(ConfigReader& reader, ModelConfig& config) {
  const std::vector<int> bos = reader.TokenIds("bos_token_id", 1, config.vocab_size);
  if (bos.size() > 1) reader.Fail("bos_token_id", "one token id or null");
  if (!bos.empty()) config.bos_token_id = bos[0];
  config.eos_token_ids = reader.TokenIds("eos_token_id", 2, config.vocab_size);
  if (!config.eos_token_ids.empty()) config.eos_token_id = config.eos_token_ids[0];
}

void ReadGatesAndConvolution(ConfigReader& reader, ModelConfig& config) {
  config.use_output_gate = reader.Bool("use_output_gate", true);
  config.use_short_conv = reader.Bool("use_short_conv", false);
  config.conv_size = reader.Int("conv_size", 4, 1, kMaxConvSize);
  // Written by older versions; q, k and v have their own kernels since.
  const bool shared = reader.Bool("share_conv_kernel", false);
  // fla's RetNet does not hand this option to its layers, so its checkpoints have no convolution
  // whatever the config says; one with such tensors fails as having tensors nobody uses.
  if (config.family == ModelFamily::kRetNet) config.use_short_conv = false;
  if (config.use_short_conv && shared) {
    reader.Fail("share_conv_kernel", "false (one kernel for q, k and v is not supported)");
  }
}

void ReadLinearAttention(ConfigReader& reader, ModelConfig& config) {
  config.use_output_gate = false;
  config.tie_feature_map_qk = reader.Bool("tie_feature_map_qk", false);
  config.norm_q = reader.Bool("norm_q", false);
  config.norm_k = reader.Bool("norm_k", false);
  config.norm_feature_map = reader.Bool("norm_feature_map", false);
  const json* norm = reader.Take("output_norm");
  if (norm == nullptr || *norm == "rmsnorm") return;
  config.output_norm = false;
  if (*norm != "identity") reader.Fail("output_norm", "\"rmsnorm\" or \"identity\"");
}

absl::StatusOr<ModelFamily> ReadFamily(ConfigReader& reader) {
  const json* type = reader.Take("model_type");
  std::vector<std::string> names;
  for (const ModelFamily family :
       {ModelFamily::kGla, ModelFamily::kLinearAttention, ModelFamily::kRetNet}) {
    const std::string name(NameOf(family));
    if (type != nullptr && *type == name) return family;
    names.push_back(absl::StrCat("\"", name, "\""));
  }
  reader.Fail("model_type", absl::StrCat("one of ", absl::StrJoin(names, ", ")));
  return reader.status();
}

}  // namespace

std::string_view NameOf(ModelFamily family) {
  switch (family) {
    case ModelFamily::kGla:
      return "gla";
    case ModelFamily::kLinearAttention:
      return "linear_attn";
    case ModelFamily::kRetNet:
      return "retnet";
  }
  return "";
}

int FeaturesPerKey(QkMap map) { return map == QkMap::kHedgehog ? 2 : map == QkMap::kDpfp ? 8 : 1; }

absl::StatusOr<ModelConfig> ModelConfig::Parse(std::string_view text) {
  GLA_ASSIGN_OR_RETURN(const json object, ParseJson(text, kMaxConfigValues));
  if (!object.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected a JSON object, got ", DescribeJson(object)));
  }
  ConfigReader reader(object);
  ModelConfig config;
  GLA_ASSIGN_OR_RETURN(config.family, ReadFamily(reader));
  RefuseUnsupported(reader, config.family);

  config.vocab_size = reader.Int("vocab_size", 32000, 1, kMaxVocab);
  config.hidden_size = reader.Int("hidden_size", 2048, 1, kMaxHidden);
  config.num_layers = reader.Int("num_hidden_layers", 24, 1, kMaxLayers);
  ReadHeads(reader, config);
  ReadMlp(reader, config);
  ReadTokens(reader, config);
  config.norm_eps = static_cast<float>(reader.Number("norm_eps", 1e-6, 1e-12, 1));
  // Null is allowed here and means false.
  config.elementwise_affine =
      reader.Take("elementwise_affine") == nullptr ||
      (!reader.IsAbsentOrNull("elementwise_affine") && reader.Bool("elementwise_affine", true));
  config.tie_word_embeddings = reader.Bool("tie_word_embeddings", false);
  config.fuse_norm = reader.Bool("fuse_norm", true);
  config.max_position_embeddings =
      reader.OptionalInt("max_position_embeddings", 0, INT32_MAX).value_or(0);
  if (config.family == ModelFamily::kLinearAttention) {
    ReadLinearAttention(reader, config);
  } else {
    ReadGatesAndConvolution(reader, config);
  }
  if (config.family == ModelFamily::kGla) {
    if (const auto clamp = reader.OptionalNumber("clamp_min", -1e30, 0)) {
      config.clamp_min = static_cast<float>(*clamp);
    }
  }
  GLA_RETURN_IF_ERROR(reader.Finish(kIgnoredKeys));
  return config;
}

absl::StatusOr<ModelConfig> ModelConfig::Load(const std::string& folder) {
  GLA_ASSIGN_OR_RETURN(const std::string path, ResolveBelow(folder, "config.json"));
  GLA_ASSIGN_OR_RETURN(const std::string text, ReadModelFile(path, kMaxConfigBytes));
  absl::StatusOr<ModelConfig> config = Parse(text);
  if (!config.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", config.status().message()));
  }
  return config;
}

int64_t ModelConfig::num_parameters() const {
  const int64_t hidden = hidden_size;
  const int64_t key_dim = int64_t{num_heads} * head_key_dim;
  const int64_t value_dim = int64_t{num_heads} * head_value_dim;
  const int64_t group_key_dim = int64_t{num_kv_heads} * head_key_dim;
  const int64_t group_value_dim = int64_t{num_kv_heads} * head_value_dim;

  int64_t layer = 2 * hidden;                                      // attn_norm, mlp_norm
  layer += 3 * hidden * intermediate_size;                         // gate, up, down
  layer += hidden * (key_dim + group_key_dim + group_value_dim);   // q, k, v
  layer += value_dim * hidden;                                     // o
  if (use_output_gate) layer += hidden * value_dim;                // g
  if (output_norm && elementwise_affine) layer += head_value_dim;  // per-head norm
  if (use_short_conv) layer += conv_size * (key_dim + group_key_dim + group_value_dim);
  if (family == ModelFamily::kGla) {  // gk, low rank with a bias
    layer += gate_low_rank_dim * (hidden + group_key_dim) + group_key_dim;
  }

  const int64_t square = int64_t{head_key_dim} * head_key_dim;
  int64_t map = 0;
  if (feature_map == QkMap::kHedgehog) map = square + head_key_dim;
  if (feature_map == QkMap::kT2r) map = square;
  if (feature_map == QkMap::kElementwiseProduct) map = 2 * (square + head_key_dim);
  layer += tie_feature_map_qk ? map : 2 * map;

  const int64_t embeddings = int64_t{vocab_size} * hidden * (tie_word_embeddings ? 1 : 2);
  return embeddings + num_layers * layer + hidden;
}

}  // namespace gla
