#include "service/context.h"

#include <sys/random.h>

#include <cstdlib>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/string_view.h"

namespace gla {
namespace {

std::string SystemBytes(size_t n) {
  std::string bytes(n, '\0');
  // Up to 256 bytes come whole, and never fail once the system has booted.
  if (getrandom(bytes.data(), n, 0) != static_cast<ssize_t>(n)) std::abort();
  return bytes;
}

// SplitMix64's output function: a bijection that spreads consecutive numbers.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

uint64_t RandomSource::Seed() {
  uint64_t seed = 0;
  if (seed_.has_value()) {
    seed = Mix(*seed_ + (count_.fetch_add(1) + 1) * 0x9e3779b97f4a7c15u);
  } else {
    SystemBytes(sizeof(seed)).copy(reinterpret_cast<char*>(&seed), sizeof(seed));
  }
  return seed;
}

std::string RandomSource::Hex(int bytes) {
  return absl::BytesToHexString(SystemBytes(static_cast<size_t>(bytes)));
}

absl::StatusOr<const Serving*> ServiceContext::Ready() const {
  const Serving* loaded = serving.load(std::memory_order_acquire);
  if (loaded == nullptr) {
    return WithReason(absl::UnavailableError("the model is still being loaded"), "LOADING");
  }
  return loaded;
}

}  // namespace gla
