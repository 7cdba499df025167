// The check of an operator's results: the naive recurrence on parts of the state that a long
// sequence can afford.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tests/bench/operator_case.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"

namespace gla::bench {
namespace {

using reference::Doubles;

constexpr size_t kSliceDoubles = size_t{1} << 23;  // what the states of a slice may take

void ParallelFor(int n, const std::function<void(int)>& work) {
  std::atomic<int> next = 0;
  const auto run = [&] {
    for (int i = next++; i < n; i = next++) work(i);
  };
  std::vector<std::thread> threads;
  const int count = std::min<int>(n, static_cast<int>(std::thread::hardware_concurrency()));
  for (int i = 1; i < count; ++i) threads.emplace_back(run);
  run();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

// Some rows of K and columns of V of one head of one sequence: a problem of its own, since a row of
// the state meets only its own elements of q, k and gate, and a column only its own of v. What sums
// over the rows (o) is right where all rows are in, what sums over the columns (dq, dk) where all
// columns are; a scalar gate's gradient is the sum over slices.
struct OperatorCase::Slice {
  reference::AttentionProblem problem;
  Doubles d_o, d_final_state;
};

// Sums of squares by result.
class OperatorCase::Errors {
 public:
  void Add(const char* name, double found, double expected) {
    Sums& sums = sums_[name];
    sums.difference += (found - expected) * (found - expected);
    sums.size += expected * expected;
  }
  absl::StatusOr<double> Worst(DType dtype) const {
    double worst = 0;
    for (const auto& [name, sums] : sums_) {
      const double ratio = std::sqrt(sums.difference / std::max(sums.size, 1e-30));
      const double limit = dtype == DType::kFloat32 ? 1e-4 : name == "o" ? 0.004 : 0.005;
      if (!(ratio <= limit)) {  // NaN too
        return absl::InternalError(
            absl::StrCat(name, " is off by ", ratio, " of its size, expected at most ", limit));
      }
      worst = std::max(worst, ratio);
    }
    return worst;
  }

 private:
  struct Sums {
    double difference = 0, size = 0;
  };
  std::map<std::string, Sums> sums_;
};

std::vector<float> OperatorCase::Download(Id id) {
  const TensorInfo& tensor = tensors_[id];
  std::vector<float> values(tensor.count);
  if (tensor.dtype == DType::kFloat32) {
    device_.Download(values.data(), at<void>(0, id), values.size() * sizeof(float));
    return values;
  }
  std::vector<uint16_t> narrow(tensor.count);
  device_.Download(narrow.data(), at<void>(0, id), narrow.size() * sizeof(uint16_t));
  for (size_t i = 0; i < narrow.size(); ++i) values[i] = FromNarrow(narrow[i], tensor.dtype);
  return values;
}

OperatorCase::Slice OperatorCase::SliceOf(int seq, int head, int first_row, int rows,
                                          int first_column, int columns) const {
  const OperatorConfig& c = config_;
  Slice slice;
  reference::AttentionProblem& p = slice.problem;
  p.H = p.G = 1, p.K = rows, p.V = columns;
  p.kind = c.gate_kind, p.scale = scale();
  p.lengths = {c.length};
  const bool per_key = c.gate_kind == GateKind::kPerKey;
  const auto append = [&](Doubles& to, Id from, size_t start, int count) {
    const auto first = tensors_[from].host.begin() + static_cast<int64_t>(start);
    to.insert(to.end(), first, first + count);
  };
  for (int t = 0; t < c.length; ++t) {
    const size_t row = row_of(seq, t, head);
    append(p.q, kQ, row * c.key_dim + first_row, rows);
    append(p.k, kK, row * c.key_dim + first_row, rows);
    append(p.v, kV, row * c.value_dim + first_column, columns);
    if (per_key) append(p.gate, kGate, row * c.key_dim + first_row, rows);
    if (c.gate_kind == GateKind::kScalar) append(p.gate, kGate, row, 1);
    if (c.pass == Pass::kBackward)
      append(slice.d_o, kDO, row * c.value_dim + first_column, columns);
  }
  for (int i = first_row; i < first_row + rows; ++i) {
    const size_t start = state_row(seq, head, i) + first_column;
    append(p.initial_state, kState, start, columns);
    if (c.pass == Pass::kBackward) append(slice.d_final_state, kDFinalState, start, columns);
  }
  return slice;
}

void OperatorCase::CheckColumns(int seq, int head, const Found& found, Errors& errors) const {
  const OperatorConfig& c = config_;
  const bool forward = c.pass == Pass::kForward;
  const int columns[] = {0, c.value_dim / 2, c.value_dim - 1};
  Doubles rows[3],
      states[3];  // of o and the final state, or of dv and the initial state's gradient
  ParallelFor(3, [&](int n) {
    const Slice slice = SliceOf(seq, head, 0, c.key_dim, columns[n], 1);
    if (forward) {
      reference::AttentionOutputs expected = reference::AttentionForward(slice.problem);
      rows[n] = std::move(expected.o), states[n] = std::move(expected.final_state);
    } else {
      reference::AttentionGradients expected =
          reference::AttentionBackward(slice.problem, slice.d_o, slice.d_final_state);
      rows[n] = std::move(expected.dv), states[n] = std::move(expected.d_initial_state);
    }
  });
  const std::vector<float>& found_rows = found[forward ? kO : kDv];
  const std::vector<float>& found_states = found[forward ? kState : kDInitialState];
  for (int n = 0; n < 3; ++n) {
    for (int t = 0; t < c.length; ++t) {
      errors.Add(forward ? "o" : "dv", found_rows[row_of(seq, t, head) * c.value_dim + columns[n]],
                 rows[n][t]);
    }
    for (int i = 0; i < c.key_dim; ++i) {
      errors.Add(forward ? "the final state" : "d_initial_state",
                 found_states[state_row(seq, head, i) + columns[n]], states[n][i]);
    }
  }
}

void OperatorCase::CheckRows(int seq, int head, const Found& found, Errors& errors) const {
  const OperatorConfig& c = config_;
  const size_t of_row = (c.length + size_t{1}) * c.value_dim;
  const int count = std::clamp<int>(static_cast<int>(kSliceDoubles / of_row), 1, c.key_dim);
  std::vector<int> firsts = {0, c.key_dim / 2, c.key_dim - 1};
  const bool all = c.gate_kind == GateKind::kScalar;  // its gradient needs every row
  if (all) {
    firsts.clear();
    for (int first = 0; first < c.key_dim; first += count) firsts.push_back(first);
  }
  std::vector<reference::AttentionGradients> expected(firsts.size());
  const auto rows_of = [&](int i) { return all ? std::min(count, c.key_dim - firsts[i]) : 1; };
  ParallelFor(static_cast<int>(firsts.size()), [&](int i) {
    const Slice slice = SliceOf(seq, head, firsts[i], rows_of(i), 0, c.value_dim);
    expected[i] = reference::AttentionBackward(slice.problem, slice.d_o, slice.d_final_state);
  });
  for (int t = 0; t < c.length; ++t) {
    const size_t row = row_of(seq, t, head);
    double d_gate = 0;
    for (size_t i = 0; i < firsts.size(); ++i) {
      for (int r = 0; r < rows_of(i); ++r) {
        const size_t at = row * c.key_dim + firsts[i] + r, from = t * size_t(rows_of(i)) + r;
        errors.Add("dq", found[kDq][at], expected[i].dq[from]);
        errors.Add("dk", found[kDk][at], expected[i].dk[from]);
        if (c.gate_kind == GateKind::kPerKey) {
          errors.Add("d_gate", found[kDGate][at], expected[i].d_gate[from]);
        }
      }
      if (all) d_gate += expected[i].d_gate[t];
    }
    if (all) errors.Add("d_gate", found[kDGate][row], d_gate);
  }
}

absl::StatusOr<double> OperatorCase::Check() {
  Call(0);
  Found found;
  for (const Id id : {kState, kO, kDq, kDk, kDv, kDGate, kDInitialState}) found[id] = Download(id);
  Errors errors;
  const int seqs = config_.batch, heads = config_.heads;
  std::vector<std::pair<int, int>> places = {{0, 0}};
  if (seqs * heads > 1) places.emplace_back(seqs - 1, heads - 1);
  for (const auto& [seq, head] : places) {
    CheckColumns(seq, head, found, errors);
    if (config_.pass == Pass::kBackward) CheckRows(seq, head, found, errors);
  }
  for (TensorInfo& tensor : tensors_) tensor.host = {};
  return errors.Worst(config_.dtype);
}

}  // namespace gla::bench
