// The gradients of the recurrence: checks, the workspace's layout, and the launches of both forms.
// Grids know the number of rows and sequences only; where sequences begin is read on the device.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_backward_chunk.cuh"
#include "kernels/cuda/attention_backward_recurrent.cuh"
#include "kernels/cuda/attention_backward_walk.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr size_t kSweepSharedBytes = 48 << 10;  // of one block's stage
constexpr int kSlice = 64;                      // of K and of V

void CheckArgs(const LinearAttentionBackwardArgs& a) {
  GLA_REQUIRES(a.num_kv_heads > 0 && a.num_heads % a.num_kv_heads == 0,
               "whole groups of query heads");
  GLA_REQUIRES(a.state_heads == a.num_kv_heads || a.state_heads == a.num_heads,
               "a state per key/value head or per query head");
  GLA_REQUIRES(a.gate_kind != GateKind::kConstant || a.state_heads == a.num_heads,
               "constant decay differs per query head, so does the state");
  GLA_REQUIRES((a.gate == nullptr) == (a.gate_kind == GateKind::kNone),
               "a gate belongs to its kind");
  const bool learned = a.gate_kind == GateKind::kScalar || a.gate_kind == GateKind::kPerKey;
  GLA_REQUIRES((a.d_gate != nullptr) == learned, "a gate per step has a gradient");
  GLA_REQUIRES(a.gate_dtype == DType::kFloat32 || a.gate_dtype == a.dtype,
               "a gate of float32 or of the inputs' type");
  GLA_REQUIRES(int64_t{a.num_heads} * std::max(a.key_dim, a.value_dim) <= 1 << 24,
               "a chunk's rows within 32-bit offsets");
}

// The plan, with the workspace's parts one after another from `a.workspace`, and their end.
BackwardPlan MakePlan(const LinearAttentionBackwardArgs& a, AttentionForm form, size_t* bytes) {
  BackwardPlan p = {};
  static_cast<LinearAttentionBackwardArgs&>(p) = a;
  p.group = a.num_heads / a.state_heads;
  p.states_per_kv = a.state_heads / a.num_kv_heads;
  p.q_stride = a.num_heads * a.key_dim, p.k_stride = a.num_kv_heads * a.key_dim;
  p.o_stride = a.num_heads * a.value_dim, p.v_stride = a.num_kv_heads * a.value_dim;
  p.slices_k = CeilDiv(a.key_dim, kSlice);
  p.slices_v = CeilDiv(a.value_dim, kSlice);
  p.max_chunks = a.num_rows / kChunkTokens + a.num_seqs;
  const bool recurrent = form == AttentionForm::kRecurrent;
  p.last_state_used = recurrent && a.d_gate != nullptr && a.d_final_state != nullptr;

  *bytes = 0;
  const auto take = [&](auto*& part, bool used, int64_t count) {
    if (!used) return;
    using Part = std::remove_reference_t<decltype(part)>;
    part = reinterpret_cast<Part>(reinterpret_cast<uintptr_t>(a.workspace) + *bytes);
    *bytes += RoundUp<size_t>(count * sizeof(*part), 256);
  };
  const int64_t rows = a.num_rows, state = int64_t{a.state_heads} * a.key_dim * a.value_dim;
  const bool gate = a.d_gate != nullptr, d_o = a.d_o != nullptr;
  const bool chunks_meet = a.max_len > kChunkTokens;
  take(p.chunk_offsets, true, int64_t{a.num_seqs} + 1);
  take(p.states, (gate || (d_o && !recurrent)) && (chunks_meet || p.last_state_used),
       p.max_chunks * state);
  take(p.gate_sums, gate && a.gate_kind == GateKind::kScalar, p.slices_k * rows * a.num_kv_heads);
  if (recurrent) {
    take(p.dq_sums, d_o, p.slices_v * rows * a.num_heads * a.key_dim);
    take(p.dk_sums, true, p.slices_v * rows * a.state_heads * a.key_dim);
    take(p.boundary_sums, p.states != nullptr,
         int64_t{p.slices_v} * p.max_chunks * a.state_heads * a.key_dim);
    take(p.dv_sums, true, p.slices_k * rows * a.state_heads * a.value_dim);
    take(p.self_scores, d_o, rows * a.num_heads);
  } else {
    const int64_t scores = int64_t{p.max_chunks} * a.num_heads * kScoresOfChunk;
    take(p.carries, chunks_meet, p.max_chunks * state);
    take(p.scores, d_o, scores);
    take(p.d_scores, d_o, scores);
  }
  return p;
}

BackwardPlan PlanOf(const LinearAttentionBackwardArgs& a, AttentionForm form) {
  GLA_REQUIRES(a.workspace != nullptr && IsAligned(a.workspace, 256), "an aligned workspace");
  size_t bytes;
  return MakePlan(a, form, &bytes);
}

