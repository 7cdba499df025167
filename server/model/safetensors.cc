#include "model/safetensors.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "model/strict_json.h"

namespace gla {
namespace {

using nlohmann::json;

constexpr uint64_t kPrefixBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kMaxTensors = 100'000;
constexpr size_t kMaxRank = 8;
constexpr size_t kMaxJsonValues = 2'000'000;

struct DTypeSize {
  std::string_view name;
  uint64_t bytes;
};
constexpr DTypeSize kDTypes[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1},
    {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
    {"U32", 4},  {"F32", 4}, {"I64", 8}, {"U64", 8},     {"F64", 8},
};

template <typename... Parts>
absl::Status Malformed(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

std::string TensorName(std::string_view name) {
  return absl::StrCat("tensor ", QuoteForMessage(name));
}

// Where a tensor's data lies in the data section.
struct Extent {
  uint64_t begin = 0;
  uint64_t end = 0;
};

struct Entry {
  TensorView view;
  Extent extent;
};

// The bytes of a tensor of this shape; false on overflow.
bool ByteCount(const std::vector<int64_t>& shape, uint64_t dtype_bytes, uint64_t* bytes) {
  *bytes = dtype_bytes;
  for (const int64_t dim : shape) {
    if (__builtin_mul_overflow(*bytes, static_cast<uint64_t>(dim), bytes)) return false;
  }
  return true;
}

absl::Status ReadShape(const json& value, TensorView& view) {
  if (!value.is_array() || value.size() > kMaxRank) {
    return Malformed(TensorName(view.name), ": shape: expected a list of at most ", kMaxRank,
                     " sizes, found ", DescribeJson(value));
  }
  for (const json& dim : value) {
    if (!dim.is_number_unsigned() || dim.get<uint64_t>() > INT64_MAX) {
      return Malformed(TensorName(view.name), ": shape: expected sizes of 0 or more, found ",
                       DescribeJson(value));
    }
    view.shape.push_back(dim.get<int64_t>());
  }
  return absl::OkStatus();
}

absl::StatusOr<Extent> ReadExtent(const json& value, const std::string& name) {
  if (!value.is_array() || value.size() != 2 || !value[0].is_number_unsigned() ||
      !value[1].is_number_unsigned()) {
    return Malformed(TensorName(name), ": data_offsets: expected [begin, end], found ",
                     DescribeJson(value));
  }
  const Extent extent{value[0].get<uint64_t>(), value[1].get<uint64_t>()};
  if (extent.begin > extent.end) {
    return Malformed(TensorName(name), ": data_offsets: expected begin <= end, found ",
                     DescribeJson(value));
  }
  return extent;
}

absl::StatusOr<Entry> ReadEntry(const std::string& name, const json& fields) {
  if (!fields.is_object() || !fields.contains("dtype") || !fields.contains("shape") ||
      !fields.contains("data_offsets") || fields.size() != 3) {
    return Malformed(TensorName(name),
                     ": expected the fields dtype, shape and data_offsets, found ",
                     DescribeJson(fields));
  }
  Entry entry;
  entry.view.name = name;
  const json& dtype = fields["dtype"];
  const auto* known = std::find_if(std::begin(kDTypes), std::end(kDTypes), [&](const DTypeSize& d) {
    return dtype.is_string() && dtype.get_ref<const std::string&>() == d.name;
  });
  if (known == std::end(kDTypes)) {
    return Malformed(TensorName(name), ": unknown dtype ", DescribeJson(dtype));
  }
  entry.view.dtype_name = std::string(known->name);
  GLA_RETURN_IF_ERROR(ReadShape(fields["shape"], entry.view));
  GLA_ASSIGN_OR_RETURN(entry.extent, ReadExtent(fields["data_offsets"], name));

  uint64_t bytes = 0;
  if (!ByteCount(entry.view.shape, known->bytes, &bytes)) {
    return Malformed(TensorName(name), ": the size of shape [",
                     absl::StrJoin(entry.view.shape, ", "), "] overflows");
  }
  if (bytes != entry.extent.end - entry.extent.begin) {
    return Malformed(TensorName(name), ": expected ", bytes, " bytes for ", entry.view.dtype_name,
                     " [", absl::StrJoin(entry.view.shape, ", "), "], found ",
                     entry.extent.end - entry.extent.begin, " in data_offsets");
  }
  entry.view.bytes = bytes;
  return entry;
}

absl::Status ReadMetadata(const json& value, Safetensors& result) {
  if (!value.is_object()) {
    return Malformed("__metadata__: expected an object of strings, found ", DescribeJson(value));
  }
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string()) {
      return Malformed("__metadata__: expected a string for ", QuoteForMessage(key), ", found ",
                       DescribeJson(text));
    }
    result.metadata.emplace(key, text.get<std::string>());
  }
  return absl::OkStatus();
}

// The tensors lie one after another, from the first byte of the data section to its last.
absl::Status CheckContiguous(const std::vector<Entry>& entries, uint64_t data_start,
                             uint64_t file_bytes) {
  uint64_t expected = 0;
  for (const Entry& entry : entries) {
    if (entry.extent.begin != expected) {
      return Malformed(
          TensorName(entry.view.name), ": expected its data to begin at ", expected, ", found ",
          entry.extent.begin,
          entry.extent.begin < expected ? " (overlaps the tensor before it)" : " (leaves a hole)");
    }
    expected = entry.extent.end;
  }
  if (expected == file_bytes - data_start) return absl::OkStatus();
  if (expected < file_bytes - data_start) {
    return Malformed("bytes after the last tensor: expected ", data_start + expected,
                     " bytes, found ", file_bytes);
  }
  // Offsets may be near 2^64: report a total only when there is one.
  if (expected > UINT64_MAX - data_start) {
    return Malformed(TensorName(entries.back().view.name), ": data_offsets lie beyond any file");
  }
  return Malformed("truncated: expected ", data_start + expected, " bytes, found ", file_bytes);
}

}  // namespace

