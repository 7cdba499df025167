// The fused attention of a decode step, against the recurrence in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/decode.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/slots.h"

namespace gla {
namespace {

struct Case {
  const char* name;
  int heads, kv_heads, key_dim, value_dim;
  GateKind gate;
  bool normalize = true, weight = true, output_gate = true, bias = true, clamp = false;
};
constexpr Case kCases[] = {
    {"gla_340m", 4, 4, 128, 256, GateKind::kPerKey},
    {"gla_1300m", 4, 4, 256, 512, GateKind::kPerKey},
    {"gla_2700m", 4, 4, 320, 640, GateKind::kPerKey},
    {"bard", 4, 4, 32, 64, GateKind::kPerKey},
    {"narrow", 2, 2, 8, 64, GateKind::kPerKey},
    {"odd", 3, 3, 72, 192, GateKind::kPerKey, true, false, true, false, true},
    {"clamped", 2, 2, 64, 64, GateKind::kPerKey, true, true, true, true, true},
    {"grouped", 8, 2, 64, 128, GateKind::kPerKey},
    {"one_head", 8, 1, 128, 128, GateKind::kPerKey, true, true, false},
    {"linear", 4, 4, 128, 128, GateKind::kNone, true, true, false},
    {"bare", 4, 2, 64, 128, GateKind::kNone, false, false, false},
    {"gated", 4, 4, 64, 128, GateKind::kNone, false, false, true},
    {"retention", 4, 4, 64, 128, GateKind::kConstant},
    {"retention_grouped", 4, 2, 64, 128, GateKind::kConstant},
    {"simple", 4, 4, 128, 256, GateKind::kScalar},
    {"simple_grouped", 4, 2, 64, 64, GateKind::kScalar},
    {"slim", 2, 2, 16, 16, GateKind::kPerKey},
    {"uneven", 3, 3, 40, 80, GateKind::kPerKey},
    {"threes", 6, 2, 64, 48, GateKind::kPerKey},
    {"all_keys", 2, 2, 512, 64, GateKind::kPerKey, true, true, true, false},
    {"all_values", 2, 1, 24, 1024, GateKind::kScalar},
};
constexpr int kRank = 16;
constexpr float kEps = 1e-5f, kNormalizer = 16, kClamp = -0.05f, kScale = 0.125f;

std::vector<float> Bf16(size_t n, float deviation, uint32_t seed) {
  return Rounded(Normal(n, deviation, seed), DType::kBFloat16);
}

// Inputs of `rows` sequences, each row made from `first + row` alone.
struct Problem {
  Problem(const Case& c, StateFormat format, int rows)
      : c(c),
        format(format),
        rows(rows),
        state_heads(c.gate == GateKind::kConstant ? c.heads : c.kv_heads),
        width(c.heads * c.key_dim + c.kv_heads * (c.key_dim + c.value_dim) + c.heads * c.value_dim +
              kRank),
        stride((StateBytes(format, state_heads, c.key_dim, c.value_dim) + 255) / 256 * 256) {
    input = Bf16(static_cast<size_t>(rows) * width, 1, 1);
    weight = Bf16(static_cast<size_t>(c.kv_heads) * c.key_dim * kRank, 0.5f, 2);
    bias = Normal(static_cast<size_t>(c.kv_heads) * c.key_dim, 1, 3);
    norm = Normal(c.value_dim, 1, 4);
    decay = Uniform(c.heads, -0.5f, -0.01f, 5);
    gate = Uniform(static_cast<size_t>(rows) * c.kv_heads, -2, 0, 6);
  }
  size_t floats() const { return static_cast<size_t>(state_heads) * c.key_dim * c.value_dim; }
  int k_at() const { return c.heads * c.key_dim; }
  int v_at() const { return k_at() + c.kv_heads * c.key_dim; }
  int g_at() const { return v_at() + c.kv_heads * c.value_dim; }
  int rank_at() const { return g_at() + c.heads * c.value_dim; }

