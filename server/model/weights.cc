#include "model/weights.h"

#include <cmath>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace gla {
namespace {

absl::Status OutOfMemory(const std::string& name, size_t bytes, const Device& device) {
  return absl::ResourceExhaustedError(absl::StrCat("no device memory for ", name, ": need ", bytes,
                                                   " bytes, ", device.memory_free(), " are free"));
}

// Turns the named weights of a source into device memory.
class Loader {
 public:
  struct Block {
    std::string name;
    int64_t rows;
  };

  Loader(Device& device, DType act, WeightSource& source)
      : device_(device), act_(act), source_(source) {}

  bool Lists(const std::string& name) const { return source_.Lists(name); }

  // Two names of one weight.
  absl::Status CheckSame(const std::string& a, const std::string& b,
                         const std::vector<int64_t>& shape) {
    GLA_ASSIGN_OR_RETURN(const HostWeight first, source_.Get(a, shape));
    GLA_ASSIGN_OR_RETURN(const HostWeight second, source_.Get(b, shape));
    if (ConvertWeight(first.matrix, DType::kFloat32) ==
        ConvertWeight(second.matrix, DType::kFloat32)) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(
        absl::StrCat("tensors ", a, " and ", b,
                     ": expected the same values (tie_feature_map_qk), found different ones"));
  }

  // The blocks [rows, cols], stacked along the rows. Blocks of no rows are absent.
  absl::StatusOr<PackedWeight> Matrix(const std::vector<Block>& blocks, int64_t cols) {
    std::vector<HostWeight> parts;
    std::vector<HostMatrix> matrices;
    bool all_bfloat16 = true;
    for (const Block& block : blocks) {
      if (block.rows == 0) continue;
      GLA_ASSIGN_OR_RETURN(HostWeight part, source_.Get(block.name, {block.rows, cols}));
      all_bfloat16 = all_bfloat16 && part.matrix.dtype == DType::kBFloat16;
      matrices.push_back(part.matrix);
      parts.push_back(std::move(part));
    }
    // The CPU multiplies float32 rows with bfloat16 weights directly: half the bytes to read. The
    // CUDA backend wants both to be of one type.
    const bool mixes = std::string_view(Device::backend()) == "cpu";
    const DType dtype =
        act_ == DType::kBFloat16 || (mixes && all_bfloat16) ? DType::kBFloat16 : DType::kFloat32;
    PackedWeight packed(device_, matrices, dtype);
    if (!packed.ok()) return OutOfMemory(blocks.front().name, packed.bytes(), device_);
    return packed;
  }

  // The weights of `shape` (the same for all but the first dimension) one after another, float32.
  absl::StatusOr<DeviceBuffer> Floats(
      const std::vector<std::pair<std::string, std::vector<int64_t>>>& blocks) {
    std::vector<uint8_t> all;
    for (const auto& [name, shape] : blocks) {
      GLA_ASSIGN_OR_RETURN(const HostWeight part, source_.Get(name, shape));
      const std::vector<uint8_t> values = ConvertWeight(part.matrix, DType::kFloat32);
      all.insert(all.end(), values.begin(), values.end());
    }
    return Upload(blocks.front().first, all);
  }
  absl::StatusOr<DeviceBuffer> Vector(const std::string& name, int64_t size) {
    return Floats({{name, {size}}});
  }

  // A table that rows are copied from; row-major, of the type in `*dtype` on return.
  absl::StatusOr<DeviceBuffer> Table(const std::string& name, int64_t rows, int64_t cols,
                                     DType* dtype) {
    GLA_ASSIGN_OR_RETURN(const HostWeight part, source_.Get(name, {rows, cols}));
    const bool narrow = act_ == DType::kBFloat16 || part.matrix.dtype == DType::kBFloat16;
    *dtype = narrow ? DType::kBFloat16 : DType::kFloat32;
    return Upload(name, ConvertWeight(part.matrix, *dtype));
  }

  absl::StatusOr<DeviceBuffer> Upload(const std::string& name, const std::vector<uint8_t>& bytes) {
    DeviceBuffer buffer(device_, bytes.size());
    if (!buffer.ok()) return OutOfMemory(name, bytes.size(), device_);
    device_.Upload(buffer.data(), bytes.data(), bytes.size());
    return buffer;
  }

