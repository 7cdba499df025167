// Programs that exist once per backend: `name` for the CPU and `name`-cuda beside it.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>

#include "kernels/device.h"

namespace gla {

// Runs the program of `backend` ("cpu" or "cuda") with the same arguments in place of this one.
// Returns when this is that program already (true), or when there is none (false, and the reason on
// stderr).
inline bool BecomeBackend(const std::string& name, const std::string& backend, char** argv) {
  if (backend == Device::backend()) return true;
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  const std::string sibling =
      (self.parent_path() / (backend == "cpu" ? name : name + "-" + backend)).string();
  execv(sibling.c_str(), argv);
  std::fprintf(stderr, "%s: cannot run %s: %s (was it built with the %s backend?)\n", name.c_str(),
               sibling.c_str(), std::strerror(errno), backend.c_str());
  return false;
}

}  // namespace gla
