// Calls of the operators of attention.h as tests make them: host values, the call on the device,
// and the same in naive double precision.
#pragma once

#include <map>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/attention.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/testing/near.h"

namespace gla {

using reference::Doubles;

inline constexpr AttentionOp kOps[] = {AttentionOp::kLinearAttention, AttentionOp::kSimpleGla,
                                       AttentionOp::kRetention, AttentionOp::kGla};
inline constexpr AttentionForm kForms[] = {AttentionForm::kRecurrent, AttentionForm::kChunkwise};

struct OpCase {
  AttentionOp op = AttentionOp::kGla;
  int H = 4, G = 2, K = 12, V = 20;
  std::vector<int> lengths = {3, 0, 70, 1};
  bool batched = false;  // REQUIRES: all lengths are the same
  DType dtype = DType::kFloat32, gate_dtype = DType::kFloat32;
  bool gate = true, initial_state = true, want_final_state = true, d_o = true, d_final_state = true;
  bool normalize = false, initial_key_sum = false, d_final_key_sum = false;
  std::optional<float> scale = {};
  std::optional<AttentionForm> form = {};

  int64_t rows() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }
  int64_t seqs() const { return static_cast<int64_t>(lengths.size()); }
  int64_t state_heads() const { return op == AttentionOp::kRetention ? H : G; }
  bool has_gate() const { return gate && op != AttentionOp::kLinearAttention; }
  bool has_d_gate() const { return has_gate() && op != AttentionOp::kRetention; }
  GateKind kind() const {
    if (!has_gate()) return GateKind::kNone;
    return op == AttentionOp::kSimpleGla   ? GateKind::kScalar
           : op == AttentionOp::kRetention ? GateKind::kConstant
                                           : GateKind::kPerKey;
  }
  double scale_or_default() const { return scale.value_or(1 / std::sqrt(static_cast<float>(K))); }

  std::vector<int64_t> RowShape(const std::vector<int64_t>& rest) const {
    std::vector<int64_t> shape = {rows()};
    if (batched) shape = {seqs(), lengths[0]};
    shape.insert(shape.end(), rest.begin(), rest.end());
    return shape;
  }
  std::vector<int64_t> GateShape() const {
    if (op == AttentionOp::kRetention) return {H};
    if (op == AttentionOp::kSimpleGla) return RowShape({G});
    return RowShape({G, K});
  }
  std::vector<int64_t> StateShape() const { return {seqs(), state_heads(), K, V}; }
  std::vector<int64_t> KeySumShape() const { return {seqs(), G, K}; }

  std::string name() const {
    std::ostringstream out;
    out << NameOf(op) << " H" << H << " G" << G << " K" << K << " V" << V << " rows " << rows()
        << (batched ? " batched " : " ") << NameOf(dtype) << " gate " << NameOf(gate_dtype);
    if (form) out << (*form == AttentionForm::kChunkwise ? " chunkwise" : " recurrent");
    out << ", given:" << (has_gate() ? " gate" : "") << (initial_state ? " initial_state" : "")
        << (normalize ? " normalize" : "") << (initial_key_sum ? " initial_key_sum" : "")
        << (want_final_state ? " want_final_state" : "") << (d_o ? " d_o" : "")
        << (d_final_state ? " d_final_state" : "") << (d_final_key_sum ? " d_final_key_sum" : "");
    return out.str();
  }
};

// All that a call may bring. Values that the case leaves out are made too, and not used.
template <typename X>
struct OpValues {
  std::vector<X> q, k, v, gate, initial_state, initial_key_sum;
  std::vector<X> d_o, d_final_state, d_final_key_sum;
};

inline size_t Count(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), size_t{1}, std::multiplies<>());
}

