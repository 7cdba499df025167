// The next step of the model as flat host arrays. Made by the engine's scheduler, read by the
// model.
#pragma once

#include <cstdint>
#include <vector>

namespace gla {

// N sequences with T rows (tokens) in all, packed; see Sequences in kernels/kernels.h for the
// slots.
struct StepPlan {
  std::vector<int32_t> tokens;            // [T]
  std::vector<int32_t> cu_seqlens = {0};  // [N + 1]
  std::vector<int32_t> read_slots;        // [N]; -1: starts from the empty state
  std::vector<int32_t> write_slots;       // [N]; -1: the final state is dropped
  std::vector<int64_t> start_positions;   // [N] position of the first row in its session (rotary)
  std::vector<int32_t> logit_rows;        // [R] rows whose logits are wanted, ascending

  int num_rows() const { return static_cast<int>(tokens.size()); }
  int num_seqs() const { return static_cast<int>(read_slots.size()); }
  int num_logit_rows() const { return static_cast<int>(logit_rows.size()); }
  void Clear() { *this = StepPlan(); }
};

}  // namespace gla
