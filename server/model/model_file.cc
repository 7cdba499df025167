#include "model/model_file.h"

#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/strict_json.h"

namespace gla {
namespace {

absl::Status ErrnoError(const std::string& path, std::string_view what) {
  const int error = errno;
  std::string message =
      absl::StrCat(path, ": ", absl::string_view(what.data(), what.size()), ": ", strerror(error));
  return error == ENOENT || error == ENOTDIR ? absl::NotFoundError(message)
                                             : absl::InvalidArgumentError(message);
}

class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

struct OpenedFile {
  Descriptor fd;
  struct stat stat;
};

absl::StatusOr<OpenedFile> OpenRegular(const std::string& path) {
  // O_NONBLOCK: opening a named pipe must not wait for its writer.
  OpenedFile file{Descriptor(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)), {}};
  if (file.fd.get() < 0) return ErrnoError(path, "cannot open");
  if (fstat(file.fd.get(), &file.stat) != 0) return ErrnoError(path, "cannot stat");
  if (!S_ISREG(file.stat.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": expected a regular file"));
  }
  return file;
}

absl::StatusOr<std::string> RealPath(const std::string& path) {
  std::unique_ptr<char, decltype(&free)> real(realpath(path.c_str(), nullptr), &free);
  if (real == nullptr) return ErrnoError(path, "cannot open");
  return std::string(real.get());
}

}  // namespace

absl::StatusOr<std::string> ResolveBelow(const std::string& folder, std::string_view name) {
  if (name.empty() || name.size() > NAME_MAX || name == "." || name == ".." ||
      name.find('/') != name.npos || name.find('\0') != name.npos) {
    return absl::InvalidArgumentError(
        absl::StrCat(folder, ": expected a plain file name, got ", QuoteForMessage(name)));
  }
  GLA_ASSIGN_OR_RETURN(const std::string root, RealPath(folder));
  GLA_ASSIGN_OR_RETURN(std::string path, RealPath(absl::StrCat(folder, "/", std::string(name))));
  if (!absl::StartsWith(path, root == "/" ? root : root + "/")) {
    return absl::InvalidArgumentError(absl::StrCat(
        folder, "/", std::string(name), ": a symbolic link out of the model folder (to ", path,
        "); only files below the folder are read: copy it there"));
  }
  return path;
}

absl::StatusOr<std::string> ReadModelFile(const std::string& path, size_t max_bytes) {
  GLA_ASSIGN_OR_RETURN(const OpenedFile file, OpenRegular(path));
  const uint64_t size = file.stat.st_size;
  if (size > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": expected at most ", max_bytes, " bytes, found ", size));
  }
  std::string text(size, '\0');
  size_t have = 0;
  while (have < text.size()) {
    const ssize_t n = read(file.fd.get(), text.data() + have, text.size() - have);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoError(path, "cannot read");
    if (n == 0) break;
    have += n;
  }
  if (have != size) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": changed while it was read: expected ", size, " bytes, found ", have));
  }
  return text;
}

struct MappedFile::Impl {
  Impl(std::string path, OpenedFile file) : path(std::move(path)), file(std::move(file)) {}
  ~Impl() {
    if (size > 0) munmap(data, size);
  }
  std::string path;
  OpenedFile file;
  void* data = nullptr;
  size_t size = 0;
};

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  GLA_ASSIGN_OR_RETURN(OpenedFile file, OpenRegular(path));
  auto impl = std::make_unique<Impl>(path, std::move(file));
  if (impl->file.stat.st_size > 0) {
    const size_t size = impl->file.stat.st_size;
    void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, impl->file.fd.get(), 0);
    if (data == MAP_FAILED) return ErrnoError(path, "cannot map");
    impl->data = data;
    impl->size = size;
    // All of it is about to be read once, front to back; a hint, so failure is harmless.
    madvise(data, size, MADV_WILLNEED);
  }
  MappedFile mapped(std::move(impl));
  GLA_RETURN_IF_ERROR(mapped.CheckUnchanged());
  return mapped;
}

MappedFile::MappedFile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
MappedFile::MappedFile(MappedFile&&) noexcept = default;
MappedFile& MappedFile::operator=(MappedFile&&) noexcept = default;
MappedFile::~MappedFile() = default;

const std::string& MappedFile::path() const { return impl_->path; }

std::string_view MappedFile::bytes() const {
  return {static_cast<const char*>(impl_->data), impl_->size};
}

absl::Status MappedFile::CheckUnchanged() const {
  struct stat now;
  if (fstat(impl_->file.fd.get(), &now) != 0) return ErrnoError(impl_->path, "cannot stat");
  const struct stat& then = impl_->file.stat;
  if (now.st_size != then.st_size) {
    return absl::InvalidArgumentError(absl::StrCat(impl_->path,
                                                   ": changed while it was loaded: expected ",
                                                   then.st_size, " bytes, found ", now.st_size));
  }
  if (now.st_mtim.tv_sec != then.st_mtim.tv_sec || now.st_mtim.tv_nsec != then.st_mtim.tv_nsec) {
    return absl::InvalidArgumentError(
        absl::StrCat(impl_->path, ": was written to while it was loaded"));
  }
  return absl::OkStatus();
}

}  // namespace gla
