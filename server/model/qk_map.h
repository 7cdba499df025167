// The map of queries and keys before the recurrence: its kernel, and the linear layers inside it.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "kernels/device.h"
#include "kernels/kernels.h"
#include "model/model_config.h"
#include "model/weight_loader.h"

namespace gla {

// The element-wise part of a map.
FeatureMap KernelOf(QkMap map);

// Linear layers inside a feature map, applied to each head; which exist depends on the map.
struct FeatureMapWeights {
  PackedWeight layer1;  // [head_key_dim, head_key_dim]
  DeviceBuffer bias1;   // [head_key_dim]
  PackedWeight layer2;  // kElementwiseProduct only
  DeviceBuffer bias2;
  PackedWeight layer1_transposed, layer2_transposed;  // with gradients only
};

struct QkMapOptions {
  QkMap map;
  int head_key_dim;
  bool tied;  // one map for queries and keys
  bool with_gradients = false;
};
// Reads the tensors below `attn` + "feature_map_q" and "feature_map_k".
absl::Status LoadQkMaps(WeightLoader& loader, const QkMapOptions& options, const std::string& attn,
                        FeatureMapWeights& q, FeatureMapWeights& k);

}  // namespace gla