 private:
  Device& device_;
  DType act_;
  WeightSource& source_;
};

// The name of the norm on each head's output, as fla's layers name it.
const char* HeadNormName(const ModelConfig& config) {
  if (config.family == ModelFamily::kLinearAttention) return "norm";
  return config.use_output_gate && config.fuse_norm ? "g_norm_swish_gate" : "g_norm";
}

// The tensors of a feature map, below its own name.
struct MapTensor {
  std::string name;
  std::vector<int64_t> shape;
};
std::vector<MapTensor> MapTensors(const ModelConfig& config) {
  const int64_t dim = config.head_key_dim;
  switch (config.feature_map) {
    case QkMap::kT2r:
      return {{".layer.weight", {dim, dim}}};
    case QkMap::kHedgehog:
      return {{".layer.weight", {dim, dim}}, {".layer.bias", {dim}}};
    case QkMap::kElementwiseProduct:
      return {{".layer1.weight", {dim, dim}},
              {".layer1.bias", {dim}},
              {".layer2.weight", {dim, dim}},
              {".layer2.bias", {dim}}};
    default:
      return {};
  }
}

absl::Status LoadFeatureMap(Loader& loader, const ModelConfig& config, const std::string& prefix,
                            FeatureMapWeights& out) {
  PackedWeight* matrix = &out.layer1;
  DeviceBuffer* bias = &out.bias1;
  for (const MapTensor& tensor : MapTensors(config)) {
    const std::string name = prefix + tensor.name;
    if (tensor.shape.size() == 1) {
      GLA_ASSIGN_OR_RETURN(*bias, loader.Vector(name, tensor.shape[0]));
      bias = &out.bias2;
    } else {
      GLA_ASSIGN_OR_RETURN(*matrix, loader.Matrix({{name, tensor.shape[0]}}, tensor.shape[1]));
      matrix = &out.layer2;
    }
  }
  return absl::OkStatus();
}

absl::Status LoadFeatureMaps(Loader& loader, const ModelConfig& config, const std::string& attn,
                             LayerWeights& out) {
  const std::string q = attn + "feature_map_q", k = attn + "feature_map_k";
  std::string q_from = q, k_from = k;
  if (config.tie_feature_map_qk) {
    // One map under two names, of which a file may list either, or both with the same values.
    bool lists_q = false, lists_k = false;
    for (const MapTensor& tensor : MapTensors(config)) {
      lists_q = lists_q || loader.Lists(q + tensor.name);
      lists_k = lists_k || loader.Lists(k + tensor.name);
    }
    q_from = k_from = lists_k && !lists_q ? k : q;
    if (lists_q && lists_k) {
      for (const MapTensor& tensor : MapTensors(config)) {
        GLA_RETURN_IF_ERROR(loader.CheckSame(q + tensor.name, k + tensor.name, tensor.shape));
      }
    }
  }
  GLA_RETURN_IF_ERROR(LoadFeatureMap(loader, config, q_from, out.q_map));
  return LoadFeatureMap(loader, config, k_from, out.k_map);
}

absl::Status LoadLayer(Loader& loader, const ModelConfig& config, int index, LayerWeights& out) {
  const std::string layer = absl::StrCat("model.layers.", index, ".");
  const std::string attn = layer + "attn.";
  const int hidden = config.hidden_size;
  const ProjectionLayout proj(config);

  GLA_ASSIGN_OR_RETURN(out.attn_norm, loader.Vector(layer + "attn_norm.weight", hidden));
  GLA_ASSIGN_OR_RETURN(out.in_proj, loader.Matrix({{attn + "q_proj.weight", proj.q},
                                                   {attn + "k_proj.weight", proj.k},
                                                   {attn + "v_proj.weight", proj.v},
                                                   {attn + "g_proj.weight", proj.g},
                                                   {attn + "gk_proj.0.weight", proj.gate}},
                                                  hidden));
  if (proj.gate > 0) {
    GLA_ASSIGN_OR_RETURN(out.gate_proj,
                         loader.Matrix({{attn + "gk_proj.1.weight", proj.k}}, proj.gate));
    GLA_ASSIGN_OR_RETURN(out.gate_bias, loader.Vector(attn + "gk_proj.1.bias", proj.k));
  }
  if (config.use_short_conv) {
    const int width = config.conv_size;
    GLA_ASSIGN_OR_RETURN(out.conv, loader.Floats({{attn + "q_conv1d.weight", {proj.q, 1, width}},
                                                  {attn + "k_conv1d.weight", {proj.k, 1, width}},
                                                  {attn + "v_conv1d.weight", {proj.v, 1, width}}}));
  }
  GLA_RETURN_IF_ERROR(LoadFeatureMaps(loader, config, attn, out));
  if (config.output_norm && config.elementwise_affine) {
    GLA_ASSIGN_OR_RETURN(
        out.head_norm,
        loader.Vector(absl::StrCat(attn, HeadNormName(config), ".weight"), config.head_value_dim));
  }
  GLA_ASSIGN_OR_RETURN(out.out_proj, loader.Matrix({{attn + "o_proj.weight", hidden}},
                                                   config.num_heads * config.head_value_dim));

  GLA_ASSIGN_OR_RETURN(out.mlp_norm, loader.Vector(layer + "mlp_norm.weight", hidden));
  GLA_ASSIGN_OR_RETURN(out.gate_up,
                       loader.Matrix({{layer + "mlp.gate_proj.weight", config.intermediate_size},
                                      {layer + "mlp.up_proj.weight", config.intermediate_size}},
                                     hidden));
  GLA_ASSIGN_OR_RETURN(out.down, loader.Matrix({{layer + "mlp.down_proj.weight", hidden}},
                                               config.intermediate_size));
  return absl::OkStatus();
}

// Retention's log decay per head: log(1 - 2^(-5 - h)).
std::vector<uint8_t> RetentionDecay(int num_heads) {
  std::vector<uint8_t> bytes(4 * static_cast<size_t>(num_heads));
  for (int head = 0; head < num_heads; ++head) {
    const float decay = std::log(1.0f - std::exp2(-5.0f - static_cast<float>(head)));
    std::memcpy(&bytes[4 * static_cast<size_t>(head)], &decay, 4);
  }
  return bytes;
}

int64_t BytesOf(const FeatureMapWeights& map) {
  return map.layer1.bytes() + map.bias1.bytes() + map.layer2.bytes() + map.bias2.bytes();
}

}  // namespace

