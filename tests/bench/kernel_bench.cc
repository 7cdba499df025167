// gla-bench-kernels: what the linear-attention operators cost on this device, forward and backward.
//
// Every case is checked against the naive recurrence in double precision before it is timed. Bytes
// are each input once and each result once; the rate is set against that of a plain copy in device
// memory measured in the same run. Small cases run through many sets of inputs, so that no cache
// holds them. On a GPU the calls are captured into a graph and replayed.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "tests/bench/operator_case.h"
#include "tests/bench/timing.h"
#include "tests/tools/sibling.h"

namespace gla::bench {
namespace {

constexpr char kUsage[] =
    "usage: gla-bench-kernels [--ops linear_attention,simple_gla,gla] [--heads 4x128x256,...]\n"
    "  [--shapes 8x2048,...] [--pass forward|backward|both] [--form recurrent|chunkwise]\n"
    "  [--dtype float32|bfloat16|float16] [--threads N] [--backend cpu|cuda] [--json]\n"
    "heads: H x K x V; shapes: sequences x tokens, one token is a decode step (forward only).\n"
    "Without --form the one that the operators choose: recurrent to 64 tokens, else chunkwise.\n";

constexpr size_t kRoundBytes = size_t{256} << 20;  // several times any second-level cache

const bool kOnCuda = std::string(Device::backend()) == "cuda";

struct Flags {
  std::vector<std::string> ops = {"simple_gla", "gla"};
  std::vector<std::vector<int>> heads = {{4, 128, 256}, {4, 256, 512}};
  std::vector<std::vector<int>> shapes =
      kOnCuda ? std::vector<std::vector<int>>{{1, 1},    {32, 1},   {256, 1},
                                              {1, 2048}, {8, 2048}, {1, 32768}}
              : std::vector<std::vector<int>>{{1, 1}, {16, 1}, {8, 256}, {1, 2048}};
  std::string pass = "both";
  std::string form;
  DType dtype = kOnCuda ? DType::kBFloat16 : DType::kFloat32;
  int threads = 0;
  std::string backend = Device::backend();
  bool json = false;
};

// "4x128x256,..." with `parts` numbers each.
bool ParseSizes(const std::string& text, size_t parts, std::vector<std::vector<int>>& out) {
  out.clear();
  for (const auto& item : absl::StrSplit(text, ',')) {
    std::vector<int>& sizes = out.emplace_back();
    for (const auto& part : absl::StrSplit(item, 'x')) {
      if (!absl::SimpleAtoi(part, &sizes.emplace_back()) || sizes.back() < 1) return false;
    }
    if (sizes.size() != parts) return false;
  }
  return true;
}

bool IsOneOf(const std::string& value, const std::vector<std::string>& known) {
  return std::find(known.begin(), known.end(), value) != known.end();
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
    if (arg == "--ops") {
      flags.ops = absl::StrSplit(value, ',');
      for (const std::string& op : flags.ops) {
        if (!IsOneOf(op, {"linear_attention", "simple_gla", "gla"})) return false;
      }
    } else if (arg == "--heads") {
      if (!ParseSizes(value, 3, flags.heads)) return false;
    } else if (arg == "--shapes") {
      if (!ParseSizes(value, 2, flags.shapes)) return false;
    } else if (arg == "--pass" && IsOneOf(value, {"forward", "backward", "both"})) {
      flags.pass = value;
    } else if (arg == "--form" && IsOneOf(value, {"recurrent", "chunkwise"})) {
      flags.form = value;
    } else if (arg == "--dtype" && IsOneOf(value, {"float32", "bfloat16", "float16"})) {
      flags.dtype = value == "float32"    ? DType::kFloat32
                    : value == "bfloat16" ? DType::kBFloat16
                                          : DType::kFloat16;
    } else if (arg == "--threads") {
      if (!absl::SimpleAtoi(value, &flags.threads) || flags.threads < 0) return false;
    } else if (arg == "--backend" && IsOneOf(value, {"cpu", "cuda"})) {
      flags.backend = value;
    } else {
      return false;
    }
  }
  return true;
}

// The cases that the flags ask for. GLA's gate has the activations' type, as its layer makes it;
// simple GLA's is float32.
std::vector<std::pair<std::string, OperatorConfig>> Cases(const Flags& flags) {
  std::vector<std::pair<std::string, OperatorConfig>> cases;
  for (const std::string& op : flags.ops) {
    for (const auto& heads : flags.heads) {
      for (const auto& shape : flags.shapes) {
        for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
          const bool forward = pass == Pass::kForward, decode = shape[1] == 1;
          if (flags.pass != "both" && flags.pass != (forward ? "forward" : "backward")) continue;
          if (decode && !forward) continue;
          const bool chunkwise = flags.form.empty() ? shape[1] > 64 : flags.form == "chunkwise";
          cases.emplace_back(
              op, OperatorConfig{
                      .gate_kind = op == "gla"          ? GateKind::kPerKey
                                   : op == "simple_gla" ? GateKind::kScalar
                                                        : GateKind::kNone,
                      .pass = pass,
                      .form = chunkwise ? AttentionForm::kChunkwise : AttentionForm::kRecurrent,
                      .batch = shape[0],
                      .length = shape[1],
                      .heads = heads[0],
                      .key_dim = heads[1],
                      .value_dim = heads[2],
                      .dtype = flags.dtype,
                      .gate_dtype = op == "gla" ? flags.dtype : DType::kFloat32});
        }
      }
    }
  }
  return cases;
}

