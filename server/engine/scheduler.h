// Who runs in the next step. Pure: no device, no clock.
//
// Every sequence that generates gets its one row each step; what is left of the budget goes to
// prompts, oldest first. A step can be planned while the one before it is queued: a token that is
// not known yet goes by its place among that step's samples. Nothing depends on a sequence's
// contents, and what a sequence is fed does not depend on who else runs.
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
  // Prompts are cut only at multiples of 64 rows from their beginning, for a model whose bits
  // depend on cuts elsewhere. The bounds above then need 63 more, and a chunk at least 64, so that
  // a prompt always gets on.
  bool align_chunks = false;
  // Prompts are cut only at multiples of max_prefill_chunk (scorings: at most max_logit_rows -
  // max_num_seqs) rows, for a model whose bits depend on any cut. Needs max_num_seqs +
  // max_prefill_chunk <= max_num_batched_tokens.
  bool whole_chunks = false;
};

// The rows of one sequence in a step.
struct StepPart {
  Sequence* sequence;  // may be gone when the step's results come: then `id` is not known any more
  RequestId id;
  int64_t start;  // its tokens before these
  int counter;    // the index of the token that is sampled; -1: none that anyone wants
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
  bool has_sessions = false;

  bool is_empty() const { return parts.empty(); }
  // Rows have to be judged by themselves (is what came out of them finite?) where there are no
  // logits, and where a row may turn out to be a session's last: its logits do not matter then.
  bool judges_rows() const { return has_sessions || plan.num_logit_rows() < plan.num_rows(); }
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

  // The next step, which counts as queued from now on (Sequence::planned, num_asked). Empty when
  // everyone waits for the step that is queued already.
  // REQUIRES: at most one step is queued whose results are not known.
  Step Plan();
  // Whether a running sequence needs to know its last token before the next step.
  bool waits_for_tokens() const;

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
