#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>

#include "base/status_macros.h"
#include "kernels/attention.h"
#include "model/checkpoint.h"
#include "model/weight_source.h"
#include "tests/tools/golden.h"
#include "tests/tools/golden_io.h"

namespace gla {
namespace {

constexpr double kFloat32Ratio = 1e-4;
constexpr double kBFloat16OutputRatio = 0.004;
constexpr double kBFloat16Ratio = 0.005;  // states and gradients

struct HostTensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

struct Op {
  AttentionOp op = AttentionOp::kLinearAttention;
  std::string gate = "g", d_gate = "dg";  // their names in the file
  float scale = 0;
  bool is_bfloat16_exact = false;
  std::vector<int32_t> cu_seqlens;
  std::map<std::string, HostTensor> tensors;  // those that the file has

  bool has(const std::string& name) const { return tensors.count(name) > 0; }
  bool has_gradients() const { return has("do") || has("dht"); }
};

std::string Metadata(const Checkpoint& file, const std::string& key) {
  const auto it = file.metadata().find(key);
  return it == file.metadata().end() ? "" : it->second;
}

absl::StatusOr<AttentionOp> ReadName(const Checkpoint& file) {
  const std::string name = Metadata(file, "op");
  if (name == "gla") return AttentionOp::kGla;
  if (name == "linear_attn") return AttentionOp::kLinearAttention;
  if (name == "simple_gla") return AttentionOp::kSimpleGla;
  if (name == "retention") return AttentionOp::kRetention;
  return absl::InvalidArgumentError(absl::StrCat(
      "metadata op: expected gla, simple_gla, retention or linear_attn, found '", name, "'"));
}

absl::Status ReadTensors(const Checkpoint& file, size_t rank, bool required,
                         const std::vector<std::string>& names, Op& op) {
  for (const std::string& name : names) {
    if (!required && file.Find(name) == nullptr) continue;
    HostTensor& tensor = op.tensors[name];
    GLA_ASSIGN_OR_RETURN(tensor.values, ReadTensor<float>(file, name, rank, &tensor.shape));
  }
  return absl::OkStatus();
}

// The operator takes a constant decay once per head; the file has it in every row.
absl::Status TakeFirstRow(HostTensor& gate) {
  const auto heads = static_cast<size_t>(gate.shape[1]);
  for (size_t i = heads; i < gate.values.size(); ++i) {
    if (gate.values[i] != gate.values[i - heads]) {
      return absl::InvalidArgumentError("tensor g: of retention, expected the same in every row");
    }
  }
  gate.values.resize(heads);
  gate.shape = {gate.shape[1]};
  return absl::OkStatus();
}

absl::StatusOr<Op> ReadOp(const Checkpoint& file) {
  Op op;
  GLA_ASSIGN_OR_RETURN(op.op, ReadName(file));
  size_t gate_rank = 2;
  if (op.op == AttentionOp::kGla) op.gate = "gk", op.d_gate = "dgk", gate_rank = 3;
  GLA_ASSIGN_OR_RETURN(op.cu_seqlens, ReadTensor<int32_t>(file, "cu_seqlens", 1));
  GLA_RETURN_IF_ERROR(ReadTensors(file, 3, true, {"q", "k", "v", "o"}, op));
  GLA_RETURN_IF_ERROR(ReadTensors(file, 4, true, {"ht"}, op));
  GLA_RETURN_IF_ERROR(ReadTensors(file, 3, false, {"do"}, op));
  GLA_RETURN_IF_ERROR(ReadTensors(file, 4, false, {"h0", "dht", "dh0"}, op));
  GLA_RETURN_IF_ERROR(ReadTensors(file, gate_rank, false, {op.gate, op.d_gate}, op));
  GLA_RETURN_IF_ERROR(ReadTensors(file, 3, op.has_gradients(), {"dq", "dk", "dv"}, op));
  if (op.op == AttentionOp::kRetention && op.has("g")) {
    GLA_RETURN_IF_ERROR(TakeFirstRow(op.tensors["g"]));
  }
  op.is_bfloat16_exact = Metadata(file, "inputs") == "bf16-exact";
  const std::string scale = Metadata(file, "scale");
  op.scale = std::strtof(scale.c_str(), nullptr);
  if (op.scale > 0 && std::isfinite(op.scale)) return op;
  return absl::InvalidArgumentError(
      absl::StrCat("metadata scale: expected a positive number, found '", scale, "'"));
}

// One call of the operator: its inputs on the device.
class Call {
 public:
  Call(Device& device, const Op& op, DType act, AttentionForm form) : device_(device), op_(op) {
    inputs.op = op.op;
    inputs.q = *Give("q", act);
    inputs.k = *Give("k", act);
    inputs.v = *Give("v", act);
    inputs.gate = Give(op.gate, DType::kFloat32);
    inputs.initial_state = Give("h0", DType::kFloat32);
    inputs.cu_seqlens = op.cu_seqlens;
    inputs.scale = op.scale;
    inputs.form = form;
    gradients.d_o = Give("do", act);
    gradients.d_final_state = Give("dht", DType::kFloat32);
  }

