#include <algorithm>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "tests/tools/golden.h"

namespace gla {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxDepth = 4;  // a link may lead back up

bool IsOpFile(const fs::path& file) {
  return file.extension() == ".safetensors" && file.filename() != "expected.safetensors";
}

void Search(const fs::path& folder, int depth, GoldenSet& found) {
  std::error_code error;
  if (fs::exists(folder / "config.json", error)) {
    found.models.push_back(folder.string());
    return;
  }
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    if (entry.is_directory(error)) {
      if (depth < kMaxDepth) Search(entry.path(), depth + 1, found);
    } else if (IsOpFile(entry.path())) {
      found.ops.push_back(entry.path().string());
    }
  }
}

}  // namespace

absl::StatusOr<GoldenSet> FindGolden(const std::string& path) {
  GoldenSet found;
  std::error_code error;
  if (fs::is_regular_file(path, error)) {
    found.ops.push_back(path);
    return found;
  }
  // A trailing slash would leave a model's folder without a name.
  const fs::path given(path);
  Search(given.has_filename() ? given : given.parent_path(), 0, found);
  if (found.models.empty() && found.ops.empty()) {
    return absl::NotFoundError(
        absl::StrCat(path,
                     ": expected a checkpoint folder with expected.safetensors, operator files "
                     "(*.safetensors), or a folder of such; found none"));
  }
  std::sort(found.models.begin(), found.models.end());
  std::sort(found.ops.begin(), found.ops.end());
  return found;
}

}  // namespace gla
