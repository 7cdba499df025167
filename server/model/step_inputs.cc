#include "model/step_inputs.h"

#include <algorithm>

namespace gla {
namespace {

// Positions, then tokens, cu_seqlens (whole, and again per run), slots and logit rows.
size_t Capacity(size_t rows, size_t seqs, size_t logit_rows) {
  const size_t ints = rows + (seqs + 1) + 2 * seqs + 2 * seqs + logit_rows;
  return rows + (ints + 1) / 2;
}

// Sequences [first, end) of a plan.
struct Range {
  int first, end;
  bool is_chunkwise;
};

std::vector<Range> CutIntoRanges(const StepPlan& plan, bool chunkwise, int max_run_seqs) {
  std::vector<Range> ranges;
  for (int n = 0; n < plan.num_seqs(); ++n) {
    const bool in_tiles = chunkwise && n >= plan.num_decode;
    if (ranges.empty() || ranges.back().is_chunkwise != in_tiles ||
        n - ranges.back().first == max_run_seqs) {
      ranges.push_back({n, n, in_tiles});
    }
    ranges.back().end = n + 1;
  }
  return ranges;
}

}  // namespace

StepInputs::StepInputs(Device& device, int max_rows, int max_seqs, int max_logit_rows)
    : device_(device),
      buffer_(device, sizeof(int64_t) * Capacity(max_rows, max_seqs, max_logit_rows)),
      staging_(Capacity(max_rows, max_seqs, max_logit_rows)) {}

void StepInputs::Set(const StepPlan& plan, bool chunkwise, int max_run_seqs) {
  const int num_rows = plan.num_rows();
  const int num_seqs = plan.num_seqs();
  const std::vector<int32_t>& cu = plan.cu_seqlens;

  int64_t* next_position = staging_.data();
  for (int n = 0; n < num_seqs; ++n) {
    for (int t = cu[n]; t < cu[n + 1]; ++t) *next_position++ = plan.start_positions[n] + t - cu[n];
  }
  auto* const ints = reinterpret_cast<int32_t*>(staging_.data() + num_rows);
  auto* const device_ints = reinterpret_cast<int32_t*>(buffer_.as<int64_t>() + num_rows);
  int32_t* next = ints;
  // Appends to the staging memory; returns where the values will be on the device.
  const auto add = [&](const int32_t* values, size_t count) {
    int32_t* const there = device_ints + (next - ints);
    next = std::copy_n(values, count, next);
    return there;
  };

  positions = buffer_.as<int64_t>();
  tokens = add(plan.tokens.data(), plan.tokens.size());
  logit_rows = add(plan.logit_rows.data(), plan.logit_rows.size());
  const int32_t* const read_slots = add(plan.read_slots.data(), num_seqs);
  const int32_t* const write_slots = add(plan.write_slots.data(), num_seqs);
  // Sequences [first, end), their rows counted from the first one's first row.
  const auto sequences = [&](int first, int end) {
    Sequences out{add(cu.data() + first, end - first + 1),
                  read_slots + first,
                  write_slots + first,
                  end - first,
                  cu[end] - cu[first],
                  0};
    for (int32_t* it = next - (end - first + 1); it != next; ++it) *it -= cu[first];
    for (int n = first; n < end; ++n) out.max_len = std::max(out.max_len, cu[n + 1] - cu[n]);
    return out;
  };
  seqs = sequences(0, num_seqs);
  runs.clear();
  for (const Range& range : CutIntoRanges(plan, chunkwise, max_run_seqs)) {
    const bool is_all = range.first == 0 && range.end == num_seqs;
    runs.push_back(
        {is_all ? seqs : sequences(range.first, range.end), cu[range.first], range.is_chunkwise});
  }
  const size_t bytes = sizeof(int64_t) * num_rows + sizeof(int32_t) * (next - ints);
  device_.Upload(buffer_.data(), staging_.data(), bytes);
}

}  // namespace gla