ProjectionLayout::ProjectionLayout(const ModelConfig& config)
    : q(config.num_heads * config.head_key_dim),
      k(config.num_kv_heads * config.head_key_dim),
      v(config.num_kv_heads * config.head_value_dim),
      g(config.use_output_gate ? config.num_heads * config.head_value_dim : 0),
      gate(config.family == ModelFamily::kGla ? config.gate_low_rank_dim : 0) {}

int64_t ModelWeights::bytes() const {
  size_t sum = embeddings.bytes() + norm.bytes() + lm_head.bytes() + decay.bytes();
  for (const LayerWeights& layer : layers) {
    sum += layer.attn_norm.bytes() + layer.in_proj.bytes() + layer.gate_proj.bytes() +
           layer.gate_bias.bytes() + layer.conv.bytes() + BytesOf(layer.q_map) +
           BytesOf(layer.k_map) + layer.head_norm.bytes() + layer.out_proj.bytes() +
           layer.mlp_norm.bytes() + layer.gate_up.bytes() + layer.down.bytes();
  }
  return static_cast<int64_t>(sum);
}

absl::StatusOr<ModelWeights> LoadWeights(Device& device, const ModelConfig& config, DType act,
                                         WeightSource& source) {
  Loader loader(device, act, source);
  ModelWeights weights;
  const char kEmbeddings[] = "model.embeddings.weight";
  GLA_ASSIGN_OR_RETURN(
      weights.embeddings,
      loader.Table(kEmbeddings, config.vocab_size, config.hidden_size, &weights.embeddings_dtype));
  weights.layers.resize(config.num_layers);
  for (int i = 0; i < config.num_layers; ++i) {
    GLA_RETURN_IF_ERROR(LoadLayer(loader, config, i, weights.layers[i]));
  }
  GLA_ASSIGN_OR_RETURN(weights.norm, loader.Vector("model.norm.weight", config.hidden_size));
  const std::string head = config.tie_word_embeddings ? kEmbeddings : "lm_head.weight";
  GLA_ASSIGN_OR_RETURN(weights.lm_head,
                       loader.Matrix({{head, config.vocab_size}}, config.hidden_size));
  if (config.family == ModelFamily::kRetNet) {
    GLA_ASSIGN_OR_RETURN(weights.decay,
                         loader.Upload("retention decay", RetentionDecay(config.num_heads)));
  }
  return weights;
}

