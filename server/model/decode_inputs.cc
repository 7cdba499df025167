#include "model/decode_inputs.h"

#include <algorithm>
#include <numeric>

namespace gla {
namespace {

// Bytes before the positions: one sequence to a row.
size_t OffsetBytes(int max_rows) { return (sizeof(int32_t) * (max_rows + 1) + 255) / 256 * 256; }

}  // namespace

int RoundedDecodeRows(int rows) {
  if (rows <= 2) return rows;
  const int step = rows <= 4 ? 4 : rows <= 64 ? 8 : rows <= 256 ? 32 : 64;
  return (rows + step - 1) / step * step;
}

DecodeInputs::DecodeInputs(Device& device, int max_rows, int max_run_seqs)
    : device_(device),
      max_run_seqs_(max_run_seqs),
      buffer_(device, OffsetBytes(max_rows) + max_rows * (sizeof(int64_t) + 3 * sizeof(int32_t)) +
                          sizeof(int64_t)) {
  if (!buffer_.ok()) return;
  std::vector<int32_t> offsets(max_rows + 1);
  std::iota(offsets.begin(), offsets.end(), 0);
  device.Upload(buffer_.data(), offsets.data(), offsets.size() * sizeof(int32_t));
  seqs.cu_seqlens = buffer_.as<int32_t>();
  positions = reinterpret_cast<const int64_t*>(buffer_.as<char>() + OffsetBytes(max_rows));
}

void DecodeInputs::Set(const StepPlan& plan) {
  Set(plan, plan.num_decode, RoundedDecodeRows(plan.num_decode));
}

void DecodeInputs::SetEmpty(int rows) { Set({}, 0, rows); }

void DecodeInputs::Set(const StepPlan& plan, int decode, int rows) {
  staging_.assign(rows + (3 * rows + 1) / 2, 0);
  std::copy_n(plan.start_positions.begin(), decode, staging_.begin());
  auto* const ints = reinterpret_cast<int32_t*>(staging_.data() + rows);
  std::fill_n(ints + rows, 2 * rows, -1);
  std::copy_n(plan.tokens.begin(), decode, ints);
  std::copy_n(plan.read_slots.begin(), decode, ints + rows);
  std::copy_n(plan.write_slots.begin(), decode, ints + 2 * rows);
  auto* const device_positions = const_cast<int64_t*>(positions);
  device_.Upload(device_positions, staging_.data(), staging_.size() * sizeof(int64_t));

  auto* const device_ints = reinterpret_cast<int32_t*>(device_positions + rows);
  tokens = device_ints;
  seqs.read_slots = device_ints + rows;
  seqs.write_slots = device_ints + 2 * rows;
  seqs.num_seqs = seqs.num_rows = rows;
  seqs.max_len = 1;
  runs.clear();
  for (int first = 0; first < rows; first += max_run_seqs_) {
    Run run = {seqs, first, false};
    run.seqs.read_slots += first;
    run.seqs.write_slots += first;
    run.seqs.num_seqs = run.seqs.num_rows = std::min(max_run_seqs_, rows - first);
    runs.push_back(run);
  }
}

}  // namespace gla
