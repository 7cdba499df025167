#include "tests/fuzz/peak_memory.h"

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace gla::testing {
namespace {

std::atomic<int64_t> held{0};
std::atomic<int64_t> base{0};
std::atomic<int64_t> peak{0};

void* Allocate(size_t bytes) {
  void* memory = malloc(bytes);
  if (memory == nullptr) abort();
  const int64_t now = held += malloc_usable_size(memory);
  for (int64_t seen = peak; now > seen && !peak.compare_exchange_weak(seen, now);) {
  }
  return memory;
}

void Release(void* memory) {
  if (memory != nullptr) held -= malloc_usable_size(memory);
  free(memory);
}

}  // namespace

void ResetPeakMemory() {
  base = held.load();
  peak = held.load();
}

size_t PeakMemory() { return static_cast<size_t>(std::max<int64_t>(peak - base, 0)); }

}  // namespace gla::testing

void* operator new(size_t bytes) { return gla::testing::Allocate(bytes); }
void* operator new[](size_t bytes) { return gla::testing::Allocate(bytes); }
void operator delete(void* memory) noexcept { gla::testing::Release(memory); }
void operator delete[](void* memory) noexcept { gla::testing::Release(memory); }
void operator delete(void* memory, size_t) noexcept { gla::testing::Release(memory); }
void operator delete[](void* memory, size_t) noexcept { gla::testing::Release(memory); }
