#include "parts.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "model/checkpoint.h"

namespace gla {
namespace {

constexpr double kMaxHeartbeatAge = 10;  // seconds

bool IsCuda() { return std::string(Device::backend()) == "cuda"; }

DType DTypeOf(const Config& config) {
  const bool bfloat16 = config.dtype.empty() ? IsCuda() : config.dtype == "bfloat16";
  return bfloat16 ? DType::kBFloat16 : DType::kFloat32;
}

PrefillForm PrefillFormOf(const Config& config) {
  const bool is_fast = IsCuda() && DTypeOf(config) == DType::kBFloat16;
  const bool chunkwise = config.prefill_form.empty() ? is_fast : config.prefill_form == "chunkwise";
  return chunkwise ? PrefillForm::kChunkwise : PrefillForm::kRecurrent;
}

std::string ServedName(const Config& config) {
  if (!config.served_model_name.empty()) return config.served_model_name;
  std::filesystem::path folder = std::filesystem::path(config.model).lexically_normal();
  if (!folder.has_filename()) folder = folder.parent_path();
  return folder.filename().string();
}

std::string ReplicaId(const Config& config) {
  if (!config.replica_id.empty()) return config.replica_id;
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "";
}

// What a GPU's recorded steps take (GLA-340M: 44 MB), and more than that.
constexpr int64_t kRecordingsMemory = int64_t{256} << 20;

// The most memory that states can have.
int64_t MostStateMemory(const Device& device) {
  if (!IsCuda()) return std::numeric_limits<int64_t>::max();  // taken when touched
  return static_cast<int64_t>(device.memory_free()) - kRecordingsMemory;
}

// The memory for states: what was asked for, or on the CPU a quarter of the memory up to 1 GiB but
// room for one session, on a GPU most of what the weights have left.
int64_t StateMemory(const Config& config, const Device& device, int64_t state_bytes) {
  if (config.state_memory > 0) return config.state_memory;
  if (IsCuda()) {
    return std::min(static_cast<int64_t>(device.memory_free()) / 5 * 4, MostStateMemory(device));
  }
  const int64_t quarter = static_cast<int64_t>(device.memory_total()) / 4;
  const int64_t least = (config.max_num_seqs + 1) * state_bytes;
  return std::min(quarter, std::max(int64_t{1} << 30, least));
}

absl::StatusOr<int64_t> NumSlots(const Config& config, const Device& device, const Model& model,
                                 Logger& log) {
  const int64_t state_bytes = model.state_bytes();
  const int64_t memory = StateMemory(config, device, state_bytes), most = MostStateMemory(device);
  if (memory > most) {
    return absl::InvalidArgumentError(
        absl::StrCat("--state-memory: expected at most ", std::max<int64_t>(most, 0),
                     " bytes, what is free on the device but for ", kRecordingsMemory,
                     " bytes for recorded steps, got ", memory));
  }
  const int64_t slots =
      std::min<int64_t>(memory / state_bytes, std::numeric_limits<int32_t>::max());
  if (slots <= config.max_num_seqs) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--state-memory: expected room for more than --max-num-seqs = ", config.max_num_seqs,
        " states of ", state_bytes, " bytes each, got ", memory, " bytes, which hold ", slots));
  }
  log.Info(
      absl::StrFormat("capacity: sessions = state memory / bytes per session - max-num-seqs = "
                      "%d / %d - %d = %d",
                      memory, state_bytes, config.max_num_seqs, slots - config.max_num_seqs));
  return slots;
}

ModelOptions OptionsForModel(const Config& config) {
  ModelOptions options;
  options.dtype = DTypeOf(config);
  options.max_rows = config.max_num_batched_tokens;
  options.max_seqs = config.max_num_seqs;
  // A row per running sequence, and room for a tile of a prompt that is scored.
  options.max_logit_rows = std::max(options.max_logit_rows, config.max_num_seqs + 63);
  options.prefill_form = PrefillFormOf(config);
  options.batch_invariant = config.batch_invariant == "yes";
  options.state_format =
      config.state_dtype == "int16" ? StateFormat::kInt16 : StateFormat::kFloat32;
  return options;
}

EngineOptions OptionsForEngine(const Config& config, int64_t num_slots) {
  EngineOptions options;
  options.max_num_seqs = config.max_num_seqs;
  options.max_num_batched_tokens = config.max_num_batched_tokens;
  // int16 states: a whole chunk beside every decoding sequence, see SchedulerOptions.
  const int reserved = config.state_dtype == "int16" ? config.max_num_seqs : 0;
  options.max_prefill_chunk =
      std::min(config.max_prefill_chunk, config.max_num_batched_tokens - reserved);
  options.max_queued_requests = config.max_num_queued_reqs;
  options.max_queued_tokens = config.max_num_queued_tokens;
  options.num_slots = num_slots;
  options.default_session_ttl_seconds = config.session_ttl;
  options.run_ahead = Device::backend() != std::string_view("cpu");
  options.poison_freed_slots = config.poison_freed_slots == "yes";
  return options;
}

