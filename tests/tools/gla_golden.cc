// gla-golden: judges this backend by golden checkpoints and operators (see golden.h).
//
// Exit code 0: every check passed; 1: some failed; 2: the input cannot be judged.

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/device.h"
#include "tests/tools/golden.h"
#include "tests/tools/sibling.h"

namespace {

constexpr char kUsage[] =
    "usage: gla-golden [--dtype float32|bfloat16|all] [--backend cpu|cuda] [--json] DIR...\n"
    "DIR: a checkpoint folder with expected.safetensors, a folder of operator files, or a folder "
    "of "
    "such.\n";
constexpr int kFailed = 1;
constexpr int kUnusable = 2;

struct Flags {
  std::vector<gla::DType> dtypes = {gla::DType::kFloat32, gla::DType::kBFloat16};
  std::string backend = gla::Device::backend();
  bool json = false;
  std::vector<std::string> paths;
};

bool Parse(int argc, char** argv, Flags& flags) {
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const std::string value = i + 1 < argc ? argv[i + 1] : "";
    if (arg == "--json") {
      flags.json = true;
    } else if (arg == "--dtype") {
      ++i;
      if (value == "float32") {
        flags.dtypes = {gla::DType::kFloat32};
      } else if (value == "bfloat16") {
        flags.dtypes = {gla::DType::kBFloat16};
      } else if (value != "all") {
        return false;
      }
    } else if (arg == "--backend") {
      ++i;
      if (value != "cpu" && value != "cuda") return false;
      flags.backend = value;
    } else if (!arg.empty() && arg[0] == '-') {
      return false;
    } else {
      flags.paths.push_back(arg);
    }
  }
  return !flags.paths.empty();
}

int Unusable(std::string_view message) {
  std::fprintf(stderr, "gla-golden: %.*s\n", static_cast<int>(message.size()), message.data());
  return kUnusable;
}

// Counts what passed and failed, and prints each check as it comes.
class Report {
 public:
  explicit Report(bool json) : json_(json) {}

  void Add(const std::vector<gla::GoldenCheck>& checks) {
    for (const gla::GoldenCheck& check : checks) {
      ++(check.passed() ? passed_ : failed_);
      if (json_) {
        list_.push_back({{"name", check.name},
                         {"check", check.check},
                         {"value", check.value},
                         {"limit", check.limit},
                         {"passed", check.passed()}});
      } else {
        std::printf("%s %s %s %.3g %.3g\n", check.passed() ? "PASS" : "FAIL", check.name.c_str(),
                    check.check.c_str(), check.value, check.limit);
      }
    }
    std::fflush(stdout);
  }

  int Finish() const {
    if (json_) {
      const nlohmann::json report = {{"backend", gla::Device::backend()},
                                     {"checks", list_},
                                     {"passed", passed_},
                                     {"failed", failed_}};
      std::printf("%s\n", report.dump().c_str());
    } else {
      std::printf("%d passed, %d failed\n", passed_, failed_);
    }
    return failed_ == 0 ? 0 : kFailed;
  }

 private:
  const bool json_;
  int passed_ = 0, failed_ = 0;
  nlohmann::json list_ = nlohmann::json::array();
};

}  // namespace

int main(int argc, char** argv) {
  Flags flags;
  if (!Parse(argc, argv, flags)) {
    std::fputs(kUsage, stderr);
    return kUnusable;
  }
  if (!gla::BecomeBackend("gla-golden", flags.backend, argv)) return kUnusable;

  gla::GoldenSet set;
  for (const std::string& path : flags.paths) {
    const absl::StatusOr<gla::GoldenSet> found = gla::FindGolden(path);
    if (!found.ok()) return Unusable(std::string(found.status().message()));
    set.models.insert(set.models.end(), found->models.begin(), found->models.end());
    set.ops.insert(set.ops.end(), found->ops.begin(), found->ops.end());
  }
  std::string error;
  // Poisoned memory: a kernel that reads what nobody wrote shows as NaN.
  const std::unique_ptr<gla::Device> device = gla::Device::Open({.poison = true}, &error);
  if (device == nullptr) return Unusable("cannot open the device: " + error);

  Report report(flags.json);
  for (const auto& [paths, judge] :
       {std::pair(&set.ops, &gla::JudgeOp), std::pair(&set.models, &gla::JudgeModel)}) {
    for (const std::string& path : *paths) {
      for (const gla::DType dtype : flags.dtypes) {
        std::vector<gla::GoldenCheck> checks;
        const absl::Status status = judge(*device, path, dtype, checks);
        if (!status.ok()) return Unusable(std::string(status.message()));
        report.Add(checks);
      }
    }
  }
  return report.Finish();
}
