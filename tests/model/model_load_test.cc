// Checkpoints into models: whole ones in every dtype, and broken ones by the name of what is wrong.
#include <cstring>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/model.h"
#include "model/weights.h"
#include "tests/model/model_folder.h"
#include "tests/testing/feed.h"
#include "tests/testing/near.h"
#include "tests/testing/tiny_model.h"

namespace gla {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::ModelFolder;
using testing::SafetensorsFile;

struct Tensor {
  std::string dtype = "BF16";
  std::vector<int64_t> shape;
  std::string bytes;
};
using Tensors = std::map<std::string, Tensor>;

// A random source that remembers what it gave.
class RecordingSource : public WeightSource {
 public:
  bool Lists(const std::string&) const override { return false; }
  absl::StatusOr<HostWeight> Get(const std::string& name,
                                 absl::Span<const int64_t> shape) override {
    absl::StatusOr<HostWeight> weight = random_.Get(name, shape);
    const auto& values = weight->generated;
    tensors[name] = {"BF16",
                     {shape.begin(), shape.end()},
                     {reinterpret_cast<const char*>(values.data()), 2 * values.size()}};
    return weight;
  }
  Tensors tensors;

 private:
  RandomWeightSource random_{1};
};

Tensors TensorsOf(Device& device, const ModelConfig& config) {
  RecordingSource source;
  ValueOrDie(LoadWeights(device, config, DType::kFloat32, source));
  return source.tensors;
}

void WriteCheckpoint(const ModelFolder& folder, const Tensors& tensors) {
  nlohmann::json header;
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  folder.Write("model.safetensors", SafetensorsFile(header.dump(), data));
}

absl::StatusOr<std::unique_ptr<Model>> LoadFrom(Device& device, const ModelConfig& config,
                                                const Tensors& tensors) {
  const ModelFolder folder;
  WriteCheckpoint(folder, tensors);
  Checkpoint checkpoint = ValueOrDie(Checkpoint::Open(folder.path()));
  return Model::Load(device, config, checkpoint, {});
}

std::vector<float> Logits(Device& device, Model& model) {
  Feeder feeder = ValueOrDie(Feeder::Create(device, model, 1));
  return feeder.Step({{0, {5, 9, 2, 11, 7, 1, 0, 3}, true}}, LogitRows::kAll);
}

// bfloat16 values as another dtype: exact in F32; in F16 to 11 bits.
std::string As(const std::string& dtype, const std::string& bfloat16) {
  std::string out;
  for (size_t i = 0; i < bfloat16.size(); i += 2) {
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 2, &bfloat16[i], 2);
    if (dtype == "F32") {
      out.append(reinterpret_cast<const char*>(&bits), 4);
      continue;
    }
    // Rebias the exponent; what is below the normal numbers becomes zero, none is above.
    const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127 + 15;
    uint16_t half = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (exponent > 0) half |= static_cast<uint16_t>(exponent << 10 | (bits >> 13 & 0x3ff));
    out.append(reinterpret_cast<const char*>(&half), 2);
  }
  return out;
}

TEST(ModelLoad, ASavedModelIsTheModel) {
  const auto device = OpenTestDevice();
  const auto random = MakeTinyModel(*device);
  const auto loaded = ValueOrDie(LoadFrom(*device, TinyConfig(), TensorsOf(*device, TinyConfig())));
  EXPECT_EQ(Logits(*device, *loaded), Logits(*device, *random));
  EXPECT_EQ(loaded->weight_bytes(), random->weight_bytes());
}

TEST(ModelLoad, Float32AndFloat16CheckpointsGiveTheSameLogits) {
  const auto device = OpenTestDevice();
  const auto random = MakeTinyModel(*device);
  const std::vector<float> expected = Logits(*device, *random);
  for (const std::string dtype : {"F32", "F16"}) {
    Tensors tensors = TensorsOf(*device, TinyConfig());
    for (auto& [name, tensor] : tensors) {
      tensor.dtype = dtype;
      tensor.bytes = As(dtype, tensor.bytes);
    }
    const auto loaded = ValueOrDie(LoadFrom(*device, TinyConfig(), tensors));
    EXPECT_TRUE(IsNear(Logits(*device, *loaded), expected, dtype == "F32" ? 1e-5 : 1e-3)) << dtype;
  }
}

