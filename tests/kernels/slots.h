// Ragged sequences and the state slots they read and write, in every combination.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "tests/kernels/harness.h"

namespace gla {

// Sequence n's slots follow the pattern (n + shift) % 5: in place; read one, write another; from
// zero; final state dropped; neither. The slots are a random permutation with some left untouched.
struct Ragged {
  Ragged(const std::vector<int>& lengths, int shift, uint32_t seed) : lengths(lengths) {
    const int n = static_cast<int>(lengths.size());
    num_slots = 2 * n + 3;
    std::vector<int32_t> slots(num_slots);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), std::mt19937(seed));
    cu_seqlens.push_back(0);
    for (int i = 0; i < n; ++i) {
      const int pattern = (i + shift) % 5;
      cu_seqlens.push_back(cu_seqlens.back() + lengths[i]);
      read_slots.push_back(pattern == 2 || pattern == 4 ? -1 : slots[2 * i]);
      write_slots.push_back(pattern >= 3 ? -1 : pattern == 0 ? slots[2 * i] : slots[2 * i + 1]);
    }
    device_cu_seqlens = Upload(cu_seqlens);
    device_read_slots = Upload(read_slots);
    device_write_slots = Upload(write_slots);
  }

  int num_seqs() const { return static_cast<int>(lengths.size()); }
  int num_rows() const { return cu_seqlens.back(); }
  Sequences view() const {
    return {device_cu_seqlens.as<int32_t>(),
            device_read_slots.as<int32_t>(),
            device_write_slots.as<int32_t>(),
            num_seqs(),
            num_rows(),
            *std::max_element(lengths.begin(), lengths.end())};
  }

  std::vector<int> lengths;
  int num_slots;
  std::vector<int32_t> cu_seqlens, read_slots, write_slots;
  DeviceBuffer device_cu_seqlens, device_read_slots, device_write_slots;
};

}  // namespace gla