absl::StatusOr<Safetensors> ParseSafetensors(std::string_view file) {
  if (file.size() < kPrefixBytes) {
    return Malformed("truncated: expected at least ", kPrefixBytes, " bytes, found ", file.size());
  }
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) {
    header_bytes = header_bytes << 8 | static_cast<unsigned char>(file[i]);
  }
  if (header_bytes > kMaxHeaderBytes) {
    return Malformed("header length: expected at most ", kMaxHeaderBytes, " bytes, found ",
                     header_bytes);
  }
  const uint64_t data_start = kPrefixBytes + header_bytes;
  if (data_start > file.size()) {
    return Malformed("truncated in the header: expected at least ", data_start, " bytes, found ",
                     file.size());
  }
  const std::string_view header = file.substr(kPrefixBytes, header_bytes);
  if (header.empty() || header[0] != '{') {
    return Malformed("header: expected a JSON object that starts with '{', found ",
                     QuoteForMessage(header.substr(0, 8)));
  }
  absl::StatusOr<json> parsed = ParseJson(header, kMaxJsonValues);
  if (!parsed.ok()) return Malformed("header: ", parsed.status().message());
  if (parsed->size() > kMaxTensors + 1) {
    return Malformed("header: expected at most ", kMaxTensors, " tensors, found ", parsed->size());
  }

  Safetensors result;
  std::vector<Entry> entries;
  entries.reserve(parsed->size());
  for (const auto& [name, fields] : parsed->items()) {
    if (name == "__metadata__") {
      GLA_RETURN_IF_ERROR(ReadMetadata(fields, result));
      continue;
    }
    GLA_ASSIGN_OR_RETURN(Entry entry, ReadEntry(name, fields));
    entries.push_back(std::move(entry));
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.extent.begin, a.extent.end) < std::pair(b.extent.begin, b.extent.end);
  });
  GLA_RETURN_IF_ERROR(CheckContiguous(entries, data_start, file.size()));
  result.tensors.reserve(entries.size());
  for (Entry& entry : entries) {
    entry.view.data = file.data() + data_start + entry.extent.begin;
    result.tensors.push_back(std::move(entry.view));
  }
  return result;
}

}  // namespace gla
