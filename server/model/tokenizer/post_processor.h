// The post-processor of tokenizer.json: the tokens it puts around a text.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"

namespace gla {

struct PostProcessor {
  int32_t bos_id = -1;  // -1: none
  int32_t eos_id = -1;

  // null, Sequence, ByteLevel, TemplateProcessing with at most one token on each side.
  static absl::StatusOr<PostProcessor> Parse(const nlohmann::json& value, int vocab_size);
};

}  // namespace gla
