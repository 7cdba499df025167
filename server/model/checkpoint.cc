#include "model/checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "model/model_file.h"
#include "model/safetensors.h"
#include "model/strict_json.h"

namespace gla {
namespace {

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr size_t kMaxIndexBytes = 64 << 20;
constexpr size_t kMaxIndexValues = 200'000;
constexpr size_t kMaxShards = 1000;
constexpr size_t kListed = 5;  // names listed in one message

std::string ShapeText(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// The first kListed of `names`, and how many more.
std::string ListNames(const std::vector<std::string>& names) {
  std::vector<std::string> listed;
  for (size_t i = 0; i < std::min(names.size(), kListed); ++i) {
    listed.push_back(QuoteForMessage(names[i]));
  }
  if (names.size() > kListed) listed.push_back(absl::StrCat(names.size() - kListed, " more"));
  return absl::StrJoin(listed, ", ");
}

// A value is NaN or infinite when all its exponent bits are set. Blocks of fixed length, without a
// branch inside, so that the compiler makes vector compares of it: the scan runs at memory speed.
template <typename Bits>
size_t FirstNonFinite(const Bits* values, size_t count, Bits exponent) {
  constexpr size_t kBlock = 4096;
  for (size_t start = 0; start < count; start += kBlock) {
    Bits any = 0;
    const Bits* block = values + start;
    if (count - start >= kBlock) {
      for (size_t i = 0; i < kBlock; ++i) {
        any |= static_cast<Bits>(-((block[i] & exponent) == exponent));
      }
      if (any == 0) continue;
    }
    for (size_t i = start; i < std::min(count, start + kBlock); ++i) {
      if ((values[i] & exponent) == exponent) return i;
    }
  }
  return count;
}

absl::Status CheckFinite(const TensorView& tensor) {
  const size_t count = tensor.bytes / SizeOf(WeightDType(tensor));
  size_t first = count;
  switch (WeightDType(tensor)) {
    case DType::kFloat32:
      first =
          FirstNonFinite<uint32_t>(static_cast<const uint32_t*>(tensor.data), count, 0x7f800000u);
      break;
    case DType::kBFloat16:
      first = FirstNonFinite<uint16_t>(static_cast<const uint16_t*>(tensor.data), count, 0x7f80u);
      break;
    case DType::kFloat16:
      first = FirstNonFinite<uint16_t>(static_cast<const uint16_t*>(tensor.data), count, 0x7c00u);
      break;
  }
  if (first == count) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "tensor ", tensor.name, ": expected finite values, found NaN or infinity at index ", first,
      " of ", count));
}

struct Record {
  TensorView view;
  size_t file = 0;    // index of the file that holds it
  bool used = false;  // a Weight() call returned it
  // The file need not align a tensor to its dtype; then an aligned copy stands in for the mapping.
  std::vector<uint32_t> aligned_copy;
};

struct OpenedSafetensors {
  MappedFile file;
  Safetensors content;
};

absl::StatusOr<OpenedSafetensors> OpenSafetensors(const std::string& path) {
  GLA_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  absl::StatusOr<Safetensors> content = ParseSafetensors(file.bytes());
  if (!content.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", content.status().message()));
  }
  return OpenedSafetensors{std::move(file), std::move(*content)};
}

// Which tensors each shard must hold, by the index: shard name -> tensor names (sorted).
absl::StatusOr<std::map<std::string, std::vector<std::string>>> ReadIndex(const std::string& path) {
  const auto fail = [&](const auto&... parts) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", parts...));
  };
  GLA_ASSIGN_OR_RETURN(const std::string text, ReadModelFile(path, kMaxIndexBytes));
  absl::StatusOr<nlohmann::json> index = ParseJson(text, kMaxIndexValues);
  if (!index.ok()) return fail(index.status().message());
  if (!index->is_object() || !index->contains("weight_map") ||
      !(*index)["weight_map"].is_object()) {
    return fail("expected an object with weight_map, an object of tensor and file names");
  }
  std::map<std::string, std::vector<std::string>> shards;
  for (const auto& [tensor, file] : (*index)["weight_map"].items()) {
    if (!file.is_string()) {
      return fail("weight_map of ", QuoteForMessage(tensor), ": expected a file name, found ",
                  DescribeJson(file));
    }
    shards[file.get<std::string>()].push_back(tensor);
  }
  if (shards.empty()) return fail("weight_map is empty");
  if (shards.size() > kMaxShards) {
    return fail("expected at most ", kMaxShards, " shards, found ", shards.size());
  }
  return shards;
}

bool Exists(const std::string& path) {
  struct stat ignored;
  return lstat(path.c_str(), &ignored) == 0;
}

}  // namespace

struct Checkpoint::Impl {
  std::vector<MappedFile> files;
  std::map<std::string, Record, std::less<>> tensors;  // Record addresses are stable
  absl::flat_hash_map<std::string, std::string> metadata;

  absl::Status Add(OpenedSafetensors opened) {
    for (TensorView& view : opened.content.tensors) {
      std::string name = view.name;
      const auto [it, added] =
          tensors.emplace(std::move(name), Record{std::move(view), files.size(), false, {}});
      if (!added) {
        return absl::InvalidArgumentError(absl::StrCat(opened.file.path(), ": tensor ",
                                                       QuoteForMessage(it->first), " is also in ",
                                                       files[it->second.file].path()));
      }
    }
    for (auto& [key, value] : opened.content.metadata) metadata.emplace(key, std::move(value));
    files.push_back(std::move(opened.file));
    return absl::OkStatus();
  }