inline OpValues<float> MakeValues(const OpCase& c, uint32_t seed = 1) {
  const auto normal = [&](const std::vector<int64_t>& shape) {
    return Normal(Count(shape), 1, seed++);
  };
  OpValues<float> x;
  x.q = normal(c.RowShape({c.H, c.K}));
  x.k = normal(c.RowShape({c.G, c.K}));
  x.v = normal(c.RowShape({c.G, c.V}));
  x.gate = normal(c.GateShape());
  x.initial_state = normal(c.StateShape());
  x.initial_key_sum = normal(c.KeySumShape());
  x.d_o = normal(c.RowShape({c.H, c.V}));
  x.d_final_state = normal(c.StateShape());
  x.d_final_key_sum = normal(c.KeySumShape());
  for (float& gate : x.gate) gate = -std::log1p(std::exp(gate)) / 4;
  if (c.normalize) {  // positive, as after a feature map: the denominator stays clear of zero
    for (std::vector<float>* values : {&x.q, &x.k, &x.initial_key_sum}) {
      for (float& value : *values) value = std::abs(value) + 0.25f;
    }
  }
  x.q = Rounded(x.q, c.dtype);
  x.k = Rounded(x.k, c.dtype);
  x.v = Rounded(x.v, c.dtype);
  x.d_o = Rounded(x.d_o, c.dtype);
  x.gate = Rounded(x.gate, c.gate_dtype);
  return x;
}

inline OpValues<double> ToDoubles(const OpValues<float>& x) {
  const auto wide = [](const std::vector<float>& values) {
    return Doubles(values.begin(), values.end());
  };
  return {wide(x.q),
          wide(x.k),
          wide(x.v),
          wide(x.gate),
          wide(x.initial_state),
          wide(x.initial_key_sum),
          wide(x.d_o),
          wide(x.d_final_state),
          wide(x.d_final_key_sum)};
}

// Results by name; one that a call does not have is not in the map.
template <typename X>
using OpResults = std::map<std::string, std::vector<X>>;

// ---- On the device ------------------------------------------------------------------------------

class OpCall {
 public:
  OpCall(const OpCase& c, const OpValues<float>& x) : case_(c) {
    in_.op = c.op;
    in_.q = Give(x.q, c.dtype, c.RowShape({c.H, c.K}));
    in_.k = Give(x.k, c.dtype, c.RowShape({c.G, c.K}));
    in_.v = Give(x.v, c.dtype, c.RowShape({c.G, c.V}));
    const DType f32 = DType::kFloat32;
    if (c.has_gate()) in_.gate = Give(x.gate, c.gate_dtype, c.GateShape());
    if (c.initial_state) in_.initial_state = Give(x.initial_state, f32, c.StateShape());
    if (c.initial_key_sum) in_.initial_key_sum = Give(x.initial_key_sum, f32, c.KeySumShape());
    if (c.d_o) gradients_.d_o = Give(x.d_o, c.dtype, c.RowShape({c.H, c.V}));
    if (c.d_final_state) gradients_.d_final_state = Give(x.d_final_state, f32, c.StateShape());
    if (c.d_final_key_sum) {
      gradients_.d_final_key_sum = Give(x.d_final_key_sum, f32, c.KeySumShape());
    }
    in_.normalize = c.normalize;
    in_.scale = c.scale;
    in_.form = c.form;
    if (!c.batched) {
      in_.cu_seqlens = {0};
      for (int length : c.lengths) in_.cu_seqlens.push_back(in_.cu_seqlens.back() + length);
    }
  }

  const AttentionInputs& inputs() const { return in_; }

  OpResults<float> Forward() const {
    absl::StatusOr<AttentionResult> got =
        AttentionForward(TestDevice(), in_, case_.want_final_state);
    EXPECT_EQ(got.status(), absl::OkStatus());
    OpResults<float> results;
    if (!got.ok()) return results;
    results["o"] = Take(got->o, case_.RowShape({case_.H, case_.V}), case_.dtype);
    Put("final_state", got->final_state, case_.StateShape(), DType::kFloat32, results);
    Put("final_key_sum", got->final_key_sum, case_.KeySumShape(), DType::kFloat32, results);
    ExpectInputsUntouched();
    return results;
  }

  OpResults<float> Backward() const {
    absl::StatusOr<AttentionGradients> got = AttentionBackward(TestDevice(), in_, gradients_);
    EXPECT_EQ(got.status(), absl::OkStatus());
    OpResults<float> results;
    if (!got.ok()) return results;
    results["dq"] = Take(got->dq, in_.q.shape, case_.dtype);
    results["dk"] = Take(got->dk, in_.k.shape, case_.dtype);
    results["dv"] = Take(got->dv, in_.v.shape, case_.dtype);
    Put("d_gate", got->d_gate, case_.GateShape(), case_.gate_dtype, results);
    Put("d_initial_state", got->d_initial_state, case_.StateShape(), DType::kFloat32, results);
    Put("d_initial_key_sum", got->d_initial_key_sum, case_.KeySumShape(), DType::kFloat32, results);
    ExpectInputsUntouched();
    return results;
  }

