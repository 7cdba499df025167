// Runs a fuzz target without a fuzzer: on the files given, and on inputs made from them by a fixed
// sequence of changes, so that any compiler can run the same few thousand inputs every time.
//
//   <target>_replay RUNS FILE_OR_FOLDER...
//
// Fails when one input takes a second or 64 MB of memory, or more.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/peak_memory.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kMaxMemory = 64 << 20;
constexpr double kMaxSeconds = GLA_SECONDS_LIMIT;  // 1, more under a sanitizer
constexpr size_t kMaxInput = 1 << 20;

const char* const kTokens[] = {"0",
                               "1",
                               "-1",
                               "8",
                               "4194305",
                               "211106198978564",
                               "4294967296",
                               "9223372036854775807",
                               "9223372036854775808",
                               "18446744073709551615",
                               "18446744073709551616",
                               "1e308",
                               "1e999",
                               "0.5",
                               "null",
                               "true",
                               "false",
                               "[]",
                               "{}",
                               "[[[[[[[[",
                               "{\"a\":{\"a\":",
                               "\"",
                               "\\u0000",
                               "\\ud800",
                               "\"F32\"",
                               "\"BF16\"",
                               "\"swish\"",
                               "\"retnet\"",
                               "\"linear_attn\"",
                               "\"hedgehog\"",
                               ",",
                               ":",
                               "}"};

std::string Change(std::string input, const std::vector<std::string>& seeds, std::mt19937& random) {
  const auto below = [&](size_t limit) { return limit == 0 ? 0 : random() % limit; };
  for (size_t changes = 1 + below(4); changes > 0; --changes) {
    const size_t at = below(input.size() + 1);
    const size_t length = below(std::min<size_t>(input.size() - at, 16) + 1);
    switch (below(7)) {
      case 0:
        if (at < input.size()) input[at] ^= static_cast<char>(1 << below(8));
        break;
      case 1:
        input.erase(at, length);
        break;
      case 2:
        input.insert(at, input.substr(below(input.size()), below(64)));
        break;
      case 3:
        input.replace(at, length, kTokens[below(std::size(kTokens))]);
        break;
      case 4: {  // a number in the text becomes another
        const size_t digit = input.find_first_of("0123456789", at);
        if (digit == input.npos) break;
        const size_t end = input.find_first_not_of("0123456789", digit);
        input.replace(digit, (end == input.npos ? input.size() : end) - digit, kTokens[below(15)]);
        break;
      }
      case 5:
        input.resize(at);
        break;
      case 6: {
        const std::string& other = seeds[below(seeds.size())];
        input = input.substr(0, at) + other.substr(below(other.size()));
        break;
      }
    }
  }
  if (input.size() > kMaxInput) input.resize(kMaxInput);
  return input;
}

// Small text that stands for much: what the parsers must bound.
std::vector<std::string> DenseInputs() {
  std::vector<std::string> inputs;
  for (const char* piece :
       {"[", "{\"a\":", "[],", "{},", "0,", "\"\",", "\"a\":0,", " ", "\\", "9"}) {
    for (const char* start : {"", "[", "{\"a\":[", "{\"__metadata__\":{", "{"}) {
      std::string text = start;
      while (text.size() < kMaxInput - 16) text += piece;
      inputs.push_back(text + "}");
      inputs.push_back("12345678" + text + "}");
    }
  }
  return inputs;
}

bool Run(const std::string& input, const std::string& what) {
  gla::testing::ResetPeakMemory();
  const clock_t start = clock();  // processor time: other work on the machine does not count
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  const double seconds = static_cast<double>(clock() - start) / CLOCKS_PER_SEC;
  const size_t memory = gla::testing::PeakMemory();
  if (seconds < kMaxSeconds && memory < kMaxMemory) return true;
  fprintf(stderr, "%s (%zu bytes): %.3f s, %zu bytes of memory\n", what.c_str(), input.size(),
          seconds, memory);
  return false;
}

std::string Read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: %s RUNS FILE_OR_FOLDER...\n", argv[0]);
    return 2;
  }
  const int runs = atoi(argv[1]);
  std::vector<std::string> seeds;
  for (int i = 2; i < argc; ++i) {
    if (!std::filesystem::is_directory(argv[i])) {
      seeds.push_back(Read(argv[i]));
      continue;
    }
    // In a fixed order, so that the inputs made of them are the same everywhere.
    std::vector<std::filesystem::path> paths;
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) paths.push_back(entry);
    std::sort(paths.begin(), paths.end());
    for (const auto& path : paths) seeds.push_back(Read(path));
  }
  if (seeds.empty()) {
    fprintf(stderr, "no seed inputs\n");
    return 2;
  }
  bool ok = true;
  for (size_t i = 0; i < seeds.size(); ++i) ok &= Run(seeds[i], "seed " + std::to_string(i));
  const std::vector<std::string> dense = DenseInputs();
  for (size_t i = 0; i < dense.size(); ++i) ok &= Run(dense[i], "dense input " + std::to_string(i));
  std::mt19937 random(1);  // its sequence is fixed by the standard
  for (int i = 0; i < runs; ++i) {
    ok &= Run(Change(seeds[i % seeds.size()], seeds, random), "run " + std::to_string(i));
  }
  printf("%zu seeds, %zu dense inputs, %d changed inputs: %s\n", seeds.size(), dense.size(), runs,
         ok ? "ok" : "FAILED");
  return ok ? 0 : 1;
}
