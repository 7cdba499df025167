// The recurrence, token by token and in tiles (attention_chunk-inl.h).
//
// One item of work is one state of one sequence, or some of its columns. Its tokens are taken in
// blocks, whose q, k, v and decays are brought to float32 once; then each strip of columns, small
// enough for the first-level cache, goes through all tokens of the block: decay, rank-1 update and
// read-out in one pass over the strip. Each state element and each output is one chain of float32
// operations in the order of t and k, so no bit depends on blocks, strips or calls.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/attention_chunk-inl.h"
#include "kernels/cpu/attention_common.h"
#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

constexpr int kTokenBlock = 16;

// One block of tokens of one head, float32.
struct TokenBlock {
  int len;
  int reps;            // query heads that read this state
  int key_dim, cols;   // K, and the number of columns in work
  const float* q;      // [reps, len, K], times scale
  const float* k;      // [len, K]
  const float* decay;  // [len, K], exp(gate); null: none
  const float* v;      // [len, cols]
  float* o;            // [reps, len, cols]
};

// Columns [c, c + kVecs * lanes) of the state through all tokens of the block; `s` is at column c.
template <int kVecs, bool kDecay, class D>
HWY_INLINE void AdvanceStrip(D d, const TokenBlock& b, int c, float* HWY_RESTRICT s,
                             int64_t s_stride) {
  using V = hn::Vec<D>;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int t = 0; t < b.len; ++t) {
    const float* HWY_RESTRICT k = b.k + t * b.key_dim;
    const float* HWY_RESTRICT decay = kDecay ? b.decay + t * b.key_dim : nullptr;
    V v[kVecs], o[kVecs];
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) v[j] = hn::LoadU(d, b.v + t * b.cols + c + j * lanes);
    for (int rep = 0; rep < b.reps; ++rep) {
      const float* HWY_RESTRICT q = b.q + (rep * b.len + t) * b.key_dim;
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) o[j] = hn::Zero(d);
      if (rep == 0) {  // the update goes with the first read-out
        for (int i = 0; i < b.key_dim; ++i) {
          const V ki = hn::Set(d, k[i]), qi = hn::Set(d, q[i]);
          float* HWY_RESTRICT row = s + i * s_stride;
#pragma GCC unroll 16
          for (int j = 0; j < kVecs; ++j) {
            V sj = hn::LoadU(d, row + j * lanes);
            if constexpr (kDecay) sj = hn::Mul(sj, hn::Set(d, decay[i]));
            sj = hn::MulAdd(ki, v[j], sj);
            hn::StoreU(sj, d, row + j * lanes);
            o[j] = hn::MulAdd(qi, sj, o[j]);
          }
        }
      } else {
        for (int i = 0; i < b.key_dim; ++i) {
          const V qi = hn::Set(d, q[i]);
#pragma GCC unroll 16
          for (int j = 0; j < kVecs; ++j) {
            o[j] = hn::MulAdd(qi, hn::LoadU(d, s + i * s_stride + j * lanes), o[j]);
          }
        }
      }
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) {
        hn::StoreU(o[j], d, b.o + (rep * b.len + t) * b.cols + c + j * lanes);
      }
    }
  }
}

template <bool kDecay>
void AdvanceBlock(const TokenBlock& b, float* s, int64_t s_stride) {
  const FloatTag d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int c = 0;
  if (b.len == 1) {  // one pass over the state: as wide as the registers let it
    constexpr int kWide = HWY_TARGET == HWY_AVX3 ? 16 : 4;
    for (; c + kWide * lanes <= b.cols; c += kWide * lanes) {
      AdvanceStrip<kWide, kDecay>(d, b, c, s + c, s_stride);
    }
  }
  for (; c + 4 * lanes <= b.cols; c += 4 * lanes) AdvanceStrip<4, kDecay>(d, b, c, s + c, s_stride);
  for (; c + lanes <= b.cols; c += lanes) AdvanceStrip<1, kDecay>(d, b, c, s + c, s_stride);
  for (; c < b.cols; ++c) AdvanceStrip<1, kDecay>(OneFloatTag(), b, c, s + c, s_stride);
}

