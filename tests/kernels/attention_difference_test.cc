// The operators' gradients against central finite differences of the naive forward recurrence in
// double precision: every operator, every differentiable input, three shapes each. Nothing of the
// reverse recurrence takes part in this judgement.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/op_case.h"

namespace gla {
namespace {

constexpr size_t kEntries = 200;  // per tensor; all of a smaller one
constexpr double kStep = 1e-4;

double Loss(const OpCase& c, const OpValues<double>& x) {
  OpCase all = c;
  all.want_final_state = true;
  const OpResults<double> out = ReferenceForward(all, x);
  const auto dot = [&](const char* name, const Doubles& d) {
    return std::inner_product(d.begin(), d.end(), out.at(name).begin(), 0.0);
  };
  return (c.d_o ? dot("o", x.d_o) : 0) +
         (c.d_final_state ? dot("final_state", x.d_final_state) : 0) +
         (c.d_final_key_sum ? dot("final_key_sum", x.d_final_key_sum) : 0);
}

void CheckTensor(const OpCase& c, OpValues<double>& x, Doubles OpValues<double>::*input,
                 const std::string& name, const OpResults<float>& gradients) {
  ASSERT_EQ(gradients.count(name), 1u) << name;
  Doubles& values = x.*input;
  ASSERT_EQ(gradients.at(name).size(), values.size()) << name;
  std::vector<size_t> entries(values.size());
  std::iota(entries.begin(), entries.end(), size_t{0});
  std::shuffle(entries.begin(), entries.end(), std::mt19937(3));
  entries.resize(std::min(entries.size(), kEntries));
  std::vector<float> got;
  Doubles want;
  for (size_t i : entries) {
    const double kept = values[i];
    values[i] = kept + kStep;
    const double above = Loss(c, x);
    values[i] = kept - kStep;
    want.push_back((above - Loss(c, x)) / (2 * kStep));
    values[i] = kept;
    got.push_back(gradients.at(name)[i]);
  }
  EXPECT_TRUE(IsNear(got, want, 1e-4)) << name;
}

void CheckDifferences(const OpCase& op) {
  for (const auto& [H, G, K, V, lengths] :
       {std::tuple(2, 2, 5, 7, std::vector<int>{9, 0, 4}),
        std::tuple(4, 2, 16, 8, std::vector<int>{70}),
        std::tuple(3, 1, 20, 12, std::vector<int>{1, 66, 16})}) {
    OpCase c = op;
    c.H = H, c.G = G, c.K = K, c.V = V, c.lengths = lengths;
    const OpValues<float> given = MakeValues(c, 11);
    OpValues<double> x = ToDoubles(given);
    for (AttentionForm form : kForms) {
      if (c.normalize && form == AttentionForm::kChunkwise) continue;
      c.form = form;
      SCOPED_TRACE(c.name());
      const OpResults<float> got = OpCall(c, given).Backward();
      using X = OpValues<double>;
      CheckTensor(c, x, &X::q, "dq", got);
      CheckTensor(c, x, &X::k, "dk", got);
      CheckTensor(c, x, &X::v, "dv", got);
      CheckTensor(c, x, &X::initial_state, "d_initial_state", got);
      if (c.has_d_gate()) CheckTensor(c, x, &X::gate, "d_gate", got);
      if (c.normalize) CheckTensor(c, x, &X::initial_key_sum, "d_initial_key_sum", got);
    }
  }
}

TEST(FiniteDifferences, LinearAttention) {
  CheckDifferences({.op = AttentionOp::kLinearAttention});
}

TEST(FiniteDifferences, NormalizedLinearAttention) {
  CheckDifferences({.op = AttentionOp::kLinearAttention,
                    .normalize = true,
                    .initial_key_sum = true,
                    .d_final_key_sum = true});
}

TEST(FiniteDifferences, SimpleGla) { CheckDifferences({.op = AttentionOp::kSimpleGla}); }

TEST(FiniteDifferences, SimpleGlaWithoutGate) {
  CheckDifferences({.op = AttentionOp::kSimpleGla, .gate = false});
}

TEST(FiniteDifferences, Retention) { CheckDifferences({.op = AttentionOp::kRetention}); }

TEST(FiniteDifferences, Gla) { CheckDifferences({.op = AttentionOp::kGla}); }

TEST(FiniteDifferences, GlaWithoutGate) {
  CheckDifferences({.op = AttentionOp::kGla, .gate = false});
}

}  // namespace
}  // namespace gla
