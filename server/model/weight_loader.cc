#include "model/weight_loader.h"

#include <cstring>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace gla {
namespace {

// `matrix` cut into heads of `head_rows` rows, each given `repeats` times.
void AddHeads(const HostMatrix& matrix, int64_t head_rows, int repeats,
              std::vector<HostMatrix>& out) {
  if (repeats == 1) return out.push_back(matrix);
  const int64_t head_bytes = head_rows * matrix.cols * static_cast<int64_t>(SizeOf(matrix.dtype));
  for (int64_t head = 0; head * head_rows < matrix.rows; ++head) {
    const void* data = static_cast<const char*>(matrix.data) + head * head_bytes;
    const HostMatrix one{data, matrix.dtype, static_cast<int>(head_rows), matrix.cols};
    out.insert(out.end(), repeats, one);
  }
}

// The blocks stacked and turned: [cols, all rows], of `Element`'s size.
template <typename Element>
std::vector<uint8_t> Transpose(const std::vector<HostMatrix>& matrices, DType dtype) {
  int64_t all_rows = 0;
  for (const HostMatrix& matrix : matrices) all_rows += matrix.rows;
  const int64_t cols = matrices.front().cols;
  std::vector<uint8_t> turned(static_cast<size_t>(all_rows * cols) * sizeof(Element));
  auto* const out = reinterpret_cast<Element*>(turned.data());
  int64_t first = 0;
  for (const HostMatrix& matrix : matrices) {
    const std::vector<uint8_t> values = ConvertWeight(matrix, dtype);
    const auto* in = reinterpret_cast<const Element*>(values.data());
    for (int64_t r = 0; r < matrix.rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) out[c * all_rows + first + r] = in[r * cols + c];
    }
    first += matrix.rows;
  }
  return turned;
}

}  // namespace

absl::Status WeightLoader::OutOfMemory(const std::string& name, size_t bytes) const {
  return absl::ResourceExhaustedError(absl::StrCat("no device memory for ", name, ": need ", bytes,
                                                   " bytes, ", device_.memory_free(), " are free"));
}

absl::Status WeightLoader::CheckSame(const std::string& a, const std::string& b,
                                     const std::vector<int64_t>& shape) {
  GLA_ASSIGN_OR_RETURN(const HostWeight first, source_.Get(a, shape));
  GLA_ASSIGN_OR_RETURN(const HostWeight second, source_.Get(b, shape));
  if (ConvertWeight(first.matrix, DType::kFloat32) ==
      ConvertWeight(second.matrix, DType::kFloat32)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("tensors ", a, " and ", b,
                   ": expected the same values (tie_feature_map_qk), found different ones"));
}

absl::StatusOr<WeightLoader::Stack> WeightLoader::Read(const std::vector<Block>& blocks,
                                                       int64_t cols) {
  Stack stack;
  bool all_bfloat16 = true;
  for (const Block& block : blocks) {
    if (block.rows == 0) continue;
    GLA_ASSIGN_OR_RETURN(HostWeight part, source_.Get(block.name, {block.rows, cols}));
    all_bfloat16 = all_bfloat16 && part.matrix.dtype == DType::kBFloat16;
    AddHeads(part.matrix, block.head_rows, block.repeats, stack.matrices);
    stack.parts.push_back(std::move(part));
  }
  // The CPU multiplies float32 rows with bfloat16 weights directly: half the bytes to read. The
  // CUDA backend wants both to be of one type.
  const bool mixes = std::string_view(Device::backend()) == "cpu";
  stack.dtype =
      act_ == DType::kBFloat16 || (mixes && all_bfloat16) ? DType::kBFloat16 : DType::kFloat32;
  return stack;
}

absl::StatusOr<PackedWeight> WeightLoader::Pack(const std::string& name,
                                                const std::vector<HostMatrix>& matrices,
                                                DType dtype) {
  PackedWeight packed(device_, matrices, dtype);
  if (!packed.ok()) return OutOfMemory(name, packed.bytes());
  return packed;
}

absl::StatusOr<PackedWeight> WeightLoader::Matrix(const std::vector<Block>& blocks, int64_t cols) {
  GLA_ASSIGN_OR_RETURN(const Stack stack, Read(blocks, cols));
  return Pack(blocks.front().name, stack.matrices, stack.dtype);
}

absl::StatusOr<WeightLoader::Pair> WeightLoader::MatrixPair(const std::vector<Block>& blocks,
                                                            int64_t cols) {
  GLA_ASSIGN_OR_RETURN(const Stack stack, Read(blocks, cols));
  const std::string& name = blocks.front().name;
  Pair pair;
  GLA_ASSIGN_OR_RETURN(pair.forward, Pack(name, stack.matrices, stack.dtype));
  const std::vector<uint8_t> turned = stack.dtype == DType::kFloat32
                                          ? Transpose<uint32_t>(stack.matrices, stack.dtype)
                                          : Transpose<uint16_t>(stack.matrices, stack.dtype);
  GLA_ASSIGN_OR_RETURN(
      pair.transposed,
      Pack(name, {{turned.data(), stack.dtype, static_cast<int>(cols), pair.forward.out()}},
           stack.dtype));
  return pair;
}

absl::StatusOr<DeviceBuffer> WeightLoader::Floats(
    const std::vector<std::pair<std::string, std::vector<int64_t>>>& blocks) {
  std::vector<float> all;
  for (const auto& [name, shape] : blocks) {
    GLA_ASSIGN_OR_RETURN(const std::vector<float> values, HostFloats({name, shape[0]}, shape));
    all.insert(all.end(), values.begin(), values.end());
  }
  return Upload(blocks.front().first, all);
}

absl::StatusOr<std::vector<float>> WeightLoader::HostFloats(const Block& block,
                                                            const std::vector<int64_t>& shape) {
  GLA_ASSIGN_OR_RETURN(const HostWeight part, source_.Get(block.name, shape));
  // A vector is one row in host memory, but its elements are the block's rows.
  HostMatrix matrix = part.matrix;
  if (shape.size() == 1) std::swap(matrix.rows, matrix.cols);
  std::vector<HostMatrix> matrices;
  AddHeads(matrix, block.head_rows, block.repeats, matrices);
  std::vector<float> all;
  for (const HostMatrix& head : matrices) {
    const std::vector<uint8_t> bytes = ConvertWeight(head, DType::kFloat32);
    const size_t before = all.size();
    all.resize(before + bytes.size() / sizeof(float));
    if (!bytes.empty()) std::memcpy(&all[before], bytes.data(), bytes.size());
  }
  return all;
}

absl::StatusOr<DeviceBuffer> WeightLoader::Table(const std::string& name, int64_t rows,
                                                 int64_t cols, DType* dtype) {
  GLA_ASSIGN_OR_RETURN(const HostWeight part, source_.Get(name, {rows, cols}));
  const bool narrow = act_ == DType::kBFloat16 || part.matrix.dtype == DType::kBFloat16;
  *dtype = narrow ? DType::kBFloat16 : DType::kFloat32;
  const std::vector<uint8_t> values = ConvertWeight(part.matrix, *dtype);
  return Upload(name, values.data(), values.size());
}

absl::StatusOr<DeviceBuffer> WeightLoader::Upload(const std::string& name, const void* data,
                                                  size_t bytes) {
  DeviceBuffer buffer(device_, bytes);
  if (!buffer.ok()) return OutOfMemory(name, bytes);
  device_.Upload(buffer.data(), data, bytes);
  return buffer;
}

}  // namespace gla
