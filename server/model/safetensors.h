// The safetensors format: what one file's bytes hold, every rule of the format checked.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "model/checkpoint.h"

namespace gla {

struct Safetensors {
  std::vector<TensorView> tensors;  // in the order of their data; views into the bytes parsed
  absl::flat_hash_map<std::string, std::string> metadata;  // "__metadata__"
};

// Parses a whole file. InvalidArgument names the tensor, what was expected and what was found. At
// most 100,000 tensors of at most 8 dimensions; an unknown dtype, a field that is not the format's,
// or a name given twice is refused.
absl::StatusOr<Safetensors> ParseSafetensors(std::string_view file);

}  // namespace gla
