// tokenizer.model, the format of the SentencePiece library.
#pragma once

#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "model/tokenizer.h"
#include "model/tokenizer/tokenizer_config.h"

namespace gla {

// The tokenizer of the file's bytes. Text is encoded by the library; special tokens in the text
// (the model's control pieces and the configuration's added tokens) are cut out before. Without a
// word in `config` the begin token is added, where there is one, and the end token is not.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseSentencePiece(std::string_view model,
                                                              const TokenizerConfig& config);

}  // namespace gla
