// gla-bench-engine: what one step of a model costs on this device.
//
// A decode step is what the engine does for N running sequences: upload of the plan, the forward
// pass, greedy sampling, and while the next step runs, the ids to the host. A prefill step runs one
// prompt and gives the logits of its last token. --positions times decode steps of sequences that
// have read so many tokens, --mixed decode steps that carry whole prompts as well. Weights are
// random unless --model names a checkpoint. The bytes of a decode step are the weights once and
// every state read and written, compared with the rate of a plain copy in device memory measured in
// the same run (CPU: of plain reads). Logits are checked to be finite before anything is timed.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "engine/sampler.h"
#include "kernels/kernels.h"
#include "model/checkpoint.h"
#include "model/model.h"
#include "tests/bench/timing.h"
#include "tests/tools/sibling.h"

namespace gla {
namespace {

constexpr char kUsage[] =
    "usage: gla-bench-engine [--config gla-340m|gla-1.3b|gla-2.7b|bard-6m | --model DIR]\n"
    "  [--dtype float32|bfloat16] [--state-dtype float32|int16] [--seqs 1,64,256]\n"
    "  [--prompt 512,2048] [--positions 1000,1000000] [--mixed 256] [--steps 50]\n"
    "  [--prefill-form recurrent|chunkwise]\n"
    "  [--record yes|no] [--batch-invariant yes|no] [--threads N] [--backend cpu|cuda] [--json]\n"
    "--positions: each of --seqs again, of sequences that have read so many tokens.\n"
    "--mixed: each of --seqs again, with prompts of 128 in the step, so many tokens in all\n"
    "  (multiples of 128).\n";

constexpr int kMixedPrompt = 128;  // tokens of a prompt of --mixed
constexpr int kChunk = 2048;       // tokens of a step that brings a sequence to its position

struct NamedConfig {
  const char* name;
  const char* json;
};
constexpr NamedConfig kConfigs[] = {
    {"gla-340m", R"({"model_type": "gla", "hidden_size": 1024, "num_hidden_layers": 24,
                     "num_heads": 4, "intermediate_size": 2816, "tie_word_embeddings": true})"},
    {"gla-1.3b", R"({"model_type": "gla", "hidden_size": 2048, "num_hidden_layers": 24,
                     "num_heads": 4, "intermediate_size": 5632})"},
    {"gla-2.7b", R"({"model_type": "gla", "hidden_size": 2560, "num_hidden_layers": 32,
                     "num_heads": 4, "intermediate_size": 6912})"},
    {"bard-6m", R"({"model_type": "gla", "hidden_size": 256, "num_hidden_layers": 6,
                    "num_heads": 4, "vocab_size": 2048})"},
};

struct Flags {
  std::string config = "bard-6m";
  std::string model;  // folder; empty: random weights
  DType dtype = std::string(Device::backend()) == "cuda" ? DType::kBFloat16 : DType::kFloat32;
  std::vector<int> seqs = {1, 64, 256};
  std::vector<int> prompts = {512, 2048};
  std::vector<int> positions;
  std::vector<int> mixed;
  int steps = 50;
  PrefillForm form =
      std::string(Device::backend()) == "cuda" ? PrefillForm::kChunkwise : PrefillForm::kRecurrent;
  StateFormat state = StateFormat::kFloat32;
  bool record = true;
  bool batch_invariant = true;
  int threads = 0;
  std::string backend = Device::backend();
  bool json = false;
};

bool ParseList(const std::string& text, std::vector<int>& out) {
  out.clear();
  for (const auto& part : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    int number = 0;
    if (!absl::SimpleAtoi(part, &number) || number < 1) return false;
    out.push_back(number);
  }
  return true;
}

