#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

namespace gla {
namespace {

constexpr int kTile = 64;  // rows of a tile of the chunkwise form

// Takes `sequence` out of `from`; null when it is not there.
template <typename Container>
std::unique_ptr<Sequence> TakeOut(Container& from, const Sequence& sequence) {
  const auto it = std::find_if(from.begin(), from.end(),
                               [&](const auto& owned) { return owned.get() == &sequence; });
  if (it == from.end()) return nullptr;
  std::unique_ptr<Sequence> taken = std::move(*it);
  from.erase(it);
  return taken;
}

void AddLogitRows(int first_row, int count, StepPlan& plan) {
  for (int i = 0; i < count; ++i) plan.logit_rows.push_back(first_row + i);
}

// Lays the next rows of `sequence` out at the end of the step.
void AddPart(Sequence& sequence, int num_rows, Step& step) {
  StepPlan& plan = step.plan;
  const int first_row = plan.num_rows();
  StepPart part = {.sequence = &sequence,
                   .id = sequence.id,
                   .start = sequence.planned,
                   .counter = -1,
                   .first_row = first_row,
                   .num_rows = num_rows,
                   .first_logit = plan.num_logit_rows(),
                   .num_logits = 1};
  bool samples = !sequence.is_score;
  if (sequence.wants_prompt_rows()) {
    const auto begin = sequence.params.prompt.begin() + sequence.planned;
    plan.tokens.insert(plan.tokens.end(), begin, begin + num_rows);
    samples &= sequence.planned + num_rows == sequence.prompt_rows();
    part.num_logits = sequence.is_score ? num_rows : samples ? 1 : 0;
    (sequence.is_score ? step.num_score_rows : step.num_prompt_rows) += num_rows;
  } else {
    plan.tokens.push_back(sequence.last_token);
    samples = !sequence.knows_last_token();
    ++plan.num_decode;
  }
  AddLogitRows(first_row + num_rows - part.num_logits, part.num_logits, plan);
  if (!sequence.is_score) step.num_samples += part.num_logits;
  step.has_sessions |= sequence.session != nullptr;
  plan.cu_seqlens.push_back(plan.num_rows());
  plan.read_slots.push_back(sequence.read_slot());
  plan.write_slots.push_back(sequence.slot.index());
  plan.start_positions.push_back(sequence.start_position + sequence.planned);
  sequence.planned += num_rows;
  if (samples) {
    part.counter = sequence.num_asked++;
    sequence.last_token = ~part.first_logit;
  }
  step.parts.push_back(part);
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options) : options_(options) {}

void Scheduler::Enqueue(std::unique_ptr<Sequence> sequence) {
  waiting_.push_back(std::move(sequence));
}

Sequence* Scheduler::AdmitNext() {
  if (waiting_.empty() || num_running() >= options_.max_num_seqs) return nullptr;
  running_.push_back(std::move(waiting_.front()));
  waiting_.pop_front();
  return running_.back().get();
}

std::unique_ptr<Sequence> Scheduler::Remove(const Sequence& sequence) {
  std::unique_ptr<Sequence> taken = TakeOut(running_, sequence);
  return taken != nullptr ? std::move(taken) : TakeOut(waiting_, sequence);
}

std::vector<Sequence*> Scheduler::All() const {
  std::vector<Sequence*> all;
  all.reserve(running_.size() + waiting_.size());
  for (const auto& sequence : running_) all.push_back(sequence.get());
  for (const auto& sequence : waiting_) all.push_back(sequence.get());
  return all;
}

bool Scheduler::waits_for_tokens() const {
  return std::any_of(running_.begin(), running_.end(),
                     [](const auto& sequence) { return sequence->waits_for_token(); });
}

Step Scheduler::Plan() {
  Step step;
  int num_scorings = 0;
  for (const auto& sequence : running_) {
    num_scorings += sequence->is_score;
    if (sequence->wants_decode_row()) AddPart(*sequence, 1, step);
  }
  // A place among the logits is kept for every generation; scorings share the others.
  int64_t rows_left = options_.max_num_batched_tokens - step.plan.num_rows();
  int64_t score_rows_left = options_.max_logit_rows - (num_running() - num_scorings);
  std::vector<std::pair<Sequence*, int>> scorings;
  for (const auto& sequence : running_) {
    if (!sequence->wants_prompt_rows()) continue;
    const int64_t budget = sequence->is_score ? std::min(rows_left, score_rows_left) : rows_left;
    const int rows = ChunkRows(*sequence, budget);
    if (rows == 0) continue;
    rows_left -= rows;
    if (sequence->is_score) {
      score_rows_left -= rows;
      scorings.emplace_back(sequence.get(), rows);
    } else {
      AddPart(*sequence, rows, step);
    }
  }
  for (const auto& [sequence, rows] : scorings) AddPart(*sequence, rows, step);
  return step;
}

int Scheduler::ChunkRows(const Sequence& sequence, int64_t budget) const {
  const int64_t left = sequence.prompt_rows() - sequence.planned;
  int64_t most = options_.max_prefill_chunk;
  if (options_.whole_chunks && sequence.is_score) {
    most = std::min<int64_t>(most, options_.max_logit_rows - options_.max_num_seqs);
  }
  int64_t rows = std::min(left, options_.whole_chunks ? most : std::min(budget, most));
  if (options_.align_chunks && rows < left) rows -= rows % kTile;
  return rows <= budget ? static_cast<int>(rows) : 0;
}

}  // namespace gla
