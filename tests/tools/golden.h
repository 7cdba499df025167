// Judges a backend by golden data: whole models and single operators.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace gla {

// One comparison with the reference: passed when value <= limit (a NaN never passes).
struct GoldenCheck {
  std::string name;   // folder or file
  std::string check;  // "float32/whole/max_abs"
  double value = 0;
  double limit = 0;
  bool passed() const { return value <= limit; }
};

// A checkpoint folder with expected.safetensors: input_ids [B, T] I32, logits [B, T, vocab] F32 and
// greedy [B, n] I32, the greedy continuation of each row. The logits are computed with the ids fed
// whole, token by token, in pieces of 7 and of 16, and whole in the chunkwise form.
//   float32:  max |difference| <= 1e-3, and the same greedy tokens
//   bfloat16: RMS(difference) / RMS(expected) <= 0.02
// A RetNet's reference may come from an fla model that was cast to bfloat16 and back, which rounds
// the table of rotary frequencies, or from one that was loaded as it is: either is accepted.
// Appends the checks; an error means that the folder cannot be judged.
absl::Status JudgeModel(Device& device, const std::string& folder, DType dtype,
                        std::vector<GoldenCheck>& checks);

// A file of one operator: q, k [T, H, K], v, o [T, H, V], ht [N, H, K, V], cu_seqlens [N + 1];
// where they exist h0, g [T, H] or gk [T, H, K]; and of the loss sum(o * do) + sum(ht * dht) the
// gradients: do, dht (one or both), dq, dk, dv, and where they exist dg or dgk, dh0. Metadata op
// and scale. Judges every result of the operator, in the recurrent and the chunkwise form, by
// RMS(difference) / RMS(expected):
//   float32: <= 1e-4
//   bfloat16, for inputs that it holds exactly: o <= 0.004, all others <= 0.005
// A gradient that the file does not have must be absent from the result ("dh0-absent", value 0).
absl::Status JudgeOp(Device& device, const std::string& file, DType dtype,
                     std::vector<GoldenCheck>& checks);

// What lies at a path: model folders (with a config.json) and operator files, sorted; folders below
// are searched too. NotFound when there is nothing to judge.
struct GoldenSet {
  std::vector<std::string> models;
  std::vector<std::string> ops;
};
absl::StatusOr<GoldenSet> FindGolden(const std::string& path);

}  // namespace gla