bool Parse(int argc, char** argv, Flags& flags) {
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--json") {
      flags.json = true;
      continue;
    }
    if (++i == argc) return false;
    const std::string value = argv[i];
    if (arg == "--config") {
      flags.config = value;
    } else if (arg == "--model") {
      flags.model = value;
    } else if (arg == "--dtype" && (value == "float32" || value == "bfloat16")) {
      flags.dtype = value == "float32" ? DType::kFloat32 : DType::kBFloat16;
    } else if (arg == "--prefill-form" && (value == "recurrent" || value == "chunkwise")) {
      flags.form = value == "recurrent" ? PrefillForm::kRecurrent : PrefillForm::kChunkwise;
    } else if (arg == "--state-dtype" && (value == "float32" || value == "int16")) {
      flags.state = value == "int16" ? StateFormat::kInt16 : StateFormat::kFloat32;
    } else if (arg == "--record" && (value == "yes" || value == "no")) {
      flags.record = value == "yes";
    } else if (arg == "--batch-invariant" && (value == "yes" || value == "no")) {
      flags.batch_invariant = value == "yes";
    } else if (arg == "--backend" && (value == "cpu" || value == "cuda")) {
      flags.backend = value;
    } else if (arg == "--seqs") {
      if (!ParseList(value, flags.seqs)) return false;
    } else if (arg == "--prompt") {
      if (!ParseList(value, flags.prompts)) return false;
    } else if (arg == "--positions") {
      if (!ParseList(value, flags.positions)) return false;
    } else if (arg == "--mixed") {
      if (!ParseList(value, flags.mixed)) return false;
      for (const int tokens : flags.mixed) {
        if (tokens % kMixedPrompt != 0) return false;
      }
    } else if (arg == "--steps") {
      if (!absl::SimpleAtoi(value, &flags.steps) || flags.steps < 1) return false;
    } else if (arg == "--threads") {
      if (!absl::SimpleAtoi(value, &flags.threads) || flags.threads < 0) return false;
    } else {
      return false;
    }
  }
  return true;
}

// The largest of the values and `least`.
int MaxOf(const std::vector<int>& values, int least) {
  for (const int value : values) least = std::max(least, value);
  return least;
}

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The steps of one model, as the engine takes them.
class Bench {
 public:
  static absl::StatusOr<std::unique_ptr<Bench>> Create(Device& device, Model& model, int slots) {
    auto bench = std::unique_ptr<Bench>(new Bench(device, model, slots));
    if (!bench->states_.ok()) {
      return absl::ResourceExhaustedError(
          absl::StrCat("no device memory for ", slots, " states of ", model.state_bytes(),
                       " bytes, ", device.memory_free(), " are free"));
    }
    GLA_ASSIGN_OR_RETURN(bench->sampler_,
                         Sampler::Create(device, {.max_jobs = slots,
                                                  .max_logit_rows = slots,
                                                  .max_step_rows = model.options().max_rows,
                                                  .vocab = model.config().vocab_size}));
    return bench;
  }

  // Median seconds of a decode step of `seqs` sequences.
  absl::StatusOr<double> Decode(int seqs, int steps) { return TimeSteps(DecodePlan(seqs), steps); }

  // The same of sequences that stand where Read() came to.
  absl::StatusOr<double> DecodeAfterRead(int seqs, int steps) {
    StepPlan plan = DecodePlan(seqs);
    plan.read_slots.assign(seqs, read_slot_);
    plan.start_positions.assign(seqs, position_);
    return TimeSteps(plan, steps);
  }

  // The same with `prompts` new prompts of kMixedPrompt tokens behind the decode rows.
  absl::StatusOr<double> Mixed(int seqs, int prompts, int steps) {
    StepPlan plan = DecodePlan(seqs);
    for (int n = 0; n < prompts; ++n) AddSequence(kMixedPrompt, plan);
    return TimeSteps(plan, steps);
  }

  // Runs a text of `length` tokens through the last slot.
  absl::Status Read(int length) {
    position_ = 0;
    while (position_ < length) {
      const auto rows = static_cast<int>(std::min<int64_t>(kChunk, length - position_));
      StepPlan plan;
      AddSequence(rows, plan);
      plan.read_slots[0] = position_ == 0 ? -1 : read_slot_;
      plan.write_slots[0] = read_slot_;
      plan.start_positions[0] = position_;
      position_ += rows;
      GLA_RETURN_IF_ERROR(CheckFinite(plan));
    }
    return absl::OkStatus();
  }

