// What the operators accept. Every tensor's shape is compared with what the tensors before it say,
// so the message names the first argument that does not fit those to its left.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/attention.h"

namespace gla {
namespace {

// The kernels count rows, heads and dimensions in int, elements of a chunk's rows and blocks of a
// launch too; these bounds keep all such products inside, with one more value column for the
// normalized gradients. The bounds on keys are what the recurrent form of the CUDA backend holds in
// a block's shared memory.
constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxKeyDim = 2048;
constexpr int64_t kMaxValueDim = 1 << 20;
constexpr int64_t kMaxRowElements = 1 << 23;
constexpr int64_t kMaxStateBlocks = 1 << 30;
constexpr int64_t kMaxStateQueries = 128;
constexpr int64_t kMaxStateKeys = 16384;

// A dimension of an expected shape; any number will do for one without a value.
struct Dim {
  const char* name;
  std::optional<int64_t> value = std::nullopt;
};

std::string Text(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// "[T, G, K] = [7, G, 64]"
std::string Text(const std::vector<Dim>& dims) {
  std::string names, values;
  for (const Dim& dim : dims) {
    const char* comma = names.empty() ? "" : ", ";
    absl::StrAppend(&names, comma, dim.name);
    absl::StrAppend(&values, comma, dim.value ? absl::StrCat(*dim.value) : dim.name);
  }
  return names == values ? absl::StrCat("[", names, "]")
                         : absl::StrCat("[", names, "] = [", values, "]");
}

// "[7, 2, 64] float32"
std::string Text(const Tensor& tensor) {
  return absl::StrCat(Text(tensor.shape), " ", NameOf(tensor.dtype));
}

// Keeps the first thing that does not fit; what is asked after it is not looked at.
class Checker {
 public:
  explicit Checker(AttentionOp op) : op_(op) {}
  bool ok() const { return status_.ok(); }
  const absl::Status& status() const { return status_; }

  void Expect(bool fits, const char* argument, const std::string& expected,
              const std::string& found) {
    if (!ok() || fits) return;
    status_ = absl::InvalidArgumentError(
        absl::StrCat(NameOf(op_), ": ", argument, ": expected ", expected, ", found ", found));
  }

  void ExpectRange(const char* argument, int64_t low, int64_t high, int64_t found) {
    Expect(low <= found && found <= high, argument, absl::StrCat(low, " to ", high),
           absl::StrCat(found));
  }

  // `like`: the argument that the shape comes from, or "".
  void ExpectTensor(const char* argument, const Tensor& tensor, const std::vector<Dim>& dims,
                    const char* like, const std::vector<DType>& dtypes) {
    if (!ok()) return;
    const std::vector<int64_t>& shape = tensor.shape;
    bool fits = shape.size() == dims.size();
    for (size_t i = 0; fits && i < dims.size(); ++i)
      fits = !dims[i].value || shape[i] == *dims[i].value;
    Expect(fits, argument, absl::StrCat("shape ", Text(dims), As(like)), Text(shape));
    fits = std::all_of(shape.begin(), shape.end(),
                       [](int64_t size) { return 0 <= size && size <= kMaxInt; });
    Expect(fits, argument, absl::StrCat("dimensions from 0 to ", kMaxInt), Text(shape));

    fits = std::find(dtypes.begin(), dtypes.end(), tensor.dtype) != dtypes.end();
    const std::string names = absl::StrJoin(
        dtypes, " or ", [](std::string* out, DType dtype) { out->append(NameOf(dtype)); });
    Expect(fits, argument, absl::StrCat("dtype ", names, As(like)), NameOf(tensor.dtype));

    const bool is_empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
    Expect(is_empty || tensor.data != nullptr, argument, absl::StrCat("data of ", Text(tensor)),
           "a null pointer");
    const size_t alignment = SizeOf(tensor.dtype);
    Expect(reinterpret_cast<uintptr_t>(tensor.data) % alignment == 0, argument,
           absl::StrCat("data at a multiple of ", alignment, " bytes"),
           absl::StrCat("address 0x", absl::Hex(reinterpret_cast<uintptr_t>(tensor.data))));
  }

  void ExpectNone(const char* argument, const std::optional<Tensor>& tensor, const char* why) {
    if (tensor) Expect(false, argument, absl::StrCat("none", why), Text(*tensor));
  }

 private:
  static std::string As(const char* like) { return *like == 0 ? "" : absl::StrCat(" as ", like); }

  AttentionOp op_;
  absl::Status status_;
};

constexpr const char* kNameOf[] = {"linear_attention", "simple_gla", "retention", "gla"};

bool IsBatched(const AttentionInputs& in) { return in.q.shape.size() == 4; }

// The dimensions that stand before the heads in q, k, v, o and in a gate per step.
std::vector<Dim> RowDims(const AttentionInputs& in) {
  if (IsBatched(in)) return {{"B", in.q.shape[0]}, {"T", in.q.shape[1]}};
  return {{"T", in.q.shape[0]}};
}

std::vector<Dim> Join(std::vector<Dim> dims, const std::vector<Dim>& more) {
  dims.insert(dims.end(), more.begin(), more.end());
  return dims;
}

void CheckSequences(Checker& check, const AttentionInputs& in) {
  if (!check.ok()) return;
  const std::vector<int32_t>& cu = in.cu_seqlens;
  if (IsBatched(in)) {
    check.Expect(cu.empty(), "cu_seqlens", "none for a batched q",
                 absl::StrCat(cu.size(), " offsets"));
    return;
  }
  const int64_t rows = in.q.shape[0];
  check.Expect(cu.size() >= 2, "cu_seqlens",
               absl::StrCat("N + 1 offsets from 0 to T = ", rows, ", N of at least 1"),
               absl::StrCat(cu.size(), " offsets"));
  if (!check.ok()) return;
  check.Expect(cu.front() == 0, "cu_seqlens", "the first offset 0", absl::StrCat(cu.front()));
  for (size_t n = 1; check.ok() && n < cu.size(); ++n) {
    check.Expect(cu[n - 1] <= cu[n], "cu_seqlens",
                 absl::StrCat("offset ", n, " of at least ", cu[n - 1]), absl::StrCat(cu[n]));
  }
  check.Expect(cu.back() == rows, "cu_seqlens", absl::StrCat("the last offset T = ", rows, " as q"),
               absl::StrCat(cu.back()));
}

void CheckGate(Checker& check, const AttentionInputs& in, const AttentionShape& shape) {
  const Dim heads = {"H", shape.num_heads}, groups = {"G", shape.num_kv_heads};
  std::vector<Dim> dims;
  const char* like = "k";
  switch (in.op) {
    case AttentionOp::kLinearAttention:
      return check.ExpectNone("gate", in.gate, "");
    case AttentionOp::kRetention:
      dims = {heads}, like = "q";
      check.Expect(in.gate.has_value(), "gate", absl::StrCat("shape ", Text(dims), " as q"),
                   "none");
      break;
    case AttentionOp::kSimpleGla:
      dims = Join(RowDims(in), {groups});
      break;
    case AttentionOp::kGla:
      dims = Join(RowDims(in), {groups, {"K", shape.key_dim}});
      break;
  }
  if (!in.gate) return;
  std::vector<DType> dtypes = {DType::kFloat32};
  if (in.q.dtype != DType::kFloat32) dtypes.push_back(in.q.dtype);
  check.ExpectTensor("gate", *in.gate, dims, like, dtypes);
}

std::vector<Dim> StateDims(const AttentionShape& shape) {
  return {{"N", shape.num_seqs},
          {"S", shape.state_heads()},
          {"K", shape.key_dim},
          {"V", shape.value_dim}};
}
std::vector<Dim> KeySumDims(const AttentionShape& shape) {
  return {{"N", shape.num_seqs}, {"G", shape.num_kv_heads}, {"K", shape.key_dim}};
}

// Sizes, in the order in which a message helps most: heads before what is computed from them.
void CheckShape(Checker& check, const AttentionShape& shape) {
  const int64_t heads = shape.num_heads, groups = shape.num_kv_heads;
  const int64_t keys = shape.key_dim, values = shape.value_dim;
  check.ExpectRange("heads of q", 1, kMaxRowElements, heads);
  check.ExpectRange("heads of k", 1, kMaxRowElements, groups);
  if (!check.ok()) return;
  check.Expect(heads % groups == 0, "heads of k",
               absl::StrCat("a divisor of the ", heads, " heads of q"), absl::StrCat(groups));
  check.ExpectRange("key dimension", 1, kMaxKeyDim, keys);
  check.ExpectRange("value dimension", 1, kMaxValueDim, values);
  check.ExpectRange("rows", 0, kMaxInt, shape.num_rows);
  check.ExpectRange("sequences", 1, kMaxInt, shape.num_seqs);
  if (!check.ok()) return;

  const int64_t state_heads = shape.state_heads(), queries = heads / state_heads;
  check.ExpectRange("elements of a row of q, H * K", 1, kMaxRowElements, heads * keys);
  check.ExpectRange("elements of a row of o, H * V", 1, kMaxRowElements, heads * values);
  check.ExpectRange("query heads per state", 1, kMaxStateQueries, queries);
  const int64_t key_blocks = (keys + 63) / 64, padded_keys = key_blocks * 64;
  check.Expect(queries * padded_keys <= kMaxStateKeys, "query heads per state * K rounded up to 64",
               absl::StrCat("at most ", kMaxStateKeys), absl::StrCat(queries, " * ", padded_keys));
  if (!check.ok()) return;
  const int64_t blocks = state_heads * values * key_blocks;
  check.Expect(shape.num_seqs <= kMaxStateBlocks / blocks, "sequences",
               absl::StrCat("N * S * V * ceil(K / 64) of at most ", kMaxStateBlocks),
               absl::StrCat(shape.num_seqs, " * ", state_heads, " * ", values, " * ", key_blocks));

  check.Expect(!shape.normalize || shape.op == AttentionOp::kLinearAttention, "normalize",
               "false but for linear_attention", "true");
  check.Expect(!shape.normalize || shape.form != AttentionForm::kChunkwise, "form",
               "recurrent with normalize", "chunkwise");
}

}  // namespace

const char* NameOf(AttentionOp op) { return kNameOf[static_cast<int>(op)]; }

AttentionForm DefaultForm(bool normalize, int64_t longest_sequence) {
  return normalize || longest_sequence <= 64 ? AttentionForm::kRecurrent
                                             : AttentionForm::kChunkwise;
}

AttentionShape ShapeOf(const AttentionInputs& in) {
  const size_t rank = in.q.shape.size();
  AttentionShape shape{.op = in.op,
                       .num_heads = in.q.shape[rank - 2],
                       .num_kv_heads = in.k.shape[rank - 2],
                       .key_dim = in.q.shape[rank - 1],
                       .value_dim = in.v.shape[rank - 1],
                       .num_rows = in.q.shape[0],
                       .num_seqs = in.q.shape[0],
                       .normalize = in.normalize,
                       .form = in.form};
  if (IsBatched(in)) {
    shape.num_rows *= in.q.shape[1];
  } else {
    shape.num_seqs = static_cast<int64_t>(in.cu_seqlens.size()) - 1;
  }
  return shape;
}

absl::Status CheckAttentionShape(const AttentionShape& shape) {
  Checker check(shape.op);
  CheckShape(check, shape);
  return check.status();
}

absl::Status CheckAttention(const AttentionInputs& in) {
  Checker check(in.op);
  const size_t rank = in.q.shape.size();
  check.Expect(rank == 3 || rank == 4, "q", "shape [T, H, K] or [B, T, H, K]", Text(in.q.shape));
  if (!check.ok()) return check.status();
  const std::vector<Dim> rows = RowDims(in);
  const std::vector<DType> act = {in.q.dtype}, float32 = {DType::kFloat32};
  const Dim heads = {"H", in.q.shape[rank - 2]}, keys = {"K", in.q.shape[rank - 1]};
  check.ExpectTensor("q", in.q, Join(rows, {heads, keys}), "", act);
  CheckSequences(check, in);
  check.ExpectTensor("k", in.k, Join(rows, {{"G"}, keys}), "q", act);
  if (!check.ok()) return check.status();
  check.ExpectTensor("v", in.v, Join(rows, {{"G", in.k.shape[rank - 2]}, {"V"}}), "k", act);
  if (!check.ok()) return check.status();

  const AttentionShape shape = ShapeOf(in);
  CheckShape(check, shape);
  CheckGate(check, in, shape);
  if (in.initial_state) {
    check.ExpectTensor("initial_state", *in.initial_state, StateDims(shape), "", float32);
  }
  if (in.initial_key_sum && in.normalize) {
    check.ExpectTensor("initial_key_sum", *in.initial_key_sum, KeySumDims(shape), "", float32);
  } else {
    check.ExpectNone("initial_key_sum", in.initial_key_sum, " without normalize");
  }
  check.Expect(std::isfinite(in.scale.value_or(1)), "scale", "a finite number",
               absl::StrCat(in.scale.value_or(1)));
  return check.status();
}

absl::Status CheckAttentionGradients(const AttentionInputs& in,
                                     const AttentionResultGradients& gradients) {
  Checker check(in.op);
  const AttentionShape shape = ShapeOf(in);
  const std::vector<DType> float32 = {DType::kFloat32};
  check.Expect(gradients.d_o || gradients.d_final_state || gradients.d_final_key_sum, "gradients",
               "at least one of d_o, d_final_state and d_final_key_sum", "none");
  if (gradients.d_o) {
    check.ExpectTensor("d_o", *gradients.d_o,
                       Join(RowDims(in), {{"H", shape.num_heads}, {"V", shape.value_dim}}), "o",
                       {in.q.dtype});
  }
  if (gradients.d_final_state) {
    check.ExpectTensor("d_final_state", *gradients.d_final_state, StateDims(shape), "", float32);
  }
  if (gradients.d_final_key_sum && in.normalize) {
    check.ExpectTensor("d_final_key_sum", *gradients.d_final_key_sum, KeySumDims(shape), "",
                       float32);
  } else {
    check.ExpectNone("d_final_key_sum", gradients.d_final_key_sum, " without normalize");
  }
  return check.status();
}

}  // namespace gla
