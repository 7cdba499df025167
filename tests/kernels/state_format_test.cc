// States in their slots and as float32, against the definition of StateFormat.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "tests/kernels/harness.h"

namespace gla {
namespace {

struct Shape {
  int heads, key_dim, value_dim;
};
constexpr Shape kShapes[] = {{1, 1, 1},  {2, 5, 63},    {1, 16, 64},
                             {3, 7, 65}, {4, 128, 256}, {2, 24, 200}};

// The bytes of one state as kInt16 defines them.
std::vector<char> Packed(const std::vector<float>& state, const Shape& shape) {
  const int rows = shape.heads * shape.key_dim, pieces = (shape.value_dim + 63) / 64;
  std::vector<char> bytes(
      StateBytes(StateFormat::kInt16, shape.heads, shape.key_dim, shape.value_dim));
  auto* const scales = reinterpret_cast<float*>(
      bytes.data() + Int16ScalesAt(shape.heads, shape.key_dim, shape.value_dim));
  for (int row = 0; row < rows; ++row) {
    for (int piece = 0; piece < pieces; ++piece) {
      const int begin = 64 * piece, end = std::min(begin + 64, shape.value_dim);
      const float* const x = &state[static_cast<size_t>(row) * shape.value_dim];
      float largest = 0;
      bool finite = true;
      for (int c = begin; c < end; ++c) {
        largest = std::max(largest, std::abs(x[c]));
        finite = finite && std::isfinite(x[c]);
      }
      const bool zero = !finite || largest < 0x1p-100f;
      const int key_dim = shape.key_dim, head = row / key_dim;
      scales[(head * pieces + piece) * key_dim + row % key_dim] = !finite ? NAN
                                                                  : zero  ? 0
                                                                          : largest / 32767.0f;
      const float inverse = zero ? 0 : 32767.0f / largest;
      for (int c = begin; c < end; ++c) {
        const volatile float product = zero ? 0 : x[c] * inverse;
        reinterpret_cast<uint16_t*>(bytes.data())[row * shape.value_dim + c] =
            static_cast<uint16_t>(std::nearbyint(product) + 32768);
      }
    }
  }
  return bytes;
}

class StateFormatTest : public testing::TestWithParam<Shape> {
 protected:
  size_t Floats() const {
    const Shape& s = GetParam();
    return static_cast<size_t>(s.heads) * s.key_dim * s.value_dim;
  }
  int64_t Bytes(StateFormat format) const {
    const Shape& s = GetParam();
    return StateBytes(format, s.heads, s.key_dim, s.value_dim);
  }
  int64_t Stride(StateFormat format) const { return (Bytes(format) + 255) / 256 * 256; }
  void Pack(const DeviceBuffer& states, const std::vector<int32_t>& slots, StateFormat format,
            const DeviceBuffer& memory) const {
    const DeviceBuffer device_slots = Upload(slots);
    const Shape& s = GetParam();
    PackStates(TestDevice(), {.states = states.as<float>(),
                              .slots_begin = memory.data(),
                              .slot_stride = Stride(format),
                              .slots = device_slots.as<int32_t>(),
                              .num_states = static_cast<int>(slots.size()),
                              .heads = s.heads,
                              .key_dim = s.key_dim,
                              .value_dim = s.value_dim,
                              .format = format});
    TestDevice().Synchronize();
  }
  std::vector<float> Unpack(const DeviceBuffer& memory, const std::vector<int32_t>& slots,
                            StateFormat format) const {
    const DeviceBuffer device_slots = Upload(slots);
    const DeviceBuffer states = Poisoned(slots.size() * Floats(), DType::kFloat32);
    const Shape& s = GetParam();
    UnpackStates(TestDevice(), {.slots_begin = memory.data(),
                                .slot_stride = Stride(format),
                                .slots = device_slots.as<int32_t>(),
                                .states = states.as<float>(),
                                .num_states = static_cast<int>(slots.size()),
                                .heads = s.heads,
                                .key_dim = s.key_dim,
                                .value_dim = s.value_dim,
                                .format = format});
    return Download<float>(states, slots.size() * Floats());
  }
};

// Values of very different sizes, and ties between two integers.
std::vector<float> Values(size_t n) {
  std::vector<float> values = Normal(n, 1, 3);
  for (size_t i = 0; i < n; ++i) values[i] *= std::exp2(static_cast<float>(i / 64 % 40) - 20);
  for (size_t i = 0; i + 4 < n; i += 640) {
    values[i] = 32767, values[i + 1] = 0.5f, values[i + 2] = 1.5f, values[i + 3] = -2.5f;
  }
  return values;
}

TEST_P(StateFormatTest, Int16IsAsDefined) {
  const size_t n = Floats();
  std::vector<float> values = Values(2 * n);
  for (size_t i = n / 2; i < n; ++i) values[i] = 0;  // rows of zeros
  const DeviceBuffer states = Upload(values);
  const int64_t stride = Stride(StateFormat::kInt16);
  const DeviceBuffer memory = Poisoned(4 * stride / 4, DType::kFloat32);
  Pack(states, {2, 0}, StateFormat::kInt16, memory);
  const std::vector<char> bytes = Download<char>(memory, 4 * stride);
  for (int i = 0; i < 2; ++i) {
    const std::vector<float> one(values.begin() + i * n, values.begin() + (i + 1) * n);
    const std::vector<char> want = Packed(one, GetParam());
    const Shape& s = GetParam();
    const char* const got = &bytes[(i == 0 ? 2 : 0) * stride];
    EXPECT_EQ(std::memcmp(got, want.data(), 2 * n), 0);
    const int64_t scales_at = Int16ScalesAt(s.heads, s.key_dim, s.value_dim);
    EXPECT_EQ(std::memcmp(got + scales_at, &want[scales_at], want.size() - scales_at), 0);
  }
  for (int64_t i = stride; i < 2 * stride; ++i) ASSERT_EQ(bytes[i], '\xFF');  // untouched
  for (int64_t i = 3 * stride; i < 4 * stride; ++i) ASSERT_EQ(bytes[i], '\xFF');

  const std::vector<float> back = Unpack(memory, {2, -1, 0}, StateFormat::kInt16);
  const int width = GetParam().value_dim;
  for (size_t i = 0; i < 3 * n; ++i) {
    if (i / n == 1) {
      ASSERT_EQ(back[i], 0);
      continue;
    }
    const size_t from = i / n == 0 ? i : i - n;
    float largest = 0;
    const size_t row = from / width * width, begin = row + from % width / 64 * 64;
    for (size_t j = begin; j < std::min(begin + 64, row + width); ++j) {
      largest = std::max(largest, std::abs(values[j]));
    }
    ASSERT_NEAR(back[i], values[from], largest / 32767 * 0.505f);
  }
}

TEST_P(StateFormatTest, Float32IsItself) {
  const std::vector<float> values = Values(Floats());
  const DeviceBuffer memory = Poisoned(3 * Stride(StateFormat::kFloat32) / 4, DType::kFloat32);
  Pack(Upload(values), {1}, StateFormat::kFloat32, memory);
  EXPECT_EQ(Unpack(memory, {1}, StateFormat::kFloat32), values);
}

TEST_P(StateFormatTest, WhatIsNotFiniteIsNaN) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> values = Values(Floats());
    values[Floats() / 2] = bad;
    const DeviceBuffer memory = Poisoned(Stride(StateFormat::kInt16) / 4, DType::kFloat32);
    Pack(Upload(values), {0}, StateFormat::kInt16, memory);
    EXPECT_TRUE(std::isnan(Unpack(memory, {0}, StateFormat::kInt16)[Floats() / 2]));
  }
}

