#include "config.h"

#include <cmath>
#include <limits>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"

namespace gla {
namespace {

// How one kind of value is read and shown. `parse` returns what was expected, or nothing when the
// text is good.
struct Binding {
  std::function<std::string(Config&, const std::string& text)> parse;
  std::function<std::string(const Config&)> show;
};

struct Flag {
  std::string name;   // without the dashes
  std::string value;  // what --help shows for it; empty: a switch
  std::string help;
  Binding binding;
};

Binding Text(std::string Config::*member) {
  return {[=](Config& config, const std::string& text) {
            config.*member = text;
            return text.empty() ? "a value" : "";
          },
          [=](const Config& config) { return config.*member; }};
}

Binding Choice(std::string Config::*member, std::vector<std::string> choices) {
  return {[=](Config& config, const std::string& text) -> std::string {
            config.*member = text;
            for (const std::string& choice : choices) {
              if (text == choice) return "";
            }
            return absl::StrJoin(choices, " or ");
          },
          [=](const Config& config) { return config.*member; }};
}

template <typename T>
Binding Integer(T Config::*member, int64_t low, int64_t high) {
  return {[=](Config& config, const std::string& text) -> std::string {
            int64_t value = 0;
            if (!absl::SimpleAtoi(text, &value) || value < low || value > high) {
              return absl::StrCat("an integer in ", low, " .. ", high);
            }
            config.*member = static_cast<T>(value);
            return "";
          },
          [=](const Config& config) { return absl::StrCat(config.*member); }};
}

Binding Seconds(double Config::*member) {
  return {[=](Config& config, const std::string& text) -> std::string {
            double value = 0;
            if (!absl::SimpleAtod(text, &value) || !(value >= 0 && value <= 86400)) {
              return "seconds in 0 .. 86400";
            }
            config.*member = value;
            return "";
          },
          [=](const Config& config) { return absl::StrCat(config.*member); }};
}

Binding Seed(std::optional<uint64_t> Config::*member) {
  return {[=](Config& config, const std::string& text) -> std::string {
            uint64_t value = 0;
            if (!absl::SimpleAtoi(text, &value)) return "an integer in 0 .. 2^64 - 1";
            config.*member = value;
            return "";
          },
          [=](const Config& config) {
            return (config.*member).has_value() ? absl::StrCat(*(config.*member)) : "";
          }};
}

// "auto", or a number with KiB, MiB, GiB, TiB or nothing behind it.
Binding Bytes(int64_t Config::*member) {
  return {[=](Config& config, const std::string& text) -> std::string {
            const std::string expected = "auto, or bytes such as 1073741824, 512MiB or 1.5GiB";
            if (text == "auto") {
              config.*member = 0;
              return "";
            }
            std::string_view number = text;
            double unit = 1;
            for (const auto& [suffix, bytes] : {std::pair<std::string_view, double>{"KiB", 0x1p10},
                                                {"MiB", 0x1p20},
                                                {"GiB", 0x1p30},
                                                {"TiB", 0x1p40}}) {
              if (number.ends_with(suffix)) {
                number.remove_suffix(suffix.size());
                unit = bytes;
                break;
              }
            }
            double value = 0;
            if (!absl::SimpleAtod(std::string(number), &value) ||
                !(value * unit >= 1 && value * unit <= 0x1p50)) {
              return expected;
            }
            config.*member = static_cast<int64_t>(value * unit);
            return "";
          },
          [=](const Config& config) {
            return config.*member == 0 ? "auto" : absl::StrCat(config.*member);
          }};
}

Binding Switch(bool Config::*member) {
  return {[=](Config& config, const std::string& text) {
            config.*member = true;
            return text.empty() ? "" : "no value";
          },
          [=](const Config& config) { return config.*member ? "yes" : ""; }};
}

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

const std::vector<Flag>& Flags() {
  using C = Config;
  static const std::vector<Flag> flags = {
      {"model", "DIR", "checkpoint folder: config.json, safetensors, tokenizer (required)",
       Text(&C::model)},
      {"served-model-name", "NAME", "name that requests may ask for; default: the folder's name",
       Text(&C::served_model_name)},
      {"dtype", "float32|bfloat16", "activations; default: float32 on cpu, bfloat16 on cuda",
       Choice(&C::dtype, {"float32", "bfloat16"})},
      {"prefill-form", "recurrent|chunkwise",
       "how prompts run: recurrent (token by token) or chunkwise (tiles, many times faster on a "
       "GPU); default: chunkwise on cuda with bfloat16, else recurrent",
       Choice(&C::prefill_form, {"recurrent", "chunkwise"})},
      {"state-dtype", "float32|int16",
       "how recurrent states rest in memory: int16 with a scale for 64 values is half the bytes",
       Choice(&C::state_dtype, {"float32", "int16"})},
      {"batch-invariant", "yes|no",
       "cuda with bfloat16: no takes faster products in steps of more than 256 sequences; a result "
       "then depends, in its last bits, on whether that many ran beside it",
       Choice(&C::batch_invariant, {"yes", "no"})},
      {"device", "N", "ordinal of the GPU", Integer(&C::device, 0, 63)},
      {"threads", "N", "threads that compute on the cpu backend; 0: one per core",
       Integer(&C::threads, 0, 1024)},
      {"host", "ADDRESS", "address to listen on, IPv4 or IPv6", Text(&C::host)},
      {"port", "N", "gRPC port; 0: any free port", Integer(&C::port, 0, 65535)},
      {"http-port", "N", "port of /metrics, /livez and /readyz; 0: any free port",
       Integer(&C::http_port, 0, 65535)},
      {"max-connections", "N", "open gRPC connections; more are closed at once",
       Integer(&C::max_connections, 1, 1000000)},
      {"replica-id", "NAME", "this process in GetModelInfo; default: the host's name",
       Text(&C::replica_id)},
      {"max-num-seqs", "N", "requests that run in one step", Integer(&C::max_num_seqs, 1, 65536)},
      {"max-num-batched-tokens", "N", "tokens of one step",
       Integer(&C::max_num_batched_tokens, 1, 1 << 20)},
      {"max-prefill-chunk", "N",
       "tokens of one prompt in one step, at most --max-num-batched-tokens",
       Integer(&C::max_prefill_chunk, 1, 1 << 20)},
      {"max-num-queued-reqs", "N", "requests that wait; more are RESOURCE_EXHAUSTED",
       Integer(&C::max_num_queued_reqs, 0, kMaxInt)},
      {"max-num-queued-tokens", "N", "prompt tokens that wait; more are RESOURCE_EXHAUSTED",
       Integer(&C::max_num_queued_tokens, 1, int64_t{1} << 40)},
      {"state-memory", "BYTES|auto",
       "memory for recurrent states (KiB, MiB, GiB understood); sessions = this / state bytes - "
       "max-num-seqs; auto: cpu min(1 GiB, RAM / 4), cuda 80 % of what is free after the weights",
       Bytes(&C::state_memory)},
      {"session-ttl", "SECONDS", "idle time after which a session expires; 0: never",
       Integer(&C::session_ttl, 0, int64_t{1} << 40)},
      {"max-prompt-tokens", "N", "longest prompt of one request",
       Integer(&C::max_prompt_tokens, 1, kMaxInt)},
      {"max-new-tokens-limit", "N", "largest max_new_tokens a request may ask for",
       Integer(&C::max_new_tokens_limit, 1, kMaxInt)},
      {"seed", "N", "makes the seeds drawn for requests without one repeatable", Seed(&C::seed)},
      {"poison-freed-slots", "yes|no", "fill freed states with NaN, so that tests see a stale read",
       Choice(&C::poison_freed_slots, {"yes", "no"})},
      {"shutdown-delay", "SECONDS",
       "after SIGTERM: time not ready but still serving, for balancers to notice",
       Seconds(&C::shutdown_delay)},
      {"shutdown-timeout", "SECONDS", "after that: time for running requests to finish",
       Seconds(&C::shutdown_timeout)},
      {"log-format", "text|json", "form of the log lines on stderr",
       Choice(&C::log_format, {"text", "json"})},
      {"version", "", "print the version and exit", Switch(&C::version)},
      {"help", "", "print this and exit", Switch(&C::help)},
  };
  return flags;
}

const Flag* FindFlag(std::string_view name) {
  for (const Flag& flag : Flags()) {
    if (flag.name == name) return &flag;
  }
  return nullptr;
}

std::string EnvName(const Flag& flag) {
  return "GLA_" + absl::AsciiStrToUpper(absl::StrReplaceAll(flag.name, {{"-", "_"}}));
}

absl::Status Apply(const Flag& flag, const std::string& spelled, const std::string& text,
                   Config& config) {
  const std::string expected = flag.binding.parse(config, text);
  if (expected.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(spelled, ": expected ", expected, ", got \"", text, "\""));
}

absl::Status ApplyArgs(const std::vector<std::string>& args, Config& config) {
  for (size_t i = 0; i < args.size(); ++i) {
    const std::pair<std::string, std::string> parts =
        absl::StrSplit(args[i], absl::MaxSplits('=', 1));
    const bool has_value = args[i].find('=') != std::string::npos;
    const Flag* flag = parts.first.rfind("--", 0) == 0
                           ? FindFlag(std::string_view(parts.first).substr(2))
                           : nullptr;
    if (flag == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat(args[i], ": expected a flag listed by --help, got \"", parts.first, "\""));
    }
    std::string text = parts.second;
    if (!flag->value.empty() && !has_value) {
      if (++i == args.size()) {
        return absl::InvalidArgumentError(
            absl::StrCat(parts.first, ": expected a value (", flag->value, "), got none"));
      }
      text = args[i];
    }
    GLA_RETURN_IF_ERROR(Apply(*flag, parts.first, text, config));
  }
  return absl::OkStatus();
}

absl::Status Check(const Config& config) {
  if (config.model.empty()) {
    return absl::InvalidArgumentError("--model: expected a checkpoint folder, got none");
  }
  const auto at_least = [](const char* flag, int64_t value, const char* other, int64_t bound) {
    return value >= bound
               ? absl::OkStatus()
               : absl::InvalidArgumentError(absl::StrCat(flag, ": expected at least ", other, " = ",
                                                         bound, ", got ", value));
  };
  GLA_RETURN_IF_ERROR(at_least("--max-num-batched-tokens", config.max_num_batched_tokens,
                               "--max-num-seqs", config.max_num_seqs));
  GLA_RETURN_IF_ERROR(at_least("--max-num-queued-tokens", config.max_num_queued_tokens,
                               "--max-prompt-tokens", config.max_prompt_tokens));
  if (config.port != 0 && config.port == config.http_port) {
    return absl::InvalidArgumentError(
        absl::StrCat("--http-port: expected another port than --port, got ", config.http_port));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Config> ParseConfig(const std::vector<std::string>& args, const EnvLookup& env) {
  Config config;
  for (const Flag& flag : Flags()) {
    if (flag.value.empty()) continue;  // no environment twin: it asks for text, not for a server
    if (const char* text = env(EnvName(flag)); text != nullptr && *text != '\0') {
      GLA_RETURN_IF_ERROR(Apply(flag, EnvName(flag), text, config));
    }
  }
  GLA_RETURN_IF_ERROR(ApplyArgs(args, config));
  if (!config.help && !config.version) GLA_RETURN_IF_ERROR(Check(config));
  return config;
}

std::string HelpText() {
  std::string out =
      "Serves a Gated Linear Attention checkpoint over gRPC.\n"
      "usage: gla-server-BACKEND --model DIR [--flag value | --flag=value ...]\n"
      "Each flag has an environment twin (GLA_MODEL for --model); the flag wins.\n\n";
  const Config defaults;
  for (const Flag& flag : Flags()) {
    const std::string shown = flag.binding.show(defaults);
    absl::StrAppend(&out, "  --", flag.name, flag.value.empty() ? "" : " ", flag.value,
                    "\n        ", flag.help,
                    shown.empty() ? "" : absl::StrCat(" (default ", shown, ")"), "\n");
  }
  return out +
         "\nExit codes: 0 drained after SIGTERM or SIGINT, 2 configuration or checkpoint, 3 device "
         "lost,\n4 the watchdog ended a shutdown that took too long.\n";
}

std::string Describe(const Config& config) {
  std::vector<std::string> parts;
  for (const Flag& flag : Flags()) {
    const std::string shown = flag.binding.show(config);
    if (!shown.empty()) parts.push_back(absl::StrCat("--", flag.name, "=", shown));
  }
  return absl::StrJoin(parts, " ");
}

}  // namespace gla
