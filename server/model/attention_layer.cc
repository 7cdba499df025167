#include "model/attention_layer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "model/attention_layer_check.h"
#include "model/attention_layer_impl.h"

namespace gla {
namespace {

std::string Text(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

void ExpectTensor(LayerChecker& check, const char* what, const Tensor& tensor, const char* names,
                  const std::vector<int64_t>& shape, DType dtype) {
  check.Expect(tensor.shape == shape, what, absl::StrCat("shape ", names, " = ", Text(shape)),
               Text(tensor.shape));
  check.Expect(tensor.dtype == dtype, what, absl::StrCat("dtype ", NameOf(dtype)),
               NameOf(tensor.dtype));
  const bool is_empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
  check.Expect(is_empty || tensor.data != nullptr, what, absl::StrCat("data of ", Text(shape)),
               "a null pointer");
}

}  // namespace

absl::StatusOr<std::unique_ptr<AttentionLayer>> AttentionLayer::Load(
    Device& device, const AttentionLayerConfig& config, const AttentionLayerOptions& options,
    WeightSource& source, const std::string& prefix) {
  GLA_RETURN_IF_ERROR(config.Check());
  LayerChecker check(config.op);
  check.Expect(options.dtype != DType::kFloat16, "dtype", "float32 or bfloat16", "float16");
  GLA_RETURN_IF_ERROR(check.status());
  auto impl = std::make_unique<Impl>(device, config, options);
  GLA_RETURN_IF_ERROR(CheckAttentionShape({.op = config.op,
                                           .num_heads = config.num_heads,
                                           .num_kv_heads = impl->layout.kv_heads,
                                           .key_dim = config.feature_dim(),
                                           .value_dim = config.head_value_dim,
                                           .normalize = config.normalize,
                                           .form = options.form}));
  GLA_ASSIGN_OR_RETURN(impl->weights,
                       LoadAttentionLayer(device, config, options.dtype, source, prefix));
  GLA_RETURN_IF_ERROR(CheckWidths(config, impl->weights));
  device.Synchronize();
  return std::unique_ptr<AttentionLayer>(new AttentionLayer(std::move(impl)));
}

AttentionLayer::AttentionLayer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
AttentionLayer::~AttentionLayer() = default;

const AttentionLayerConfig& AttentionLayer::config() const { return impl_->config; }

absl::StatusOr<AttentionLayerOutput> AttentionLayer::Forward(const AttentionLayerInput& input,
                                                             bool want_final_state) const {
  GLA_RETURN_IF_ERROR(impl_->CheckInput(input));
  return impl_->Forward(input, want_final_state);
}

absl::StatusOr<AttentionLayerGradients> AttentionLayer::Backward(
    const AttentionRecord& record, const AttentionLayerOutputGradients& gradients) const {
  GLA_RETURN_IF_ERROR(impl_->CheckGradients(record, gradients));
  return impl_->Backward(record, gradients);
}

// ---- Checks of what the operator does not see: x, positions, the convolution --------------------

absl::Status AttentionLayer::Impl::CheckConvState(const char* what,
                                                  const std::optional<Tensor>& conv,
                                                  int64_t num_seqs) const {
  LayerChecker check(config.op);
  if (!conv) return check.status();
  check.Expect(carries_inputs(), what, "none without a short convolution of more than one input",
               Text(conv->shape));
  ExpectTensor(check, what, *conv, "[N, conv_size - 1, channels of q, k and v]",
               {num_seqs, config.conv_size - 1, layout.qkv()}, DType::kFloat32);
  return check.status();
}

absl::Status AttentionLayer::Impl::CheckInput(const AttentionLayerInput& input) const {
  LayerChecker check(config.op);
  const int64_t rows = input.x.shape.empty() ? 0 : input.x.shape[0];
  ExpectTensor(check, "x", input.x, "[T, hidden_size]", {rows, config.hidden_size}, options.dtype);
  // The kernels count the elements of their rows in int.
  const int64_t most =
      INT32_MAX / std::max(layout.width(), config.num_heads * config.feature_dim());
  check.Expect(rows <= most, "x", absl::StrCat("at most ", most, " rows"), rows);
  const int64_t num_seqs = static_cast<int64_t>(input.cu_seqlens.size()) - 1;
  check.Expect(num_seqs >= 1, "cu_seqlens", "N + 1 offsets from 0 to T, N of at least 1",
               absl::StrCat(num_seqs + 1, " offsets"));
  const auto starts = static_cast<int64_t>(input.start_positions.size());
  const bool turns = config.op == AttentionOp::kRetention;
  check.Expect(starts == 0 || (turns && starts == num_seqs), "start_positions",
               turns ? absl::StrCat("none, or one for each of ", num_seqs, " sequences") : "none",
               starts);
  GLA_RETURN_IF_ERROR(check.status());
  return CheckConvState("initial.conv", input.initial.conv, num_seqs);
}

absl::Status AttentionLayer::Impl::CheckGradients(
    const AttentionRecord& record, const AttentionLayerOutputGradients& gradients) const {
  LayerChecker check(config.op);
  const AttentionLayerState<Tensor>& d_final = gradients.d_final_state;
  check.Expect(gradients.dy || d_final.recurrent || d_final.key_sum || d_final.conv, "gradients",
               "at least one of dy and d_final_state", "none");
  if (gradients.dy) {
    ExpectTensor(check, "dy", *gradients.dy, "[T, hidden_size]",
                 {record.o.shape[0], config.hidden_size}, DType::kFloat32);
  }
  GLA_RETURN_IF_ERROR(check.status());
  return CheckConvState("d_final_state.conv", d_final.conv,
                        static_cast<int64_t>(record.cu_seqlens.size()) - 1);
}

}  // namespace gla
