// A checkpoint folder's tensors: safetensors files, memory-mapped and fully checked before use.
//
// Accepts `model.safetensors`, or `model.safetensors.index.json` with its shards. The files are
// hostile input: header length, JSON, every offset, shape product and dtype are checked with
// overflow-safe arithmetic against the file size (the rules of the safetensors format: header at
// most 100 MB, offsets contiguous without overlap or hole), before any tensor can be found. Only
// files below the folder are read, by plain names and not through links that lead out of it.
//
// A file that others cut, extend or rewrite after Open() makes Weight() or CheckAllUsed() fail:
// call the latter last, when all data was copied. Only a cut in the very moment of reading cannot
// be answered (the kernel sends SIGBUS).
//
// Const after Open(), but for Weight(); any thread may read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/device.h"

namespace gla {

// A tensor inside a mapped file. Valid as long as its Checkpoint.
struct TensorView {
  std::string name;
  std::string dtype_name;  // as the file spells it: "BF16", "F16", "F32", "I32", ...
  std::vector<int64_t> shape;
  const void* data = nullptr;
  size_t bytes = 0;
};

class Checkpoint {
 public:
  // The single file or the shards below `folder`. Errors are InvalidArgument or NotFound and name
  // file, tensor, expected and found.
  static absl::StatusOr<Checkpoint> Open(const std::string& folder);
  // One safetensors file.
  static absl::StatusOr<Checkpoint> OpenFile(const std::string& path);
  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  // Null when there is no such tensor.
  const TensorView* Find(std::string_view name) const;
  // The tensor, a weight (F32, F16 or BF16) of exactly this shape, all values finite; or an error
  // that says which tensor, what was expected and what was found. Marks the tensor as used.
  absl::StatusOr<const TensorView*> Weight(const std::string& name,
                                           absl::Span<const int64_t> shape);
  // Error naming the first tensors that no Weight() call asked for (misspelt or not supported) and
  // their count, or a file that has changed since Open().
  absl::Status CheckAllUsed() const;

  std::vector<std::string> names() const;  // sorted
  // "__metadata__", of all shards.
  const absl::flat_hash_map<std::string, std::string>& metadata() const;

 private:
  struct Impl;
  explicit Checkpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// The weight's dtype as the kernels name it. REQUIRES: returned by Checkpoint::Weight().
DType WeightDType(const TensorView& tensor);

}  // namespace gla
