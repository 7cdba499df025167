// The operators of attention.h: which results a call has, and their values, against the naive
// recurrence in double precision.
#include <cctype>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/op_case.h"

namespace gla {
namespace {

constexpr AttentionOp kLinear = AttentionOp::kLinearAttention, kSimple = AttentionOp::kSimpleGla,
                      kRetention = AttentionOp::kRetention, kGla = AttentionOp::kGla;

void CheckForward(const OpCase& c) {
  const OpValues<float> x = MakeValues(c);
  Judge(c, OpCall(c, x).Forward(), ReferenceForward(c, ToDoubles(x)));
}
void CheckBackward(const OpCase& c) {
  const OpValues<float> x = MakeValues(c);
  Judge(c, OpCall(c, x).Backward(), ReferenceBackward(c, ToDoubles(x)));
}

// ---- Optional inputs ----------------------------------------------------------------------------

// Every combination of what may be there and what may be missing.
std::vector<OpCase> EveryCombination(AttentionOp op) {
  std::vector<OpCase> cases;
  for (int bits = 0; bits < 256; ++bits) {
    OpCase c = {.op = op};
    c.gate = bits & 1;
    c.initial_state = bits & 2;
    c.want_final_state = bits & 4;
    c.d_o = bits & 8;
    c.d_final_state = bits & 16;
    c.normalize = bits & 32;
    c.initial_key_sum = bits & 64;
    c.d_final_key_sum = bits & 128;
    if (op == kLinear && c.gate) continue;
    if (op == kRetention && !c.gate) continue;
    if (op != kLinear && c.normalize) continue;
    if (!c.normalize && (c.initial_key_sum || c.d_final_key_sum)) continue;
    cases.push_back(c);
  }
  return cases;
}

class EveryCombinationOfOptionalInputs : public testing::TestWithParam<AttentionOp> {
 protected:
  // In the form that the operator chooses and in each that it has.
  void ForEach(const std::function<void(const OpCase&)>& check) {
    const std::vector<OpCase> cases = EveryCombination(GetParam());
    // of linear attention 16, normalized 64
    const size_t count = GetParam() == kLinear ? 80 : GetParam() == kRetention ? 16 : 32;
    EXPECT_EQ(cases.size(), count);
    for (OpCase c : cases) {
      check(c);
      for (AttentionForm form : kForms) {
        if (c.normalize && form == AttentionForm::kChunkwise) continue;
        c.form = form;
        check(c);
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Operators, EveryCombinationOfOptionalInputs, testing::ValuesIn(kOps),
                         [](const auto& test) {
                           std::string name = NameOf(test.param);
                           std::erase_if(name, [](char c) { return !std::isalnum(c); });
                           return name;
                         });

// The names say it without the reference: o always; states when wanted; gradients of what is given.
void ExpectNames(const OpResults<float>& got,
                 const std::vector<std::pair<std::string, bool>>& names) {
  size_t count = 0;
  for (const auto& [name, exists] : names) {
    EXPECT_EQ(got.count(name), exists ? 1u : 0u) << name;
    count += exists;
  }
  EXPECT_EQ(got.size(), count);
}

TEST_P(EveryCombinationOfOptionalInputs, HasItsResults) {
  ForEach([](const OpCase& c) {
    SCOPED_TRACE(c.name());
    const OpValues<float> x = MakeValues(c);
    const OpResults<float> got = OpCall(c, x).Forward();
    ExpectNames(got, {{"o", true},
                      {"final_state", c.want_final_state},
                      {"final_key_sum", c.want_final_state && c.normalize}});
    Judge(c, got, ReferenceForward(c, ToDoubles(x)));
  });
}

TEST_P(EveryCombinationOfOptionalInputs, HasItsGradients) {
  ForEach([](const OpCase& c) {
    if (!c.d_o && !c.d_final_state && !c.d_final_key_sum) return;
    SCOPED_TRACE(c.name());
    const OpValues<float> x = MakeValues(c);
    const OpResults<float> got = OpCall(c, x).Backward();
    ExpectNames(got, {{"dq", true},
                      {"dk", true},
                      {"dv", true},
                      {"d_gate", c.gate && (c.op == kSimple || c.op == kGla)},
                      {"d_initial_state", c.initial_state},
                      {"d_initial_key_sum", c.initial_key_sum}});
    Judge(c, got, ReferenceBackward(c, ToDoubles(x)));
  });
}

// ---- Types and sizes ----------------------------------------------------------------------------

std::vector<OpCase> EveryOperator() {
  std::vector<OpCase> cases;
  for (AttentionOp op : kOps) cases.push_back({.op = op});
  cases.push_back(
      {.op = kLinear, .normalize = true, .initial_key_sum = true, .d_final_key_sum = true});
  for (AttentionOp op : {kSimple, kGla}) cases.push_back({.op = op, .gate = false});
  return cases;
}

TEST(Attention, EveryTypeOfInputsAndGates) {
  for (OpCase c : EveryOperator()) {
    for (DType dtype : kAttentionTypes) {
      for (DType gate_dtype : {DType::kFloat32, dtype}) {
        c.dtype = dtype;
        c.gate_dtype = gate_dtype;
        CheckForward(c);
        CheckBackward(c);
      }
    }
  }
}

TEST(Attention, OddHeadsAndDimensions) {
  for (OpCase c : EveryOperator()) {
    c.lengths = {65, 7};
    for (const std::vector<int>& sizes :
         {std::vector<int>{1, 1, 1, 1}, {5, 5, 60, 33}, {6, 1, 7, 64}}) {
      c.H = sizes[0], c.G = sizes[1], c.K = sizes[2], c.V = sizes[3];
      // With one key it cancels from the quotient, and dq is a rounding error.
      if (c.normalize && c.K == 1) c.K = 2;
      CheckForward(c);
      CheckBackward(c);
    }
  }
}

TEST(Attention, EveryFiniteScaleIsUsed) {
  for (OpCase c : EveryOperator()) {
    for (float scale : {1.0f, -0.3f, 0.0f}) {
      if (c.normalize && scale <= 0) continue;  // next to 1e-10 nothing is left of the values
      c.scale = scale;
      CheckForward(c);
      CheckBackward(c);
    }
  }
}

TEST(Attention, TheDefaultScaleIsOneOverTheRootOfK) {
  for (OpCase c : EveryOperator()) {
    const OpValues<float> x = MakeValues(c);
    const OpResults<float> forward = OpCall(c, x).Forward(), backward = OpCall(c, x).Backward();
    c.scale = 1 / std::sqrt(12.0f);
    ExpectSameBits(OpCall(c, x).Forward(), forward);
    ExpectSameBits(OpCall(c, x).Backward(), backward);
  }
}

// ---- Layouts and forms --------------------------------------------------------------------------

TEST(Attention, BatchedEqualsPackedBitForBit) {
  for (OpCase c : EveryOperator()) {
    for (int length : {1, 5, 66}) {
      c.lengths = {length, length, length};
      c.batched = false;
      const OpValues<float> x = MakeValues(c);
      SCOPED_TRACE(c.name());
      const OpResults<float> forward = OpCall(c, x).Forward(), backward = OpCall(c, x).Backward();
      c.batched = true;
      ExpectSameBits(OpCall(c, x).Forward(), forward);
      ExpectSameBits(OpCall(c, x).Backward(), backward);
    }
  }
}

TEST(Attention, TheFormsAgree) {
  for (OpCase c : EveryOperator()) {
    if (c.normalize) continue;
    c.lengths = {200, 1, 64};
    const OpValues<float> x = MakeValues(c);
    SCOPED_TRACE(c.name());
    c.form = AttentionForm::kRecurrent;
    const OpCall recurrent(c, x);
    c.form = AttentionForm::kChunkwise;
    const OpCall chunkwise(c, x);
    for (const auto& [got, want] : {std::pair(chunkwise.Forward(), recurrent.Forward()),
                                    std::pair(chunkwise.Backward(), recurrent.Backward())}) {
      for (const auto& [name, values] : want) {
        EXPECT_TRUE(IsNear(got.at(name), values, 2e-5)) << name;
      }
    }
  }
}

TEST(DefaultForm, IsRecurrentUpToATileAndWhenNormalized) {
  for (int length : {0, 1, 63, 64}) {
    EXPECT_EQ(DefaultForm(false, length), AttentionForm::kRecurrent) << length;
  }
  for (int length : {65, 128, 1 << 30}) {
    EXPECT_EQ(DefaultForm(false, length), AttentionForm::kChunkwise) << length;
    EXPECT_EQ(DefaultForm(true, length), AttentionForm::kRecurrent) << length;
  }
}

TEST(Attention, TheDefaultFormIsTheRulesForTheLongestSequence) {
  for (OpCase c : EveryOperator()) {
    for (int longest : {64, 65}) {
      c.lengths = {longest, 2};
      c.form.reset();
      const OpValues<float> x = MakeValues(c);
      SCOPED_TRACE(c.name());
      const OpResults<float> forward = OpCall(c, x).Forward(), backward = OpCall(c, x).Backward();
      c.form = DefaultForm(c.normalize, longest);
      ExpectSameBits(OpCall(c, x).Forward(), forward);
      ExpectSameBits(OpCall(c, x).Backward(), backward);
    }
  }
}

// ---- No tokens ----------------------------------------------------------------------------------

TEST(Attention, ACallWithoutTokensCarriesStatesAndTheirGradients) {
  for (const OpCase& op : EveryOperator()) {
    for (bool batched : {false, true}) {
      for (bool given : {false, true}) {
        OpCase c = op;
        c.lengths = {0, 0};
        c.batched = batched;
        c.initial_state = c.d_final_state = given;
        c.initial_key_sum = c.d_final_key_sum = given && c.normalize;
        CheckForward(c);
        c.initial_state = true;
        c.initial_key_sum = c.normalize;
        c.d_o = true;
        CheckBackward(c);
      }
    }
  }
}

}  // namespace
}  // namespace gla
