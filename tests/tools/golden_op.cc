#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <functional>

#include "base/status_macros.h"
#include "model/checkpoint.h"
#include "model/weight_source.h"
#include "tests/tools/golden.h"
#include "tests/tools/golden_io.h"

namespace gla {
namespace {

constexpr double kFloat32Ratio = 1e-4;
constexpr double kBFloat16OutputRatio = 0.004;
constexpr double kBFloat16StateRatio = 0.005;

struct Op {
  GateKind gate_kind = GateKind::kNone;
  double scale = 0;
  bool is_bfloat16_exact = false;
  int64_t rows = 0, seqs = 0, heads = 0, key_dim = 0, value_dim = 0;
  std::vector<int32_t> cu_seqlens;
  std::vector<float> q, k, v, gate, h0, o, ht;  // gate, h0: may be empty
};

using Shape = std::vector<int64_t>;

absl::Status ReadInto(const Checkpoint& file, const std::string& name, const Shape& expected,
                      std::vector<float>& out) {
  Shape shape;
  GLA_ASSIGN_OR_RETURN(out, ReadTensor<float>(file, name, expected.size(), &shape));
  if (shape == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tensor ", name, ": expected shape [",
                                                 absl::StrJoin(expected, ", "), "], found [",
                                                 absl::StrJoin(shape, ", "), "]"));
}

std::string Metadata(const Checkpoint& file, const std::string& key) {
  const auto it = file.metadata().find(key);
  return it == file.metadata().end() ? "" : it->second;
}

absl::Status ReadGate(const Checkpoint& file, Op& op) {
  const std::string name = Metadata(file, "op");
  if (name == "gla") {
    op.gate_kind = GateKind::kPerKey;
    return ReadInto(file, "gk", {op.rows, op.heads, op.key_dim}, op.gate);
  }
  if (name == "linear_attn") return absl::OkStatus();
  if (name != "simple_gla" && name != "retention") {
    return absl::InvalidArgumentError(absl::StrCat(
        "metadata op: expected gla, simple_gla, retention or linear_attn, found '", name, "'"));
  }
  if (file.Find("g") == nullptr) {
    if (name == "simple_gla") return absl::OkStatus();
    return absl::InvalidArgumentError("tensor g: not found");
  }
  GLA_RETURN_IF_ERROR(ReadInto(file, "g", {op.rows, op.heads}, op.gate));
  op.gate_kind = GateKind::kScalar;
  if (name == "simple_gla") return absl::OkStatus();
  op.gate_kind = GateKind::kConstant;
  for (size_t i = op.heads; i < op.gate.size(); ++i) {
    if (op.gate[i] != op.gate[i - op.heads]) {
      return absl::InvalidArgumentError("tensor g: of retention, expected the same in every row");
    }
  }
  op.gate.resize(op.heads);
  return absl::OkStatus();
}

absl::StatusOr<Op> ReadOp(const Checkpoint& file) {
  Op op;
  Shape q_shape, v_shape;
  GLA_ASSIGN_OR_RETURN(op.q, ReadTensor<float>(file, "q", 3, &q_shape));
  GLA_ASSIGN_OR_RETURN(op.v, ReadTensor<float>(file, "v", 3, &v_shape));
  GLA_ASSIGN_OR_RETURN(op.cu_seqlens, ReadTensor<int32_t>(file, "cu_seqlens", 1));
  op.rows = q_shape[0], op.heads = q_shape[1], op.key_dim = q_shape[2], op.value_dim = v_shape[2];
  const std::vector<int32_t>& cu = op.cu_seqlens;
  if (cu.size() < 2 || cu.front() != 0 || cu.back() != op.rows ||
      !std::is_sorted(cu.begin(), cu.end())) {
    return absl::InvalidArgumentError(absl::StrCat("tensor cu_seqlens: expected to rise from 0 to ",
                                                   op.rows, ", found [", absl::StrJoin(cu, ", "),
                                                   "]"));
  }
  op.seqs = static_cast<int64_t>(cu.size()) - 1;
  const Shape state = {op.seqs, op.heads, op.key_dim, op.value_dim};
  const Shape values = {op.rows, op.heads, op.value_dim};
  GLA_RETURN_IF_ERROR(ReadInto(file, "k", q_shape, op.k));
  GLA_RETURN_IF_ERROR(ReadInto(file, "v", values, op.v));
  GLA_RETURN_IF_ERROR(ReadInto(file, "o", values, op.o));
  GLA_RETURN_IF_ERROR(ReadInto(file, "ht", state, op.ht));
  if (file.Find("h0") != nullptr) GLA_RETURN_IF_ERROR(ReadInto(file, "h0", state, op.h0));
  GLA_RETURN_IF_ERROR(ReadGate(file, op));
  op.is_bfloat16_exact = Metadata(file, "inputs") == "bf16-exact";
  const std::string scale = Metadata(file, "scale");
  op.scale = std::strtod(scale.c_str(), nullptr);
  if (op.scale > 0 && std::isfinite(op.scale)) return op;
  return absl::InvalidArgumentError(
      absl::StrCat("metadata scale: expected a positive number, found '", scale, "'"));
}

// The operator's results in one form.
struct Results {
  std::vector<float> o, ht;
};

Results Compute(Device& device, const Op& op, DType dtype, bool chunkwise) {
  const auto upload = [&](const void* data, size_t bytes) {
    DeviceBuffer buffer(device, bytes);
    device.Upload(buffer.data(), data, bytes);
    return buffer;
  };
  const auto upload_act = [&](const std::vector<float>& values) {
    const std::vector<uint8_t> bytes =
        ConvertWeight({values.data(), DType::kFloat32, 1, static_cast<int>(values.size())}, dtype);
    return upload(bytes.data(), bytes.size());
  };
  const DeviceBuffer q = upload_act(op.q), k = upload_act(op.k), v = upload_act(op.v);
  const DeviceBuffer gate = upload(op.gate.data(), op.gate.size() * 4);
  const DeviceBuffer cu = upload(op.cu_seqlens.data(), op.cu_seqlens.size() * 4);
  const DeviceBuffer o(device, op.o.size() * SizeOf(dtype));
  const DeviceBuffer state(device, op.ht.size() * 4);
  if (!op.h0.empty()) device.Upload(state.data(), op.h0.data(), op.h0.size() * 4);
  std::vector<int32_t> slots(op.seqs);
  for (int32_t n = 0; n < op.seqs; ++n) slots[n] = n;
  const DeviceBuffer write_slots = upload(slots.data(), slots.size() * 4);
  if (op.h0.empty()) std::fill(slots.begin(), slots.end(), -1);
  const DeviceBuffer read_slots = upload(slots.data(), slots.size() * 4);

  LinearAttentionArgs args{};
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.gate_kind = op.gate_kind;
  args.gate = gate.as<float>();
  args.o = o.data();
  args.state = state.as<float>();
  args.state_stride = op.heads * op.key_dim * op.value_dim;
  args.seqs = {cu.as<int32_t>(),          read_slots.as<int32_t>(),  write_slots.as<int32_t>(),
               static_cast<int>(op.seqs), static_cast<int>(op.rows), 0};
  for (int64_t n = 0; n < op.seqs; ++n) {
    args.seqs.max_len = std::max(args.seqs.max_len, op.cu_seqlens[n + 1] - op.cu_seqlens[n]);
  }
  args.num_heads = args.num_kv_heads = args.state_heads = static_cast<int>(op.heads);
  args.key_dim = static_cast<int>(op.key_dim);
  args.value_dim = static_cast<int>(op.value_dim);
  args.q_stride = args.k_stride = op.heads * op.key_dim;
  args.v_stride = args.o_stride = op.heads * op.value_dim;
  args.gate_stride = op.gate_kind == GateKind::kPerKey ? op.heads * op.key_dim : op.heads;
  args.scale = static_cast<float>(op.scale);
  args.dtype = dtype;
  (chunkwise ? ChunkLinearAttention : RecurrentLinearAttention)(device, args);

  std::vector<uint8_t> raw(o.bytes());
  device.Download(raw.data(), o.data(), raw.size());
  const std::vector<uint8_t> wide =
      ConvertWeight({raw.data(), dtype, 1, static_cast<int>(op.o.size())}, DType::kFloat32);
  Results results{std::vector<float>(op.o.size()), std::vector<float>(op.ht.size())};
  std::memcpy(results.o.data(), wide.data(), wide.size());
  device.Download(results.ht.data(), state.data(), state.bytes());
  return results;
}

}  // namespace

absl::Status JudgeOp(Device& device, const std::string& path, DType dtype,
                     std::vector<GoldenCheck>& checks) {
  GLA_ASSIGN_OR_RETURN(const Checkpoint file, Checkpoint::OpenFile(path));
  const absl::StatusOr<Op> op = ReadOp(file);
  if (!op.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", std::string(op.status().message())));
  }
  if (dtype == DType::kBFloat16 && !op->is_bfloat16_exact) return absl::OkStatus();
  const std::string name = std::filesystem::path(path).stem().string();
  const bool narrow = dtype == DType::kBFloat16;
  for (const bool chunkwise : {false, true}) {
    const Results got = Compute(device, *op, dtype, chunkwise);
    const std::string check = absl::StrCat(NameOf(dtype), chunkwise ? "/chunkwise" : "/recurrent");
    checks.push_back({name, check + "/o-rms-ratio", RmsRatio(got.o, op->o),
                      narrow ? kBFloat16OutputRatio : kFloat32Ratio});
    checks.push_back({name, check + "/ht-rms-ratio", RmsRatio(got.ht, op->ht),
                      narrow ? kBFloat16StateRatio : kFloat32Ratio});
  }
  return absl::OkStatus();
}

}  // namespace gla
