// Recordings of a step's kernels, for each of a few sizes of it: of the decode rows, and of others
// as long as launching them would take longer than they run.
//
// A recording is made for upper bounds (StepShape, rounded numbers of rows). What is beyond a
// plan's own rows is computed for nothing: rows of token 0 that belong to no sequence, sequences of
// no rows and no slots.
#include "model/model_impl.h"

namespace gla {

void Model::Impl::Record(char* states) {
  if (!MayRecord()) return;
  for (int least = 1; least <= options.max_seqs;) {
    const int rows = RoundedDecodeRows(least);
    RecordDecode(rows, states);
    least = rows + 1;
  }
  for (const StepShape& shape : StepShape::All(options.max_rows, max_shape_seqs())) {
    RecordRows(shape, states);
  }
  // What follows the recordings chooses its algorithms when it is first met: a token of no session.
  StepPlan plan;
  plan.tokens = plan.logit_rows = {0};
  plan.cu_seqlens = {0, 1};
  plan.read_slots = plan.write_slots = {-1};
  plan.start_positions = {0};
  Forward(plan, states, nullptr, nullptr);
}

// A first run outside of the recording, which touches no slot, loads the kernels' code.

void Model::Impl::RecordDecode(int rows, char* states) {
  ForgetRecordings(states);
  if (recordings.count(rows) > 0) return;
  const auto work = [this, rows, states] { QueueDecode(rows, states); };
  decode_inputs->SetEmpty(rows);
  work();
  recordings.emplace(rows, Recording(device, work));
}

void Model::Impl::RecordRows(const StepShape& shape, char* states) {
  ForgetRecordings(states);
  if (row_recordings.count(shape) > 0) return;
  const auto work = [this, rows = shape.rows, states] {
    step = &*inputs;
    Layers(rows, states);
  };
  inputs->Set({}, is_chunkwise(), max_run_seqs(), shape);
  work();
  row_recordings.emplace(shape, Recording(device, work));
}

void Model::Impl::ForgetRecordings(const char* states) {
  if (states == recorded_states) return;
  recordings.clear();
  row_recordings.clear();
  recorded_states = states;
}

}  // namespace gla
