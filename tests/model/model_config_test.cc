#include "model/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "model/checkpoint.h"
#include "tests/model/model_folder.h"

namespace gla {
namespace {

using ::gla::testing::ModelFolder;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kGolden[] = GLA_SOURCE_DIR "/tests/golden/models/";
constexpr char kBard[] = GLA_SOURCE_DIR "/deploy/models/bard-6m";

std::string Message(const absl::Status& status) { return std::string(status.message()); }

// A config of `family` with `keys` ("\"a\":1,\"b\":2") set besides small dimensions.
absl::StatusOr<ModelConfig> Config(std::string_view family, std::string_view keys) {
  auto config = nlohmann::json::parse(
      R"({"vocab_size":100,"hidden_size":64,"num_hidden_layers":2,"num_heads":4})");
  config["model_type"] = std::string(family);
  config.update(nlohmann::json::parse(absl::StrCat("{", std::string(keys), "}")));
  return ModelConfig::Parse(config.dump());
}

// ---- What is refused ----------------------------------------------------------------------------

struct Refused {
  const char* fact;
  const char* family;
  const char* keys;
  const char* expected;  // the whole message, or its beginning
};

const Refused kRefused[] = {
    {"UnknownFamily", "llama", "",
     "model_type: expected one of \"gla\", \"linear_attn\", \"retnet\", got \"llama\""},
    {"HybridAttention", "gla", R"("attn":{"layers":[1],"num_heads":4})",
     "attn: expected null (hybrid models with softmax attention layers are not supported), got {"},
    {"HybridAttentionInRetNet", "retnet", R"("attn":[])", "attn: expected null"},
    {"AttentionResiduals", "gla", R"("attnres_block_size":4)",
     "attnres_block_size: expected null (attention residuals are not supported), got 4"},
    {"ValueGate", "gla", R"("use_gv":true)",
     "use_gv: expected false (value gates are not supported), got true"},
    {"NoKeyGate", "gla", R"("use_gk":false)",
     "use_gk: expected true (the layer always has its key gate), got false"},
    {"OtherActivation", "gla", R"("hidden_act":"powlu")",
     "hidden_act: expected \"swish\" (other activations are not supported), got \"powlu\""},
    {"OtherGateNormalizer", "gla", R"("gate_logit_normalizer":8)",
     "gate_logit_normalizer: expected 16 (another value is not supported), got 8"},
    {"OtherGateRank", "gla", R"("gate_low_rank_dim":32)", "gate_low_rank_dim: expected 16"},
    {"Quantization", "gla", R"("quantization_config":{"bits":4})",
     "quantization_config: expected null"},
    {"EncoderDecoder", "gla", R"("is_encoder_decoder":true)", "is_encoder_decoder: expected false"},
    {"PrunedHeads", "gla", R"("pruned_heads":{"0":[1]})", "pruned_heads: expected {}"},
    {"SharedConvolutionKernel", "gla", R"("use_short_conv":true,"share_conv_kernel":true)",
     "share_conv_kernel: expected false"},
    {"UnknownKey", "gla", R"("rope_theta":10000)",
     "\"rope_theta\": unknown key (10000); it may change what the model computes"},
    {"KeyOfAnotherFamily", "gla", R"("norm_q":true)", "\"norm_q\": unknown key (true)"},
    {"GateKeyInLinearAttention", "linear_attn", R"("clamp_min":-1)", "\"clamp_min\": unknown key"},
    {"MisspeltKey", "gla", R"("hidden_sizes":64)", "\"hidden_sizes\": unknown key"},
    {"HiddenSizeIsText", "gla", R"("hidden_size":"64")",
     "hidden_size: expected an integer from 1 to 65536, got \"64\""},
    {"HiddenSizeIsFractional", "gla", R"("hidden_size":64.0)", "hidden_size: expected an integer"},
    {"HiddenSizeIsNull", "gla", R"("hidden_size":null)", "hidden_size: expected an integer"},
    {"HiddenSizeIsBool", "gla", R"("hidden_size":true)", "hidden_size: expected an integer"},
    {"HiddenSizeIsZero", "gla", R"("hidden_size":0)", "hidden_size: expected an integer from 1"},
    {"HiddenSizeIsNegative", "gla", R"("hidden_size":-64)",
     "hidden_size: expected an integer from 1"},
    {"HiddenSizeIsABillion", "gla", R"("hidden_size":1000000000)",
     "hidden_size: expected an integer"},
    {"HiddenSizeWraps", "gla", R"("hidden_size":18446744073709551615)",
     "hidden_size: expected an integer from 1 to 65536, got 18446744073709551615"},
    {"HiddenSizeWrapsInt32", "gla", R"("hidden_size":4294967360)",
     "hidden_size: expected an integer"},
    {"LayersAreABillion", "gla", R"("num_hidden_layers":1000000000)",
     "num_hidden_layers: expected an integer from 1 to 1024, got 1000000000"},
    {"VocabularyIsHuge", "gla", R"("vocab_size":2000000000)", "vocab_size: expected an integer"},
    {"HeadsAreZero", "gla", R"("num_heads":0)",
     "num_heads: expected an integer from 1 to 4096, got 0"},
    {"HeadsDoNotDivideKeys", "gla", R"("num_heads":3)",
     "num_heads: expected a divisor of hidden_size * expand_k = 32, got 3"},
    {"HeadsDoNotDivideValues", "gla", R"("num_heads":4,"expand_v":0.03125)",
     "num_heads: expected a divisor of hidden_size * expand_v = 2, got 4"},
    {"KeyValueHeadsDoNotDivideHeads", "gla", R"("num_kv_heads":3)",
     "num_kv_heads: expected a divisor of num_heads = 4, got 3"},
    {"MoreKeyValueHeadsThanHeads", "gla", R"("num_kv_heads":8)",
     "num_kv_heads: expected a divisor of num_heads = 4, got 8"},
    {"ExpandIsNoInteger", "gla", R"("expand_k":0.3)",
     "expand_k: expected hidden_size * this to be an integer, got 19.2"},
    {"ExpandIsNegative", "gla", R"("expand_k":-0.5)", "expand_k: expected a number from"},
    {"ExpandIsHuge", "gla", R"("expand_v":1e300)", "expand_v: expected a number from"},
    {"ExpandIsText", "gla", R"("expand_v":"1")", "expand_v: expected a number from"},
    {"FeatureMapOfAnotherFamily", "gla", R"("feature_map":"hedgehog")",
     "feature_map: expected one of null, \"relu\", \"sigmoid\", \"silu\", \"swish\", \"sqrelu\", "
     "\"gelu\", "
     "got \"hedgehog\""},
    {"ExactGeluInRetNet", "retnet", R"("feature_map":"gelu")", "feature_map: expected one of null"},
    {"NoFeatureMapInLinearAttention", "linear_attn", R"("feature_map":null)",
     "feature_map: expected one of \"elementwise_product\", \"elu\""},
    {"FeatureMapIsANumber", "gla", R"("feature_map":7)", "feature_map: expected one of"},
    {"OutputNormUnknown", "linear_attn", R"("output_norm":"layernorm")",
     "output_norm: expected \"rmsnorm\" or \"identity\", got \"layernorm\""},
    {"BoolIsANumber", "gla", R"("use_output_gate":1)",
     "use_output_gate: expected true or false, got 1"},
    {"TieIsNull", "gla", R"("tie_word_embeddings":null)",
     "tie_word_embeddings: expected true or false"},
    {"ClampIsPositive", "gla", R"("clamp_min":0.5)", "clamp_min: expected a number from"},
    {"NormEpsIsZero", "gla", R"("norm_eps":0)", "norm_eps: expected a number from"},
    {"ConvolutionTooWide", "gla", R"("conv_size":9)",
     "conv_size: expected an integer from 1 to 8, got 9"},
    {"IntermediateIsZero", "gla", R"("intermediate_size":0)",
     "intermediate_size: expected an integer"},
    {"RatioIsHuge", "gla", R"("hidden_ratio":1e9)", "hidden_ratio: expected a number from"},
    {"BosBeyondVocabulary", "gla", R"("bos_token_id":100)",
     "bos_token_id: expected a token id below vocab_size (100)"},
    {"TwoBosTokens", "gla", R"("bos_token_id":[1,2])",
     "bos_token_id: expected one token id or null"},
    {"EosIsNegative", "gla", R"("eos_token_id":-1)", "eos_token_id: expected a token id"},
    {"EosListHoldsText", "gla", R"("eos_token_id":[1,"2"])", "eos_token_id: expected a token id"},
    {"RetNetHeadTooWide", "retnet", R"("hidden_size":2048)",
     "expand_k: expected an even key dimension of each head, at most 256, got hidden_size * "
     "expand_k / "
     "num_heads = 512"},
    {"RetNetHeadOdd", "retnet", R"("hidden_size":20)", "expand_k: expected an even key dimension"},
};

class RefusedConfigTest : public ::testing::TestWithParam<Refused> {};

TEST_P(RefusedConfigTest, SaysKeyExpectedAndGot) {
  const auto config = Config(GetParam().family, GetParam().keys);
  ASSERT_FALSE(config.ok());
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(config.status()), ::testing::StartsWith(GetParam().expected));
}

INSTANTIATE_TEST_SUITE_P(ModelConfig, RefusedConfigTest, ::testing::ValuesIn(kRefused),
                         [](const auto& info) { return std::string(info.param.fact); });

TEST(ModelConfig, TextThatIsNoObjectIsRefused) {
  const std::pair<std::string, const char*> cases[] = {
      {"", "not valid JSON"},
      {"{", "not valid JSON at byte 2"},
      {"[]", "expected a JSON object, got []"},
      {"{}", "model_type: expected one of"},
      {R"({"model_type":["gla"]})", "got [\"gla\"]"},
      {R"({"model_type":"gla","model_type":"gla"})", "name \"model_type\" appears twice"},
      {R"({"model_type":"gla","norm_eps":NaN})", "not valid JSON"},
      {R"({"model_type":"gla","norm_eps":1e999})", "not valid JSON"},
      {std::string(100'000, '['), "nested deeper than 32"},
  };
  for (const auto& [text, expected] : cases) {
    EXPECT_THAT(Message(ModelConfig::Parse(text).status()), HasSubstr(expected));
  }
}

TEST(ModelConfig, LoadNamesTheFile) {
  const ModelFolder folder;
  EXPECT_EQ(ModelConfig::Load(folder.path()).status().code(), absl::StatusCode::kNotFound);
  folder.Write("config.json", R"({"model_type":"mamba"})");
  EXPECT_THAT(Message(ModelConfig::Load(folder.path()).status()),
              HasSubstr("config.json: model_type: expected"));
  folder.Write("config.json", std::string((1 << 20) + 1, ' '));
  EXPECT_THAT(Message(ModelConfig::Load(folder.path()).status()),
              HasSubstr("config.json: expected at most 1048576 bytes, found 1048577"));
  std::filesystem::remove(folder.File("config.json"));
  std::filesystem::create_symlink("/etc/passwd", folder.File("config.json"));
  EXPECT_THAT(Message(ModelConfig::Load(folder.path()).status()),
              HasSubstr("symbolic link out of"));
}

// ---- What is understood -------------------------------------------------------------------------

TEST(ModelConfig, AbsentKeysHaveFlasDefaults) {
  const auto gla = ModelConfig::Parse(R"({"model_type":"gla"})");
  ASSERT_TRUE(gla.ok()) << gla.status();
  EXPECT_EQ(gla->vocab_size, 32000);
  EXPECT_EQ(gla->hidden_size, 2048);
  EXPECT_EQ(gla->num_layers, 24);
  EXPECT_EQ(gla->num_heads, 4);
  EXPECT_EQ(gla->num_kv_heads, 4);
  EXPECT_EQ(gla->head_key_dim, 256);
  EXPECT_EQ(gla->head_value_dim, 512);
  EXPECT_EQ(gla->intermediate_size, 5632);
  EXPECT_EQ(gla->bos_token_id, 1);
  EXPECT_EQ(gla->eos_token_id, 2);
  EXPECT_EQ(gla->feature_map, QkMap::kNone);
  EXPECT_FALSE(gla->clamp_min.has_value());
  EXPECT_TRUE(gla->use_output_gate);
  EXPECT_FALSE(gla->use_short_conv);
  // GLA-1.3B, its layers of 51,435,008 added up by hand.
  EXPECT_EQ(gla->num_parameters(), 2 * 32000 * 2048 + 24 * int64_t{51435008} + 2048);

  const auto linear = ModelConfig::Parse(R"({"model_type":"linear_attn"})");
  ASSERT_TRUE(linear.ok()) << linear.status();
  EXPECT_EQ(linear->head_key_dim, 512);
  EXPECT_EQ(linear->feature_map, QkMap::kElementwiseProduct);
  EXPECT_FALSE(linear->use_output_gate);
  EXPECT_TRUE(linear->output_norm);

  const auto retnet = ModelConfig::Parse(R"({"model_type":"retnet"})");
  ASSERT_TRUE(retnet.ok()) << retnet.status();
  EXPECT_EQ(retnet->num_heads, 8);
  EXPECT_EQ(retnet->head_key_dim, 256);
  EXPECT_EQ(retnet->head_value_dim, 512);
  EXPECT_EQ(retnet->intermediate_size, 2816);
}

TEST(ModelConfig, IntermediateSizeIsTheNextMultipleOf256) {
  EXPECT_EQ(Config("gla", R"("hidden_size":64)")->intermediate_size, 256);
  EXPECT_EQ(Config("gla", R"("hidden_size":256)")->intermediate_size, 768);
  EXPECT_EQ(Config("gla", R"("hidden_size":384)")->intermediate_size, 1024);  // exactly
  EXPECT_EQ(Config("gla", R"("hidden_size":1024)")->intermediate_size, 2816);
  EXPECT_EQ(Config("gla", R"("hidden_size":1024,"hidden_ratio":2)")->intermediate_size, 1536);
  EXPECT_EQ(Config("retnet", R"("hidden_size":1024,"hidden_ratio":null)")->intermediate_size, 2816);
  EXPECT_EQ(Config("gla", R"("intermediate_size":100)")->intermediate_size, 100);
}

TEST(ModelConfig, FeatureDimFollowsTheFeatureMap) {
  const struct {
    const char* family;
    const char* name;
    QkMap map;
    int feature_dim;  // the heads have 16 (8 in gla)
  } cases[] = {
      {"linear_attn", "elementwise_product", QkMap::kElementwiseProduct, 16},
      {"linear_attn", "elu", QkMap::kElu, 16},
      {"linear_attn", "relu", QkMap::kRelu, 16},
      {"linear_attn", "identity", QkMap::kIdentity, 16},
      {"linear_attn", "hedgehog", QkMap::kHedgehog, 32},
      {"linear_attn", "t2r", QkMap::kT2r, 16},
      {"linear_attn", "dpfp", QkMap::kDpfp, 128},
      {"gla", "relu", QkMap::kRelu, 8},
      {"gla", "sigmoid", QkMap::kSigmoid, 8},
      {"gla", "silu", QkMap::kSilu, 8},
      {"gla", "swish", QkMap::kSilu, 8},
      {"gla", "sqrelu", QkMap::kSquaredRelu, 8},
      {"gla", "gelu", QkMap::kGelu, 8},
      {"retnet", "relu2", QkMap::kSquaredRelu, 16},
      {"retnet", "gelu_pytorch_tanh", QkMap::kGelu, 16},
      {"retnet", "linear", QkMap::kIdentity, 16},
  };
  for (const auto& c : cases) {
    const auto config = Config(c.family, absl::StrCat("\"feature_map\":\"", c.name, "\""));
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->feature_map, c.map) << c.name;
    EXPECT_EQ(config->feature_dim, c.feature_dim) << c.name;
  }
}

TEST(ModelConfig, GroupedHeadsAreUnderstoodInEveryFamily) {
  for (const char* family : {"gla", "linear_attn", "retnet"}) {
    const auto config = Config(family, R"("num_kv_heads":2)");
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->num_heads, 4);
    EXPECT_EQ(config->num_kv_heads, 2);
  }
}

TEST(ModelConfig, EveryOptionArrives) {
  const auto gla = Config("gla", R"("use_short_conv":true,"conv_size":3,"use_output_gate":false,
      "clamp_min":-0.5,"elementwise_affine":null,"norm_eps":1e-5,"tie_word_embeddings":true,
      "fuse_norm":false,"expand_k":1,"expand_v":2.0,"max_position_embeddings":null,"use_gk":true,
      "gate_low_rank_dim":16,"share_conv_kernel":false)");
  ASSERT_TRUE(gla.ok()) << gla.status();
  EXPECT_TRUE(gla->use_short_conv);
  EXPECT_EQ(gla->conv_size, 3);
  EXPECT_FALSE(gla->use_output_gate);
  EXPECT_EQ(gla->clamp_min, -0.5f);
  EXPECT_FALSE(gla->elementwise_affine);
  EXPECT_EQ(gla->norm_eps, 1e-5f);
  EXPECT_TRUE(gla->tie_word_embeddings);
  EXPECT_FALSE(gla->fuse_norm);
  EXPECT_EQ(gla->head_key_dim, 16);
  EXPECT_EQ(gla->head_value_dim, 32);
  EXPECT_EQ(gla->max_position_embeddings, 0);

  const auto linear =
      Config("linear_attn", R"("tie_feature_map_qk":true,"norm_q":true,"norm_k":true,
      "norm_feature_map":true,"output_norm":"identity")");
  ASSERT_TRUE(linear.ok()) << linear.status();
  EXPECT_TRUE(linear->tie_feature_map_qk && linear->norm_q && linear->norm_k);
  EXPECT_TRUE(linear->norm_feature_map);
  EXPECT_FALSE(linear->output_norm);
}

TEST(ModelConfig, RetNetHasNoConvolutionWhateverItsConfigSays) {
  const auto config = Config("retnet", R"("use_short_conv":true)");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FALSE(config->use_short_conv);
}

TEST(ModelConfig, BeginAndEndTokensMayBeOneManyOrNone) {
  const auto many = Config("gla", R"("bos_token_id":null,"eos_token_id":[7,9])");
  ASSERT_TRUE(many.ok()) << many.status();
  EXPECT_EQ(many->bos_token_id, -1);
  EXPECT_EQ(many->eos_token_id, 7);
  EXPECT_THAT(many->eos_token_ids, ElementsAre(7, 9));
  const auto none = Config("gla", R"("eos_token_id":null)");
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(none->eos_token_id, -1);
  EXPECT_THAT(none->eos_token_ids, IsEmpty());
  // The defaults do not fit a vocabulary of two.
  EXPECT_EQ(Config("gla", R"("vocab_size":2)")->eos_token_id, -1);
}

TEST(ModelConfig, KeysThatDoNotChangeInferenceAreAccepted) {
  const auto config = Config("gla", R"("architectures":["GLAForCausalLM"],"torch_dtype":"bfloat16",
      "dtype":"float16","transformers_version":"4.40.2","use_cache":true,"fuse_cross_entropy":true,
      "fuse_swiglu":false,"initializer_range":0.02,"id2label":{"0":"A"},"attn_mode":"fused_chunk",
      "pad_token_id":null,"temperature":1.0,"max_length":20,"auto_map":{},"use_l2warp":false)");
  EXPECT_TRUE(config.ok()) << config.status();
}

// ---- Real ones ----------------------------------------------------------------------------------

struct GoldenDims {
  const char* folder;
  ModelFamily family;
  int num_heads, num_kv_heads, head_key_dim, head_value_dim, intermediate_size;
};

class GoldenConfigTest : public ::testing::TestWithParam<GoldenDims> {};

TEST_P(GoldenConfigTest, HasTheExpectedDimensions) {
  const GoldenDims& expected = GetParam();
  const auto config = ModelConfig::Load(std::string(kGolden) + expected.folder);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->family, expected.family);
  EXPECT_EQ(config->vocab_size, 199);
  EXPECT_EQ(config->hidden_size, 64);
  EXPECT_EQ(config->num_layers, 2);
  EXPECT_EQ(config->num_heads, expected.num_heads);
  EXPECT_EQ(config->num_kv_heads, expected.num_kv_heads);
  EXPECT_EQ(config->head_key_dim, expected.head_key_dim);
  EXPECT_EQ(config->feature_dim, expected.head_key_dim);
  EXPECT_EQ(config->head_value_dim, expected.head_value_dim);
  EXPECT_EQ(config->intermediate_size, expected.intermediate_size);
}

TEST_P(GoldenConfigTest, CountsTheParametersItsCheckpointHolds) {
  const std::string folder = std::string(kGolden) + GetParam().folder;
  const auto config = ModelConfig::Load(folder);
  ASSERT_TRUE(config.ok()) << config.status();
  const auto checkpoint = Checkpoint::Open(folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  int64_t elements = 0;
  for (const std::string& name : checkpoint->names()) {
    elements += checkpoint->Find(name)->bytes / 2;  // all are BF16
  }
  EXPECT_EQ(config->num_parameters(), elements);
}

INSTANTIATE_TEST_SUITE_P(
    Models, GoldenConfigTest,
    ::testing::Values(
        GoldenDims{"gla_long", ModelFamily::kGla, 2, 2, 16, 32, 128},
        GoldenDims{"gla_mqa", ModelFamily::kGla, 4, 2, 8, 16, 128},
        GoldenDims{"gla_plain", ModelFamily::kGla, 2, 2, 16, 32, 128},
        GoldenDims{"gla_ratio_mlp", ModelFamily::kGla, 2, 2, 16, 32, 256},
        GoldenDims{"gla_relu_clamp_nogate", ModelFamily::kGla, 2, 2, 16, 32, 128},
        GoldenDims{"gla_short_conv", ModelFamily::kGla, 2, 2, 16, 32, 128},
        GoldenDims{"gla_tied", ModelFamily::kGla, 2, 2, 16, 32, 128},
        GoldenDims{"linear_attn_default", ModelFamily::kLinearAttention, 2, 2, 32, 32, 128},
        GoldenDims{"linear_attn_elu_norm", ModelFamily::kLinearAttention, 2, 2, 32, 32, 128},
        GoldenDims{"retnet_default", ModelFamily::kRetNet, 2, 2, 32, 64, 128}),
    [](const auto& info) { return std::string(info.param.folder); });

TEST(ModelConfig, GoldenOptionsArrive) {
  const auto relu = ModelConfig::Load(std::string(kGolden) + "gla_relu_clamp_nogate");
  ASSERT_TRUE(relu.ok()) << relu.status();
  EXPECT_EQ(relu->feature_map, QkMap::kRelu);
  EXPECT_EQ(relu->clamp_min, -0.05f);
  EXPECT_FALSE(relu->use_output_gate);
  EXPECT_TRUE(ModelConfig::Load(std::string(kGolden) + "gla_short_conv")->use_short_conv);
  EXPECT_TRUE(ModelConfig::Load(std::string(kGolden) + "gla_tied")->tie_word_embeddings);
  const auto elu = ModelConfig::Load(std::string(kGolden) + "linear_attn_elu_norm");
  ASSERT_TRUE(elu.ok()) << elu.status();
  EXPECT_EQ(elu->feature_map, QkMap::kElu);
  EXPECT_TRUE(elu->norm_q && elu->norm_k && elu->norm_feature_map);
}

TEST(ModelConfig, Bard6mHas6201728Parameters) {
  const auto config = ModelConfig::Load(kBard);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->num_parameters(), 6201728);
  EXPECT_EQ(config->head_key_dim, 32);
  EXPECT_EQ(config->head_value_dim, 64);
  EXPECT_EQ(config->intermediate_size, 768);
}

TEST(ModelConfig, LearnedFeatureMapsAndTheirTyingAreCounted) {
  const int64_t plain = Config("linear_attn", R"("feature_map":"elu")")->num_parameters();
  const auto extra = [&](const char* map, bool tied) {
    return Config("linear_attn",
                  absl::StrCat("\"feature_map\":\"", map,
                               "\",\"tie_feature_map_qk\":", tied ? "true" : "false"))
               ->num_parameters() -
           plain;
  };
  // Two layers, heads of 16.
  EXPECT_EQ(extra("t2r", false), 2 * 2 * 256);
  EXPECT_EQ(extra("t2r", true), 2 * 256);
  EXPECT_EQ(extra("hedgehog", false), 2 * 2 * (256 + 16));
  EXPECT_EQ(extra("elementwise_product", true), 2 * 2 * (256 + 16));
  EXPECT_EQ(extra("dpfp", false), 0);
}

}  // namespace
}  // namespace gla