// Rounds for a fifth of a second, five at least.
int RepeatsFor(double milliseconds) {
  return std::clamp(static_cast<int>(200 / std::max(milliseconds, 1e-3)), 5, 50);
}

absl::StatusOr<nlohmann::json> Measure(Device& device, const std::string& op,
                                       const OperatorConfig& config, double copy_rate) {
  GLA_ASSIGN_OR_RETURN(const auto made, OperatorCase::Create(device, config, kRoundBytes));
  GLA_ASSIGN_OR_RETURN(const double error, made->Check());
  const auto work = [&] { made->Queue(); };
  const double once = Median(Time(device, work, 1, HasReplay()));
  const double seconds =
      1e-3 * Median(Time(device, work, RepeatsFor(once), HasReplay())) / made->num_sets();
  return nlohmann::json{
      {"op", op},
      {"pass", config.pass == Pass::kForward ? "forward" : "backward"},
      {"form", config.form == AttentionForm::kRecurrent ? "recurrent" : "chunkwise"},
      {"sequences", config.batch},
      {"tokens", config.length},
      {"heads", config.heads},
      {"key_dim", config.key_dim},
      {"value_dim", config.value_dim},
      {"error", error},
      {"sets", made->num_sets()},
      {"workspace_bytes", made->workspace_bytes()},
      {"microseconds", 1e6 * seconds},
      {"bytes", made->bytes()},
      {"bytes_per_second", made->bytes() / seconds},
      {"flops_per_second", made->flops() / seconds},
      {"share_of_copy_rate", made->bytes() / seconds / copy_rate}};
}

void PrintRow(const nlohmann::json& row) {
  const std::string shape = absl::StrCat(
      row["sequences"].get<int>(), "x", row["tokens"].get<int>(), " H", row["heads"].get<int>(),
      " K", row["key_dim"].get<int>(), " V", row["value_dim"].get<int>());
  std::printf("%-16s %-8s %-9s %-22s %11.2f %9.1f %9.3f %7.1f %9.1e\n",
              row["op"].get<std::string>().c_str(), row["pass"].get<std::string>().c_str(),
              row["form"].get<std::string>().c_str(), shape.c_str(),
              row["microseconds"].get<double>(), row["bytes_per_second"].get<double>() / 1e9,
              row["flops_per_second"].get<double>() / 1e12,
              100 * row["share_of_copy_rate"].get<double>(), row["error"].get<double>());
  std::fflush(stdout);
}

absl::Status Run(const Flags& flags) {
  std::string error;
  const auto device = Device::Open({.num_threads = flags.threads}, &error);
  if (device == nullptr) return absl::UnavailableError(error);
  const double copy_rate = CopyRate(*device);
  if (copy_rate == 0) return absl::ResourceExhaustedError("no memory to measure a copy");
  nlohmann::json report = {{"device", device->name()},
                           {"backend", Device::backend()},
                           {"dtype", NameOf(flags.dtype)},
                           {"copy_bytes_per_second", copy_rate},
                           {"rows", nlohmann::json::array()}};
  if (!flags.json) {
    std::printf("%s (%s), %s, copy rate %.1f GB/s\n%-16s %-8s %-9s %-22s %11s %9s %9s %7s %9s\n",
                device->name().c_str(), Device::backend(), NameOf(flags.dtype), copy_rate / 1e9,
                "op", "pass", "form", "shape", "us", "GB/s", "TFLOP/s", "% copy", "error");
  }
  for (const auto& [op, config] : Cases(flags)) {
    const absl::StatusOr<nlohmann::json> row = Measure(*device, op, config, copy_rate);
    if (!row.ok()) {
      return absl::Status(
          row.status().code(),
          absl::StrCat(op, " ", config.batch, "x", config.length, " H", config.heads, " K",
                       config.key_dim, " V", config.value_dim, ": ", row.status().message()));
    }
    if (!flags.json) PrintRow(*row);
    report["rows"].push_back(*row);
  }
  if (flags.json) std::printf("%s\n", report.dump().c_str());
  return absl::OkStatus();
}

}  // namespace
}  // namespace gla::bench

int main(int argc, char** argv) {
  gla::bench::Flags flags;
  if (!gla::bench::Parse(argc, argv, flags)) {
    std::fputs(gla::bench::kUsage, stderr);
    return 2;
  }
  if (!gla::BecomeBackend("gla-bench-kernels", flags.backend, argv)) return 2;
  const absl::Status status = gla::bench::Run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "gla-bench-kernels: %s\n", std::string(status.message()).c_str());
  return 1;
}
