#include "tests/bench/operator_case.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tests/kernels/harness.h"

namespace gla::bench {
namespace {

constexpr int kTile = 64;
constexpr int kMaxSets = 256;

// About N(0, 1), fast: the sum of the four 16-bit parts of a splitmix64 word, which has variance
// 4 / 12 in units of 2^16.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  float Next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    const uint64_t sum = (z & 0xFFFF) + (z >> 16 & 0xFFFF) + (z >> 32 & 0xFFFF) + (z >> 48);
    return (static_cast<float>(sum) / 65536.0f - 2.0f) * 1.7320508f;
  }

 private:
  uint64_t state_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<OperatorCase>> OperatorCase::Create(Device& device,
                                                                   const OperatorConfig& config,
                                                                   size_t min_bytes) {
  auto made = std::unique_ptr<OperatorCase>(new OperatorCase(device, config));
  GLA_RETURN_IF_ERROR(made->MakeInputs(min_bytes));
  return made;
}

OperatorCase::OperatorCase(Device& device, const OperatorConfig& config)
    : device_(device), config_(config) {
  Layout();
}

void OperatorCase::Layout() {
  const OperatorConfig& c = config_;
  const size_t rows = static_cast<size_t>(c.batch) * c.length * c.heads;
  const size_t keys = rows * c.key_dim, values = rows * c.value_dim;
  const size_t gates = c.gate_kind == GateKind::kNone     ? 0
                       : c.gate_kind == GateKind::kScalar ? rows
                                                          : keys;
  const size_t states = static_cast<size_t>(c.batch) * c.heads * c.key_dim * c.value_dim;
  const bool forward = c.pass == Pass::kForward;
  tensors_[kQ] = tensors_[kK] = {.count = keys, .dtype = c.dtype};
  tensors_[kV] = {.count = values, .dtype = c.dtype};
  tensors_[kGate] = {.count = gates, .dtype = c.gate_dtype};
  tensors_[kState] = {.count = states};
  if (forward) {
    tensors_[kO] = tensors_[kV];
  } else {
    tensors_[kDO] = tensors_[kDv] = tensors_[kV];
    tensors_[kDFinalState] = tensors_[kDInitialState] = tensors_[kState];
    tensors_[kDq] = tensors_[kDk] = tensors_[kQ];
    tensors_[kDGate] = tensors_[kGate];
  }
  for (TensorInfo& tensor : tensors_) {
    const size_t bytes = tensor.count * SizeOf(tensor.dtype);
    tensor.offset = set_bytes_;
    set_bytes_ += (bytes + 255) / 256 * 256;
    bytes_ += static_cast<double>(bytes);
  }
  if (forward) bytes_ += static_cast<double>(states * sizeof(float));  // read and written
}

absl::Status OperatorCase::MakeInputs(size_t min_bytes) {
  num_sets_ =
      static_cast<int>(std::clamp<size_t>((min_bytes + set_bytes_ - 1) / set_bytes_, 1, kMaxSets));
  sets_ = DeviceBuffer(device_, num_sets_ * set_bytes_);
  cu_seqlens_ = DeviceBuffer(device_, (config_.batch + 1) * sizeof(int32_t));
  slots_ = DeviceBuffer(device_, config_.batch * sizeof(int32_t));
  if (!sets_.ok() || !cu_seqlens_.ok() || !slots_.ok()) {
    return absl::ResourceExhaustedError(absl::StrCat(num_sets_ * set_bytes_,
                                                     " bytes of inputs and results asked for, ",
                                                     device_.memory_free(), " are free"));
  }
  size_t bytes = 0;
  if (config_.pass == Pass::kBackward) {
    bytes = LinearAttentionBackwardBytes(device_, BackwardArgs(0), config_.form);
  } else if (config_.form == AttentionForm::kChunkwise) {
    bytes = ChunkLinearAttentionBytes(device_, ForwardArgs(0));
  }
  workspace_ = DeviceBuffer(device_, bytes);
  if (!workspace_.ok()) {
    return absl::ResourceExhaustedError(
        absl::StrCat(bytes, " bytes of workspace asked for, ", device_.memory_free(), " are free"));
  }
  if (bytes > 0) device_.Fill(workspace_.data(), 0xFF, bytes);
  device_.Fill(sets_.data(), 0xFF, set_bytes_);
  std::vector<int32_t> cu_seqlens(config_.batch + 1), slots(config_.batch);
  for (int n = 0; n <= config_.batch; ++n) cu_seqlens[n] = n * config_.length;
  for (int n = 0; n < config_.batch; ++n) slots[n] = slot(n);
  device_.Upload(cu_seqlens_.data(), cu_seqlens.data(), cu_seqlens.size() * sizeof(int32_t));
  device_.Upload(slots_.data(), slots.data(), slots.size() * sizeof(int32_t));
  for (int id = kQ; id <= kDFinalState; ++id) {
    TensorInfo& tensor = tensors_[id];
    Random random(id + 1);
    tensor.host.resize(tensor.count);
    for (float& x : tensor.host) {
      x = random.Next();
      if (id == kGate) x = -std::log1p(std::exp(-x)) / 16;
    }
    void* to = at<char>(0, static_cast<Id>(id));
    if (tensor.dtype == DType::kFloat32) {
      device_.Upload(to, tensor.host.data(), tensor.count * sizeof(float));
      continue;
    }
    std::vector<uint16_t> narrow(tensor.count);
    for (size_t i = 0; i < tensor.count; ++i) {
      narrow[i] = ToNarrow(tensor.host[i], tensor.dtype);
      tensor.host[i] = FromNarrow(narrow[i], tensor.dtype);
    }
    device_.Upload(to, narrow.data(), tensor.count * sizeof(uint16_t));
  }
  for (int set = 1; set < num_sets_; ++set) {
    device_.Copy(sets_.as<char>() + set * set_bytes_, sets_.data(), set_bytes_);
  }
  device_.Synchronize();
  return absl::OkStatus();
}

LinearAttentionArgs OperatorCase::ForwardArgs(int set) const {
  const OperatorConfig& c = config_;
  const int64_t keys = int64_t{c.heads} * c.key_dim, values = int64_t{c.heads} * c.value_dim;
  LinearAttentionArgs args{.q = at<void>(set, kQ),
                           .k = at<void>(set, kK),
                           .v = at<void>(set, kV),
                           .gate_kind = c.gate_kind,
                           .gate = at<void>(set, kGate),
                           .gate_dtype = c.gate_dtype,
                           .o = at<void>(set, kO),
                           .state = at<float>(set, kState),
                           .state_stride = keys * c.value_dim,
                           .seqs = {.cu_seqlens = cu_seqlens_.as<int32_t>(),
                                    .read_slots = slots_.as<int32_t>(),
                                    .write_slots = slots_.as<int32_t>(),
                                    .num_seqs = c.batch,
                                    .num_rows = c.batch * c.length,
                                    .max_len = c.length},
                           .num_heads = c.heads,
                           .num_kv_heads = c.heads,
                           .key_dim = c.key_dim,
                           .value_dim = c.value_dim,
                           .state_heads = c.heads,
                           .q_stride = keys,
                           .k_stride = keys,
                           .v_stride = values,
                           .o_stride = values,
                           .gate_stride = c.gate_kind == GateKind::kPerKey ? keys : c.heads,
                           .scale = scale(),
                           .dtype = c.dtype,
                           .workspace = workspace_.data()};
  return args;
}

LinearAttentionBackwardArgs OperatorCase::BackwardArgs(int set) const {
  const OperatorConfig& c = config_;
  return {.q = at<void>(set, kQ),
          .k = at<void>(set, kK),
          .v = at<void>(set, kV),
          .gate_kind = c.gate_kind,
          .gate = at<void>(set, kGate),
          .gate_dtype = c.gate_dtype,
          .initial_state = at<float>(set, kState),
          .d_o = at<void>(set, kDO),
          .d_final_state = at<float>(set, kDFinalState),
          .dq = at<void>(set, kDq),
          .dk = at<void>(set, kDk),
          .dv = at<void>(set, kDv),
          .d_gate = at<void>(set, kDGate),
          .d_initial_state = at<float>(set, kDInitialState),
          .cu_seqlens = cu_seqlens_.as<int32_t>(),
          .num_seqs = c.batch,
          .num_rows = c.batch * c.length,
          .max_len = c.length,
          .num_heads = c.heads,
          .num_kv_heads = c.heads,
          .key_dim = c.key_dim,
          .value_dim = c.value_dim,
          .state_heads = c.heads,
          .scale = scale(),
          .dtype = c.dtype,
          .workspace = workspace_.data()};
}

void OperatorCase::Call(int set) {
  const bool recurrent = config_.form == AttentionForm::kRecurrent;
  if (config_.pass == Pass::kForward) {
    const LinearAttentionArgs args = ForwardArgs(set);
    recurrent ? RecurrentLinearAttention(device_, args) : ChunkLinearAttention(device_, args);
  } else {
    const LinearAttentionBackwardArgs args = BackwardArgs(set);
    recurrent ? RecurrentLinearAttentionBackward(device_, args)
              : ChunkLinearAttentionBackward(device_, args);
  }
}

void OperatorCase::Queue() {
  for (int set = 0; set < num_sets_; ++set) Call(set);
}

double OperatorCase::flops() const {
  const double k = config_.key_dim, v = config_.value_dim;
  double of_row = 4 * k * v + 2 * kTile * (k + v);
  if (config_.pass == Pass::kBackward) of_row = 10 * k * v + kTile * (6 * k + 4 * v);
  if (config_.length == 1 && config_.pass == Pass::kForward) of_row = 5 * k * v;
  return of_row * config_.batch * config_.length * config_.heads;
}

}  // namespace gla::bench
