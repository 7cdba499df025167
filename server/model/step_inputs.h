// A step plan in device memory: uploaded in one piece, and cut into runs for the recurrence.
#pragma once

#include <cstdint>
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

class StepInputs : public StepView {
 public:
  // Room for plans of at most this many rows, sequences and logit rows; see ok().
  StepInputs(Device& device, int max_rows, int max_seqs, int max_logit_rows);
  bool ok() const { return buffer_.ok(); }

  // Queues the upload. With `chunkwise` the sequences that are not decode rows are in chunkwise
  // runs, otherwise all are in runs of the recurrent form: the form does not depend on the other
  // sequences of the plan, so the bits do not. A run has at most `max_run_seqs` sequences. What the
  // members point to is valid until the next Set.
  void Set(const StepPlan& plan, bool chunkwise, int max_run_seqs);

 private:
  Device& device_;
  DeviceBuffer buffer_;
  std::vector<int64_t> staging_;  // positions, then everything else as int32
};

}  // namespace gla