TEST(ModelLoad, ATiedFeatureMapIsReadUnderEitherName) {
  const auto device = OpenTestDevice();
  ModelConfig config = TinyConfig();
  config.family = ModelFamily::kLinearAttention;
  config.use_output_gate = false;
  config.feature_map = QkMap::kHedgehog;
  config.feature_dim = 32;
  config.tie_feature_map_qk = true;
  const Tensors only_q = TensorsOf(*device, config);
  const auto expected = Logits(*device, *ValueOrDie(LoadFrom(*device, config, only_q)));
  Tensors both = only_q, only_k = only_q;
  for (const auto& [name, tensor] : only_q) {
    const size_t at = name.find("feature_map_q");
    if (at == std::string::npos) continue;
    std::string other = name;
    other.replace(at, 13, "feature_map_k");
    both[other] = only_k[other] = tensor;
    only_k.erase(name);
  }
  EXPECT_EQ(Logits(*device, *ValueOrDie(LoadFrom(*device, config, only_k))), expected);
  EXPECT_EQ(Logits(*device, *ValueOrDie(LoadFrom(*device, config, both))), expected);
  both["model.layers.1.attn.feature_map_k.layer.weight"].bytes[0] ^= 1;
  EXPECT_THAT(LoadFrom(*device, config, both).status().ToString(),
              AllOf(HasSubstr("INVALID_ARGUMENT: tensors "
                              "model.layers.1.attn.feature_map_q.layer.weight and "
                              "model.layers.1.attn.feature_map_k.layer.weight"),
                    HasSubstr("expected the same values")));
}

// ---- Broken checkpoints -------------------------------------------------------------------------

struct Broken {
  const char* what;
  std::function<void(Tensors&)> damage;
  std::vector<const char*> message;  // all of these are in it
};
void PrintTo(const Broken& broken, std::ostream* out) { *out << broken.what; }

class BrokenCheckpoint : public ::testing::TestWithParam<Broken> {};

TEST_P(BrokenCheckpoint, IsRefusedByName) {
  const auto device = OpenTestDevice();
  Tensors tensors = TensorsOf(*device, TinyConfig());
  GetParam().damage(tensors);
  const absl::Status status = LoadFrom(*device, TinyConfig(), tensors).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  for (const char* part : GetParam().message) EXPECT_THAT(status.ToString(), HasSubstr(part));
}

constexpr char kKProj[] = "model.layers.1.attn.k_proj.weight";

INSTANTIATE_TEST_SUITE_P(
    All, BrokenCheckpoint,
    ::testing::Values(
        Broken{"missing",
               [](Tensors& t) { t.erase("model.layers.1.mlp.up_proj.weight"); },
               {"tensor model.layers.1.mlp.up_proj.weight: expected shape [128, 64], found no"}},
        Broken{"misspelt",
               [](Tensors& t) {
                 t["model.layers.0.attn.q_projj.weight"] = t["model.layers.0.attn.q_proj.weight"];
                 t.erase("model.layers.0.attn.q_proj.weight");
               },
               {"tensor model.layers.0.attn.q_proj.weight: expected shape [32, 64], found no"}},
        Broken{"extra",
               [](Tensors& t) { t["model.layers.2.attn.q_proj.weight"] = t[kKProj]; },
               {"model.layers.2.attn.q_proj.weight", "no part of the model"}},
        Broken{"transposed",
               [](Tensors& t) {
                 t[kKProj].shape = {64, 32};
               },
               {kKProj, "expected shape [32, 64], found [64, 32]"}},
        Broken{"flat",
               [](Tensors& t) { t[kKProj].shape = {64 * 32}; },
               {kKProj, "expected shape [32, 64], found [2048]"}},
        Broken{"one head of the output projection",
               [](Tensors& t) {
                 Tensor& o = t["model.layers.1.attn.o_proj.weight"];
                 o.shape = {64, 32};
                 o.bytes.resize(2 * 64 * 32);
               },
               {"model.layers.1.attn.o_proj.weight", "expected shape [64, 64], found [64, 32]"}},
        Broken{"integers",
               [](Tensors& t) { t[kKProj].dtype = "I16"; },
               {kKProj, "expected dtype F32, F16 or BF16, found I16"}},
        Broken{"a norm of another width",
               [](Tensors& t) {
                 Tensor& norm = t["model.layers.0.attn.g_norm_swish_gate.weight"];
                 norm.shape = {16};
                 norm.bytes.resize(32);
               },
               {"model.layers.0.attn.g_norm_swish_gate.weight", "expected shape [32], found [16]"}},
        Broken{"a vocabulary of another size",
               [](Tensors& t) {
                 t["lm_head.weight"].shape = {2047, 64};
                 t["lm_head.weight"].bytes.resize(2 * 2047 * 64);
               },
               {"lm_head.weight", "expected shape [2048, 64], found [2047, 64]"}},
        Broken{"NaN",
               [](Tensors& t) { t["model.norm.weight"].bytes.replace(0, 2, "\xff\x7f"); },
               {"model.norm.weight", "NaN"}}));

}  // namespace
}  // namespace gla
