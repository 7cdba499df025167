// The next step of the model as flat host arrays. Made by the engine's scheduler, read by the
// model.
#pragma once

#include <cstdint>
#include <vector>

namespace gla {

// N sequences with T rows (tokens) in all, packed; see Sequences in kernels/kernels.h for the
// slots.
struct StepPlan {
  // [T]. One below 0 is what the step before sampled: ~i stands for the i-th of its samples, see
  // Model::Forward.
  std::vector<int32_t> tokens;
  std::vector<int32_t> cu_seqlens = {0};  // [N + 1]
  std::vector<int32_t> read_slots;        // [N]; -1: starts from the empty state
  std::vector<int32_t> write_slots;       // [N]; -1: the final state is dropped
  std::vector<int64_t> start_positions;   // [N] position of the first row in its session (rotary)
  std::vector<int32_t> logit_rows;        // [R] rows whose logits are wanted, ascending
  // The first sequences that generate: one row each, which has logits. A row's bits may depend on
  // whether it is one of these, never on the other rows of the step.
  int num_decode = 0;

  int num_rows() const { return static_cast<int>(tokens.size()); }
  int num_seqs() const { return static_cast<int>(read_slots.size()); }
  int num_logit_rows() const { return static_cast<int>(logit_rows.size()); }
  void Clear() { *this = StepPlan(); }
};

}  // namespace gla