absl::Status CheckWidths(const ModelConfig& config, const ModelWeights& weights) {
  absl::Status status;
  const auto expect = [&status](const std::string& where, const std::string& what, int64_t expected,
                                int64_t found) {
    if (!status.ok() || expected == found) return;
    status = absl::InvalidArgumentError(
        absl::StrCat(where, ": ", what, ": expected ", expected, ", found ", found));
  };
  const auto floats = [](const DeviceBuffer& buffer) {
    return static_cast<int64_t>(buffer.bytes() / sizeof(float));
  };
  const int64_t hidden = config.hidden_size;
  const ProjectionLayout proj(config);
  const int64_t heads = config.num_heads, kv_heads = config.num_kv_heads;
  const int map_factor = config.feature_map == QkMap::kHedgehog ? 2
                         : config.feature_map == QkMap::kDpfp   ? 8
                                                                : 1;

  expect("model", "embedding bytes for vocab_size rows of the residual's width",
         config.vocab_size * hidden * static_cast<int64_t>(SizeOf(weights.embeddings_dtype)),
         static_cast<int64_t>(weights.embeddings.bytes()));
  expect("model", "layers", config.num_layers, static_cast<int64_t>(weights.layers.size()));
  for (size_t i = 0; i < weights.layers.size() && status.ok(); ++i) {
    const LayerWeights& layer = weights.layers[i];
    const std::string where = absl::StrCat("layer ", i);
    const auto expect_here = [&](const char* what, int64_t expected, int64_t found) {
      expect(where, what, expected, found);
    };
    expect_here("attn_norm weight for the residual's width", hidden, floats(layer.attn_norm));
    expect_here("input width of the q, k, v, g and gate projections, after attn_norm", hidden,
                layer.in_proj.in());
    expect_here("output width of the q, k, v, g and gate projections", proj.width(),
                layer.in_proj.out());
    if (proj.gate > 0) {
      expect_here("input width of gk_proj.1, after gk_proj.0", proj.gate, layer.gate_proj.in());
      expect_here("output width of gk_proj.1, one gate per key dimension",
                  kv_heads * config.feature_dim, layer.gate_proj.out());
      expect_here("gk_proj.1 bias", layer.gate_proj.out(), floats(layer.gate_bias));
    }
    if (config.use_short_conv) {
      expect_here("short convolution weights for the q, k and v channels",
                  int64_t{proj.qkv()} * config.conv_size, floats(layer.conv));
    }
    for (const FeatureMapWeights* map : {&layer.q_map, &layer.k_map}) {
      if (map->layer1.bytes() == 0) continue;
      expect_here("input width of the feature map, after a head's projection", config.head_key_dim,
                  map->layer1.in());
      expect_here("output width of the feature map's layers", map->layer1.out(),
                  map->layer2.bytes() == 0 ? map->layer1.out() : map->layer2.out());
    }
    expect_here("key dimension of the recurrence, after the feature map",
                int64_t{config.head_key_dim} * map_factor, config.feature_dim);
    if (layer.head_norm.bytes() > 0) {
      expect_here("per-head norm weight for the recurrence's value dimension",
                  config.head_value_dim, floats(layer.head_norm));
    }
    // The norm gives [rows, heads, value dim]; the projection takes the heads merged.
    expect_here("input width of o_proj, after the per-head norm (heads * value dim)",
                heads * config.head_value_dim, layer.out_proj.in());
    if (proj.g > 0) {
      expect_here("width of the output gate, after the per-head norm",
                  heads * config.head_value_dim, proj.g);
    }
    expect_here("output width of o_proj, added to the residual", hidden, layer.out_proj.out());
    expect_here("mlp_norm weight for the residual's width", hidden, floats(layer.mlp_norm));
    expect_here("input width of the mlp, after mlp_norm", hidden, layer.gate_up.in());
    expect_here("output width of mlp gate and up", int64_t{2} * config.intermediate_size,
                layer.gate_up.out());
    expect_here("input width of mlp down, after gate * up", layer.gate_up.out() / 2,
                layer.down.in());
    expect_here("output width of mlp down, added to the residual", hidden, layer.down.out());
  }
  expect("model", "norm weight for the residual's width", hidden, floats(weights.norm));
  expect("model", "input width of lm_head, after the norm", hidden, weights.lm_head.in());
  expect("model", "output width of lm_head, one logit per token", config.vocab_size,
         weights.lm_head.out());
  return status;
}

}  // namespace gla
