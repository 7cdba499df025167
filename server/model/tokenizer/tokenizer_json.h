// tokenizer.json, the format of Hugging Face's tokenizers library.
#pragma once

#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "model/tokenizer.h"
#include "model/tokenizer/tokenizer_config.h"

namespace gla {

// The tokenizer of the file's text. BPE models only; InvalidArgument names the part that is
// malformed or not supported. `config` decides about begin and end tokens where it says something;
// else the file's post-processor does.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizerJson(std::string_view json,
                                                              const TokenizerConfig& config);

}  // namespace gla
