// What the attention of a decode step costs by itself: a captured graph that runs it over as many
// layers' states as no cache holds.
//   gla-bench-decode-attention [--json] [--repeats N] [--shape gla-1.3b] [--state int16] [--seqs
//   256]
// Without the last three: every shape, format and number of sequences.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/decode.h"
#include "tests/bench/timing.h"

namespace gla::bench {
namespace {

struct Shape {
  const char* name;
  int heads, key_dim, value_dim;
};
constexpr Shape kShapes[] = {{"gla-1.3b", 4, 256, 512},
                             {"gla-340m", 4, 128, 256},
                             {"gla-2.7b", 4, 320, 640},
                             {"bard-6m", 4, 32, 64}};
constexpr int kRank = 16;
constexpr int64_t kUncached = int64_t{256} << 20;  // bytes

uint16_t ToBf16(float x) {
  uint32_t bits;
  static_assert(sizeof(bits) == sizeof(x));
  std::copy_n(reinterpret_cast<const char*>(&x), 4, reinterpret_cast<char*>(&bits));
  return static_cast<uint16_t>((bits + 0x8000) >> 16);
}

class Inputs {
 public:
  Inputs(Device& device, const Shape& s, StateFormat format, int rows)
      : stride_((StateBytes(format, s.heads, s.key_dim, s.value_dim) + 255) / 256 * 256),
        layer_bytes_(rows * stride_),
        layers_(static_cast<int>(std::clamp<int64_t>(kUncached / layer_bytes_, 3, 600))),
        width_(2 * s.heads * (s.key_dim + s.value_dim) + kRank),
        states_(device, layers_ * layer_bytes_),
        y_(device, size_t{2} * rows * s.heads * s.value_dim) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> x(static_cast<size_t>(rows) * width_);
    for (uint16_t& value : x) value = ToBf16(normal(random));
    x_ = Upload(device, x);
    std::vector<float> weight(static_cast<size_t>(s.heads) * s.key_dim * kRank);
    for (float& value : weight) value = normal(random);
    weight_ = PackedWeight(device, {{weight.data(), DType::kFloat32, s.heads * s.key_dim, kRank}},
                           DType::kBFloat16);
    weight.resize(std::max(s.heads * s.key_dim, s.value_dim));
    floats_ = Upload(device, weight);
    std::vector<int32_t> slots(rows);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), random);
    slots_ = Upload(device, slots);
    device.Fill(states_.data(), 0, states_.bytes());

    const uint16_t* at = x_.as<uint16_t>();
    a_.q = at, a_.k = at += s.heads * s.key_dim, a_.v = at += s.heads * s.key_dim;
    a_.output_gate = at += s.heads * s.value_dim, a_.gate_in = at + s.heads * s.value_dim;
    a_.q_stride = a_.k_stride = a_.v_stride = a_.output_gate_stride = a_.gate_in_stride = width_;
    a_.gate_kind = GateKind::kPerKey;
    a_.gate_weight = &weight_, a_.gate_bias = floats_.as<float>(), a_.gate_normalizer = 16;
    a_.state_format = format, a_.state_stride = stride_;
    a_.read_slots = a_.write_slots = slots_.as<int32_t>();
    a_.num_heads = a_.num_kv_heads = a_.state_heads = s.heads;
    a_.key_dim = s.key_dim, a_.value_dim = s.value_dim;
    a_.scale = 1 / 16.0f;
    a_.norm_weight = floats_.as<float>(), a_.eps = 1e-5f;
    a_.y = y_.data(), a_.y_stride = s.heads * s.value_dim;
    a_.rows = rows;
  }
  int layers() const { return layers_; }
  void Step(Device& device) {
    for (int layer = 0; layer < layers_; ++layer) {
      a_.state = states_.as<char>() + layer * layer_bytes_;
      DecodeKernels::Get()->Attention(device, a_);
    }
  }

 private:
  template <typename T>
  static DeviceBuffer Upload(Device& device, const std::vector<T>& values) {
    DeviceBuffer buffer(device, values.size() * sizeof(T));
    device.Upload(buffer.data(), values.data(), values.size() * sizeof(T));
    return buffer;
  }

  int64_t stride_, layer_bytes_;
  int layers_, width_;
  DeviceBuffer states_, y_, x_, floats_, slots_;
  PackedWeight weight_;
  DecodeAttentionArgs a_{};
};