  // Median seconds of a prompt of `length` tokens from the empty state to its last logits.
  absl::StatusOr<double> Prefill(int length, int steps) {
    StepPlan plan;
    AddSequence(length, plan);
    GLA_RETURN_IF_ERROR(CheckFinite(plan));
    std::vector<double> times;
    for (int i = 0; i < std::min(steps, 10); ++i) {
      const double start = Seconds();
      Start(plan);
      GLA_RETURN_IF_ERROR(Take());
      times.push_back(Seconds() - start);
    }
    return bench::Median(times);
  }

 private:
  Bench(Device& device, Model& model, int slots)
      : device_(device),
        model_(model),
        read_slot_(slots - 1),
        states_(device, static_cast<size_t>(slots * model.state_bytes())) {}

  // A sequence of `length` tokens from the empty state, in the next slot.
  void AddSequence(int length, StepPlan& plan) const {
    const int n = plan.num_seqs();
    for (int t = 0; t < length; ++t) {
      plan.tokens.push_back((n * 7919 + t * 104729 + 1) % model_.config().vocab_size);
    }
    plan.cu_seqlens.push_back(plan.num_rows());
    plan.read_slots.push_back(-1);
    plan.write_slots.push_back(n);
    plan.start_positions.push_back(0);
    plan.logit_rows.push_back(plan.num_rows() - 1);
  }

  StepPlan DecodePlan(int seqs) const {
    StepPlan plan;
    for (int n = 0; n < seqs; ++n) AddSequence(1, plan);
    plan.num_decode = seqs;
    return plan;
  }

  // Median seconds of a step like `plan`, whose decode rows go on with what they sampled. Running
  // ahead as the engine does: a step is queued before the tokens of the last one are read.
  absl::StatusOr<double> TimeSteps(StepPlan plan, int steps) {
    GLA_RETURN_IF_ERROR(CheckFinite(plan));
    const int decode = plan.num_decode;
    std::copy_n(plan.write_slots.begin(), decode, plan.read_slots.begin());
    GLA_RETURN_IF_ERROR(CheckFinite(plan));
    std::vector<double> times;
    const int warm_up = std::min(steps, 5);
    Start(plan);
    for (int n = 0; n < decode; ++n) plan.tokens[n] = ~n;
    double last = Seconds();
    for (int i = -warm_up; i < steps; ++i) {
      for (int n = 0; n < decode; ++n) ++plan.start_positions[n];
      Start(plan);
      GLA_RETURN_IF_ERROR(Take());
      const double now = Seconds();
      if (i >= 0) times.push_back(now - last);
      last = now;
    }
    GLA_RETURN_IF_ERROR(Take());
    return bench::Median(times);
  }

  void Start(const StepPlan& plan) {
    const float* logits = model_.Forward(plan, states_.data(), nullptr, sampler_->sampled());
    sampler_->Start(logits, std::vector<SampleJob>(plan.logit_rows.size()), {});
  }
  absl::Status Take() {
    for (const int32_t token : sampler_->Take().tokens) {
      if (token < 0) return absl::InternalError("a logit is not finite");
    }
    return absl::OkStatus();
  }

  absl::Status CheckFinite(const StepPlan& plan) {
    const float* logits = model_.Forward(plan, states_.data());
    std::vector<float> host(plan.logit_rows.size() * model_.config().vocab_size);
    device_.Download(host.data(), logits, host.size() * sizeof(float));
    for (size_t i = 0; i < host.size(); ++i) {
      if (std::isfinite(host[i])) continue;
      return absl::InternalError(
          absl::StrCat("logit ", i, " of a step of ", plan.num_rows(), " rows is not finite"));
    }
    return absl::OkStatus();
  }

  Device& device_;
  Model& model_;
  const int read_slot_;   // of Read()
  int64_t position_ = 0;  // where Read() came to
  DeviceBuffer states_;
  std::unique_ptr<Sampler> sampler_;
};

