// Who runs in the next step. Pure: no device, no clock.
//
// Every sequence that generates gets its one row each step; what is left of the budget goes to
// prompts, oldest first. Nothing depends on a sequence's contents, and what a sequence is fed does
// not depend on who else runs.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "engine/sequence.h"
#include "model/step_plan.h"

namespace gla {

struct SchedulerOptions {
  int max_num_seqs = 64;
  int max_num_batched_tokens = 2048;  // rows of a step; at least max_num_seqs (+ 63, see below)
  int max_prefill_chunk = 512;        // rows of one prompt in a step
  int max_logit_rows = 256;           // at least max_num_seqs (+ 63)
  // Prompts are cut only at multiples of 64 rows from their beginning (and a single last row stands
  // alone), for a model whose bits depend on the cut. The bounds above then need 63 more, and a
  // chunk at least 64, so that a prompt always gets on.
  bool align_chunks = false;
};

// The rows of one sequence in a step.
struct StepPart {
  Sequence* sequence;
  int first_row;  // among the plan's rows
  int num_rows;
  int first_logit;  // among the plan's logit rows
  int num_logits;
};

struct Step {
  StepPlan plan;
  std::vector<StepPart> parts;  // the plan's sequences in order: generating, prompts, scorings
  int num_samples = 0;          // the first logit rows belong to generations, the rest to scorings
  int num_prompt_rows = 0;
  int num_score_rows = 0;

  // Rows without logits have to be judged by themselves: is what came out of them finite?
  bool judges_rows() const { return plan.num_logit_rows() < plan.num_rows(); }
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);

  // At the end of the queue.
  void Enqueue(std::unique_ptr<Sequence> sequence);
  // The next one of the queue, which runs from now on; null when none waits or all places are
  // taken. Who calls gives it a slot.
  Sequence* AdmitNext();
  // Takes a sequence out, queued or running.
  std::unique_ptr<Sequence> Remove(const Sequence& sequence);

  // REQUIRES: num_running() > 0. The step has at least one row.
  Step Plan() const;

  // Running sequences, oldest first, then waiting ones.
  std::vector<Sequence*> All() const;
  bool is_empty() const { return running_.empty() && waiting_.empty(); }
  int num_running() const { return static_cast<int>(running_.size()); }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }

 private:
  int ChunkRows(const Sequence& sequence, int64_t budget) const;

  const SchedulerOptions options_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of admission
  std::deque<std::unique_ptr<Sequence>> waiting_;
};

}  // namespace gla
