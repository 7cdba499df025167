// Models and a device for tests: a tiny random one, made in no time, and the trained bard-6m.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "model/checkpoint.h"
#include "model/model.h"
#include "model/model_config.h"

namespace gla {

inline const std::string kBardFolder = GLA_SOURCE_DIR "/deploy/models/bard-6m";

// The value, or the end of the test program with the error.
template <typename T>
T ValueOrDie(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::fprintf(stderr, "%s\n", value.status().ToString().c_str());
    std::abort();
  }
  return *std::move(value);
}

// The backend's device with poisoned memory: reading what nobody wrote gives NaN.
inline std::unique_ptr<Device> OpenTestDevice() {
  std::string error;
  std::unique_ptr<Device> device = Device::Open({.num_threads = 2, .poison = true}, &error);
  if (device == nullptr) {
    std::fprintf(stderr, "no device: %s\n", error.c_str());
    std::abort();
  }
  return device;
}

// GLA, 2 layers, hidden 64, 2 heads with K 16 and V 32. The vocabulary is bard-6m's, so that its
// tokenizer fits.
inline ModelConfig TinyConfig() {
  ModelConfig config;
  config.vocab_size = 2048;
  config.hidden_size = 64;
  config.num_layers = 2;
  config.num_heads = config.num_kv_heads = 2;
  config.head_key_dim = config.feature_dim = 16;
  config.head_value_dim = 32;
  config.intermediate_size = 128;
  config.bos_token_id = 1;
  config.eos_token_id = 2;
  config.eos_token_ids = {2};
  return config;
}

// Random weights, the same for the same seed and config.
inline std::unique_ptr<Model> MakeTinyModel(Device& device, const ModelOptions& options = {},
                                            uint64_t seed = 1,
                                            const ModelConfig& config = TinyConfig()) {
  return ValueOrDie(Model::Random(device, config, seed, options));
}

inline std::unique_ptr<Model> LoadModel(Device& device, const std::string& folder,
                                        const ModelOptions& options = {}) {
  const ModelConfig config = ValueOrDie(ModelConfig::Load(folder));
  Checkpoint checkpoint = ValueOrDie(Checkpoint::Open(folder));
  return ValueOrDie(Model::Load(device, config, checkpoint, options));
}

inline std::unique_ptr<Model> LoadBard(Device& device, const ModelOptions& options = {}) {
  return LoadModel(device, kBardFolder, options);
}

}  // namespace gla
