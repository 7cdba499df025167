// The parts of the server that need the checkpoint: device, model, tokenizer, engine, in the order
// in which they can be had.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/log.h"
#include "config.h"
#include "engine/engine.h"
#include "kernels/device.h"
#include "model/model.h"
#include "model/model_config.h"
#include "model/tokenizer.h"
#include "service/context.h"
#include "telemetry/metrics.h"

namespace gla {

// What is known in a moment: enough for metrics, so that the ports open before the weights are
// read.
struct Ground {
  std::unique_ptr<Device> device;
  ModelConfig model_config;
  StaticFacts facts;
};
absl::StatusOr<Ground> OpenGround(const Config& config);

enum class ServingState { kLoading, kReady, kDraining };

// The loaded checkpoint and its engine. Load() and SetState() belong to one thread; the questions
// come from any.
class Loaded {
 public:
  // Reads weights and tokenizer, sizes the states, starts the engine and lets it prove itself.
  absl::Status Load(const Config& config, Ground& ground, Metrics& metrics, Logger& log);

  Engine& engine() { return *engine_; }  // REQUIRES: Load() was ok; so for the next
  const Serving& serving() const { return *serving_; }

  void SetState(ServingState state) { state_ = state; }
  // Why not, or empty.
  std::string NotReady() const;
  std::string NotLive() const;

 private:
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Engine> engine_;
  std::optional<Serving> serving_;
  std::atomic<const Engine*> started_ = nullptr;
  std::atomic<ServingState> state_ = ServingState::kLoading;
};

std::string VersionText();

}  // namespace gla