// z += k; denominators[rep, t] = q_t . z_t + 1e-10
void AdvanceKeySum(const TokenBlock& b, float* z, float* denominators) {
  for (int t = 0; t < b.len; ++t) {
    AddScaled(1.0f, b.k + t * b.key_dim, z, b.key_dim);
    for (int rep = 0; rep < b.reps; ++rep) {
      const int row = rep * b.len + t;
      denominators[row] = Dot(b.q + row * b.key_dim, z, b.key_dim) + 1e-10f;
    }
  }
}

template <typename T>
void RecurrentState(const LinearAttentionArgs& a, int seq, int state_head, int col0, int cols) {
  const HeadMap heads(a, state_head);
  const int K = a.key_dim, V = a.value_dim;
  const bool normalized = a.key_sum_state != nullptr;
  thread_local std::vector<float> scratch;
  const size_t block_k = static_cast<size_t>(kTokenBlock) * K, block_v = kTokenBlock * cols;
  scratch.resize((heads.reps + 2) * block_k + (heads.reps + 1) * block_v + K +
                 heads.reps * kTokenBlock + static_cast<size_t>(K) * cols);
  float* q = scratch.data();
  float* k = q + heads.reps * block_k;
  float* decay = k + block_k;
  float* v = decay + block_k;
  float* o = v + block_v;
  float* z = o + heads.reps * block_v;
  float* denominators = z + K;
  float* dropped_state = denominators + heads.reps * kTokenBlock;

  StateView state(a, seq, state_head, col0, cols, dropped_state);
  state.Begin();
  if (normalized) BeginKeySum(a, seq, heads.group, z);
  const int64_t end = a.seqs.cu_seqlens[seq + 1];
  for (int64_t t0 = a.seqs.cu_seqlens[seq]; t0 < end; t0 += kTokenBlock) {
    const int len = static_cast<int>(std::min<int64_t>(kTokenBlock, end - t0));
    for (int t = 0; t < len; ++t) {
      const int64_t row = t0 + t;
      Convert(static_cast<const T*>(a.k) + row * a.k_stride + heads.group * K, k + t * K, K);
      Convert(static_cast<const T*>(a.v) + row * a.v_stride + heads.group * V + col0, v + t * cols,
              cols);
      for (int rep = 0; rep < heads.reps; ++rep) {
        LoadScaled(static_cast<const T*>(a.q) + row * a.q_stride + (heads.first + rep) * K, a.scale,
                   q + (rep * len + t) * K, K);
      }
      if (a.gate_kind != GateKind::kNone) {
        LoadGates(GateView(a), row, heads, K, decay + t * K);
        ExpInPlace(decay + t * K, K);
      }
    }
    const TokenBlock block{len, heads.reps, K, cols, q, k, decay, v, o};
    if (normalized) AdvanceKeySum(block, z, denominators);
    if (a.gate_kind == GateKind::kNone) {
      AdvanceBlock<false>(block, state.data, state.stride);
    } else {
      AdvanceBlock<true>(block, state.data, state.stride);
    }
    for (int i = 0; i < heads.reps * len; ++i) {
      T* out =
          static_cast<T*>(a.o) + (t0 + i % len) * a.o_stride + (heads.first + i / len) * V + col0;
      const float* from = o + static_cast<size_t>(i) * cols;
      const float denominator = normalized ? denominators[i] : 1.0f;
      ForVectors(cols, [=](auto d, size_t c) HWY_ATTR {
        auto value = hn::LoadU(d, from + c);
        if (normalized) value = hn::Div(value, hn::Set(d, denominator));
        StoreFloats(d, value, out + c);
      });
    }
  }
  if (normalized) EndKeySum(a, seq, heads.group, z);
}

