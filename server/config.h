// Every knob of the server: its default, its meaning, its flag and its environment twin.
//
// `--max-num-seqs=64` or `--max-num-seqs 64` on the command line, GLA_MAX_NUM_SEQS=64 in the
// environment; the flag wins over the environment, the environment over the default. The table in
// config.cc is the only list of them: parsing, --help and the log line at start are made from it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/log.h"

namespace gla {

struct Config {
  // What is served.
  std::string model;              // checkpoint folder; required
  std::string served_model_name;  // empty: the folder's name
  std::string dtype;              // float32 | bfloat16; empty: float32 on cpu, bfloat16 on cuda
  std::string prefill_form;       // recurrent | chunkwise; empty: chunkwise on cuda with bfloat16
  std::string state_dtype = "float32";  // float32 | int16
  std::string batch_invariant = "yes";  // yes | no
  int device = 0;                       // ordinal of the GPU
  int threads = 0;                      // cpu backend: threads that compute; 0: one per core

  // Where.
  std::string host = "0.0.0.0";
  int port = 8001;       // gRPC; 0: any free port
  int http_port = 8002;  // /metrics, /livez, /readyz; 0: any free port
  int max_connections = 1024;
  std::string replica_id;  // empty: the host's name

  // How much at once.
  int max_num_seqs = 64;
  int max_num_batched_tokens = 2048;
  int max_prefill_chunk = 512;
  int max_num_queued_reqs = 256;
  int64_t max_num_queued_tokens = 1 << 20;
  int64_t state_memory = 0;   // bytes; 0: auto
  int64_t session_ttl = 900;  // seconds; 0: sessions never expire

  // Limits of one request.
  int max_prompt_tokens = 32768;
  int max_new_tokens_limit = 8192;
  std::optional<uint64_t> seed;  // drawn seeds come from this one; none: from the system

  std::string poison_freed_slots = "no";  // yes | no: fill freed states with NaN, for tests

  // The end.
  double shutdown_delay = 0;     // seconds that SIGTERM is announced before new work is refused
  double shutdown_timeout = 25;  // seconds for running work to finish

  std::string log_format = "text";  // text | json

  // "help" or "version" was asked for: print it and exit 0.
  bool help = false;
  bool version = false;

  LogFormat log() const { return log_format == "json" ? LogFormat::kJson : LogFormat::kText; }
};

// The value of an environment variable, or null.
using EnvLookup = std::function<const char*(const std::string& name)>;

// `args` without the program's name. InvalidArgument names flag (or variable), value and what was
// expected. The result is checked as a whole unless it asks for help or the version.
absl::StatusOr<Config> ParseConfig(const std::vector<std::string>& args, const EnvLookup& env);

std::string HelpText();
// "--model=... --port=..." with every value, for the log.
std::string Describe(const Config& config);

}  // namespace gla