  const Case& c;
  StateFormat format;
  int rows, state_heads, width;
  int64_t stride;
  std::vector<float> input, weight, bias, norm, decay, gate;
};

// Slots filled with states that the format can hold, rows in turn multiplied by `sizes`; the slots'
// float32 values.
DeviceBuffer MakeSlots(const Problem& p, int num_slots, std::vector<float>* values,
                       const std::vector<float>& sizes = {1}) {
  *values = Normal(num_slots * p.floats(), 1, 7);
  for (size_t i = 0; i < values->size(); ++i) {
    (*values)[i] *= sizes[i / p.c.value_dim % sizes.size()];
  }
  const DeviceBuffer states = Upload(*values);
  DeviceBuffer slots = Poisoned(num_slots * p.stride / 4, DType::kFloat32);
  std::vector<int32_t> all(num_slots);
  std::iota(all.begin(), all.end(), 0);
  const DeviceBuffer ids = Upload(all);
  PackStates(TestDevice(), {states.as<float>(), slots.data(), p.stride, ids.as<int32_t>(),
                            num_slots, p.state_heads, p.c.key_dim, p.c.value_dim, p.format});
  UnpackStates(TestDevice(), {slots.data(), p.stride, ids.as<int32_t>(), states.as<float>(),
                              num_slots, p.state_heads, p.c.key_dim, p.c.value_dim, p.format});
  *values = Download<float>(states, num_slots * p.floats());
  return slots;
}

std::vector<float> SlotValues(const Problem& p, const DeviceBuffer& slots, int num_slots) {
  DeviceBuffer states = Poisoned(num_slots * p.floats(), DType::kFloat32);
  std::vector<int32_t> all(num_slots);
  std::iota(all.begin(), all.end(), 0);
  const DeviceBuffer ids = Upload(all);
  UnpackStates(TestDevice(), {slots.data(), p.stride, ids.as<int32_t>(), states.as<float>(),
                              num_slots, p.state_heads, p.c.key_dim, p.c.value_dim, p.format});
  return Download<float>(states, num_slots * p.floats());
}

// Rows [first, first + count) of the problem; returns y [count, H, V].
std::vector<float> RunRows(const Problem& p, const DeviceBuffer& slots,
                           const std::vector<int32_t>& read, const std::vector<int32_t>& write,
                           int first, int count) {
  const Case& c = p.c;
  const std::vector<float> rows(p.input.begin() + static_cast<int64_t>(first) * p.width,
                                p.input.begin() + static_cast<int64_t>(first + count) * p.width);
  const DeviceBuffer input = UploadAs(rows, DType::kBFloat16);
  const PackedWeight weight(TestDevice(),
                            {{p.weight.data(), DType::kFloat32, c.kv_heads * c.key_dim, kRank}},
                            DType::kBFloat16);
  const DeviceBuffer bias = Upload(p.bias), norm = Upload(p.norm), decay = Upload(p.decay);
  const DeviceBuffer gate = Upload(std::vector<float>(
      p.gate.begin() + first * c.kv_heads, p.gate.begin() + (first + count) * c.kv_heads));
  const DeviceBuffer read_slots = Upload(read), write_slots = Upload(write);
  const size_t y_width = static_cast<size_t>(c.heads) * c.value_dim;
  const DeviceBuffer y = Poisoned(count * y_width, DType::kBFloat16);
  const auto* x = input.as<uint16_t>();
  DecodeAttentionArgs a{};
  a.q = x, a.k = x + p.k_at(), a.v = x + p.v_at();
  a.q_stride = a.k_stride = a.v_stride = p.width;
  a.gate_kind = c.gate;
  if (c.gate == GateKind::kPerKey) {
    a.gate_in = x + p.rank_at(), a.gate_in_stride = p.width;
    a.gate_weight = &weight;
    a.gate_bias = c.bias ? bias.as<float>() : nullptr;
    a.gate_normalizer = kNormalizer;
    a.gate_clamp_min = c.clamp ? &kClamp : nullptr;
  }
  a.decay = decay.as<float>();
  a.gate = gate.as<float>(), a.gate_stride = c.kv_heads;
  a.state = slots.data(), a.state_format = p.format, a.state_stride = p.stride;
  a.read_slots = read_slots.as<int32_t>(), a.write_slots = write_slots.as<int32_t>();
  a.num_heads = c.heads, a.num_kv_heads = c.kv_heads;
  a.key_dim = c.key_dim, a.value_dim = c.value_dim, a.state_heads = p.state_heads;
  a.scale = kScale;
  a.normalize = c.normalize;
  a.norm_weight = c.weight ? norm.as<float>() : nullptr;
  a.eps = kEps;
  if (c.output_gate) a.output_gate = x + p.g_at(), a.output_gate_stride = p.width;
  a.y = y.data(), a.y_stride = static_cast<int64_t>(y_width);
  a.rows = count;
  EXPECT_TRUE(DecodeKernels::Get()->Serves(a));
  DecodeKernels::Get()->Attention(TestDevice(), a);
  return DownloadAs(y, count * y_width, DType::kBFloat16);
}

// One row in double: y, and the state after it in `state`.
reference::Doubles Expected(const Problem& p, int row, std::vector<double>* state) {
  const Case& c = p.c;
  const float* const x = &p.input[static_cast<size_t>(row) * p.width];
  reference::Doubles y;
  const int K = c.key_dim, V = c.value_dim, group = c.heads / p.state_heads;
  for (int h = 0; h < p.state_heads; ++h) {
    const int g = h / (p.state_heads / c.kv_heads);
    double* const S = &(*state)[static_cast<size_t>(h) * K * V];
    for (int k = 0; k < K; ++k) {
      double log_decay = 0;
      if (c.gate == GateKind::kConstant) log_decay = p.decay[h];
      if (c.gate == GateKind::kScalar) log_decay = p.gate[row * c.kv_heads + g];
      if (c.gate == GateKind::kPerKey) {
        double sum = c.bias ? p.bias[g * K + k] : 0;
        for (int r = 0; r < kRank; ++r) {
          sum += double{x[p.rank_at() + r]} * p.weight[(g * K + k) * kRank + r];
        }
        log_decay = reference::LogSigmoidGate(sum, kNormalizer, c.clamp ? &kClamp : nullptr);
      }
      for (int v = 0; v < V; ++v) {
        S[k * V + v] = std::exp(log_decay) * S[k * V + v] +
                       double{x[p.k_at() + g * K + k]} * x[p.v_at() + g * V + v];
      }
    }
    for (int q = 0; q < group; ++q) {
      const int head = h * group + q;
      reference::Doubles o(V), weight, gate;
      for (int v = 0; v < V; ++v) {
        for (int k = 0; k < K; ++k) o[v] += kScale * x[head * K + k] * S[k * V + v];
        if (c.weight) weight.push_back(p.norm[v]);
        if (c.output_gate) gate.push_back(x[p.g_at() + head * V + v]);
      }
      const reference::Doubles out = reference::RmsNorm(o, weight, gate, kEps, c.normalize);
      y.insert(y.end(), out.begin(), out.end());
    }
  }
  return y;
}

class DecodeAttentionTest : public testing::TestWithParam<std::tuple<Case, StateFormat>> {
 protected:
  const Case& option() const { return std::get<0>(GetParam()); }
  StateFormat format() const { return std::get<1>(GetParam()); }
};

TEST_P(DecodeAttentionTest, IsTheRecurrenceInEveryPatternOfSlots) {
  const int rows = 11;
  const Problem p(option(), format(), rows);
  const Ragged ragged(std::vector<int>(rows, 1), 0, 8);
  std::vector<float> before;
  const DeviceBuffer slots = MakeSlots(p, ragged.num_slots, &before);
  const std::vector<float> y = RunRows(p, slots, ragged.read_slots, ragged.write_slots, 0, rows);
  const std::vector<float> after = SlotValues(p, slots, ragged.num_slots);
  std::vector<float> want_slots = before;
  double error = 0, size = 0;
  const size_t n = p.floats(), width = y.size() / rows;
  for (int r = 0; r < rows; ++r) {
    const int read = ragged.read_slots[r], write = ragged.write_slots[r];
    std::vector<double> state(n);
    if (read >= 0) std::copy_n(before.begin() + read * n, n, state.begin());
    const reference::Doubles want = Expected(p, r, &state);
    for (size_t i = 0; i < width; ++i) {
      const double expected = read < 0 && write < 0 ? 0 : want[i];
      error += std::pow(y[r * width + i] - expected, 2), size += expected * expected;
    }
    if (write >= 0) std::copy_n(state.begin(), n, want_slots.begin() + write * n);
  }
  EXPECT_LT(std::sqrt(error / size), 0.004);
  error = size = 0;
  for (size_t i = 0; i < want_slots.size(); ++i) {
    const int slot = static_cast<int>(i / n);
    const bool written = std::count(ragged.write_slots.begin(), ragged.write_slots.end(), slot) > 0;
    if (!written) {
      ASSERT_EQ(after[i], before[i]) << "an untouched slot";
    }
    error += std::pow(after[i] - want_slots[i], 2), size += std::pow(want_slots[i], 2);
  }
  EXPECT_LT(std::sqrt(error / size), format() == StateFormat::kInt16 ? 5e-5 : 1e-6);
}

TEST_P(DecodeAttentionTest, ARowHasTheSameBitsInEveryCall) {
  const int rows = option().key_dim * option().value_dim > 128 * 128 ? 70 : 300;
  const Problem p(option(), format(), rows);
  std::vector<float> before;
  std::vector<int32_t> all(rows);
  std::iota(all.begin(), all.end(), 0);
  const DeviceBuffer together = MakeSlots(p, rows, &before);
  const DeviceBuffer apart = MakeSlots(p, rows, &before);
  const std::vector<float> want = RunRows(p, together, all, all, 0, rows);
  const size_t width = want.size() / rows;
  for (int first = 0, count = 1; first < rows;
       first += count, count = std::min(2 * count, rows - first)) {
    const std::vector<int32_t> ids(all.begin() + first, all.begin() + first + count);
    const std::vector<float> got = RunRows(p, apart, ids, ids, first, count);
    EXPECT_EQ(std::memcmp(got.data(), &want[first * width], got.size() * 4), 0);
  }
  EXPECT_EQ(SlotValues(p, together, rows), SlotValues(p, apart, rows));
}

class Int16StateTest : public DecodeAttentionTest {};

// What an int16 slot gets is what a float32 slot would get, to rounding, whatever the sizes of
// rows.
TEST_P(Int16StateTest, IsFloat32Rounded) {
  const int rows = 7;
  const Case& c = option();
  const Problem p(c, StateFormat::kInt16, rows), q(c, StateFormat::kFloat32, rows);
  std::vector<int32_t> all(rows);
  std::iota(all.begin(), all.end(), 0);
  const DeviceBuffer ids = Upload(all);
  for (const std::vector<float>& sizes :
       {std::vector<float>{1}, std::vector<float>{0x1p-60f, 0, 0x1p-90f, 0x1p20f, 0x1p-120f}}) {
    std::vector<float> values;
    const DeviceBuffer slots = MakeSlots(p, rows, &values, sizes);
    const DeviceBuffer wide = Poisoned(rows * q.stride / 4, DType::kFloat32);
    const DeviceBuffer states = Upload(values);
    PackStates(TestDevice(), {states.as<float>(), wide.data(), q.stride, ids.as<int32_t>(), rows,
                              q.state_heads, c.key_dim, c.value_dim, StateFormat::kFloat32});
    const std::vector<float> y = RunRows(p, slots, all, all, 0, rows);
    // The formats lay rows on lanes differently, so sums over K differ in order.
    const std::vector<float> y_wide = RunRows(q, wide, all, all, 0, rows);
    double error = 0, size = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      error += std::pow(y[i] - y_wide[i], 2), size += std::pow(y_wide[i], 2);
    }
    EXPECT_LT(std::sqrt(error / size), 0.004);
    const std::vector<float> got = SlotValues(p, slots, rows), want = SlotValues(q, wide, rows);
    for (size_t row = 0; row < want.size(); row += c.value_dim) {
      for (int begin = 0; begin < c.value_dim; begin += kStateTile) {
        const size_t from = row + begin, to = row + std::min(begin + kStateTile, c.value_dim);
        float largest = 0;
        for (size_t i = from; i < to; ++i) largest = std::max(largest, std::abs(want[i]));
        for (size_t i = from; i < to; ++i) ASSERT_NEAR(got[i], want[i], largest / 32767 * 0.52f);
      }
    }
  }
}

TEST_P(DecodeAttentionTest, WhatIsNotFiniteStaysNaN) {
  const Problem p(option(), format(), 2);
  std::vector<float> values;
  const DeviceBuffer slots = MakeSlots(p, 2, &values);
  const DeviceBuffer ids = Upload(std::vector<int32_t>{0, 1});
  values[0] = NAN, values[p.floats() + p.floats() / 2] = INFINITY;
  const DeviceBuffer states = Upload(values);
  PackStates(TestDevice(), {states.as<float>(), slots.data(), p.stride, ids.as<int32_t>(), 2,
                            p.state_heads, p.c.key_dim, p.c.value_dim, p.format});
  const std::vector<float> y = RunRows(p, slots, {0, 1}, {0, 1}, 0, 2);
  const std::vector<float> after = SlotValues(p, slots, 2);
  EXPECT_TRUE(std::isnan(after[0]));
  EXPECT_FALSE(std::isfinite(after[p.floats() + p.floats() / 2]));
  EXPECT_TRUE(std::isnan(y[0]));
}

std::string NameOfCase(const testing::TestParamInfo<DecodeAttentionTest::ParamType>& info) {
  return std::string(std::get<0>(info.param).name) +
         (std::get<1>(info.param) == StateFormat::kInt16 ? "_int16" : "");
}
INSTANTIATE_TEST_SUITE_P(Kinds, DecodeAttentionTest,
                         testing::Combine(testing::ValuesIn(kCases),
                                          testing::Values(StateFormat::kFloat32,
                                                          StateFormat::kInt16)),
                         NameOfCase);
INSTANTIATE_TEST_SUITE_P(Kinds, Int16StateTest,
                         testing::Combine(testing::ValuesIn(kCases),
                                          testing::Values(StateFormat::kInt16)),
                         NameOfCase);

TEST(DecodeAttention, MoreRowsThanAGridCountsInOneDirection) {
  const Case& c = *std::find_if(std::begin(kCases), std::end(kCases),
                                [](const Case& c) { return std::string(c.name) == "slim"; });
  const int rows = 70001;  // a grid stops at 65535 but along x
  const Problem p(c, StateFormat::kFloat32, rows);
  std::vector<float> values;
  const DeviceBuffer slots = MakeSlots(p, 1, &values);
  const std::vector<float> all =
      RunRows(p, slots, std::vector<int32_t>(rows, 0), std::vector<int32_t>(rows, -1), 0, rows);
  const int width = c.heads * c.value_dim;
  for (const int first : {0, 32766, 65534, rows - 3}) {
    const std::vector<float> three = RunRows(p, slots, {0, 0, 0}, {-1, -1, -1}, first, 3);
    const auto begin = all.begin() + static_cast<int64_t>(first) * width;
    EXPECT_EQ(three, std::vector<float>(begin, begin + 3 * width)) << "rows from " << first;
  }
}

TEST(DecodeAttention, SlotsBeyondTwoToThe31) {
  // 340M's layer among 24: a pool of more than 2^31 floats.
  const Case c = kCases[0];
  Problem p(c, StateFormat::kFloat32, 2);
  p.stride = int64_t{24} * 512 * 1024;
  const int num_slots = 1100;  // 13.2 GiB
  if (TestDevice().memory_free() < size_t{num_slots} * p.stride * 2) {
    GTEST_SKIP() << "needs a GPU with 26 GiB free: twice the pool, which other tests may share";
  }
  const DeviceBuffer pool(TestDevice(), num_slots * p.stride);
  ASSERT_TRUE(pool.ok());
  const int last = num_slots - 1;
  TestDevice().Fill(pool.as<char>() + last * p.stride, 0, 512 * 1024);
  const std::vector<float> high = RunRows(p, pool, {last, -1}, {last, 0}, 0, 2);
  TestDevice().Fill(pool.data(), 0, 512 * 1024);
  const std::vector<float> low = RunRows(p, pool, {0, -1}, {0, 1}, 0, 2);
  EXPECT_EQ(high, low);
}

}  // namespace
}  // namespace gla