 private:
  struct Given {
    DeviceBuffer buffer;
    std::vector<float> values;
    DType dtype;
  };

  Tensor Give(const std::vector<float>& values, DType dtype, std::vector<int64_t> shape) {
    given_.push_back({UploadAs(values, dtype), values, dtype});
    return {given_.back().buffer.data(), dtype, std::move(shape)};
  }
  void ExpectInputsUntouched() const {
    for (const Given& given : given_) {
      const auto now = DownloadAs(given.buffer, given.values.size(), given.dtype);
      EXPECT_TRUE(IsSameBits(now, given.values)) << "an input was written to";
    }
  }
  static std::vector<float> Take(const DeviceTensor& tensor, const std::vector<int64_t>& shape,
                                 DType dtype) {
    EXPECT_EQ(tensor.shape, shape);
    EXPECT_EQ(tensor.dtype, dtype);
    EXPECT_EQ(tensor.buffer.bytes(), Count(shape) * SizeOf(dtype));
    return DownloadAs(tensor.buffer, tensor.buffer.bytes() / SizeOf(tensor.dtype), tensor.dtype);
  }
  static void Put(const std::string& name, const std::optional<DeviceTensor>& tensor,
                  const std::vector<int64_t>& shape, DType dtype, OpResults<float>& results) {
    if (tensor) results[name] = Take(*tensor, shape, dtype);
  }

  OpCase case_;
  std::vector<Given> given_;
  AttentionInputs in_;
  AttentionResultGradients gradients_;
};

// ---- In double precision ------------------------------------------------------------------------

inline reference::AttentionProblem ProblemOf(const OpCase& c, const OpValues<double>& x) {
  return {.H = c.H,
          .G = c.G,
          .K = c.K,
          .V = c.V,
          .kind = c.kind(),
          .scale = c.scale_or_default(),
          .lengths = c.lengths,
          .q = x.q,
          .k = x.k,
          .v = x.v,
          .gate = c.has_gate() ? x.gate : Doubles(),
          .initial_state = c.initial_state ? x.initial_state : Doubles()};
}

// z after every row of every group, and after the last row of every sequence.
struct KeySums {
  Doubles rows;   // [T, G, K]
  Doubles final;  // [N, G, K]
};
inline KeySums SumKeys(const OpCase& c, const OpValues<double>& x) {
  KeySums sums;
  const size_t width = size_t(c.G) * c.K;
  size_t row = 0;
  for (size_t n = 0; n < c.lengths.size(); ++n) {
    Doubles z(width, 0.0);
    if (c.initial_key_sum) std::copy_n(x.initial_key_sum.begin() + n * width, width, z.begin());
    for (int t = 0; t < c.lengths[n]; ++t, ++row) {
      for (size_t i = 0; i < width; ++i) z[i] += x.k[row * width + i];
      sums.rows.insert(sums.rows.end(), z.begin(), z.end());
    }
    sums.final.insert(sums.final.end(), z.begin(), z.end());
  }
  return sums;
}

// scale q_t . z_t + 1e-10 of every row and query head.
inline Doubles Denominators(const OpCase& c, const OpValues<double>& x) {
  const KeySums sums = SumKeys(c, x);
  Doubles result;
  for (int64_t row = 0; row < c.rows(); ++row) {
    for (int h = 0; h < c.H; ++h) {
      const auto q = x.q.begin() + (row * c.H + h) * c.K;
      const auto z = sums.rows.begin() + (row * c.G + h / (c.H / c.G)) * c.K;
      result.push_back(c.scale_or_default() * std::inner_product(q, q + c.K, z, 0.0) + 1e-10);
    }
  }
  return result;
}

inline OpResults<double> ReferenceForward(const OpCase& c, const OpValues<double>& x) {
  reference::AttentionOutputs out = reference::AttentionForward(ProblemOf(c, x));
  if (c.normalize) {
    const Doubles d = Denominators(c, x);
    for (size_t i = 0; i < out.o.size(); ++i) out.o[i] /= d[i / c.V];
  }
  OpResults<double> results;
  results["o"] = std::move(out.o);
  if (c.want_final_state) results["final_state"] = std::move(out.final_state);
  if (c.want_final_state && c.normalize) results["final_key_sum"] = SumKeys(c, x).final;
  return results;
}

