// What every RPC works with.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

#include "base/log.h"
#include "engine/engine.h"
#include "gla/v1/inference.pb.h"
#include "model/tokenizer.h"
#include "service/call.h"
#include "telemetry/metrics.h"

namespace gla {

// The loaded model. Made by main when everything is ready; const from then on.
struct Serving {
  Engine& engine;
  const Tokenizer& tokenizer;
  v1::GetModelInfoResponse info;  // all but `sessions`; names and limits are read from here
};

// Seeds and ids: from the system's generator, or repeatable from one seed. Thread-safe.
class RandomSource {
 public:
  explicit RandomSource(std::optional<uint64_t> seed) : seed_(seed) {}
  uint64_t Seed();                    // for sampling; repeatable with a seed
  static std::string Hex(int bytes);  // for ids; always from the system

 private:
  const std::optional<uint64_t> seed_;
  std::atomic<uint64_t> count_ = 0;
};

struct ServiceContext {
  ServiceContext(Metrics& metrics, Logger& log, std::optional<uint64_t> seed)
      : metrics(metrics), log(log), random(seed) {}

  Metrics& metrics;
  Logger& log;
  RandomSource random;
  CallRegistry calls;
  // Null while the model loads: calls are answered UNAVAILABLE.
  std::atomic<const Serving*> serving = nullptr;

  // The loaded model, or Unavailable with reason LOADING.
  absl::StatusOr<const Serving*> Ready() const;
};

}  // namespace gla
