#include "model/attention_layer.h"

#include <algorithm>

#include "gtest/gtest.h"
#include "tests/model/layer_call.h"

namespace gla::layer_test {
namespace {

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

}  // namespace
}  // namespace gla::layer_test
