// The recurrence of the family: checks, and the choice of tiles, which looks at K, V and types
// only.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attention_chunk.cuh"
#include "kernels/cuda/attention_recurrent.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr size_t kStageBudget = 64 << 10;  // bytes of shared memory for a block's stages
constexpr int kMaxStageTokens = 16;
constexpr int kLoaderThreads = 128;
constexpr int kLoadersFrom = 2 * kMaxStageTokens + 1;  // length of the longest sequence
constexpr int kMaxRecurrentKeys = 2048;

void CheckArgs(const LinearAttentionArgs& a) {
  GLA_REQUIRES(a.num_kv_heads > 0 && a.num_heads % a.num_kv_heads == 0,
               "whole groups of query heads");
  GLA_REQUIRES(a.state_heads == a.num_kv_heads || a.state_heads == a.num_heads,
               "a state per key/value head or per query head");
  GLA_REQUIRES((a.gate == nullptr) == (a.gate_kind == GateKind::kNone),
               "a gate belongs to its kind");
  GLA_REQUIRES(a.gate_kind != GateKind::kConstant || a.state_heads == a.num_heads,
               "constant decay differs per query head, so does the state");
  GLA_REQUIRES(a.gate_dtype == DType::kFloat32 || a.gate_dtype == a.dtype,
               "a gate of float32 or of the inputs' type");
}

template <typename T, typename Gate>
bool AllowsVectorInputs(const LinearAttentionArgs& a) {
  const size_t four = 4 * sizeof(T);
  const bool gate = a.gate_kind != GateKind::kPerKey ||
                    (IsAligned(a.gate, 4 * sizeof(Gate)) && a.gate_stride % 4 == 0);
  return gate && IsAligned(a.q, four) && IsAligned(a.k, four) && IsAligned(a.v, four) &&
         a.q_stride % 4 == 0 && a.k_stride % 4 == 0 && a.v_stride % 4 == 0 && a.key_dim % 4 == 0 &&
         a.value_dim % 4 == 0;
}

template <typename T, typename Gate, int kRows, int kWarpsV, Decay kDecay, bool kKeySum>
void LaunchRecurrent(Device& device, const LinearAttentionArgs& a) {
  constexpr int kTileV = 16 * kWarpsV;
  RecurrentPlan p;
  p.tiles_v = CeilDiv(a.value_dim, kTileV);
  p.warps_k = CeilDiv(a.key_dim, 8 * kRows);
  p.padded_k = p.warps_k * 8 * kRows;
  p.group = a.num_heads / a.state_heads;
  p.compute_threads = 32 * kWarpsV * p.warps_k;
  p.vector_inputs = AllowsVectorInputs<T, Gate>(a);
  p.vector_state = IsAligned(a.state, 16) && a.state_stride % 4 == 0 && a.value_dim % 4 == 0;

  // From here on: only when things are done, not in which order numbers are added.
  const auto bytes = [&] {
    const int stages = CeilDiv(std::max(a.seqs.max_len, 1), p.stage_tokens);
    const StageLayout layout(p, kTileV, kDecay == Decay::kPerKey, kKeySum);
    return std::min(stages, 2) * layout.total * sizeof(float);
  };
  p.stage_tokens = std::min(kMaxStageTokens, std::max(a.seqs.max_len, 1));
  while (p.stage_tokens > 1 && bytes() > kStageBudget) p.stage_tokens /= 2;
  GLA_REQUIRES(bytes() <= device.impl().max_shared_bytes,
               "query heads per state times key dimension fit shared memory");
  int threads = p.compute_threads;
  constexpr int kMaxThreads = 65536 / MaxRegisters(kRows);
  if (a.seqs.max_len >= kLoadersFrom && threads + kLoaderThreads <= kMaxThreads) {
    threads += kLoaderThreads;
  }
  const auto kernel = RecurrentKernel<T, Gate, kRows, kWarpsV, kDecay, kKeySum>;
  AllowShared(kernel, bytes());
  const unsigned grid = GridOf(int64_t{a.seqs.num_seqs} * a.state_heads * p.tiles_v);
  kernel<<<grid, threads, bytes(), device.impl().stream>>>(a, p);
  CUDA_CHECK(cudaGetLastError());
}

