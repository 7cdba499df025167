// Files of a model folder: found only below the folder, mapped or read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace gla {

// The real path of `folder`/`name`. `name` must be a plain file name, and where it is a symbolic
// link it must end below `folder`. NotFound when there is no such file.
absl::StatusOr<std::string> ResolveBelow(const std::string& folder, std::string_view name);

// The whole of a small file. InvalidArgument when it is larger than `max_bytes` or not a regular
// file.
absl::StatusOr<std::string> ReadModelFile(const std::string& path, size_t max_bytes);

// A regular file mapped read-only; the mapping goes with the object.
//
// The kernel does not keep a mapped file from being changed by others. CheckUnchanged() finds a
// file that was cut, extended or rewritten since Open(); reading `bytes()` while another process
// cuts the file kills the reader (SIGBUS), as for every user of mmap, so check before and after
// reading.
class MappedFile {
 public:
  static absl::StatusOr<MappedFile> Open(const std::string& path);
  MappedFile(MappedFile&&) noexcept;
  MappedFile& operator=(MappedFile&&) noexcept;
  ~MappedFile();

  const std::string& path() const;
  std::string_view bytes() const;
  absl::Status CheckUnchanged() const;

 private:
  struct Impl;
  explicit MappedFile(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace gla