absl::StatusOr<std::unique_ptr<Model>> MakeModel(Device& device, const Flags& flags) {
  ModelOptions options{.dtype = flags.dtype,
                       .prefill_form = flags.form,
                       .state_format = flags.state,
                       .record_steps = flags.record,
                       .batch_invariant = flags.batch_invariant};
  const int max_mixed = MaxOf(flags.mixed, 0);
  const int max_decode = MaxOf(flags.seqs, 1);
  options.max_seqs = options.max_logit_rows = max_decode + max_mixed / kMixedPrompt;
  options.max_rows = MaxOf(flags.prompts, max_decode + max_mixed);
  if (!flags.positions.empty()) options.max_rows = std::max(options.max_rows, kChunk);
  if (!flags.model.empty()) {
    GLA_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Load(flags.model));
    GLA_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(flags.model));
    return Model::Load(device, config, checkpoint, options);
  }
  for (const NamedConfig& named : kConfigs) {
    if (flags.config != named.name) continue;
    GLA_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Parse(named.json));
    return Model::Random(device, config, 1, options);
  }
  return absl::InvalidArgumentError(absl::StrCat("no config is named '", flags.config, "'"));
}

absl::Status RunPositions(Device& device, Bench& bench, const Flags& flags,
                          nlohmann::json& report) {
  if (flags.positions.empty()) return absl::OkStatus();
  if (!flags.json) {
    std::printf("%10s %12s %12s %12s   device memory free, MiB, before and after\n", "position",
                "decode", "ms/step", "tokens/s");
  }
  for (const int position : flags.positions) {
    const size_t before = device.memory_free();
    GLA_RETURN_IF_ERROR(bench.Read(position));
    for (const int seqs : flags.seqs) {
      GLA_ASSIGN_OR_RETURN(const double seconds, bench.DecodeAfterRead(seqs, flags.steps));
      const size_t after = device.memory_free();
      report["positions"].push_back({{"position", position},
                                     {"seqs", seqs},
                                     {"ms_per_step", 1e3 * seconds},
                                     {"tokens_per_second", seqs / seconds},
                                     {"memory_free_before", before},
                                     {"memory_free_after", after}});
      if (flags.json) continue;
      std::printf("%10d %12d %12.3f %12.0f %12.1f %12.1f\n", position, seqs, 1e3 * seconds,
                  seqs / seconds, before / 1048576.0, after / 1048576.0);
      std::fflush(stdout);
    }
  }
  return absl::OkStatus();
}

absl::Status RunMixed(Bench& bench, const Flags& flags, nlohmann::json& report) {
  if (flags.mixed.empty()) return absl::OkStatus();
  if (!flags.json) {
    std::printf("%10s %12s %12s %14s %16s\n", "decode", "+ prompts", "ms/step", "new tokens/s",
                "prompt tokens/s");
  }
  for (const int tokens : flags.mixed) {
    const int prompts = tokens / kMixedPrompt;
    for (const int seqs : flags.seqs) {
      GLA_ASSIGN_OR_RETURN(const double seconds, bench.Mixed(seqs, prompts, flags.steps));
      report["mixed"].push_back({{"seqs", seqs},
                                 {"prompts", prompts},
                                 {"prompt_tokens", tokens},
                                 {"ms_per_step", 1e3 * seconds},
                                 {"new_tokens_per_second", (seqs + prompts) / seconds},
                                 {"prompt_tokens_per_second", tokens / seconds}});
      if (flags.json) continue;
      std::printf("%10d %8d x %d %11.3f %14.0f %16.0f\n", seqs, prompts, kMixedPrompt,
                  1e3 * seconds, (seqs + prompts) / seconds, tokens / seconds);
      std::fflush(stdout);
    }
  }
  return absl::OkStatus();
}