// 64 rows of K to a warp, 32 columns of V to a block; narrow and very wide K get other shapes, so
// that a block has from four to sixteen warps.
template <typename T, typename Gate, Decay kDecay, bool kKeySum>
void LaunchRecurrent(Device& device, const LinearAttentionArgs& a) {
  if (a.key_dim <= 64) {
    LaunchRecurrent<T, Gate, 8, 4, kDecay, kKeySum>(device, a);
  } else if (a.key_dim <= 512) {
    LaunchRecurrent<T, Gate, 8, 2, kDecay, kKeySum>(device, a);
  } else {
    LaunchRecurrent<T, Gate, 16, 1, kDecay, kKeySum>(device, a);
  }
}

template <typename T, typename Gate, Decay kDecay>
void LaunchRecurrent(Device& device, const LinearAttentionArgs& a) {
  if (a.key_sum_state == nullptr) return LaunchRecurrent<T, Gate, kDecay, false>(device, a);
  if constexpr (std::is_same_v<Gate, float>) {
    LaunchRecurrent<T, Gate, kDecay, true>(device, a);
    KeySumKernel<T><<<GridOf(a.seqs.num_seqs), 256, 0, device.impl().stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
  } else {
    GLA_REQUIRES(a.key_sum_state == nullptr, "normalized attention has no gate of 16 bits");
  }
}

template <typename T, typename Gate>
void LaunchRecurrent(Device& device, const LinearAttentionArgs& a) {
  switch (a.gate_kind) {
    case GateKind::kNone:
      return LaunchRecurrent<T, float, Decay::kNone>(device, a);
    case GateKind::kConstant:
    case GateKind::kScalar:
      return LaunchRecurrent<T, Gate, Decay::kPerStep>(device, a);
    case GateKind::kPerKey:
      return LaunchRecurrent<T, Gate, Decay::kPerKey>(device, a);
  }
}

void LaunchChunk(Device& device, const LinearAttentionArgs& a) {
  const cudaStream_t stream = Queue(device);
  const size_t bytes = ChunkSharedBytes(a.key_dim);
  const int tiles_v = CeilDiv(a.value_dim, kChunkColumns);
  const unsigned grid = GridOf(int64_t{a.seqs.num_seqs} * a.state_heads * tiles_v);
  WithInputType(a.dtype, [&]<typename T>() {
    AllowShared(ChunkKernel<T>, bytes);
    ChunkKernel<T><<<grid, kChunkThreads, bytes, stream>>>(a, tiles_v);
  });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void RecurrentLinearAttention(Device& device, const LinearAttentionArgs& a) {
  CheckArgs(a);
  GLA_REQUIRES(a.key_dim <= kMaxRecurrentKeys, "a key dimension up to 2048");
  if (a.seqs.num_seqs == 0) return;
  device.impl().Use();
  WithInputType(a.dtype, [&]<typename T>() {
    if (a.gate_dtype == DType::kFloat32) {
      LaunchRecurrent<T, float>(device, a);
    } else {
      LaunchRecurrent<T, T>(device, a);
    }
  });
}

void ChunkLinearAttention(Device& device, const LinearAttentionArgs& a) {
  CheckArgs(a);
  GLA_REQUIRES(a.key_sum_state == nullptr, "the chunkwise form does not normalize");
  if (a.seqs.num_seqs == 0) return;
  if (ChunkSharedBytes(a.key_dim) > device.impl().max_shared_bytes) {
    return RecurrentLinearAttention(device, a);
  }
  LaunchChunk(device, a);
}

}  // namespace gla
