// The gradients of linear attention: attention_backward_plan.h says how, attention_backward_*-inl.h
// do it. Both forms are the same three passes, over tiles of 16 tokens or of one.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_backward.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <algorithm>

#include "kernels/cpu/attention_backward_gradients-inl.h"
#include "kernels/cpu/attention_backward_plan.h"
#include "kernels/cpu/attention_backward_sweep-inl.h"
#include "kernels/cpu/common.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

// f.template operator()<kTile, T>()
template <typename F>
void WithTileAndType(const BackwardPlan& plan, DType dtype, const F& f) {
  WithStoredType(dtype, [&]<typename T>() {
    if (plan.tile == 1) {
      f.template operator()<1, T>();
    } else {
      f.template operator()<kMaxTile, T>();
    }
  });
}

// f(sequence's rows, block) of the blocks in work items [begin, end); `heads` items per block.
template <typename F>
void ForBlocks(const LinearAttentionBackwardArgs& a, const BackwardPlan& plan, int heads,
               int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = i / heads;
    int low = 0, high = a.num_seqs;  // the last sequence whose first block is not after this one
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (plan.first_block(middle, a.cu_seqlens[middle]) <= block ? low : high) = middle;
    }
    const SequenceRows rows(a, plan, low);
    const int block_in_seq = static_cast<int>(block - rows.first_block);
    if (block_in_seq < rows.num_blocks) f(rows, block_in_seq, static_cast<int>(i % heads));
  }
}

void BackwardKeys(const LinearAttentionBackwardArgs& a, const BackwardPlan& plan, int64_t begin,
                  int64_t end) {
  ForBlocks(a, plan, a.state_heads, begin, end,
            [&](const SequenceRows& rows, int block, int state_head) {
              WithTileAndType(plan, a.dtype, [&]<int kTile, typename T>() {
                PrepareBlock<kTile, T>(a, plan, rows, block, state_head);
              });
            });
}

void BackwardSweeps(const LinearAttentionBackwardArgs& a, const BackwardPlan& plan, int64_t begin,
                    int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int split = static_cast<int>(i % plan.splits);
    const int head = static_cast<int>(i / plan.splits % a.state_heads);
    const int seq = static_cast<int>(i / plan.splits / a.state_heads);
    WithTileAndType(plan, a.dtype, [&]<int kTile, typename T>() {
      Sweep<kTile, T> sweep(a, plan, seq, head, split);
      sweep.Forward();
      sweep.Backward();
    });
  }
}

void BackwardGradients(const LinearAttentionBackwardArgs& a, const BackwardPlan& plan,
                       int64_t begin, int64_t end) {
  ForBlocks(a, plan, a.num_kv_heads, begin, end,
            [&](const SequenceRows& rows, int block, int group) {
              WithTileAndType(plan, a.dtype, [&]<int kTile, typename T>() {
                BlockGradients<kTile, T>(a, plan, rows, block, group).Run();
              });
            });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(BackwardKeys);
HWY_EXPORT(BackwardSweeps);
HWY_EXPORT(BackwardGradients);

namespace {

void CheckArgs(const LinearAttentionBackwardArgs& a) {
  GLA_CHECK(a.num_kv_heads > 0 && a.num_heads % a.num_kv_heads == 0);
  GLA_CHECK(a.state_heads == (a.gate_kind == GateKind::kConstant ? a.num_heads : a.num_kv_heads));
  GLA_CHECK((a.gate_kind == GateKind::kNone) == (a.gate == nullptr));
  const bool learned = a.gate_kind == GateKind::kScalar || a.gate_kind == GateKind::kPerKey;
  GLA_CHECK(learned == (a.d_gate != nullptr));
  GLA_CHECK(a.gate_dtype == DType::kFloat32 || a.gate_dtype == a.dtype);
}

void Backward(Device& device, const LinearAttentionBackwardArgs& a, AttentionForm form) {
  CheckArgs(a);
  if (a.num_seqs == 0) return;
  const BackwardPlan plan(a, form, device.impl().pool.num_threads());
  GLA_CHECK(a.workspace != nullptr || plan.bytes() == 0);
  // What a block of one state costs in each pass.
  const double keys = double{BackwardPlan::kBlock} * plan.padded_k;
  const double keys_ns = keys * (kExpNs + 8 * plan.reps * kMulAddNs);
  const double sweep_ns = keys * a.value_dim * (3 + 2 * plan.reps) * kMulAddNs / plan.splits;
  const int64_t states = int64_t{a.num_seqs} * a.state_heads;
  const double blocks_per_seq = static_cast<double>(plan.num_blocks) / a.num_seqs;
  ParallelFor(device, plan.num_blocks * a.state_heads, keys_ns, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(BackwardKeys)(a, plan, begin, end);
  });
  ParallelFor(device, states * plan.splits, blocks_per_seq * sweep_ns,
              [&](int64_t begin, int64_t end) {
                HWY_DYNAMIC_DISPATCH(BackwardSweeps)(a, plan, begin, end);
              });
  ParallelFor(device, plan.num_blocks * a.num_kv_heads, 2 * keys_ns,
              [&](int64_t begin, int64_t end) {
                HWY_DYNAMIC_DISPATCH(BackwardGradients)(a, plan, begin, end);
              });
}

}  // namespace

size_t LinearAttentionBackwardBytes(Device& device, const LinearAttentionBackwardArgs& a,
                                    AttentionForm form) {
  return BackwardPlan(a, form, device.impl().pool.num_threads()).bytes();
}
void RecurrentLinearAttentionBackward(Device& device, const LinearAttentionBackwardArgs& a) {
  Backward(device, a, AttentionForm::kRecurrent);
}
void ChunkLinearAttentionBackward(Device& device, const LinearAttentionBackwardArgs& a) {
  Backward(device, a, AttentionForm::kChunkwise);
}

}  // namespace gla
#endif  // HWY_ONCE