  absl::Status OpenShards(const std::string& folder) {
    GLA_ASSIGN_OR_RETURN(const std::string index_path, ResolveBelow(folder, kIndexFile));
    GLA_ASSIGN_OR_RETURN(const auto shards, ReadIndex(index_path));
    for (const auto& [shard, expected] : shards) {
      GLA_ASSIGN_OR_RETURN(const std::string path, ResolveBelow(folder, shard));
      GLA_ASSIGN_OR_RETURN(OpenedSafetensors opened, OpenSafetensors(path));
      std::vector<std::string> found;
      for (const TensorView& view : opened.content.tensors) found.push_back(view.name);
      std::sort(found.begin(), found.end());
      GLA_RETURN_IF_ERROR(CheckShard(path, expected, found));
      GLA_RETURN_IF_ERROR(Add(std::move(opened)));
    }
    return absl::OkStatus();
  }

  // A shard holds what the index says, no more and no less. REQUIRES: both lists are sorted.
  static absl::Status CheckShard(const std::string& path, const std::vector<std::string>& expected,
                                 const std::vector<std::string>& found) {
    std::vector<std::string> missing, extra;
    std::set_difference(expected.begin(), expected.end(), found.begin(), found.end(),
                        std::back_inserter(missing));
    std::set_difference(found.begin(), found.end(), expected.begin(), expected.end(),
                        std::back_inserter(extra));
    if (!missing.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": expected the tensors the index places here, found none of ",
                       ListNames(missing)));
    }
    if (!extra.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": holds tensors the index does not place here: ", ListNames(extra)));
    }
    return absl::OkStatus();
  }
};

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& folder) {
  // A single file wins over an index, as in the library that writes both.
  if (Exists(absl::StrCat(folder, "/", kSingleFile))) {
    GLA_ASSIGN_OR_RETURN(const std::string path, ResolveBelow(folder, kSingleFile));
    return OpenFile(path);
  }
  if (!Exists(absl::StrCat(folder, "/", kIndexFile))) {
    return absl::NotFoundError(
        absl::StrCat(folder, ": expected ", kSingleFile, " or ", kIndexFile, ", found neither"));
  }
  auto impl = std::make_unique<Impl>();
  GLA_RETURN_IF_ERROR(impl->OpenShards(folder));
  return Checkpoint(std::move(impl));
}

absl::StatusOr<Checkpoint> Checkpoint::OpenFile(const std::string& path) {
  GLA_ASSIGN_OR_RETURN(OpenedSafetensors opened, OpenSafetensors(path));
  auto impl = std::make_unique<Impl>();
  GLA_RETURN_IF_ERROR(impl->Add(std::move(opened)));
  return Checkpoint(std::move(impl));
}

const TensorView* Checkpoint::Find(std::string_view name) const {
  const auto it = impl_->tensors.find(name);
  return it == impl_->tensors.end() ? nullptr : &it->second.view;
}

absl::StatusOr<const TensorView*> Checkpoint::Weight(const std::string& name,
                                                     absl::Span<const int64_t> shape) {
  const auto it = impl_->tensors.find(name);
  if (it == impl_->tensors.end()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, ": expected shape ",
                                                   ShapeText(shape), ", found no such tensor"));
  }
  Record& record = it->second;
  TensorView& view = record.view;
  if (view.dtype_name != "F32" && view.dtype_name != "F16" && view.dtype_name != "BF16") {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", name, ": expected dtype F32, F16 or BF16, found ", view.dtype_name));
  }
  if (absl::MakeConstSpan(view.shape) != shape) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", name, ": expected shape ", ShapeText(shape), ", found ", ShapeText(view.shape)));
  }
  const MappedFile& file = impl_->files[record.file];
  GLA_RETURN_IF_ERROR(file.CheckUnchanged());
  if (view.bytes > 0 && reinterpret_cast<uintptr_t>(view.data) % SizeOf(WeightDType(view)) != 0) {
    record.aligned_copy.resize((view.bytes + 3) / 4);
    std::memcpy(record.aligned_copy.data(), view.data, view.bytes);
    view.data = record.aligned_copy.data();
  }
  GLA_RETURN_IF_ERROR(CheckFinite(view));
  GLA_RETURN_IF_ERROR(file.CheckUnchanged());
  record.used = true;
  return &view;
}

absl::Status Checkpoint::CheckAllUsed() const {
  for (const MappedFile& file : impl_->files) GLA_RETURN_IF_ERROR(file.CheckUnchanged());
  std::vector<std::string> unused;
  for (const auto& [name, record] : impl_->tensors) {
    if (!record.used) unused.push_back(name);
  }
  if (unused.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      unused.size(), " tensors of the checkpoint are no part of the model the config describes: ",
      ListNames(unused)));
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& [name, record] : impl_->tensors) names.push_back(name);
  return names;
}

const absl::flat_hash_map<std::string, std::string>& Checkpoint::metadata() const {
  return impl_->metadata;
}

DType WeightDType(const TensorView& tensor) {
  if (tensor.dtype_name == "F32") return DType::kFloat32;
  if (tensor.dtype_name == "BF16") return DType::kBFloat16;
  return DType::kFloat16;
}

}  // namespace gla