struct Flags {
  bool is_json = false;
  int repeats = 10;
  std::string shape, state;  // empty: all
  std::vector<int> seqs = {1, 8, 32, 64, 256, 1024};
};

bool Parse(int argc, char** argv, Flags& flags) {
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--json") {
      flags.is_json = true;
      continue;
    }
    if (++i == argc) return false;
    const std::string value = argv[i];
    const int number = std::atoi(argv[i]);
    if (arg == "--repeats" && number > 0) {
      flags.repeats = number;
    } else if (arg == "--seqs" && number > 0) {
      flags.seqs = {number};
    } else if (arg == "--shape" && std::any_of(std::begin(kShapes), std::end(kShapes),
                                               [&](const Shape& s) { return s.name == value; })) {
      flags.shape = value;
    } else if (arg == "--state" && (value == "float32" || value == "int16")) {
      flags.state = value;
    } else {
      return false;
    }
  }
  return true;
}

int Main(int argc, char** argv) {
  Flags flags;
  if (!Parse(argc, argv, flags)) {
    std::fprintf(stderr,
                 "usage: gla-bench-decode-attention [--json] [--repeats N] [--shape gla-1.3b] "
                 "[--state float32|int16] [--seqs N]\n");
    return 2;
  }
  const bool is_json = flags.is_json;
  std::string error;
  const auto device = Device::Open({}, &error);
  if (device == nullptr || DecodeKernels::Get() == nullptr) {
    std::fprintf(stderr, "no decode kernels here: %s\n", error.c_str());
    return 1;
  }
  const double copy = CopyRate(*device);
  nlohmann::json report = {{"bench", "decode_attention"},
                           {"device", device->name()},
                           {"copy_bytes_per_second", copy},
                           {"rows", nlohmann::json::array()}};
  if (!is_json) {
    std::printf("%s, copy %.0f GB/s\n", device->name().c_str(), copy / 1e9);
    std::printf("%-9s %-6s %5s %9s %6s %5s\n", "shape", "state", "rows", "us", "GB/s", "copy");
  }
  for (const Shape& shape : kShapes) {
    if (!flags.shape.empty() && flags.shape != shape.name) continue;
    for (const StateFormat format : {StateFormat::kFloat32, StateFormat::kInt16}) {
      const bool is_int16 = format == StateFormat::kInt16;
      if (!flags.state.empty() && flags.state != (is_int16 ? "int16" : "float32")) continue;
      for (const int rows : flags.seqs) {
        Inputs inputs(*device, shape, format, rows);
        const double ms = Median(Time(
            *device, [&] { inputs.Step(*device); }, flags.repeats, true));
        const double us = 1000 * ms / inputs.layers();
        const double bytes =
            2.0 * rows *
            static_cast<double>(StateBytes(format, shape.heads, shape.key_dim, shape.value_dim));
        const double rate = 1e6 * bytes / us;
        report["rows"].push_back({{"shape", shape.name},
                                  {"state", is_int16 ? "int16" : "float32"},
                                  {"seqs", rows},
                                  {"us", us},
                                  {"limit_us", 1e6 * bytes / copy}});
        if (is_json) continue;
        std::printf("%-9s %-6s %5d %9.2f %6.0f %4.0f%%\n", shape.name, is_int16 ? "int16" : "fp32",
                    rows, us, rate / 1e9, 100 * rate / copy);
      }
    }
  }
  if (is_json) std::printf("%s\n", report.dump().c_str());
  return 0;
}

}  // namespace
}  // namespace gla::bench

int main(int argc, char** argv) { return gla::bench::Main(argc, argv); }
