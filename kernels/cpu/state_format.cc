// States between their slots and float32, see StateFormat in kernels.h.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/cpu/common.h"
#include "kernels/kernels.h"

namespace gla {
namespace {

struct Int16Scale {
  float scale, inverse;

  // `bits`: of the largest absolute value. As integers, NaN > infinity > numbers.
  static Int16Scale Of(uint32_t bits) {
    if (bits >= 0x7F800000u) return {std::numeric_limits<float>::quiet_NaN(), 0};
    const float largest = std::bit_cast<float>(bits);
    if (largest < 0x1p-100f) return {0, 0};
    return {largest / 32767.0f, 32767.0f / largest};
  }
};

// A row's scales lie key_dim apart.
void UnpackRow(const uint16_t* from, const float* scales, int key_dim, int value_dim, float* to) {
  for (int begin = 0; begin < value_dim; begin += kStateTile, scales += key_dim) {
    const float scale = *scales;
    const int end = std::min(begin + kStateTile, value_dim);
    for (int c = begin; c < end; ++c) to[c] = static_cast<float>(from[c] - kInt16Zero) * scale;
  }
}

void PackRow(const float* from, int key_dim, int value_dim, uint16_t* to, float* scales) {
  for (int begin = 0; begin < value_dim; begin += kStateTile, scales += key_dim) {
    const int end = std::min(begin + kStateTile, value_dim);
    uint32_t largest = 0;
    for (int c = begin; c < end; ++c) {
      largest = std::max(largest, std::bit_cast<uint32_t>(from[c]) & 0x7FFFFFFFu);
    }
    const Int16Scale scale = Int16Scale::Of(largest);
    *scales = scale.scale;
    if (scale.inverse == 0) {
      std::fill(to + begin, to + end, uint16_t{kInt16Zero});
      continue;
    }
    // Adding 2^23 + 2^15 rounds to an integer, ties to even, and leaves it, plus 2^15, in the low
    // bits.
    for (int c = begin; c < end; ++c) {
      const float rounded = from[c] * scale.inverse + (0x1p23f + kInt16Zero);
      to[c] = static_cast<uint16_t>(std::bit_cast<uint32_t>(rounded));
    }
  }
}

// Calls f(slot, where the row is in `states`, its offset in a state, that of its first scale) for
// every row of every state; offsets in values. Args: UnpackStatesArgs or PackStatesArgs.
template <typename Args, typename F>
void ForEachRow(Device& device, const Args& a, const F& f) {
  const int64_t rows = int64_t{a.heads} * a.key_dim;
  const int pieces = (a.value_dim + kStateTile - 1) / kStateTile;
  ParallelFor(device, a.num_states * rows, a.value_dim * kCopyNs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % rows;
      const int64_t scale = row / a.key_dim * pieces * a.key_dim + row % a.key_dim;
      f(int64_t{a.slots[i / rows]}, a.states + i * a.value_dim, row * a.value_dim, scale);
    }
  });
}

}  // namespace

void UnpackStates(Device& device, const UnpackStatesArgs& a) {
  const int64_t scales_at = Int16ScalesAt(a.heads, a.key_dim, a.value_dim);
  ForEachRow(device, a, [&](int64_t slot, float* to, int64_t at, int64_t scale) {
    if (slot < 0) {
      std::fill_n(to, a.value_dim, 0.0f);
      return;
    }
    const char* const state = static_cast<const char*>(a.slots_begin) + slot * a.slot_stride;
    if (a.format == StateFormat::kFloat32) {
      std::copy_n(reinterpret_cast<const float*>(state) + at, a.value_dim, to);
    } else {
      UnpackRow(reinterpret_cast<const uint16_t*>(state) + at,
                reinterpret_cast<const float*>(state + scales_at) + scale, a.key_dim, a.value_dim,
                to);
    }
  });
}

void PackStates(Device& device, const PackStatesArgs& a) {
  const int64_t scales_at = Int16ScalesAt(a.heads, a.key_dim, a.value_dim);
  ForEachRow(device, a, [&](int64_t slot, const float* from, int64_t at, int64_t scale) {
    if (slot < 0) return;
    char* const state = static_cast<char*>(a.slots_begin) + slot * a.slot_stride;
    if (a.format == StateFormat::kFloat32) {
      std::copy_n(from, a.value_dim, reinterpret_cast<float*>(state) + at);
    } else {
      PackRow(from, a.key_dim, a.value_dim, reinterpret_cast<uint16_t*>(state) + at,
              reinterpret_cast<float*>(state + scales_at) + scale);
    }
  });
}

}  // namespace gla