void RecurrentStates(const LinearAttentionArgs& a, int splits, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int split = static_cast<int>(i % splits);
    const int head = static_cast<int>(i / splits % a.state_heads);
    const int seq = static_cast<int>(i / splits / a.state_heads);
    const int col0 = a.value_dim * split / splits, col1 = a.value_dim * (split + 1) / splits;
    WithStoredType(a.dtype,
                   [&]<typename T>() { RecurrentState<T>(a, seq, head, col0, col1 - col0); });
  }
}

void ChunkStates(const LinearAttentionArgs& a, int splits, int64_t begin, int64_t end) {
  const int strips = NumStrips(a.value_dim);
  for (int64_t i = begin; i < end; ++i) {
    const int split = static_cast<int>(i % splits);
    const int head = static_cast<int>(i / splits % a.state_heads);
    const int seq = static_cast<int>(i / splits / a.state_heads);
    WithStoredType(a.dtype, [&]<typename T>() {
      ChunkState<T>(a, seq, head, strips * split / splits, strips * (split + 1) / splits);
    });
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(RecurrentStates);
HWY_EXPORT(ChunkStates);

namespace {

void CheckArgs(const LinearAttentionArgs& a) {
  GLA_CHECK(a.num_kv_heads > 0 && a.num_heads % a.num_kv_heads == 0);
  GLA_CHECK(a.state_heads == a.num_kv_heads || a.state_heads == a.num_heads);
  GLA_CHECK((a.gate_kind == GateKind::kNone) == (a.gate == nullptr));
  GLA_CHECK(a.gate_dtype == DType::kFloat32 || a.gate_dtype == a.dtype);
  // One state cannot decay at two rates.
  GLA_CHECK(a.gate_kind != GateKind::kConstant || a.state_heads == a.num_heads);
  GLA_CHECK(a.key_sum_state == nullptr || a.state_heads == a.num_kv_heads);
}

// What one state of an average sequence costs.
double StateNs(const LinearAttentionArgs& a) {
  const double rows = static_cast<double>(a.seqs.num_rows) / std::max(1, a.seqs.num_seqs);
  const double reads = 0.5 * a.num_heads / a.state_heads;
  return rows * (a.key_dim * kExpNs + a.key_dim * a.value_dim * (1 + reads) * kMulAddNs);
}

// Columns are independent; with fewer states than threads they are shared too. (Not the key sum:
// every share would read what another one writes.)
int NumSplits(Device& device, const LinearAttentionArgs& a) {
  const int64_t states = int64_t{a.seqs.num_seqs} * a.state_heads;
  const int64_t wanted = 2 * device.impl().pool.num_threads();
  if (a.key_sum_state != nullptr || states == 0 || states >= wanted) return 1;
  return static_cast<int>(std::clamp<int64_t>(wanted / states, 1, std::max(1, a.value_dim / 64)));
}

}  // namespace

void RecurrentLinearAttention(Device& device, const LinearAttentionArgs& a) {
  CheckArgs(a);
  const int splits = NumSplits(device, a);
  ParallelFor(device, int64_t{a.seqs.num_seqs} * a.state_heads * splits, StateNs(a) / splits,
              [&](int64_t begin, int64_t end) {
                HWY_DYNAMIC_DISPATCH(RecurrentStates)(a, splits, begin, end);
              });
}

void ChunkLinearAttention(Device& device, const LinearAttentionArgs& a) {
  CheckArgs(a);
  GLA_CHECK(a.key_sum_state == nullptr);
  const int splits = NumSplits(device, a);
  ParallelFor(device, int64_t{a.seqs.num_seqs} * a.state_heads * splits, StateNs(a) / splits,
              [&](int64_t begin, int64_t end) {
                HWY_DYNAMIC_DISPATCH(ChunkStates)(a, splits, begin, end);
              });
}

size_t ChunkLinearAttentionBytes(Device&, const LinearAttentionArgs&) { return 0; }

}  // namespace gla
#endif  // HWY_ONCE