  AttentionInputs inputs;
  AttentionResultGradients gradients;

 private:
  std::optional<Tensor> Give(const std::string& name, DType dtype) {
    if (!op_.has(name)) return std::nullopt;
    const HostTensor& tensor = op_.tensors.at(name);
    const int count = static_cast<int>(tensor.values.size());
    const auto bytes = ConvertWeight({tensor.values.data(), DType::kFloat32, 1, count}, dtype);
    memory_.emplace_back(device_, bytes.size());
    device_.Upload(memory_.back().data(), bytes.data(), bytes.size());
    return Tensor{memory_.back().data(), dtype, tensor.shape};
  }

  Device& device_;
  const Op& op_;
  std::vector<DeviceBuffer> memory_;
};

std::vector<float> Download(Device& device, const DeviceTensor& tensor) {
  std::vector<uint8_t> raw(tensor.buffer.bytes());
  device.Download(raw.data(), tensor.buffer.data(), raw.size());
  std::vector<float> values(raw.size() / SizeOf(tensor.dtype));
  const auto wide = ConvertWeight({raw.data(), tensor.dtype, 1, static_cast<int>(values.size())},
                                  DType::kFloat32);
  if (!wide.empty()) std::memcpy(values.data(), wide.data(), wide.size());
  return values;
}

// How far a result is from the file's tensor of that name. What the file does not have must not be
// there: a check of its own, 1 when it is.
GoldenCheck Compare(Device& device, const Op& op, const std::string& name,
                    const DeviceTensor* result, const std::string& prefix, double limit) {
  if (!op.has(name)) return {"", absl::StrCat(prefix, name, "-absent"), result ? 1.0 : 0.0, 0};
  const HostTensor& expected = op.tensors.at(name);
  double ratio = std::numeric_limits<double>::infinity();
  if (result != nullptr && result->shape == expected.shape) {
    ratio = RmsRatio(Download(device, *result), expected.values);
  }
  return {"", absl::StrCat(prefix, name, "-rms-ratio"), ratio, limit};
}

absl::StatusOr<std::vector<GoldenCheck>> Judge(Device& device, const Op& op, DType act,
                                               AttentionForm form) {
  const bool narrow = act == DType::kBFloat16;
  const double limit = narrow ? kBFloat16Ratio : kFloat32Ratio;
  const std::string prefix =
      absl::StrCat(NameOf(act), form == AttentionForm::kChunkwise ? "/chunkwise/" : "/recurrent/");
  const auto present = [](const std::optional<DeviceTensor>& tensor) {
    return tensor ? &*tensor : nullptr;
  };
  const Call call(device, op, act, form);
  GLA_ASSIGN_OR_RETURN(const AttentionResult result, AttentionForward(device, call.inputs, true));
  std::vector<GoldenCheck> checks = {
      Compare(device, op, "o", &result.o, prefix, narrow ? kBFloat16OutputRatio : kFloat32Ratio),
      Compare(device, op, "ht", present(result.final_state), prefix, limit)};
  if (!op.has_gradients()) return checks;
  GLA_ASSIGN_OR_RETURN(const AttentionGradients gradients,
                       AttentionBackward(device, call.inputs, call.gradients));
  for (const auto& [name, tensor] :
       {std::pair<std::string, const DeviceTensor*>{"dq", &gradients.dq},
        {"dk", &gradients.dk},
        {"dv", &gradients.dv},
        {op.d_gate, present(gradients.d_gate)},
        {"dh0", present(gradients.d_initial_state)}}) {
    checks.push_back(Compare(device, op, name, tensor, prefix, limit));
  }
  return checks;
}

}  // namespace

absl::Status JudgeOp(Device& device, const std::string& path, DType dtype,
                     std::vector<GoldenCheck>& checks) {
  GLA_ASSIGN_OR_RETURN(const Checkpoint file, Checkpoint::OpenFile(path));
  const auto named = [&path](const absl::Status& status) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", std::string(status.message())));
  };
  const absl::StatusOr<Op> op = ReadOp(file);
  if (!op.ok()) return named(op.status());
  if (dtype == DType::kBFloat16 && !op->is_bfloat16_exact) return absl::OkStatus();
  for (const AttentionForm form : {AttentionForm::kRecurrent, AttentionForm::kChunkwise}) {
    absl::StatusOr<std::vector<GoldenCheck>> found = Judge(device, *op, dtype, form);
    if (!found.ok()) return named(found.status());
    for (GoldenCheck& check : *found) {
      check.name = std::filesystem::path(path).stem().string();
      checks.push_back(std::move(check));
    }
  }
  return absl::OkStatus();
}

}  // namespace gla
