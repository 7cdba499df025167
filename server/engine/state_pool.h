// A fixed set of recurrent-state slots, allocated once.
//
// A sequence needs the same memory at its first token as at its millionth, so capacity is a count.
// Contents of a fresh slot are undefined: a sequence starts from the empty state by reading no slot
// at all (see Sequences in kernels/kernels.h).
//
// Owned by the engine thread; not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace gla {

class StatePool {
 public:
  // A move-only claim on one slot, given back when destroyed. The pool outlives its slots.
  class Slot {
   public:
    Slot() = default;
    Slot(Slot&& other) noexcept { *this = std::move(other); }
    Slot& operator=(Slot&& other) noexcept;
    ~Slot() { Release(); }

    int32_t index() const { return index_; }  // -1: none
    explicit operator bool() const { return pool_ != nullptr; }
    void Release();

   private:
    friend class StatePool;
    Slot(StatePool* pool, int32_t index) : pool_(pool), index_(index) {}
    StatePool* pool_ = nullptr;
    int32_t index_ = -1;
  };

  // ResourceExhausted when device memory does not hold the slots. With `poison_freed` a slot that
  // is given back is filled with NaN.
  static absl::StatusOr<std::unique_ptr<StatePool>> Create(Device& device, int64_t num_slots,
                                                           int64_t slot_bytes, bool poison_freed);

  // REQUIRES: num_free() > 0.
  Slot Acquire();

  float* states() const { return memory_.as<float>(); }  // slot s at s * slot_bytes()
  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t num_slots() const { return num_slots_; }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_used() const { return num_slots_ - num_free(); }

 private:
  StatePool(Device& device, DeviceBuffer memory, int64_t num_slots, int64_t slot_bytes,
            bool poison_freed);

  Device& device_;
  const DeviceBuffer memory_;
  const int64_t num_slots_;
  const int64_t slot_bytes_;
  const bool poison_freed_;
  std::vector<int32_t> free_;  // the last one is the next to go: its memory is the warmest
};

}  // namespace gla
