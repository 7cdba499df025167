// States between their slots and float32: a warp to a piece of 64 columns.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 256;

struct Int16Scale {
  float scale, inverse;

  // `bits`: of the largest absolute value. As integers, NaN > infinity > numbers.
  __device__ static Int16Scale Of(uint32_t bits) {
    if (bits >= 0x7F800000u) return {__uint_as_float(0x7FC00000u), 0};
    const float largest = __uint_as_float(bits);
    if (largest < 0x1p-100f) return {0, 0};
    return {__fdiv_rn(largest, 32767.0f), __fdiv_rn(32767.0f, largest)};
  }
  // NaN becomes 0.
  __device__ uint16_t Pack(float x) const {
    return static_cast<uint16_t>(__float2int_rn(x * inverse) + kInt16Zero);
  }
};

// A warp's piece of a row: `row` counts the rows of all heads of one state.
struct Piece {
  int64_t state, row, scale_at;
  int column, count;
  bool exists;

  __device__ Piece(int num_states, int64_t rows, int key_dim, int value_dim) {
    const int pieces = CeilDiv(value_dim, kStateTile);
    const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
    state = item / (rows * pieces);
    row = item / pieces % rows;
    const int tile = static_cast<int>(item % pieces);
    column = tile * kStateTile;
    scale_at = (row / key_dim * pieces + tile) * key_dim + row % key_dim;
    count = min(value_dim - column, kStateTile);
    exists = state < num_states;
  }
};

unsigned Grid(int num_states, int heads, int key_dim, int value_dim) {
  const int64_t pieces = int64_t{num_states} * heads * key_dim * CeilDiv(value_dim, kStateTile);
  return GridOf(CeilDiv(pieces, int64_t{kThreads / 32}));
}

__global__ void __launch_bounds__(kThreads)
    UnpackKernel(const UnpackStatesArgs a, int64_t rows, int64_t scales_at) {
  WaitForPrevious();
  AllowNext();
  const Piece at(a.num_states, rows, a.key_dim, a.value_dim);
  if (!at.exists) return;
  const int slot = a.slots[at.state];
  const char* const state = static_cast<const char*>(a.slots_begin) + slot * a.slot_stride;
  const int64_t from = at.row * a.value_dim + at.column;
  float* const to = a.states + at.state * rows * a.value_dim + from;
  const bool is_int16 = a.format == StateFormat::kInt16;
  const float scale =
      slot >= 0 && is_int16 ? reinterpret_cast<const float*>(state + scales_at)[at.scale_at] : 0;
  for (int c = threadIdx.x % 32; c < at.count; c += 32) {
    float x = 0;
    if (slot >= 0) {
      x = is_int16 ? static_cast<float>(reinterpret_cast<const uint16_t*>(state)[from + c] -
                                        kInt16Zero) *
                         scale
                   : reinterpret_cast<const float*>(state)[from + c];
    }
    to[c] = x;
  }
}

__global__ void __launch_bounds__(kThreads)
    PackKernel(const PackStatesArgs a, int64_t rows, int64_t scales_at) {
  WaitForPrevious();
  AllowNext();
  const Piece at(a.num_states, rows, a.key_dim, a.value_dim);
  if (!at.exists) return;
  const int slot = a.slots[at.state];
  if (slot < 0) return;
  char* const state = static_cast<char*>(a.slots_begin) + slot * a.slot_stride;
  const int64_t to = at.row * a.value_dim + at.column;
  const float* const from = a.states + at.state * rows * a.value_dim + to;
  const int lane = threadIdx.x % 32;
  const float x[2] = {lane < at.count ? from[lane] : 0.0f,
                      lane + 32 < at.count ? from[lane + 32] : 0.0f};
  if (a.format == StateFormat::kFloat32) {
    if (lane < at.count) reinterpret_cast<float*>(state)[to + lane] = x[0];
    if (lane + 32 < at.count) reinterpret_cast<float*>(state)[to + lane + 32] = x[1];
    return;
  }
  uint32_t largest = max(__float_as_uint(x[0]) & 0x7FFFFFFFu, __float_as_uint(x[1]) & 0x7FFFFFFFu);
  largest = __reduce_max_sync(0xFFFFFFFFu, largest);
  const Int16Scale scale = Int16Scale::Of(largest);
  uint16_t* const out = reinterpret_cast<uint16_t*>(state) + to;
  if (lane < at.count) out[lane] = scale.Pack(x[0]);
  if (lane + 32 < at.count) out[lane + 32] = scale.Pack(x[1]);
  if (lane == 0) reinterpret_cast<float*>(state + scales_at)[at.scale_at] = scale.scale;
}

}  // namespace

void UnpackStates(Device& device, const UnpackStatesArgs& a) {
  if (a.num_states == 0) return;
  LaunchOverlapped(
      device, UnpackKernel,
      {.blocks = Grid(a.num_states, a.heads, a.key_dim, a.value_dim), .threads = kThreads}, a,
      int64_t{a.heads} * a.key_dim, Int16ScalesAt(a.heads, a.key_dim, a.value_dim));
}

void PackStates(Device& device, const PackStatesArgs& a) {
  if (a.num_states == 0) return;
  LaunchOverlapped(
      device, PackKernel,
      {.blocks = Grid(a.num_states, a.heads, a.key_dim, a.value_dim), .threads = kThreads}, a,
      int64_t{a.heads} * a.key_dim, Int16ScalesAt(a.heads, a.key_dim, a.value_dim));
}

}  // namespace gla
