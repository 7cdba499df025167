#include "model/attention_layer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/attention_layer_weights.h"
#include "model/model.h"
#include "tests/kernels/harness.h"
#include "tests/model/naive_layer.h"
#include "tests/testing/feed.h"
#include "tests/testing/finite_differences.h"
#include "tests/testing/near.h"
#include "tests/testing/tiny_model.h"

namespace gla {
namespace {

using reference::Doubles;
using ::testing::HasSubstr;

constexpr uint64_t kSeed = 5;
const char kPrefix[] = "attn.";

// ---- Layers and their calls ---------------------------------------------------------------------

// Three shapes: several heads and ragged sequences, grouped heads with an empty sequence, and one
// that is longer than a tile of the chunkwise form.
struct Shape {
  int hidden, heads, kv_heads, key_dim, value_dim;
  std::vector<int> lengths;
};
const Shape kShapes[] = {
    {20, 2, 2, 8, 12, {5, 1, 9}}, {24, 4, 2, 6, 10, {7, 0, 3, 2}}, {12, 3, 1, 14, 5, {70, 2}}};

AttentionLayerConfig ConfigOf(AttentionOp op, const Shape& shape) {
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

std::unique_ptr<AttentionLayer> MakeLayer(const AttentionLayerConfig& config,
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
Parts AllOf(const AttentionLayerConfig& config) {
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

std::vector<float> ToHost(const DeviceTensor& tensor) {
  EXPECT_EQ(tensor.dtype, DType::kFloat32);
  return Download<float>(tensor.buffer, tensor.buffer.bytes() / sizeof(float));
}
std::vector<float> ToHost(const std::optional<DeviceTensor>& tensor) {
  return tensor ? ToHost(*tensor) : std::vector<float>();
}

Results<float> RunLayer(const AttentionLayer& layer, const Call& call, const Given& given) {
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
AttentionLayerInput InputOf(const DeviceBuffer& x, int rows, int hidden) {
  AttentionLayerInput input;
  input.x = Tensor{x.data(), DType::kFloat32, {rows, hidden}};
  input.cu_seqlens = {0, rows};
  return input;
}

// Sequence n's part of a state of `all.size() / num_seqs` values each, or zeros.
Doubles PartOf(const std::vector<float>& all, size_t n, size_t num_seqs, bool given) {
  const size_t size = all.size() / num_seqs;
  if (!given) return Doubles(size, 0.0);
  return {all.begin() + n * size, all.begin() + (n + 1) * size};
}

void Append(Doubles& to, const Doubles& more) { to.insert(to.end(), more.begin(), more.end()); }

// The definition's results, and central finite differences of it.
Results<double> RunDefinition(const Call& call, const Given& given) {
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

void ExpectNear(const Results<float>& got, const Results<double>& want, double tolerance) {
  EXPECT_TRUE(IsNear(got.y, want.y, tolerance)) << "y";
  EXPECT_TRUE(IsNear(got.recurrent, want.recurrent, tolerance)) << "final state";
  EXPECT_TRUE(IsNear(got.key_sum, want.key_sum, tolerance)) << "final key sum";
  EXPECT_TRUE(IsNear(got.conv, want.conv, tolerance)) << "final inputs";
  EXPECT_TRUE(IsNear(got.dx, want.dx, tolerance)) << "dx";
  EXPECT_TRUE(IsNear(got.d_recurrent, want.d_recurrent, tolerance)) << "d_initial_state";
  EXPECT_TRUE(IsNear(got.d_key_sum, want.d_key_sum, tolerance)) << "d_initial_key_sum";
  EXPECT_TRUE(IsNear(got.d_conv, want.d_conv, tolerance)) << "gradient of the first inputs";
}

void ExpectSameBits(const Results<float>& got, const Results<float>& want) {
  EXPECT_TRUE(IsSameBits(got.y, want.y));
  EXPECT_TRUE(IsSameBits(got.recurrent, want.recurrent));
  EXPECT_TRUE(IsSameBits(got.key_sum, want.key_sum));
  EXPECT_TRUE(IsSameBits(got.conv, want.conv));
  EXPECT_TRUE(IsSameBits(got.dx, want.dx));
  EXPECT_TRUE(IsSameBits(got.d_recurrent, want.d_recurrent));
  EXPECT_TRUE(IsSameBits(got.d_key_sum, want.d_key_sum));
  EXPECT_TRUE(IsSameBits(got.d_conv, want.d_conv));
}

// As one operator may be off; in bfloat16 each of a layer's kernels rounds once more.
constexpr double kFloat32 = 1e-4, kBFloat16 = 0.02;

// Every form and type against the definition.
void Check(const AttentionLayerConfig& config, const std::vector<int>& lengths,
           const Given& given) {
  const Call call(config, lengths, DType::kFloat32);
  const Results<double> want = RunDefinition(call, given);
  for (const AttentionForm form : {AttentionForm::kRecurrent, AttentionForm::kChunkwise}) {
    if (config.normalize && form == AttentionForm::kChunkwise) continue;
    SCOPED_TRACE(form == AttentionForm::kRecurrent ? "recurrent" : "chunkwise");
    const auto layer = MakeLayer(config, {.form = form});
    ExpectNear(RunLayer(*layer, call, given), want, kFloat32);
  }
}

// ---- Gradients ----------------------------------------------------------------------------------

struct Kind {
  const char* name;
  AttentionOp op;
  bool use_gate;
};
const Kind kKinds[] = {{"linear attention", AttentionOp::kLinearAttention, false},
                       {"simple GLA", AttentionOp::kSimpleGla, true},
                       {"simple GLA without a gate", AttentionOp::kSimpleGla, false},
                       {"retention", AttentionOp::kRetention, false},
                       {"GLA", AttentionOp::kGla, true},
                       {"GLA without a gate", AttentionOp::kGla, false}};

class EveryKind : public ::testing::TestWithParam<Kind> {};
void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }
INSTANTIATE_TEST_SUITE_P(AttentionLayer, EveryKind, ::testing::ValuesIn(kKinds));

TEST_P(EveryKind, EqualsFiniteDifferencesAtEveryShape) {
  for (const Shape& shape : kShapes) {
    for (const bool initial : {false, true}) {
      for (const bool output_gate : {false, true}) {
        if (output_gate && GetParam().op == AttentionOp::kLinearAttention) continue;
        SCOPED_TRACE(::testing::Message() << shape.heads << " heads, initial state " << initial
                                          << ", output gate " << output_gate);
        AttentionLayerConfig config = ConfigOf(GetParam().op, shape);
        config.use_gate = GetParam().use_gate;
        config.use_output_gate = output_gate;
        Given given;
        if (initial) given = {.initial = AllOf(config), .d_final = AllOf(config)};
        Check(config, shape.lengths, given);
      }
    }
  }
}

TEST_P(EveryKind, InBFloat16IsNearTheDefinition) {
  for (const Shape& shape : kShapes) {
    AttentionLayerConfig config = ConfigOf(GetParam().op, shape);
    config.use_gate = GetParam().use_gate;
    config.use_short_conv = config.op != AttentionOp::kLinearAttention;
    config.norm_eps = 0.1f;  // lest a norm of nearly nothing amplify what was rounded before it
    const Given given = {.initial = AllOf(config), .d_final = AllOf(config)};
    const Call call(config, shape.lengths, DType::kBFloat16);
    const Results<double> want = RunDefinition(call, given);
    for (const AttentionForm form : {AttentionForm::kRecurrent, AttentionForm::kChunkwise}) {
      const auto layer = MakeLayer(config, {.dtype = DType::kBFloat16, .form = form});
      ExpectNear(RunLayer(*layer, call, given), want, kBFloat16);
    }
  }
}

// An option of a layer, on the shape with grouped heads.
struct Option {
  const char* name;
  AttentionOp op;
  void (*set)(AttentionLayerConfig&);
};
const Option kOptions[] = {
    {"elementwise_product", AttentionOp::kLinearAttention,
     [](AttentionLayerConfig& c) { c.feature_map = QkMap::kElementwiseProduct; }},
    {"tied hedgehog", AttentionOp::kLinearAttention,
     [](AttentionLayerConfig& c) {
       c.feature_map = QkMap::kHedgehog;
       c.tie_feature_map_qk = true;
     }},
    {"t2r", AttentionOp::kLinearAttention,
     [](AttentionLayerConfig& c) { c.feature_map = QkMap::kT2r; }},
    {"dpfp", AttentionOp::kLinearAttention,
     [](AttentionLayerConfig& c) { c.feature_map = QkMap::kDpfp; }},
    {"elu, norm_q and norm_k", AttentionOp::kLinearAttention,
     [](AttentionLayerConfig& c) {
       c.feature_map = QkMap::kElu;
       c.norm_q = c.norm_k = true;
     }},
    {"hedgehog, normalize", AttentionOp::kLinearAttention,
     [](AttentionLayerConfig& c) {
       c.feature_map = QkMap::kHedgehog;
       c.normalize = true;
     }},
    {"elu, normalize, no output norm", AttentionOp::kLinearAttention,
     [](AttentionLayerConfig& c) {
       c.feature_map = QkMap::kElu;
       c.normalize = true;
       c.output_norm = false;
     }},
    {"no output norm", AttentionOp::kLinearAttention,
     [](AttentionLayerConfig& c) { c.output_norm = false; }},
    {"no affine, another eps", AttentionOp::kGla,
     [](AttentionLayerConfig& c) {
       c.elementwise_affine = false;
       c.norm_eps = 0.1f;
     }},
    {"clamp_min", AttentionOp::kGla, [](AttentionLayerConfig& c) { c.clamp_min = -0.3f; }},
    {"silu, norm and gate apart", AttentionOp::kGla,
     [](AttentionLayerConfig& c) {
       c.feature_map = QkMap::kSilu;
       c.fuse_norm = false;
     }},
    {"short convolution", AttentionOp::kGla,
     [](AttentionLayerConfig& c) { c.use_short_conv = true; }},
    {"short convolution with bias, sigmoid", AttentionOp::kSimpleGla,
     [](AttentionLayerConfig& c) {
       c.use_short_conv = c.conv_bias = true;
       c.conv_size = 3;
       c.feature_map = QkMap::kSigmoid;
     }},
    {"short convolution, no gate", AttentionOp::kSimpleGla,
     [](AttentionLayerConfig& c) {
       c.use_short_conv = true;
       c.use_gate = false;
     }},
    {"convolution of one input, gelu", AttentionOp::kGla,
     [](AttentionLayerConfig& c) {
       c.use_short_conv = true;
       c.conv_size = 1;
       c.feature_map = QkMap::kGelu;
     }},
    {"short convolution, squared relu", AttentionOp::kRetention,
     [](AttentionLayerConfig& c) {
       c.use_short_conv = true;
       c.feature_map = QkMap::kSquaredRelu;
     }},
};

class EveryOption : public ::testing::TestWithParam<Option> {};
void PrintTo(const Option& option, std::ostream* out) {
  *out << NameOf(option.op) << ": " << option.name;
}
INSTANTIATE_TEST_SUITE_P(AttentionLayer, EveryOption, ::testing::ValuesIn(kOptions));

TEST_P(EveryOption, EqualsFiniteDifferences) {
  AttentionLayerConfig config = ConfigOf(GetParam().op, kShapes[1]);
  GetParam().set(config);
  for (const bool states : {false, true}) {
    SCOPED_TRACE(states ? "with states" : "without states");
    Given given;
    if (states) given = {.initial = AllOf(config), .d_final = AllOf(config)};
    Check(config, kShapes[1].lengths, given);
  }
}

// Every combination of what may be given: which results exist, and that they are right.
TEST(AttentionLayer, EveryCombinationOfStatesAndGradients) {
  AttentionLayerConfig convolved = ConfigOf(AttentionOp::kGla, {8, 2, 1, 4, 6, {}});
  convolved.use_short_conv = true;
  AttentionLayerConfig normalized = ConfigOf(AttentionOp::kLinearAttention, {8, 2, 1, 4, 6, {}});
  normalized.feature_map = QkMap::kElu;
  normalized.normalize = true;
  normalized.output_norm = false;  // which would take out what the key sum scales
  for (const AttentionLayerConfig& config : {convolved, normalized}) {
    const auto layer = MakeLayer(config);
    const Call call(config, {4, 0, 2}, DType::kFloat32);
    for (int mask = 0; mask < 32; ++mask) {
      const auto bit = [&](int i) { return (mask >> i & 1) != 0; };
      const bool is_linear = config.normalize;
      const auto parts = [&](bool recurrent, bool other) {
        return Parts{recurrent, other && is_linear, other && !is_linear};
      };
      const Given given = {parts(bit(0), bit(1)), bit(2), parts(bit(3), bit(4))};
      if (mask < 4) continue;  // no gradient is given
      SCOPED_TRACE(::testing::Message() << NameOf(config.op) << " " << mask);
      ExpectNear(RunLayer(*layer, call, given), RunDefinition(call, given), kFloat32);
    }
  }
}

TEST(AttentionLayer, WithoutAGradientThereIsNothingToDo) {
  const AttentionLayerConfig config = ConfigOf(AttentionOp::kGla, kShapes[0]);
  const Call call(config, {3}, DType::kFloat32);
  const auto layer = MakeLayer(config);
  const DeviceBuffer x = Upload(call.x);
  const AttentionLayerOutput output =
      ValueOrDie(layer->Forward(InputOf(x, 3, config.hidden_size), false));
  EXPECT_FALSE(output.final_state.recurrent.has_value());
  EXPECT_THAT(layer->Backward(output.record, {}).status().ToString(),
              HasSubstr("INVALID_ARGUMENT: gla layer: gradients: expected at least one of dy and "
                        "d_final_state, found none"));
}

// ---- Cut and carried on -------------------------------------------------------------------------

// The first `rows` rows of a call of one sequence, or those after them.
Call Cut(const Call& whole, int rows, bool first) {
  Call part = whole;
  const auto at = whole.x.begin() + int64_t{rows} * whole.config.hidden_size;
  const auto dy_at = whole.dy.begin() + int64_t{rows} * whole.config.hidden_size;
  part.cu_seqlens = {0, first ? rows : whole.rows() - rows};
  part.lengths = {part.rows()};
  part.x.assign(first ? whole.x.begin() : at, first ? at : whole.x.end());
  part.dy.assign(first ? whole.dy.begin() : dy_at, first ? dy_at : whole.dy.end());
  for (int64_t& start : part.starts) start += first ? 0 : rows;
  return part;
}

TEST_P(EveryKind, CutAnywhereAndCarriedOnEqualsWhole) {
  AttentionLayerConfig config = ConfigOf(GetParam().op, kShapes[1]);
  config.use_gate = GetParam().use_gate;
  config.use_short_conv = config.op != AttentionOp::kLinearAttention;
  const Given given = {.initial = AllOf(config), .d_final = AllOf(config)};
  const auto layer = MakeLayer(config, {.form = AttentionForm::kRecurrent});
  const Call whole(config, {9}, DType::kFloat32);
  const Results<float> want = RunLayer(*layer, whole, given);
  for (const int rows : {1, 2, 5, 8}) {
    SCOPED_TRACE(rows);
    Call first = Cut(whole, rows, true), second = Cut(whole, rows, false);
    const Results<float> forward = RunLayer(*layer, first, given);  // its gradients come below
    second.initial = {forward.recurrent, {}, forward.conv};
    const Results<float> late = RunLayer(*layer, second, given);
    first.d_final = {late.d_recurrent, {}, late.d_conv};
    const Results<float> early = RunLayer(*layer, first, given);

    std::vector<float> y = early.y, dx = early.dx;
    y.insert(y.end(), late.y.begin(), late.y.end());
    dx.insert(dx.end(), late.dx.begin(), late.dx.end());
    EXPECT_TRUE(IsSameBits(y, want.y));
    EXPECT_TRUE(IsSameBits(late.recurrent, want.recurrent));
    EXPECT_TRUE(IsSameBits(late.conv, want.conv));
    EXPECT_TRUE(IsNear(dx, want.dx, 1e-6));
    EXPECT_TRUE(IsNear(early.d_recurrent, want.d_recurrent, 1e-6));
    EXPECT_TRUE(IsNear(early.d_conv, want.d_conv, 1e-6));
  }
}

TEST_P(EveryKind, ASequenceIsTheSameAloneAndInAnyBatchAndEveryTime) {
  AttentionLayerConfig config = ConfigOf(GetParam().op, kShapes[1]);
  config.use_gate = GetParam().use_gate;
  const Given given = {.initial = AllOf(config), .d_final = AllOf(config)};
  for (const DType dtype : kActTypes) {
    for (const AttentionForm form : {AttentionForm::kRecurrent, AttentionForm::kChunkwise}) {
      const auto layer = MakeLayer(config, {.dtype = dtype, .form = form});
      const Call all(config, {1, 67, 0, 5}, dtype);
      const Results<float> together = RunLayer(*layer, all, given);
      ExpectSameBits(RunLayer(*layer, all, given), together);
      for (size_t n = 0; n < all.lengths.size(); ++n) {
        const auto rows_of = [&](const std::vector<float>& values) {
          return std::vector<float>(values.begin() + all.cu_seqlens[n] * config.hidden_size,
                                    values.begin() + all.cu_seqlens[n + 1] * config.hidden_size);
        };
        const auto part = [&](const std::vector<float>& values) {
          const size_t size = values.size() / all.lengths.size();
          return std::vector<float>(values.begin() + n * size, values.begin() + (n + 1) * size);
        };
        Call one = all;
        one.lengths = {all.lengths[n]};
        one.cu_seqlens = {0, all.lengths[n]};
        if (!one.starts.empty()) one.starts = {all.starts[n]};
        one.x = rows_of(all.x);
        one.dy = rows_of(all.dy);
        one.initial = {part(all.initial.recurrent), {}, {}};
        one.d_final = {part(all.d_final.recurrent), {}, {}};
        const Results<float> alone = RunLayer(*layer, one, given);
        EXPECT_TRUE(IsSameBits(alone.y, rows_of(together.y)));
        EXPECT_TRUE(IsSameBits(alone.recurrent, part(together.recurrent)));
        EXPECT_TRUE(IsSameBits(alone.dx, rows_of(together.dx)));
        EXPECT_TRUE(IsSameBits(alone.d_recurrent, part(together.d_recurrent)));
      }
    }
  }
}

TEST_P(EveryKind, NoTokensPassTheStateOn) {
  AttentionLayerConfig config = ConfigOf(GetParam().op, kShapes[1]);
  config.use_gate = GetParam().use_gate;
  config.use_short_conv = config.op != AttentionOp::kLinearAttention;
  const Given given = {.initial = AllOf(config), .d_final = AllOf(config)};
  const Call call(config, {0, 0}, DType::kFloat32);
  const Results<float> got = RunLayer(*MakeLayer(config), call, given);
  EXPECT_TRUE(got.y.empty() && got.dx.empty());
  EXPECT_TRUE(IsSameBits(got.recurrent, call.initial.recurrent));
  EXPECT_TRUE(IsSameBits(got.conv, call.initial.conv));
  EXPECT_TRUE(IsSameBits(got.d_recurrent, call.d_final.recurrent));
  EXPECT_TRUE(IsSameBits(got.d_conv, call.d_final.conv));
}

// ---- The server's layer -------------------------------------------------------------------------

// The rest of a model of one layer, in double.
class Around {
 public:
  explicit Around(const ModelConfig& config) : c_(config), source_(kSeed) {}

  Doubles Embedding(int token) {
    const Doubles table = Weight("model.embeddings.weight", {c_.vocab_size, c_.hidden_size});
    return {table.begin() + int64_t{token} * c_.hidden_size,
            table.begin() + int64_t{token + 1} * c_.hidden_size};
  }
  Doubles Norm(const std::string& name, const Doubles& x) {
    return reference::RmsNorm(x, Weight(name, {c_.hidden_size}), {}, c_.norm_eps, true);
  }
  // The logits, of the residual after the attention layer.
  Doubles Rest(Doubles residual) {
    const std::string mlp = "model.layers.0.mlp.";
    const Doubles x = Norm("model.layers.0.mlp_norm.weight", residual);
    Doubles gate = Linear(mlp + "gate_proj.weight", x, c_.intermediate_size);
    const Doubles up = Linear(mlp + "up_proj.weight", x, c_.intermediate_size);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = reference::Silu(gate[i]) * up[i];
    const Doubles down = Linear(mlp + "down_proj.weight", gate, c_.hidden_size);
    for (size_t i = 0; i < down.size(); ++i) residual[i] += down[i];
    return Linear("lm_head.weight", Norm("model.norm.weight", residual), c_.vocab_size);
  }

 private:
  Doubles Weight(const std::string& name, const std::vector<int64_t>& shape) {
    const HostWeight weight = *source_.Get(name, shape);
    const std::vector<uint8_t> bytes = ConvertWeight(weight.matrix, DType::kFloat32);
    const auto* floats = reinterpret_cast<const float*>(bytes.data());
    return {floats, floats + bytes.size() / sizeof(float)};
  }
  Doubles Linear(const std::string& name, const Doubles& x, int out) {
    const Doubles w = Weight(name, {out, static_cast<int64_t>(x.size())});
    Doubles y(out);
    for (int o = 0; o < out; ++o) {
      for (size_t i = 0; i < x.size(); ++i) y[o] += w[o * x.size() + i] * x[i];
    }
    return y;
  }

  const ModelConfig c_;
  RandomWeightSource source_;
};

TEST(AttentionLayer, IsTheServersLayer) {
  for (const char* keys :
       {R"("model_type": "gla", "num_kv_heads": 2, "clamp_min": -0.04, "feature_map": "relu")",
        R"("model_type": "gla", "use_short_conv": true, "use_output_gate": false)",
        R"("model_type": "linear_attn", "feature_map": "hedgehog", "norm_feature_map": true)",
        R"("model_type": "linear_attn", "num_kv_heads": 1, "norm_k": true)",
        R"("model_type": "retnet", "num_kv_heads": 2)"}) {
    SCOPED_TRACE(keys);
    const ModelConfig config = ValueOrDie(ModelConfig::Parse(absl::StrCat(
        R"({"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4,)",
        R"("expand_k": 0.5, "expand_v": 1.0, "intermediate_size": 48,)", keys, "}")));
    const std::vector<int32_t> tokens = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9};
    const auto model = MakeTinyModel(TestDevice(), {}, kSeed, config);
    Feeder feeder = ValueOrDie(Feeder::Create(TestDevice(), *model, 1));
    const std::vector<float> logits = feeder.Step({{0, tokens, true}}, LogitRows::kAll);

    Around around(config);
    std::vector<float> x;
    for (const int32_t token : tokens) {
      const Doubles row = around.Norm("model.layers.0.attn_norm.weight", around.Embedding(token));
      x.insert(x.end(), row.begin(), row.end());
    }
    RandomWeightSource source(kSeed);
    const auto layer = ValueOrDie(
        AttentionLayer::Load(TestDevice(), AttentionLayerConfig::Of(config),
                             {.form = AttentionForm::kRecurrent}, source, "model.layers.0.attn."));
    const DeviceBuffer device_x = Upload(x);
    const auto rows = static_cast<int32_t>(tokens.size());
    const AttentionLayerOutput output =
        ValueOrDie(layer->Forward(InputOf(device_x, rows, config.hidden_size), true));
    const std::vector<float> y = ToHost(output.y);
    Doubles want;
    for (int32_t t = 0; t < rows; ++t) {
      Doubles residual = around.Embedding(tokens[t]);
      for (int i = 0; i < 32; ++i) residual[i] += y[t * 32 + i];
      Append(want, around.Rest(residual));
    }
    EXPECT_TRUE(IsNear(logits, want, 1e-5));
    // The recurrent states stand first in a slot.
    const std::vector<float> state = ToHost(output.final_state.recurrent);
    std::vector<float> slot = feeder.State(0);
    slot.resize(state.size());
    EXPECT_TRUE(IsNear(state, slot, 1e-5));
  }
}

// ---- What does not fit --------------------------------------------------------------------------

struct Refusal {
  const char* message;
  void (*spoil)(AttentionLayerConfig&);
};

TEST(AttentionLayer, RefusesConfigsByName) {
  const Refusal refusals[] = {
      {"gla layer: hidden_size: expected 1 to 16777216, found 0",
       [](AttentionLayerConfig& c) { c.hidden_size = 0; }},
      {"gla layer: num_kv_heads: expected a divisor of num_heads = 4, found 3",
       [](AttentionLayerConfig& c) { c.num_kv_heads = 3; }},
      {"gla layer: num_kv_heads: expected 1 to 16777216, found -1",
       [](AttentionLayerConfig& c) { c.num_kv_heads = -1; }},
      {"gla layer: head_key_dim: expected 1 to 4194304, found 0",
       [](AttentionLayerConfig& c) { c.head_key_dim = 0; }},
      {"gla layer: normalize: expected false, found true",
       [](AttentionLayerConfig& c) { c.normalize = true; }},
      {"gla layer: norm_k: expected false, found true",
       [](AttentionLayerConfig& c) { c.norm_k = true; }},
      {"gla layer: output_norm: expected true, found false",
       [](AttentionLayerConfig& c) { c.output_norm = false; }},
      {"gla layer: conv_bias: expected false, found true",
       [](AttentionLayerConfig& c) { c.conv_bias = true; }},
      {"gla layer: conv_size: expected 1 to 8, found 9",
       [](AttentionLayerConfig& c) { c.conv_size = 9; }},
      {"gla layer: clamp_min: expected at most 0, found 1",
       [](AttentionLayerConfig& c) { c.clamp_min = 1; }},
      {"gla layer: gate_logit_normalizer: expected a positive number, found 0",
       [](AttentionLayerConfig& c) { c.gate_logit_normalizer = 0; }},
      {"simple_gla layer: clamp_min: expected none, found -1",
       [](AttentionLayerConfig& c) {
         c.op = AttentionOp::kSimpleGla;
         c.clamp_min = -1;
       }},
      {"linear_attention layer: use_gate: expected false, found true",
       [](AttentionLayerConfig& c) { c.op = AttentionOp::kLinearAttention; }},
      {"linear_attention layer: use_output_gate: expected false, found true",
       [](AttentionLayerConfig& c) {
         c.op = AttentionOp::kLinearAttention;
         c.use_gate = false;
       }},
      {"retention layer: key dimension of a head, turned in pairs: expected an even number, found "
       "7",
       [](AttentionLayerConfig& c) {
         c.op = AttentionOp::kRetention;
         c.use_gate = false;
         c.head_key_dim = 7;
       }},
      // What the operator holds.
      {"gla: key dimension: expected 1 to 2048, found 4096",
       [](AttentionLayerConfig& c) { c.head_key_dim = 4096; }},
      // Parts that do not meet.
      {"gla layer: output width of gk_proj.1, one gate per key dimension: expected 24, found 12",
       [](AttentionLayerConfig& c) { c.feature_map = QkMap::kHedgehog; }},
  };
  for (const Refusal& refusal : refusals) {
    AttentionLayerConfig config = ConfigOf(AttentionOp::kGla, kShapes[1]);
    refusal.spoil(config);
    RandomWeightSource source(kSeed);
    const auto layer = AttentionLayer::Load(TestDevice(), config, {}, source, kPrefix);
    EXPECT_EQ(layer.status().ToString(), absl::StrCat("INVALID_ARGUMENT: ", refusal.message));
  }
  RandomWeightSource source(kSeed);
  EXPECT_THAT(AttentionLayer::Load(TestDevice(), ConfigOf(AttentionOp::kGla, kShapes[1]),
                                   {.dtype = DType::kFloat16}, source, kPrefix)
                  .status()
                  .ToString(),
              HasSubstr("gla layer: dtype: expected float32 or bfloat16, found float16"));
}

TEST(AttentionLayer, MergedHeadsMustFitTheOutputProjection) {
  const AttentionLayerConfig config = ConfigOf(AttentionOp::kRetention, kShapes[1]);
  RandomWeightSource source(kSeed);
  AttentionLayerWeights weights =
      ValueOrDie(LoadAttentionLayer(TestDevice(), config, DType::kFloat32, source, kPrefix));
  EXPECT_TRUE(CheckWidths(config, weights).ok());
  // A projection that takes one head's 10 values where four heads give 40.
  const std::vector<float> values(24 * 40);
  const auto pack = [&](int rows, int cols) {
    return PackedWeight(TestDevice(), {{values.data(), DType::kFloat32, rows, cols}},
                        DType::kFloat32);
  };
  weights.out_proj.forward = pack(24, 10);
  EXPECT_EQ(CheckWidths(config, weights).ToString(),
            "INVALID_ARGUMENT: retention layer: input width of o_proj, after the per-head norm "
            "(heads * value dim): expected 40, found 10");
  weights.out_proj.forward = pack(24, 40);
  weights.out_proj.transposed = pack(24, 40);
  EXPECT_EQ(
      CheckWidths(config, weights).ToString(),
      "INVALID_ARGUMENT: retention layer: input width of the gradient of o_proj: expected 24, "
      "found 40");
}

TEST(AttentionLayer, RefusesInputsByName) {
  AttentionLayerConfig config = ConfigOf(AttentionOp::kGla, kShapes[1]);
  config.use_short_conv = true;
  const auto gla = MakeLayer(config);
  const auto retention = MakeLayer(ConfigOf(AttentionOp::kRetention, kShapes[1]));
  const DeviceBuffer memory = Upload(std::vector<float>(4096));
  const auto tensor = [&](std::vector<int64_t> shape, DType dtype = DType::kFloat32) {
    return Tensor{memory.data(), dtype, std::move(shape)};
  };
  const auto refused = [&](const AttentionLayer& layer, const AttentionLayerInput& input) {
    return layer.Forward(input, true).status().ToString();
  };
  AttentionLayerInput good = InputOf(memory, 5, 24);
  good.cu_seqlens = {0, 2, 5};
  ASSERT_TRUE(gla->Forward(good, true).ok());
  AttentionLayerInput bad = good;
  bad.x = tensor({5, 23});
  EXPECT_EQ(refused(*gla, bad),
            "INVALID_ARGUMENT: gla layer: x: expected shape [T, hidden_size] = [5, 24], found [5, "
            "23]");
  bad.x = tensor({5, 1, 24});
  EXPECT_THAT(refused(*gla, bad), HasSubstr("= [5, 24], found [5, 1, 24]"));
  bad.x = tensor({});
  EXPECT_THAT(refused(*gla, bad), HasSubstr("= [0, 24], found []"));
  bad.x = tensor({5, 24}, DType::kBFloat16);
  EXPECT_EQ(refused(*gla, bad),
            "INVALID_ARGUMENT: gla layer: x: expected dtype float32, found bfloat16");
  bad.x = {nullptr, DType::kFloat32, {5, 24}};
  EXPECT_THAT(refused(*gla, bad), HasSubstr("x: expected data of [5, 24], found a null pointer"));
  bad.x = tensor({int64_t{1} << 40, 24});
  EXPECT_THAT(refused(*gla, bad), HasSubstr("gla layer: x: expected at most"));

  bad = good;
  bad.cu_seqlens = {};
  EXPECT_THAT(refused(*gla, bad), HasSubstr("gla layer: cu_seqlens: expected N + 1 offsets"));
  bad.cu_seqlens = {0, 4};
  EXPECT_THAT(refused(*gla, bad), HasSubstr("cu_seqlens: expected the last offset T = 5"));
  bad.cu_seqlens = {0, 3, 2, 5};
  EXPECT_THAT(refused(*gla, bad), HasSubstr("cu_seqlens: expected offset 2 of at least 3"));

  bad = good;
  bad.start_positions = {0, 2};
  EXPECT_THAT(refused(*gla, bad), HasSubstr("start_positions: expected none, found 2"));
  bad.start_positions = {0};
  EXPECT_THAT(refused(*retention, bad),
              HasSubstr("start_positions: expected none, or one for each of 2 sequences, found 1"));

  bad = good;
  bad.initial.recurrent = tensor({2, 4, 6, 10});  // per query head; the layer has two groups
  EXPECT_THAT(refused(*gla, bad),
              HasSubstr("initial_state: expected shape [N, S, K, V] = [2, 2, 6, 10]"));
  bad = good;
  bad.initial.key_sum = tensor({2, 2, 6});
  EXPECT_THAT(refused(*gla, bad), HasSubstr("initial_key_sum: expected none without normalize"));
  bad = good;
  bad.initial.conv = tensor({2, 4, 56});
  EXPECT_EQ(refused(*gla, bad),
            "INVALID_ARGUMENT: gla layer: initial.conv: expected shape [N, conv_size - 1, channels "
            "of q, k and v] = [2, 3, 56], found [2, 4, 56]");
  EXPECT_THAT(refused(*retention, bad),
              HasSubstr("retention layer: initial.conv: expected none without a short convolution "
                        "of more than one input, found [2, 4, 56]"));

  const AttentionLayerOutput output = ValueOrDie(gla->Forward(good, true));
  const auto refused_gradients = [&](const AttentionLayerOutputGradients& gradients) {
    return gla->Backward(output.record, gradients).status().ToString();
  };
  EXPECT_THAT(refused_gradients({.dy = tensor({4, 24})}),
              HasSubstr("gla layer: dy: expected shape [T, hidden_size] = [5, 24], found [4, 24]"));
  EXPECT_THAT(refused_gradients({.dy = tensor({5, 24}, DType::kBFloat16)}),
              HasSubstr("gla layer: dy: expected dtype float32, found bfloat16"));
  AttentionLayerOutputGradients gradients{.dy = tensor({5, 24})};
  gradients.d_final_state.recurrent = tensor({2, 2, 6, 9});
  EXPECT_THAT(refused_gradients(gradients),
              HasSubstr("d_final_state: expected shape [N, S, K, V] = [2, 2, 6, 10]"));
  gradients.d_final_state = {.conv = tensor({1, 3, 56})};
  EXPECT_THAT(refused_gradients(gradients), HasSubstr("d_final_state.conv: expected shape"));
}

TEST(AttentionLayer, NamesATensorOfAnotherShape) {
  const ModelConfig model = ValueOrDie(ModelConfig::Load(kBardFolder));
  Checkpoint checkpoint = ValueOrDie(Checkpoint::Open(kBardFolder));
  CheckpointSource source(checkpoint);
  AttentionLayerConfig config = AttentionLayerConfig::Of(model);
  const auto load = [&] {
    return AttentionLayer::Load(TestDevice(), config, {}, source, "model.layers.0.attn.").status();
  };
  EXPECT_TRUE(load().ok());
  config.head_value_dim /= 2;
  EXPECT_THAT(load().ToString(), HasSubstr("model.layers.0.attn.v_proj.weight: expected"));
}

}  // namespace
}  // namespace gla
