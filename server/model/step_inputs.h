// A step plan in device memory: uploaded in one piece, and cut into runs for the recurrence.
#pragma once

#include <compare>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/device.h"
#include "kernels/kernels.h"
#include "model/step_plan.h"

namespace gla {

// Neighbouring sequences of a plan whose recurrence is computed in the same form.
struct Run {
  Sequences seqs;     // rows counted from first_row
  int first_row = 0;  // in the plan
  bool is_chunkwise = false;
};

// Where the kernels of a step find its rows and sequences.
struct StepView {
  int32_t* tokens = nullptr;            // [T]
  const int64_t* positions = nullptr;   // [T] of each row in its session
  const int32_t* logit_rows = nullptr;  // [R]
  Sequences seqs;                       // all of the step
  std::vector<Run> runs;
};

// Upper bounds of what is in a step: what its kernels are launched for, so that one recording of
// them serves many plans. The rows and sequences beyond the plan's own are of no token and no slot.
struct StepShape {
  int rows, seqs, max_len;
  auto operator<=>(const StepShape&) const = default;

  // Of a plan without decode rows, in coarse numbers. None for so many rows that launches take less
  // time than what they launch, and for very many sequences.
  static std::optional<StepShape> Around(const StepPlan& plan, int max_rows, int max_seqs);
  // All that Around() may give.
  static std::vector<StepShape> All(int max_rows, int max_seqs);
};

class StepInputs : public StepView {
 public:
  // Room for plans of at most this many rows, sequences and logit rows; see ok().
  StepInputs(Device& device, int max_rows, int max_seqs, int max_logit_rows);
  bool ok() const { return buffer_.ok(); }

  // Queues the upload. With `chunkwise` the sequences that are not decode rows are in chunkwise
  // runs, otherwise all are in runs of the recurrent form: the form does not depend on the other
  // sequences of the plan, so the bits do not. A run has at most `max_run_seqs` sequences. What the
  // members point to is valid until the next Set. With `shape` (one run only) the members are those
  // of a step of that shape, and all but logit_rows depend on it alone.
  void Set(const StepPlan& plan, bool chunkwise, int max_run_seqs,
           const std::optional<StepShape>& shape);

 private:
  Device& device_;
  DeviceBuffer buffer_;
  std::vector<int64_t> staging_;  // positions, then everything else as int32
};

}  // namespace gla