TEST_P(StateFormatTest, NoSlotIsNotWritten) {
  const DeviceBuffer memory = Poisoned(Stride(StateFormat::kInt16) / 4, DType::kFloat32);
  Pack(Upload(Values(Floats())), {-1}, StateFormat::kInt16, memory);
  EXPECT_TRUE(AllNaN(Download<float>(memory, Stride(StateFormat::kInt16) / 4)));
}

INSTANTIATE_TEST_SUITE_P(Shapes, StateFormatTest, testing::ValuesIn(kShapes));

// How far outputs drift when the state rests as int16 after every token, over 32,768 tokens of GLA
// with gates logsigmoid(x + bias) / 16: bias 0 remembers some 20 tokens, 4 some 900, 8 very many.
double DriftOfInt16(float bias) {
  const int K = 128, V = 64, tokens = 32768, judged = 4096;
  std::vector<float> gates = Normal(static_cast<size_t>(tokens) * K, 1, 11);
  for (float& x : gates) {
    x += bias;
    x = (std::min(x, 0.0f) - std::log1p(std::exp(-std::abs(x)))) / 16;
  }
  const DeviceBuffer q = Upload(Normal(static_cast<size_t>(tokens) * K, 1, 12));
  const DeviceBuffer k = Upload(Normal(static_cast<size_t>(tokens) * K, 1, 13));
  const DeviceBuffer v = Upload(Normal(static_cast<size_t>(tokens) * V, 1, 14));
  const DeviceBuffer gate = Upload(gates), cu_seqlens = Upload(std::vector<int32_t>{0, 1});
  const DeviceBuffer slot = Upload(std::vector<int32_t>{0});
  const size_t count = static_cast<size_t>(tokens) * V;
  std::vector<float> outputs[2];
  for (const StateFormat format : {StateFormat::kFloat32, StateFormat::kInt16}) {
    const DeviceBuffer o = Poisoned(count, DType::kFloat32);
    const DeviceBuffer state = Upload(std::vector<float>(K * V));
    const DeviceBuffer rests = Poisoned(K * V * 2, DType::kFloat32);
    for (int t = 0; t < tokens; ++t) {
      LinearAttentionArgs a{};
      a.q = q.as<float>() + static_cast<int64_t>(t) * K;
      a.k = k.as<float>() + static_cast<int64_t>(t) * K;
      a.v = v.as<float>() + static_cast<int64_t>(t) * V;
      a.gate_kind = GateKind::kPerKey;
      a.gate = gate.as<float>() + static_cast<int64_t>(t) * K;
      a.o = o.as<float>() + static_cast<int64_t>(t) * V;
      a.state = state.as<float>();
      a.state_stride = K * V;
      a.seqs = {cu_seqlens.as<int32_t>(), slot.as<int32_t>(), slot.as<int32_t>(), 1, 1, 1};
      a.num_heads = a.num_kv_heads = a.state_heads = 1;
      a.key_dim = K, a.value_dim = V;
      a.q_stride = a.k_stride = a.gate_stride = K;
      a.v_stride = a.o_stride = V;
      a.scale = 1;
      a.dtype = DType::kFloat32;
      RecurrentLinearAttention(TestDevice(), a);
      if (format == StateFormat::kFloat32) continue;
      PackStates(TestDevice(), {state.as<float>(), rests.data(), 4 * K * V, slot.as<int32_t>(), 1,
                                1, K, V, format});
      UnpackStates(TestDevice(), {rests.data(), 4 * K * V, slot.as<int32_t>(), state.as<float>(), 1,
                                  1, K, V, format});
    }
    outputs[format == StateFormat::kInt16] = Download<float>(o, count);
  }
  double error = 0, size = 0;
  for (size_t i = count - static_cast<size_t>(judged) * V; i < count; ++i) {
    error += std::pow(outputs[1][i] - outputs[0][i], 2), size += std::pow(outputs[0][i], 2);
  }
  return std::sqrt(error / size);
}

TEST(StateFormats, Int16KeepsLongStreamsWithinAThousandth) {
  for (const float bias : {0.0f, 4.0f, 8.0f}) {
    const double drift = DriftOfInt16(bias);
    RecordProperty("bias" + std::to_string(static_cast<int>(bias)), std::to_string(drift));
    std::printf("gate bias %.0f: outputs differ by %.5f %% (RMS)\n", bias, 100 * drift);
    EXPECT_LT(drift, bias < 8 ? 0.001 : 0.003);
  }
}

}  // namespace
}  // namespace gla
