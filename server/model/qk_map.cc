#include "model/qk_map.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "base/status_macros.h"

namespace gla {
namespace {

// The tensors of a feature map, below its own name.
struct MapTensor {
  std::string name;
  std::vector<int64_t> shape;
};
std::vector<MapTensor> MapTensors(const QkMapOptions& options) {
  const int64_t dim = options.head_key_dim;
  switch (options.map) {
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

absl::Status LoadMap(WeightLoader& loader, const QkMapOptions& options, const std::string& prefix,
                     FeatureMapWeights& out) {
  PackedWeight* matrix = &out.layer1;
  PackedWeight* transposed = &out.layer1_transposed;
  DeviceBuffer* bias = &out.bias1;
  for (const MapTensor& tensor : MapTensors(options)) {
    const std::string name = prefix + tensor.name;
    if (tensor.shape.size() == 1) {
      GLA_ASSIGN_OR_RETURN(*bias, loader.Vector(name, tensor.shape[0]));
      bias = &out.bias2;
      continue;
    }
    const std::vector<WeightLoader::Block> block = {{name, tensor.shape[0]}};
    if (options.with_gradients) {
      GLA_ASSIGN_OR_RETURN(WeightLoader::Pair pair, loader.MatrixPair(block, tensor.shape[1]));
      *matrix = std::move(pair.forward);
      *transposed = std::move(pair.transposed);
    } else {
      GLA_ASSIGN_OR_RETURN(*matrix, loader.Matrix(block, tensor.shape[1]));
    }
    matrix = &out.layer2;
    transposed = &out.layer2_transposed;
  }
  return absl::OkStatus();
}

}  // namespace

FeatureMap KernelOf(QkMap map) {
  switch (map) {
    case QkMap::kRelu:
    case QkMap::kT2r:
      return FeatureMap::kRelu;
    case QkMap::kElu:
      return FeatureMap::kElu;
    case QkMap::kSilu:
      return FeatureMap::kSilu;
    case QkMap::kSigmoid:
      return FeatureMap::kSigmoid;
    case QkMap::kSquaredRelu:
      return FeatureMap::kSquaredRelu;
    case QkMap::kGelu:
      return FeatureMap::kGelu;
    case QkMap::kElementwiseProduct:
      return FeatureMap::kProduct;
    case QkMap::kHedgehog:
      return FeatureMap::kSoftmax2;
    case QkMap::kDpfp:
      return FeatureMap::kDpfp;
    case QkMap::kNone:
    case QkMap::kIdentity:
      return FeatureMap::kIdentity;
  }
  return FeatureMap::kIdentity;
}

absl::Status LoadQkMaps(WeightLoader& loader, const QkMapOptions& options, const std::string& attn,
                        FeatureMapWeights& q_map, FeatureMapWeights& k_map) {
  const std::string q = attn + "feature_map_q", k = attn + "feature_map_k";
  std::string q_from = q, k_from = k;
  if (options.tied) {
    // One map under two names, of which a file may list either, or both with the same values.
    bool lists_q = false, lists_k = false;
    for (const MapTensor& tensor : MapTensors(options)) {
      lists_q = lists_q || loader.Lists(q + tensor.name);
      lists_k = lists_k || loader.Lists(k + tensor.name);
    }
    q_from = k_from = lists_k && !lists_q ? k : q;
    if (lists_q && lists_k) {
      for (const MapTensor& tensor : MapTensors(options)) {
        GLA_RETURN_IF_ERROR(loader.CheckSame(q + tensor.name, k + tensor.name, tensor.shape));
      }
    }
  }
  GLA_RETURN_IF_ERROR(LoadMap(loader, options, q_from, q_map));
  return LoadMap(loader, options, k_from, k_map);
}

}  // namespace gla
