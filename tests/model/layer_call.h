// A call of an attention layer with gradients: what goes in, what the layer makes of it, and what
// the definition and its finite differences make of it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "gtest/gtest.h"
#include "model/attention_layer.h"
#include "tests/kernels/harness.h"
#include "tests/model/naive_layer.h"
#include "tests/testing/finite_differences.h"
#include "tests/testing/near.h"
#include "tests/testing/tiny_model.h"

namespace gla::layer_test {

using reference::Doubles;

inline constexpr uint64_t kSeed = 5;
inline const char kPrefix[] = "attn.";

// Three shapes: several heads and ragged sequences, grouped heads with an empty sequence, and one
// that is longer than a tile of the chunkwise form.
struct Shape {
  int hidden, heads, kv_heads, key_dim, value_dim;
  std::vector<int> lengths;
};
inline const Shape kShapes[] = {
    {20, 2, 2, 8, 12, {5, 1, 9}}, {24, 4, 2, 6, 10, {7, 0, 3, 2}}, {12, 3, 1, 14, 5, {70, 2}}};

inline AttentionLayerConfig ConfigOf(AttentionOp op, const Shape& shape) {
  AttentionLayerConfig config;
  config.op = op;
  config.hidden_size = shape.hidden;
  config.num_heads = shape.heads;
  config.num_kv_heads = shape.kv_heads;
  config.head_key_dim = shape.key_dim;
  config.head_value_dim = shape.value_dim;
  config.use_gate = op == AttentionOp::kSimpleGla || op == AttentionOp::kGla;
  config.gate_logit_normalizer = 2;  // so that the gate weighs in every gradient
  config.gate_low_rank_dim = 3;
  config.use_output_gate = op != AttentionOp::kLinearAttention;
  return config;
}

inline std::unique_ptr<AttentionLayer> MakeLayer(const AttentionLayerConfig& config,
                                                 const AttentionLayerOptions& options = {}) {
  RandomWeightSource source(kSeed);
  return ValueOrDie(AttentionLayer::Load(TestDevice(), config, options, source, kPrefix));
}

// Which parts of a state are given.
struct Parts {
  bool recurrent = false, key_sum = false, conv = false;
};
struct Given {
  Parts initial;
  bool dy = true;
  Parts d_final;
};
inline Parts AllOf(const AttentionLayerConfig& config) {
  return {true, config.normalize, config.use_short_conv && config.conv_size > 1};
}

// The same for every part of a state of N sequences.
struct HostState {
  std::vector<float> recurrent, key_sum, conv;
};

// A call's arguments in host memory.
struct Call {
  Call(const AttentionLayerConfig& config, const std::vector<int>& lengths, DType dtype)
      : config(config), lengths(lengths), dtype(dtype) {
    RandomWeightSource source(kSeed);
    const NaiveLayer naive(config, source, kPrefix);
    const size_t n = lengths.size();
    for (size_t i = 0; i < n; ++i) {
      cu_seqlens.push_back(cu_seqlens.back() + lengths[i]);
      if (config.op == AttentionOp::kRetention) starts.push_back(37 * static_cast<int64_t>(i));
    }
    const size_t elements = size_t(rows()) * config.hidden_size;
    x = Rounded(Normal(elements, 1, 1), dtype);
    dy = Normal(elements, 1, 2);
    // A sum of keys is of positive features.
    initial = {Normal(n * naive.recurrent_size(), 0.5f, 3),
               Uniform(n * naive.key_sum_size(), 0.5f, 2, 4), Normal(n * naive.conv_size(), 1, 5)};
    d_final = {Normal(n * naive.recurrent_size(), 0.5f, 6), Normal(n * naive.key_sum_size(), 1, 7),
               Normal(n * naive.conv_size(), 1, 8)};
  }
  int rows() const { return cu_seqlens.back(); }