v1::GetModelInfoResponse ModelInfo(const Config& config, const Ground& ground, const Model& model,
                                   const Tokenizer& tokenizer, const Engine& engine) {
  const ModelConfig& shape = ground.model_config;
  v1::GetModelInfoResponse info;
  info.set_model(ground.facts.model);
  info.set_family(ground.facts.family);
  info.set_parameters(shape.num_parameters());
  info.set_dtype(ground.facts.dtype);
  info.set_state_dtype(config.state_dtype);
  info.set_state_bytes_per_session(model.state_bytes());
  info.set_capacity_sessions(engine.capacity_sessions());
  info.set_max_num_seqs(config.max_num_seqs);
  info.set_max_prompt_tokens(config.max_prompt_tokens);
  info.set_max_new_tokens(config.max_new_tokens_limit);
  info.set_backend(ground.facts.backend);
  info.set_device(ground.facts.device);
  info.set_version(ground.facts.version);
  info.set_replica_id(ReplicaId(config));
  info.set_vocab_size(shape.vocab_size);
  info.set_num_layers(shape.num_layers);
  info.set_hidden_size(shape.hidden_size);
  info.set_bos_token_id(tokenizer.bos_token_id());
  info.set_eos_token_id(tokenizer.eos_token_id());
  info.set_weight_bytes(model.weight_bytes());
  info.set_prefill_form(PrefillFormOf(config) == PrefillForm::kChunkwise ? "chunkwise"
                                                                         : "recurrent");
  return info;
}

}  // namespace

absl::StatusOr<Ground> OpenGround(const Config& config) {
  Ground ground;
  GLA_ASSIGN_OR_RETURN(ground.model_config, ModelConfig::Load(config.model));
  std::string error;
  ground.device = Device::Open({.ordinal = config.device, .num_threads = config.threads}, &error);
  if (ground.device == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("no ", Device::backend(), " device ", config.device, ": ", error));
  }
  ground.facts = {.version = GLA_VERSION,
                  .backend = Device::backend(),
                  .device = ground.device->name(),
                  .model = ServedName(config),
                  .family = std::string(NameOf(ground.model_config.family)),
                  .dtype = NameOf(DTypeOf(config))};
  return ground;
}

absl::Status Loaded::Load(const Config& config, Ground& ground, Metrics& metrics, Logger& log) {
  Device& device = *ground.device;
  GLA_ASSIGN_OR_RETURN(tokenizer_, Tokenizer::Load(config.model));
  // A larger embedding is usual, padded to a round number; a smaller one would be read beyond its
  // end.
  if (tokenizer_->vocab_size() > ground.model_config.vocab_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokenizer of ", config.model, ": expected at most vocab_size = ",
                     ground.model_config.vocab_size, " tokens, got ", tokenizer_->vocab_size()));
  }
  {
    GLA_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(config.model));
    GLA_ASSIGN_OR_RETURN(
        model_, Model::Load(device, ground.model_config, checkpoint, OptionsForModel(config)));
  }
  GLA_ASSIGN_OR_RETURN(const int64_t num_slots, NumSlots(config, device, *model_, log));
  GLA_ASSIGN_OR_RETURN(engine_, Engine::Create(device, *model_, *tokenizer_, metrics,
                                               OptionsForEngine(config, num_slots)));
  GLA_RETURN_IF_ERROR(engine_->SelfTest());
  metrics.device_memory_total_bytes.Set(static_cast<double>(device.memory_total()));
  metrics.device_memory_used_bytes.Set(
      static_cast<double>(device.memory_total() - device.memory_free()));
  log.Info("loaded", {{"model", ground.facts.model},
                      {"family", ground.facts.family},
                      {"parameters", ground.model_config.num_parameters()},
                      {"weight_bytes", model_->weight_bytes()},
                      {"dtype", ground.facts.dtype},
                      {"backend", ground.facts.backend},
                      {"device", ground.facts.device}});
  engine_->Start();
  started_ = engine_.get();
  serving_.emplace(Serving{.engine = *engine_,
                           .tokenizer = *tokenizer_,
                           .info = ModelInfo(config, ground, *model_, *tokenizer_, *engine_)});
  return absl::OkStatus();
}

std::string Loaded::NotReady() const {
  switch (state_.load()) {
    case ServingState::kLoading:
      return "loading";
    case ServingState::kReady:
      return "";
    case ServingState::kDraining:
      return "draining";
  }
  return "";
}

std::string Loaded::NotLive() const {
  const Engine* engine = started_;
  if (engine == nullptr) return "";  // loading is not a reason to be restarted
  const double age = engine->heartbeat_age_seconds();
  return age < kMaxHeartbeatAge
             ? ""
             : absl::StrFormat("the engine has not finished a step for %.1f s", age);
}

std::string VersionText() {
  return absl::StrCat("gla-server ", GLA_VERSION, " (", Device::backend(), ")\n");
}

}  // namespace gla