absl::Status Run(const Flags& flags) {
  std::string error;
  const auto device = Device::Open({.num_threads = flags.threads}, &error);
  if (device == nullptr) return absl::UnavailableError(error);
  const double start = Seconds();
  GLA_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, MakeModel(*device, flags));
  const double build_seconds = Seconds() - start;
  const double copy_rate = bench::CopyRate(*device);
  if (copy_rate == 0) return absl::ResourceExhaustedError("no memory to measure a copy");
  const double read_rate = bench::ReadRate(*device);
  // Writes cost a CPU more than reads, so a copy is no bound of what is mostly read.
  const double rate = read_rate > 0 ? read_rate : copy_rate;
  const std::string limit = read_rate > 0 ? "read" : "copy";
  const int slots = model->options().max_seqs + (flags.positions.empty() ? 0 : 1);
  GLA_ASSIGN_OR_RETURN(const auto bench, Bench::Create(*device, *model, slots));
  const std::string name = flags.model.empty() ? flags.config : flags.model;
  nlohmann::json report = {
      {"bench", "engine"},
      {"model", name},
      {"parameters", model->config().num_parameters()},
      {"weight_bytes", model->weight_bytes()},
      {"state_bytes", model->state_bytes()},
      {"dtype", NameOf(flags.dtype)},
      {"state_dtype", flags.state == StateFormat::kInt16 ? "int16" : "float32"},
      {"backend", Device::backend()},
      {"device", device->name()},
      {"build_seconds", build_seconds},
      {"copy_bytes_per_second", copy_rate},
      {"read_bytes_per_second", read_rate},
      {"decode", nlohmann::json::array()},
      {"prefill", nlohmann::json::array()},
      {"positions", nlohmann::json::array()},
      {"mixed", nlohmann::json::array()}};
  if (!flags.json) {
    std::printf("%s: %.1f M parameters, %s, state %.2f MiB, on %s (%s), built in %.1f s\n",
                name.c_str(), model->config().num_parameters() / 1e6, NameOf(flags.dtype),
                model->state_bytes() / 1048576.0, device->name().c_str(), Device::backend(),
                build_seconds);
    std::printf("%s rate %.1f GB/s\n%10s %12s %12s %10s %10s\n", limit.c_str(), rate / 1e9,
                "decode", "ms/step", "tokens/s", "GB/step", ("% of " + limit).c_str());
  }
  for (const int seqs : flags.seqs) {
    GLA_ASSIGN_OR_RETURN(const double seconds, bench->Decode(seqs, flags.steps));
    const double bytes = static_cast<double>(model->weight_bytes() - model->embedding_bytes()) +
                         2.0 * seqs * static_cast<double>(model->state_bytes());
    const double share = bytes / seconds / rate;
    report["decode"].push_back({{"seqs", seqs},
                                {"ms_per_step", 1e3 * seconds},
                                {"tokens_per_second", seqs / seconds},
                                {"bytes_per_step", bytes},
                                {"share_of_" + limit + "_rate", share}});
    if (flags.json) continue;
    std::printf("%10d %12.3f %12.0f %10.3f %10.1f\n", seqs, 1e3 * seconds, seqs / seconds,
                bytes / 1e9, 100 * share);
    std::fflush(stdout);
  }
  if (!flags.json && !flags.prompts.empty()) {
    std::printf("%10s %12s %12s\n", "prefill", "ms", "tokens/s");
  }
  for (const int length : flags.prompts) {
    GLA_ASSIGN_OR_RETURN(const double seconds, bench->Prefill(length, flags.steps));
    report["prefill"].push_back(
        {{"tokens", length}, {"ms", 1e3 * seconds}, {"tokens_per_second", length / seconds}});
    if (!flags.json) std::printf("%10d %12.3f %12.0f\n", length, 1e3 * seconds, length / seconds);
  }
  GLA_RETURN_IF_ERROR(RunPositions(*device, *bench, flags, report));
  GLA_RETURN_IF_ERROR(RunMixed(*bench, flags, report));
  if (flags.json) std::printf("%s\n", report.dump().c_str());
  return absl::OkStatus();
}

}  // namespace
}  // namespace gla

int main(int argc, char** argv) {
  gla::Flags flags;
  if (!gla::Parse(argc, argv, flags)) {
    std::fputs(gla::kUsage, stderr);
    return 2;
  }
  if (!gla::BecomeBackend("gla-bench-engine", flags.backend, argv)) return 2;
  const absl::Status status = gla::Run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "gla-bench-engine: %s\n", std::string(status.message()).c_str());
  return 1;
}