  AttentionLayerConfig config;
  std::vector<int> lengths;
  DType dtype;
  std::vector<int32_t> cu_seqlens = {0};
  std::vector<int64_t> starts;
  std::vector<float> x, dy;
  HostState initial, d_final;
};

// What a layer, or the definition, makes of a call; empty where absent.
template <typename T>
struct Results {
  std::vector<T> y, recurrent, key_sum, conv;
  std::vector<T> dx, d_recurrent, d_key_sum, d_conv;
};

// State parts in device memory.
struct DeviceState {
  DeviceState(const AttentionLayerConfig& config, const HostState& state, const Parts& parts,
              int64_t num_seqs) {
    RandomWeightSource source(kSeed);
    const NaiveLayer naive(config, source, kPrefix);
    const int64_t K = config.feature_dim();
    if (parts.recurrent) {
      view.recurrent =
          Add(state.recurrent, {num_seqs, naive.state_heads(), K, config.head_value_dim});
    }
    if (parts.key_sum) view.key_sum = Add(state.key_sum, {num_seqs, config.num_kv_heads, K});
    if (parts.conv) {
      view.conv = Add(state.conv, {num_seqs, config.conv_size - 1, naive.channels()});
    }
  }
  Tensor Add(const std::vector<float>& values, const std::vector<int64_t>& shape) {
    buffers.push_back(Upload(values));
    return {buffers.back().data(), DType::kFloat32, shape};
  }
  AttentionLayerState<Tensor> view;
  std::vector<DeviceBuffer> buffers;
};

inline std::vector<float> ToHost(const DeviceTensor& tensor) {
  EXPECT_EQ(tensor.dtype, DType::kFloat32);
  return Download<float>(tensor.buffer, tensor.buffer.bytes() / sizeof(float));
}
inline std::vector<float> ToHost(const std::optional<DeviceTensor>& tensor) {
  return tensor ? ToHost(*tensor) : std::vector<float>();
}

inline Results<float> RunLayer(const AttentionLayer& layer, const Call& call, const Given& given) {
  const auto num_seqs = static_cast<int64_t>(call.lengths.size());
  const DeviceBuffer x = UploadAs(call.x, call.dtype), dy = Upload(call.dy);
  const DeviceState initial(call.config, call.initial, given.initial, num_seqs);
  const DeviceState d_final(call.config, call.d_final, given.d_final, num_seqs);
  AttentionLayerInput input;
  input.x = Tensor{x.data(), call.dtype, {call.rows(), call.config.hidden_size}};
  input.cu_seqlens = call.cu_seqlens;
  input.start_positions = call.starts;
  input.initial = initial.view;
  const AttentionLayerOutput output = ValueOrDie(layer.Forward(input, true));
  AttentionLayerOutputGradients gradients{.d_final_state = d_final.view};
  if (given.dy) {
    gradients.dy = Tensor{dy.data(), DType::kFloat32, {call.rows(), call.config.hidden_size}};
  }
  const AttentionLayerGradients back = ValueOrDie(layer.Backward(output.record, gradients));
  EXPECT_EQ(back.d_initial_state.recurrent.has_value(), given.initial.recurrent);
  EXPECT_EQ(back.d_initial_state.key_sum.has_value(), given.initial.key_sum);
  EXPECT_EQ(back.d_initial_state.conv.has_value(), given.initial.conv);
  return {ToHost(output.y),
          ToHost(output.final_state.recurrent),
          ToHost(output.final_state.key_sum),
          ToHost(output.final_state.conv),
          ToHost(back.dx),
          ToHost(back.d_initial_state.recurrent),
          ToHost(back.d_initial_state.key_sum),
          ToHost(back.d_initial_state.conv)};
}

// Rows of float32, from the empty state. (In place of a nested initializer, whose vectors g++ 12
// takes for uninitialized.)
inline AttentionLayerInput InputOf(const DeviceBuffer& x, int rows, int hidden) {
  AttentionLayerInput input;
  input.x = Tensor{x.data(), DType::kFloat32, {rows, hidden}};
  input.cu_seqlens = {0, rows};
  return input;
}

// Sequence n's part of a state of `all.size() / num_seqs` values each, or zeros.
inline Doubles PartOf(const std::vector<float>& all, size_t n, size_t num_seqs, bool given) {
  const size_t size = all.size() / num_seqs;
  if (!given) return Doubles(size, 0.0);
  return {all.begin() + n * size, all.begin() + (n + 1) * size};
}

inline void Append(Doubles& to, const Doubles& more) {
  to.insert(to.end(), more.begin(), more.end());
}

// The definition's results, and central finite differences of it.
inline Results<double> RunDefinition(const Call& call, const Given& given) {
  RandomWeightSource source(kSeed);
  NaiveLayer naive(call.config, source, kPrefix);
  Results<double> results;
  const size_t num_seqs = call.lengths.size(), D = call.config.hidden_size;
  for (size_t n = 0; n < num_seqs; ++n) {
    const auto part = [&](const std::vector<float>& all, bool has) {
      return PartOf(all, n, num_seqs, has);
    };
    const auto rows_of = [&](const std::vector<float>& all) {
      return Doubles(all.begin() + call.cu_seqlens[n] * D,
                     all.begin() + call.cu_seqlens[n + 1] * D);
    };
    NaiveSequence in{.start_position = call.starts.empty() ? 0 : call.starts[n],
                     .x = rows_of(call.x),
                     .recurrent = part(call.initial.recurrent, given.initial.recurrent),
                     .key_sum = part(call.initial.key_sum, given.initial.key_sum),
                     .conv = part(call.initial.conv, given.initial.conv)};
    const Doubles dy = given.dy ? rows_of(call.dy) : Doubles(in.x.size(), 0.0);
    const Doubles d_recurrent = part(call.d_final.recurrent, given.d_final.recurrent);
    const Doubles d_key_sum = part(call.d_final.key_sum, given.d_final.key_sum);
    const Doubles d_conv = part(call.d_final.conv, given.d_final.conv);
    const auto loss = [&] {
      const NaiveSequence out = naive.Run(in);
      return InnerProduct(dy, out.x) + InnerProduct(d_recurrent, out.recurrent) +
             InnerProduct(d_key_sum, out.key_sum) + InnerProduct(d_conv, out.conv);
    };
    const NaiveSequence out = naive.Run(in);
    Append(results.y, out.x);
    Append(results.recurrent, out.recurrent);
    Append(results.key_sum, out.key_sum);
    Append(results.conv, out.conv);
    Append(results.dx, FiniteDifferences(in.x, loss));
    if (given.initial.recurrent) {
      Append(results.d_recurrent, FiniteDifferences(in.recurrent, loss));
    }
    if (given.initial.key_sum) Append(results.d_key_sum, FiniteDifferences(in.key_sum, loss));
    if (given.initial.conv) Append(results.d_conv, FiniteDifferences(in.conv, loss));
  }
  return results;
}

inline void ExpectNear(const Results<float>& got, const Results<double>& want, double tolerance) {
  EXPECT_TRUE(IsNear(got.y, want.y, tolerance)) << "y";
  EXPECT_TRUE(IsNear(got.recurrent, want.recurrent, tolerance)) << "final state";
  EXPECT_TRUE(IsNear(got.key_sum, want.key_sum, tolerance)) << "final key sum";
  EXPECT_TRUE(IsNear(got.conv, want.conv, tolerance)) << "final inputs";
  EXPECT_TRUE(IsNear(got.dx, want.dx, tolerance)) << "dx";
  EXPECT_TRUE(IsNear(got.d_recurrent, want.d_recurrent, tolerance)) << "d_initial_state";
  EXPECT_TRUE(IsNear(got.d_key_sum, want.d_key_sum, tolerance)) << "d_initial_key_sum";
  EXPECT_TRUE(IsNear(got.d_conv, want.d_conv, tolerance)) << "gradient of the first inputs";
}

inline void ExpectSameBits(const Results<float>& got, const Results<float>& want) {
  EXPECT_TRUE(IsSameBits(got.y, want.y));
  EXPECT_TRUE(IsSameBits(got.recurrent, want.recurrent));
  EXPECT_TRUE(IsSameBits(got.key_sum, want.key_sum));
  EXPECT_TRUE(IsSameBits(got.conv, want.conv));
  EXPECT_TRUE(IsSameBits(got.dx, want.dx));
  EXPECT_TRUE(IsSameBits(got.d_recurrent, want.d_recurrent));
  EXPECT_TRUE(IsSameBits(got.d_key_sum, want.d_key_sum));
  EXPECT_TRUE(IsSameBits(got.d_conv, want.d_conv));
}

}  // namespace gla::layer_test
