#include <algorithm>
#include <filesystem>
#include <memory>

#include "base/status_macros.h"
#include "model/checkpoint.h"
#include "model/model.h"
#include "model/model_config.h"
#include "tests/testing/feed.h"
#include "tests/tools/golden.h"
#include "tests/tools/golden_io.h"

namespace gla {
namespace {

constexpr double kMaxAbs = 1e-3;
constexpr double kBFloat16Ratio = 0.02;
constexpr double kInt16StateRatio = 0.0005;  // float32 but for the states

struct Expected {
  int64_t batch = 0, length = 0, vocab = 0, generated = 0;
  std::vector<std::vector<int32_t>> input_ids;  // [B][T]
  std::vector<float> logits;                    // [B, T, vocab]
  std::vector<int32_t> greedy;                  // [B, n]
};

absl::StatusOr<Expected> ReadExpected(const std::string& folder, const ModelConfig& config) {
  GLA_ASSIGN_OR_RETURN(const Checkpoint file,
                       Checkpoint::OpenFile(folder + "/expected.safetensors"));
  Expected expected;
  std::vector<int64_t> ids_shape, logits_shape, greedy_shape;
  GLA_ASSIGN_OR_RETURN(const auto ids, ReadTensor<int32_t>(file, "input_ids", 2, &ids_shape));
  GLA_ASSIGN_OR_RETURN(expected.logits, ReadTensor<float>(file, "logits", 3, &logits_shape));
  GLA_ASSIGN_OR_RETURN(expected.greedy, ReadTensor<int32_t>(file, "greedy", 2, &greedy_shape));
  expected.batch = ids_shape[0];
  expected.length = ids_shape[1];
  expected.vocab = config.vocab_size;
  expected.generated = greedy_shape[1];
  const std::vector<int64_t> wanted = {expected.batch, expected.length, expected.vocab};
  if (logits_shape != wanted || greedy_shape[0] != expected.batch) {
    return absl::InvalidArgumentError(absl::StrCat(
        folder, "/expected.safetensors: expected logits [", absl::StrJoin(wanted, ", "),
        "] and greedy of ", expected.batch, " rows, found [", absl::StrJoin(logits_shape, ", "),
        "] and ", greedy_shape[0], " rows"));
  }
  if (expected.batch < 1 || expected.length < 1) {
    return absl::InvalidArgumentError(folder + "/expected.safetensors: input_ids is empty");
  }
  for (const int32_t id : ids) {
    if (id >= 0 && id < config.vocab_size) continue;
    return absl::InvalidArgumentError(absl::StrCat(folder, "/expected.safetensors: input id ", id,
                                                   " is not below vocab_size ", expected.vocab));
  }
  for (int64_t b = 0; b < expected.batch; ++b) {
    const auto row = ids.begin() + b * expected.length;
    expected.input_ids.emplace_back(row, row + expected.length);
  }
  return expected;
}

// Feeds every row, `piece` tokens of each at a time, and puts the logits in the reference's order.
// 0: token by token, as decode rows.
std::vector<float> LogitsInPieces(Feeder& feeder, const Expected& expected, int64_t piece) {
  const int num_decode = piece == 0 ? static_cast<int>(expected.batch) : 0;
  piece = std::max<int64_t>(piece, 1);
  std::vector<float> logits(expected.logits.size());
  for (int64_t start = 0; start < expected.length; start += piece) {
    const int64_t count = std::min(piece, expected.length - start);
    std::vector<Feed> feeds;
    for (int64_t b = 0; b < expected.batch; ++b) {
      const auto from = expected.input_ids[b].begin() + start;
      feeds.push_back({static_cast<int>(b), {from, from + count}, start == 0});
    }
    const std::vector<float> got = feeder.Step(feeds, LogitRows::kAll, num_decode);
    for (int64_t b = 0; b < expected.batch; ++b) {
      std::copy_n(got.begin() + b * count * expected.vocab, count * expected.vocab,
                  logits.begin() + (b * expected.length + start) * expected.vocab);
    }
  }
  return logits;
}

// How many of the greedy tokens differ, each row continued from its last logits and state by decode
// rows.
int64_t GreedyMismatches(Feeder& feeder, const Expected& expected,
                         const std::vector<float>& logits) {
  std::vector<int32_t> next(expected.batch);
  for (int64_t b = 0; b < expected.batch; ++b) {
    next[b] = ArgMax(&logits[((b + 1) * expected.length - 1) * expected.vocab], expected.vocab);
  }
  int64_t mismatches = 0;
  for (int64_t i = 0; i < expected.generated; ++i) {
    std::vector<Feed> feeds;
    for (int64_t b = 0; b < expected.batch; ++b) {
      mismatches += next[b] != expected.greedy[b * expected.generated + i];
      feeds.push_back({static_cast<int>(b), {std::max(next[b], 0)}});
    }
    const std::vector<float> got =
        feeder.Step(feeds, LogitRows::kLast, static_cast<int>(expected.batch));
    for (int64_t b = 0; b < expected.batch; ++b) {
      next[b] = ArgMax(&got[b * expected.vocab], expected.vocab);
    }
  }
  return mismatches;
}

struct Way {
  const char* name;
  int64_t piece;  // 0: decode rows
  PrefillForm form = PrefillForm::kRecurrent;
  StateFormat state = StateFormat::kFloat32;
  bool record = true;
};

// The checks of every way of feeding the ids, with exact or rounded rotary frequencies.
absl::StatusOr<std::vector<GoldenCheck>> Judge(Device& device, const std::string& folder,
                                               const ModelConfig& config, const Expected& expected,
                                               DType dtype, bool rotary_bfloat16_frequencies) {
  const std::string name = std::filesystem::path(folder).filename().string();
  constexpr auto kRecurrent = PrefillForm::kRecurrent, kChunkwise = PrefillForm::kChunkwise;
  constexpr auto kInt16 = StateFormat::kInt16;
  const Way ways[] = {{"whole", expected.length},
                      {"token-by-token", 1},
                      {"pieces-of-7", 7},
                      {"pieces-of-16", 16},
                      {"decoded", 0},
                      {.name = "decoded-unrecorded", .piece = 0, .record = false},
                      {"whole-chunkwise", expected.length, kChunkwise},
                      {"int16-state-whole", expected.length, kRecurrent, kInt16},
                      {"int16-state-decoded", 0, kRecurrent, kInt16},
                      {"int16-state-whole-chunkwise", expected.length, kChunkwise, kInt16}};
  std::vector<GoldenCheck> checks;
  std::unique_ptr<Model> model;
  for (const Way& way : ways) {
    if (way.state != StateFormat::kFloat32 && config.norm_feature_map) continue;  // not offered
    if (model == nullptr || model->options().prefill_form != way.form ||
        model->options().state_format != way.state || model->options().record_steps != way.record) {
      GLA_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(folder));
      const int rows = static_cast<int>(expected.batch * expected.length);
      GLA_ASSIGN_OR_RETURN(
          model, Model::Load(device, config, checkpoint,
                             {.dtype = dtype,
                              .max_rows = rows,
                              .max_seqs = static_cast<int>(expected.batch),
                              .max_logit_rows = rows,
                              .prefill_form = way.form,
                              .state_format = way.state,
                              .record_steps = way.record,
                              .rotary_bfloat16_frequencies = rotary_bfloat16_frequencies}));
    }
    GLA_ASSIGN_OR_RETURN(Feeder feeder,
                         Feeder::Create(device, *model, static_cast<int>(expected.batch)));
    const std::vector<float> logits = LogitsInPieces(feeder, expected, way.piece);
    const std::string check =
        absl::StrCat(NameOf(dtype), "/", way.name,
                     rotary_bfloat16_frequencies ? "/rotary-bfloat16-frequencies" : "");
    if (dtype == DType::kFloat32 && way.state == kInt16) {
      checks.push_back(
          {name, check + "/logits-rms-ratio", RmsRatio(logits, expected.logits), kInt16StateRatio});
    } else if (dtype == DType::kFloat32) {
      checks.push_back(
          {name, check + "/logits-max-abs", MaxAbsDifference(logits, expected.logits), kMaxAbs});
      checks.push_back({name, check + "/greedy-mismatches",
                        static_cast<double>(GreedyMismatches(feeder, expected, logits)), 0});
    } else {
      checks.push_back(
          {name, check + "/logits-rms-ratio", RmsRatio(logits, expected.logits), kBFloat16Ratio});
    }
  }
  return checks;
}

bool AllPassed(const std::vector<GoldenCheck>& checks) {
  return std::all_of(checks.begin(), checks.end(),
                     [](const GoldenCheck& check) { return check.passed(); });
}

}  // namespace

absl::Status JudgeModel(Device& device, const std::string& folder, DType dtype,
                        std::vector<GoldenCheck>& checks) {
  GLA_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Load(folder));
  GLA_ASSIGN_OR_RETURN(const Expected expected, ReadExpected(folder, config));
  GLA_ASSIGN_OR_RETURN(std::vector<GoldenCheck> found,
                       Judge(device, folder, config, expected, dtype, false));
  // fla itself gives two results for a RetNet, see golden.h; the names of the checks say which one
  // the reference is.
  if (config.family == ModelFamily::kRetNet && !AllPassed(found)) {
    GLA_ASSIGN_OR_RETURN(std::vector<GoldenCheck> rounded,
                         Judge(device, folder, config, expected, dtype, true));
    if (AllPassed(rounded)) found = std::move(rounded);
  }
  checks.insert(checks.end(), found.begin(), found.end());
  return absl::OkStatus();
}

}  // namespace gla