// Rows of `width` and of 1, side by side; an empty one of the two is zero, both empty is empty.
inline Doubles WithColumn(const Doubles& rows, const Doubles& column, size_t width) {
  const size_t count = std::max(rows.size() / width, column.size());
  Doubles joined(count * (width + 1), 0.0);
  for (size_t r = 0; r < count; ++r) {
    if (!rows.empty()) std::copy_n(rows.begin() + r * width, width, &joined[r * (width + 1)]);
    if (!column.empty()) joined[r * (width + 1) + width] = column[r];
  }
  return joined;
}
inline Doubles Part(const Doubles& joined, size_t width, size_t first, size_t count) {
  Doubles part;
  for (size_t at = 0; at < joined.size(); at += width) {
    part.insert(part.end(), joined.begin() + at + first, joined.begin() + at + first + count);
  }
  return part;
}

// Normalized: the key sum as a column of the state, whose values are all 1.
inline OpResults<double> ReferenceBackward(const OpCase& c, const OpValues<double>& x) {
  reference::AttentionProblem p = ProblemOf(c, x);
  Doubles d_o = c.d_o ? x.d_o : Doubles();
  Doubles d_final_state = c.d_final_state ? x.d_final_state : Doubles();
  const size_t V = c.V;
  if (c.normalize) {
    const Doubles none, d = Denominators(c, x);
    if (c.d_o) {
      const Doubles numerators = reference::AttentionForward(p).o;
      Doubles d_d;
      for (size_t r = 0; r < d.size(); ++r) {
        double dot = 0;
        for (size_t i = r * V; i < (r + 1) * V; ++i) dot += d_o[i] * numerators[i], d_o[i] /= d[r];
        d_d.push_back(-dot / (d[r] * d[r]));
      }
      d_o = WithColumn(d_o, d_d, V);
    }
    p.v = WithColumn(p.v, Doubles(p.v.size() / V, 1.0), V);
    p.initial_state = WithColumn(p.initial_state, c.initial_key_sum ? x.initial_key_sum : none, V);
    d_final_state = WithColumn(d_final_state, c.d_final_key_sum ? x.d_final_key_sum : none, V);
    p.V = c.V + 1;
  }
  reference::AttentionGradients got = reference::AttentionBackward(p, d_o, d_final_state);
  OpResults<double> results;
  if (c.normalize) {
    if (c.initial_key_sum) results["d_initial_key_sum"] = Part(got.d_initial_state, V + 1, V, 1);
    got.d_initial_state = Part(got.d_initial_state, V + 1, 0, V);
    got.dv = Part(got.dv, V + 1, 0, V);
  }
  results["dq"] = std::move(got.dq);
  results["dk"] = std::move(got.dk);
  results["dv"] = std::move(got.dv);
  if (c.has_d_gate()) results["d_gate"] = std::move(got.d_gate);
  if (c.initial_state) results["d_initial_state"] = std::move(got.d_initial_state);
  return results;
}

// ---- Judgement ----------------------------------------------------------------------------------

inline double ToleranceOf(const OpCase& c, const std::string& name) {
  if (c.dtype == DType::kFloat32 && c.gate_dtype == DType::kFloat32) return 1e-4;
  return name == "o" ? 0.004 : 0.005;
}

// Exactly the results that are wanted, each near its reference.
inline void Judge(const OpCase& c, const OpResults<float>& got, const OpResults<double>& want) {
  SCOPED_TRACE(c.name());
  for (const auto& [name, values] : got) EXPECT_TRUE(want.count(name)) << "not wanted: " << name;
  for (const auto& [name, values] : want) {
    if (got.count(name) == 0) {
      ADD_FAILURE() << "missing: " << name;
    } else {
      EXPECT_TRUE(IsNear(got.at(name), values, ToleranceOf(c, name))) << name;
    }
  }
}

inline void ExpectSameBits(const OpResults<float>& got, const OpResults<float>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [name, values] : want) {
    ASSERT_EQ(got.count(name), 1u) << name;
    EXPECT_TRUE(IsSameBits(got.at(name), values)) << name;
  }
}

}  // namespace gla
