// The decode rows of a step in device memory, always at the same place, so that kernels which were
// recorded once find them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/device.h"
#include "model/step_inputs.h"
#include "model/step_plan.h"

namespace gla {

// The number of rows that `rows` decode rows are run as: a few sizes, so that few recordings serve
// all.
int RoundedDecodeRows(int rows);

class DecodeInputs : public StepView {
 public:
  // Runs have at most `max_run_seqs` sequences. REQUIRES: `max_rows` is a rounded number.
  DecodeInputs(Device& device, int max_rows, int max_run_seqs);
  bool ok() const { return buffer_.ok(); }

  // Queues the upload of the plan's first plan.num_decode sequences, and of rows without slots up
  // to the rounded number. Where the view points depends on that number alone.
  void Set(const StepPlan& plan);
  // The same with `rows` rows without slots.
  void SetEmpty(int rows);

 private:
  void Set(const StepPlan& plan, int decode, int rows);

  Device& device_;
  const int max_run_seqs_;
  DeviceBuffer buffer_;           // [cu_seqlens | positions | tokens | read slots | write slots]
  std::vector<int64_t> staging_;  // positions, then the rest as int32
};

}  // namespace gla
