#include "model/step_inputs.h"

#include <algorithm>
#include <array>
#include <set>

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

// Of a StepShape.
constexpr int kMostShapeRows = 1024;
constexpr int kShortLength = 512;  // of sequences that are not cut into segments
constexpr std::array<int, 3> kShapeSeqs = {1, 8, 64};

int RoundedRows(int rows) {
  const int step = rows <= 512 ? 64 : 128;
  return (rows + step - 1) / step * step;
}

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

std::optional<StepShape> StepShape::Around(const StepPlan& plan, int max_rows, int max_seqs) {
  const int rows = plan.num_rows(), num_seqs = plan.num_seqs();
  if (rows > kMostShapeRows || num_seqs > kShapeSeqs.back()) return std::nullopt;
  const int seqs = *std::lower_bound(kShapeSeqs.begin(), kShapeSeqs.end(), num_seqs);
  int longest = 0;
  for (int n = 0; n < num_seqs; ++n) {
    longest = std::max(longest, plan.cu_seqlens[n + 1] - plan.cu_seqlens[n]);
  }
  const int shape_rows = std::min(RoundedRows(rows), max_rows);
  return StepShape{
      .rows = shape_rows,
      .seqs = std::min(seqs, max_seqs),
      .max_len = longest <= kShortLength ? std::min(kShortLength, shape_rows) : shape_rows};
}

std::vector<StepShape> StepShape::All(int max_rows, int max_seqs) {
  std::set<StepShape> shapes;
  for (int least = 1; least <= std::min(kMostShapeRows, max_rows);) {
    const int rows = std::min(RoundedRows(least), max_rows);
    int fewer = 0;  // sequences than `seqs` stands for
    for (const int seqs : kShapeSeqs) {
      if (fewer >= std::min(max_seqs, rows)) break;
      shapes.insert({rows, std::min(seqs, max_seqs), rows});
      if (seqs > 1) shapes.insert({rows, std::min(seqs, max_seqs), std::min(kShortLength, rows)});
      fewer = seqs;
    }
    least = rows + 1;
  }
  return {shapes.begin(), shapes.end()};
}

StepInputs::StepInputs(Device& device, int max_rows, int max_seqs, int max_logit_rows)
    : device_(device),
      buffer_(device, sizeof(int64_t) * Capacity(max_rows, max_seqs, max_logit_rows)),
      staging_(Capacity(max_rows, max_seqs, max_logit_rows)) {}

void StepInputs::Set(const StepPlan& plan, bool chunkwise, int max_run_seqs,
                     const std::optional<StepShape>& shape) {
  const int num_seqs = plan.num_seqs();
  const int rows = shape.has_value() ? shape->rows : plan.num_rows();
  const int all_seqs = shape.has_value() ? shape->seqs : num_seqs;
  const std::vector<int32_t>& cu = plan.cu_seqlens;

  int64_t* next_position = staging_.data();
  for (int n = 0; n < num_seqs; ++n) {
    for (int t = cu[n]; t < cu[n + 1]; ++t) *next_position++ = plan.start_positions[n] + t - cu[n];
  }
  std::fill(next_position, staging_.data() + rows, 0);
  auto* const ints = reinterpret_cast<int32_t*>(staging_.data() + rows);
  auto* const device_ints = reinterpret_cast<int32_t*>(buffer_.as<int64_t>() + rows);
  int32_t* next = ints;
  // Appends to the staging memory, `filler` up to `size`; returns where the values will be on the
  // device.
  const auto add = [&](const int32_t* values, int count, int size, int32_t filler) {
    int32_t* const there = device_ints + (next - ints);
    next = std::fill_n(std::copy_n(values, count, next), size - count, filler);
    return there;
  };

  positions = buffer_.as<int64_t>();
  tokens = add(plan.tokens.data(), plan.num_rows(), rows, 0);
  const int32_t* const read_slots = add(plan.read_slots.data(), num_seqs, all_seqs, -1);
  const int32_t* const write_slots = add(plan.write_slots.data(), num_seqs, all_seqs, -1);
  runs.clear();
  if (shape.has_value()) {
    seqs = {.cu_seqlens = add(cu.data(), num_seqs + 1, all_seqs + 1, cu[num_seqs]),
            .read_slots = read_slots,
            .write_slots = write_slots,
            .num_seqs = all_seqs,
            .num_rows = rows,
            .max_len = shape->max_len};
    runs.push_back({seqs, 0, chunkwise});
  } else {
    // Sequences [first, end), their rows counted from the first one's first row.
    const auto sequences = [&](int first, int end) {
      const int count = end - first;
      Sequences out{.cu_seqlens = add(cu.data() + first, count + 1, count + 1, 0),
                    .read_slots = read_slots + first,
                    .write_slots = write_slots + first,
                    .num_seqs = count,
                    .num_rows = cu[end] - cu[first],
                    .max_len = 0};
      for (int32_t* it = next - (count + 1); it != next; ++it) *it -= cu[first];
      for (int n = first; n < end; ++n) out.max_len = std::max(out.max_len, cu[n + 1] - cu[n]);
      return out;
    };
    seqs = sequences(0, num_seqs);
    for (const Range& range : CutIntoRanges(plan, chunkwise, max_run_seqs)) {
      const bool is_all = range.first == 0 && range.end == num_seqs;
      runs.push_back(
          {is_all ? seqs : sequences(range.first, range.end), cu[range.first], range.is_chunkwise});
    }
  }
  const auto num_logits = static_cast<int>(plan.logit_rows.size());
  logit_rows = add(plan.logit_rows.data(), num_logits, num_logits, 0);
  const size_t bytes = sizeof(int64_t) * rows + sizeof(int32_t) * (next - ints);
  device_.Upload(buffer_.data(), staging_.data(), bytes);
}

}  // namespace gla
