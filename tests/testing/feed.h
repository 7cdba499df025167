// Feeds tokens to a model by slots and brings the logits back: what tests need of an engine.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/model.h"

namespace gla {

// Tokens for the sequence in `slot`, after what it has been fed before; or from the empty state.
struct Feed {
  int slot = 0;
  std::vector<int32_t> tokens;
  bool fresh = false;
};

enum class LogitRows { kAll, kLast };  // of every row, or of each feed's last row

class Feeder {
 public:
  static absl::StatusOr<Feeder> Create(Device& device, Model& model, int num_slots) {
    Feeder feeder(device, model, num_slots);
    if (feeder.states_.ok()) return feeder;
    return absl::ResourceExhaustedError("no device memory for the states");
  }

  // One step of the model; the logits' rows one after another. The first `num_decode` feeds, of one
  // token each, are decode rows.
  std::vector<float> Step(const std::vector<Feed>& feeds, LogitRows rows, int num_decode = 0) {
    StepPlan plan;
    plan.num_decode = num_decode;
    for (const Feed& feed : feeds) {
      int64_t& position = positions_[feed.slot];
      if (feed.fresh) position = 0;
      plan.read_slots.push_back(feed.fresh ? -1 : feed.slot);
      plan.write_slots.push_back(feed.slot);
      plan.start_positions.push_back(position);
      position += static_cast<int64_t>(feed.tokens.size());
      for (size_t i = 0; i < feed.tokens.size(); ++i) {
        const bool is_last = i + 1 == feed.tokens.size();
        if (rows == LogitRows::kAll || is_last) plan.logit_rows.push_back(plan.num_rows());
        plan.tokens.push_back(feed.tokens[i]);
      }
      plan.cu_seqlens.push_back(plan.num_rows());
    }
    return Run(plan);
  }

  std::vector<float> Run(const StepPlan& plan, const int32_t* sampled = nullptr) {
    const float* logits = model_->Forward(plan, states_.data(), nullptr, sampled);
    std::vector<float> host(plan.logit_rows.size() * model_->config().vocab_size);
    device_->Download(host.data(), logits, host.size() * sizeof(float));
    return host;
  }

  void* states() const { return states_.data(); }
  // The bytes of a slot, as floats whatever they are.
  std::vector<float> State(int slot) const {
    const int64_t bytes = model_->state_bytes();
    std::vector<float> host(bytes / sizeof(float));
    device_->Download(host.data(), states_.as<char>() + slot * bytes, bytes);
    return host;
  }

 private:
  Feeder(Device& device, Model& model, int num_slots)
      : device_(&device),
        model_(&model),
        states_(device, static_cast<size_t>(num_slots * model.state_bytes())),
        positions_(num_slots) {}

  Device* device_;
  Model* model_;
  DeviceBuffer states_;
  std::vector<int64_t> positions_;  // per slot
};

// The largest value's index, the lowest on a tie; -1 when a value is NaN.
inline int32_t ArgMax(const float* values, int64_t count) {
  int32_t best = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] != values[i]) return -1;
    if (values[i] > values[best]) best = static_cast<int32_t>(i);
  }
  return best;
}

}  // namespace gla
