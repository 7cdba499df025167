// Any bytes as a safetensors file: refused or understood, never a crash; what is understood lies
// inside the file.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "model/checkpoint.h"
#include "model/safetensors.h"

namespace {

void Require(bool fact) {
  if (!fact) abort();
}

void Parse(std::string_view file) {
  const absl::StatusOr<gla::Safetensors> parsed = gla::ParseSafetensors(file);
  if (!parsed.ok()) {
    Require(!parsed.status().message().empty() && parsed.status().message().size() < 2000);
    return;
  }
  size_t bytes = 0;
  for (const gla::TensorView& tensor : parsed->tensors) {
    const char* data = static_cast<const char*>(tensor.data);
    Require(data >= file.data() && data + tensor.bytes <= file.data() + file.size());
    bytes += tensor.bytes;
  }
  Require(bytes <= file.size());
}

void OpenAndReadWeights(std::string_view file) {
  const int fd = memfd_create("fuzz", 0);
  Require(fd >= 0 && write(fd, file.data(), file.size()) == static_cast<ssize_t>(file.size()));
  absl::StatusOr<gla::Checkpoint> checkpoint =
      gla::Checkpoint::OpenFile("/proc/self/fd/" + std::to_string(fd));
  close(fd);
  if (!checkpoint.ok()) return;
  bool all_weights = true;
  for (const std::string& name : checkpoint->names()) {
    const gla::TensorView* tensor = checkpoint->Find(name);
    Require(tensor != nullptr && tensor->name == name);
    all_weights &= checkpoint->Weight(name, tensor->shape).ok();
  }
  Require(checkpoint->CheckAllUsed().ok() == all_weights);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  Parse(input);
  OpenAndReadWeights(input);
  // The same with the header's length made right, so that changed headers are read at all.
  const size_t end = input.rfind('}');
  if (size <= 8 || end == input.npos || end < 8) return 0;
  std::string repaired;
  for (int i = 0; i < 8; ++i) repaired.push_back(static_cast<char>((end + 1 - 8) >> (8 * i)));
  repaired.append(input.substr(8));
  Parse(repaired);
  OpenAndReadWeights(repaired);
  return 0;
}