void FindChunks(const BackwardPlan& p, cudaStream_t stream) {
  ChunkOffsetsKernel<256><<<1, 256, 0, stream>>>(p.cu_seqlens, p.num_seqs, p.chunk_offsets);
  CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void FinishGate(const BackwardPlan& p, cudaStream_t stream) {
  if (p.gate_sums == nullptr || p.num_rows == 0) return;
  const int64_t items = int64_t{p.num_rows} * p.num_kv_heads;
  GateGradientKernel<T><<<GridOf(CeilDiv<int64_t>(items, 256)), 256, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

// ---- Recurrent ----------------------------------------------------------------------------------

int StageTokens(const BackwardPlan& p, bool backward) {
  int tokens = kMaxSweepTokens;
  while (tokens > 1 && SweepBytes(tokens, p.group, backward) > kSweepSharedBytes) tokens /= 2;
  return tokens;
}

template <typename T>
void LaunchRecurrent(Device& device, const BackwardPlan& p) {
  const cudaStream_t stream = Queue(device);
  const auto sweep = [&](auto* kernel, bool backward) {
    const int tokens = StageTokens(p, backward);
    const size_t bytes = SweepBytes(tokens, p.group, backward);
    GLA_REQUIRES(bytes <= device.impl().max_shared_bytes,
                 "query heads per state fit shared memory");
    AllowShared(kernel, bytes);
    const unsigned grid = GridOf(int64_t{p.num_seqs} * p.state_heads * p.slices_k * p.slices_v);
    kernel<<<grid, kSweepThreads, bytes, stream>>>(p, tokens);
    CUDA_CHECK(cudaGetLastError());
  };
  FindChunks(p, stream);
  if (p.d_o != nullptr || p.states != nullptr) sweep(ForwardSweepKernel<T>, false);
  sweep(BackwardSweepKernel<T>, true);
  if (p.num_rows == 0) return;
  if (p.d_o != nullptr) {
    const int64_t items = int64_t{p.num_rows} * p.num_heads;
    SelfScoresKernel<T><<<GridOf(CeilDiv<int64_t>(items, 8)), 256, 0, stream>>>(p);
    CUDA_CHECK(cudaGetLastError());
  }
  const unsigned key_grid = GridOf(int64_t{p.max_chunks} * p.num_kv_heads * p.slices_k);
  KeySumsKernel<T><<<key_grid, kChunkThreads, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
  const int64_t values = int64_t{p.num_rows} * p.num_kv_heads * p.value_dim;
  ValueSumsKernel<T><<<GridOf(CeilDiv<int64_t>(values, 256)), 256, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
  FinishGate<T>(p, stream);
}

// ---- Chunkwise ----------------------------------------------------------------------------------

template <typename T>
void LaunchChunks(Device& device, const BackwardPlan& p) {
  const cudaStream_t stream = Queue(device);
  const unsigned walk_grid =
      GridOf(int64_t{p.num_seqs} * p.state_heads * p.slices_k * CeilDiv(p.value_dim, kWalkColumns));
  FindChunks(p, stream);
  if (p.states != nullptr) {
    StateWalkKernel<T><<<walk_grid, kChunkThreads, 0, stream>>>(p);
    CUDA_CHECK(cudaGetLastError());
  }
  if (p.carries != nullptr || p.d_initial_state != nullptr) {
    CarryWalkKernel<T><<<walk_grid, kChunkThreads, 0, stream>>>(p);
    CUDA_CHECK(cudaGetLastError());
  }
  if (p.num_rows == 0) return;
  if (p.d_o != nullptr) {
    LinearAttentionArgs inputs = {};
    inputs.q = p.q, inputs.k = p.k, inputs.v = p.v, inputs.gate = p.gate;
    inputs.gate_kind = p.gate_kind, inputs.gate_dtype = p.gate_dtype;
    inputs.key_dim = p.key_dim;
    inputs.q_stride = p.q_stride, inputs.k_stride = p.k_stride;
    inputs.gate_stride = p.gate_kind == GateKind::kPerKey ? p.k_stride : p.num_kv_heads;
    const unsigned score_grid = GridOf(int64_t{p.max_chunks} * p.num_heads);
    AllowShared(ScoresKernel<T>, sizeof(ChunkTile));
    ScoresKernel<T><<<score_grid, kChunkThreads, sizeof(ChunkTile), stream>>>(p, inputs);
    CUDA_CHECK(cudaGetLastError());
  }
  const unsigned value_grid = GridOf(int64_t{p.max_chunks} * p.num_kv_heads * p.slices_v);
  ValueGradientKernel<T><<<value_grid, kChunkThreads, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
  const unsigned key_grid = GridOf(int64_t{p.max_chunks} * p.num_kv_heads * p.slices_k);
  AllowShared(KeyGradientKernel<T>, sizeof(KeyTile));
  KeyGradientKernel<T><<<key_grid, kChunkThreads, sizeof(KeyTile), stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
  FinishGate<T>(p, stream);
}

}  // namespace

size_t LinearAttentionBackwardBytes(Device&, const LinearAttentionBackwardArgs& a,
                                    AttentionForm form) {
  size_t bytes;
  MakePlan(a, form, &bytes);
  return bytes;
}

void RecurrentLinearAttentionBackward(Device& device, const LinearAttentionBackwardArgs& a) {
  CheckArgs(a);
  if (a.num_seqs == 0) return;
  const BackwardPlan p = PlanOf(a, AttentionForm::kRecurrent);
  WithInputType(a.dtype, [&]<typename T>() { LaunchRecurrent<T>(device, p); });
}

void ChunkLinearAttentionBackward(Device& device, const LinearAttentionBackwardArgs& a) {
  CheckArgs(a);
  if (a.num_seqs == 0) return;
  const BackwardPlan p = PlanOf(a, AttentionForm::kChunkwise);
  WithInputType(a.dtype, [&]<typename T>() { LaunchChunks<T>(device, p); });
}

}  // namespace gla
