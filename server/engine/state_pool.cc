#include "engine/state_pool.h"

#include <cstdio>
#include <cstdlib>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace gla {

StatePool::Slot& StatePool::Slot::operator=(Slot&& other) noexcept {
  if (this != &other) {
    Release();
    pool_ = std::exchange(other.pool_, nullptr);
    index_ = std::exchange(other.index_, -1);
  }
  return *this;
}

void StatePool::Slot::Release() {
  if (pool_ == nullptr) return;
  if (pool_->poison_freed_) {
    auto* memory = reinterpret_cast<char*>(pool_->states()) + index_ * pool_->slot_bytes_;
    pool_->device_.Fill(memory, 0xFF, static_cast<size_t>(pool_->slot_bytes_));
  }
  pool_->free_.push_back(index_);
  pool_ = nullptr;
  index_ = -1;
}

absl::StatusOr<std::unique_ptr<StatePool>> StatePool::Create(Device& device, int64_t num_slots,
                                                             int64_t slot_bytes,
                                                             bool poison_freed) {
  constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();
  if (num_slots < 1 || num_slots > kMaxSlots) {
    return absl::InvalidArgumentError(
        absl::StrCat("state slots: expected 1 .. ", kMaxSlots, ", got ", num_slots));
  }
  const bool fits = num_slots <= std::numeric_limits<int64_t>::max() / slot_bytes;
  DeviceBuffer memory;
  if (fits) memory = DeviceBuffer(device, static_cast<size_t>(num_slots * slot_bytes));
  if (!fits || !memory.ok()) {
    return absl::ResourceExhaustedError(absl::StrCat("no device memory for ", num_slots,
                                                     " state slots of ", slot_bytes,
                                                     " bytes; free: ", device.memory_free()));
  }
  return std::unique_ptr<StatePool>(
      new StatePool(device, std::move(memory), num_slots, slot_bytes, poison_freed));
}

StatePool::StatePool(Device& device, DeviceBuffer memory, int64_t num_slots, int64_t slot_bytes,
                     bool poison_freed)
    : device_(device),
      memory_(std::move(memory)),
      num_slots_(num_slots),
      slot_bytes_(slot_bytes),
      poison_freed_(poison_freed) {
  free_.reserve(static_cast<size_t>(num_slots));
  for (int64_t i = num_slots; i-- > 0;) free_.push_back(static_cast<int32_t>(i));
}

StatePool::Slot StatePool::Acquire() {
  if (free_.empty()) {
    std::fprintf(stderr, "state pool: all %lld slots are taken\n",
                 static_cast<long long>(num_slots_));
    std::abort();
  }
  const int32_t index = free_.back();
  free_.pop_back();
  return Slot(this, index);
}

}  // namespace gla
