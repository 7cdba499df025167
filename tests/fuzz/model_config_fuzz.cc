// Any bytes as config.json: refused with a message, or a config whose numbers are sane.

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "model/model_config.h"

namespace {

void Require(bool fact) {
  if (!fact) abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::StatusOr<gla::ModelConfig> config =
      gla::ModelConfig::Parse({reinterpret_cast<const char*>(data), size});
  if (!config.ok()) {
    Require(!config.status().message().empty() && config.status().message().size() < 2000);
    return 0;
  }
  Require(config->vocab_size > 0 && config->hidden_size > 0 && config->num_layers > 0);
  Require(config->num_heads > 0 && config->num_kv_heads > 0);
  Require(config->num_heads % config->num_kv_heads == 0);
  Require(config->head_key_dim > 0 && config->head_value_dim > 0);
  Require(config->feature_dim >= config->head_key_dim && config->intermediate_size > 0);
  Require(config->bos_token_id < config->vocab_size && config->eos_token_id < config->vocab_size);
  Require(config->conv_size >= 1 && config->conv_size <= 8);
  Require(config->norm_eps > 0 && config->clamp_min.value_or(0) <= 0);
  Require(config->num_parameters() > 0);
  return 0;
}
