// The recurrence in tiles of 64 tokens, sub-blocks of 16, in the form that never exponentiates a
// positive number (kernels/README.md, "Chunkwise form").
//
// Within a tile: L_t is the sum of gates from the start of t's sub-block to t; E_b = exp(L of the
// last row of sub-block b). Then with qh_t = q_t exp(L_t) and kh_s = k_s exp(L_end - L_s), both
// damped:
//   A_ts = qh_t . (prod of E between the sub-blocks) kh_s    s in an earlier sub-block
//   A_ts = sum_k q_t k_s exp(L_t - L_s)                      s in the same one, exact pairs
//   o_t  = sum_s A_ts v_s + (qh_t prod of E before t's) S
//   S    = (prod of all E) S + sum_s (kh_s prod of E after s's)^T v_s

// The usual guard, once per instruction set.
#if defined(GLA_KERNELS_CPU_ATTENTION_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GLA_KERNELS_CPU_ATTENTION_CHUNK_INL_H_
#undef GLA_KERNELS_CPU_ATTENTION_CHUNK_INL_H_
#else
#define GLA_KERNELS_CPU_ATTENTION_CHUNK_INL_H_
#endif

#include <algorithm>
#include <vector>

#include "kernels/cpu/attention_common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

constexpr int kTile = 64, kSub = 16, kSubs = kTile / kSub;

template <typename T>
HWY_INLINE void LoadScaled(const T* from, float scale, float* to, size_t n) {
  ForVectors(n, [=](auto d, size_t i) HWY_ATTR {
    hn::StoreU(hn::Mul(LoadFloats(d, from + i), hn::Set(d, scale)), d, to + i);
  });
}

// y *= x
HWY_INLINE void Multiply(const float* x, float* y, size_t n) {
  ForVectors(n, [=](auto d, size_t i) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, y + i);
  });
}

// y = x exp(a - b), a <= b; b null: 0
HWY_INLINE void Damp(const float* x, const float* a, const float* b, float* y, size_t n) {
  ForVectors(n, [=](auto d, size_t i) HWY_ATTR {
    auto exponent = hn::LoadU(d, a + i);
    if (b != nullptr) exponent = hn::Sub(exponent, hn::LoadU(d, b + i));
    hn::StoreU(hn::Mul(hn::LoadU(d, x + i), ExpOfNegative(d, exponent)), d, y + i);
  });
}

// sum_k q k exp(a - b), a <= b
HWY_INLINE float DampedDot(const float* q, const float* k, const float* a, const float* b,
                           size_t n) {
  return SumVectors(n, [=](auto d, size_t i) HWY_ATTR {
    const auto decay = ExpOfNegative(d, hn::Sub(hn::LoadU(d, a + i), hn::LoadU(d, b + i)));
    return hn::Mul(hn::Mul(hn::LoadU(d, q + i), hn::LoadU(d, k + i)), decay);
  });
}

// The arrays of one tile; K-vectors one after another.
struct ChunkScratch {
  ChunkScratch(int K, int V, std::vector<float>& memory) {
    const size_t k_tile = static_cast<size_t>(kTile) * K;
    memory.resize(5 * k_tile + (kSubs + 1) * K + static_cast<size_t>(kTile + 1 + K) * V);
    float* next = memory.data();
    const auto take = [&next](size_t n) { return (next += n) - n; };
    q = take(k_tile), k = take(k_tile), q_damped = take(k_tile), k_damped = take(k_tile);
    local = take(k_tile), sub_decay = take(static_cast<size_t>(kSubs) * K), factor = take(K);
    v = take(static_cast<size_t>(kTile) * V), o = take(V);
    dropped_state = take(static_cast<size_t>(K) * V);
  }

  float *q, *k;                // [64, K]
  float *q_damped, *k_damped;  // [64, K]: qh, kh
  float* local;                // [64, K]: L
  float* sub_decay;            // [4, K]: E
  float* factor;               // [K]
  float *v, *o;                // [64, V], [V]
  float* dropped_state;        // [K, V]
  float scores[kTile];         // one row of A
};

// L of `len` rows from `row0` on, and E of their sub-blocks.
inline void SumGates(const LinearAttentionArgs& a, int64_t row0, int len, const HeadMap& heads,
                     ChunkScratch& w) {
  const int K = a.key_dim;
  for (int t = 0; t < len; ++t) {
    float* sum = w.local + t * K;
    LoadGates(a, row0 + t, heads, sum);
    for (int i = 0; i < K; ++i) {
      // exp(-104) is 0 in float32: a stronger gate does the same, and would only take precision
      // away from the sums of the tokens after it.
      sum[i] = std::max(sum[i], -104.0f) + (t % kSub == 0 ? 0.0f : sum[i - K]);
    }
  }
  std::fill_n(w.sub_decay, kSubs * K, 1.0f);
  for (int b = 0; b * kSub < len; ++b) {
    const int last = std::min(len, (b + 1) * kSub) - 1;
    Damp(w.sub_decay + b * K, w.local + last * K, nullptr, w.sub_decay + b * K, K);
  }
}

// o of the tile's row `t` into w.o, without changing the state.
inline void ChunkOutput(const LinearAttentionArgs& a, int t, bool gated, const StateView& state,
                        ChunkScratch& w) {
  const int K = a.key_dim, V = a.value_dim, sub = t / kSub;
  const float* q = w.q + t * K;
  for (int s = sub * kSub; s <= t; ++s) {
    w.scores[s] = gated ? DampedDot(q, w.k + s * K, w.local + t * K, w.local + s * K, K)
                        : Dot(q, w.k + s * K, K);
  }
  float* read = w.factor;  // q as it meets the sub-block in work, damped further on the way back
  std::copy_n(gated ? w.q_damped + t * K : q, K, read);
  const float* keys = gated ? w.k_damped : w.k;
  for (int b = sub - 1; b >= 0; --b) {
    for (int s = b * kSub; s < (b + 1) * kSub; ++s) w.scores[s] = Dot(read, keys + s * K, K);
    if (gated) Multiply(w.sub_decay + b * K, read, K);
  }
  std::fill_n(w.o, V, 0.0f);
  for (int i = 0; i < K; ++i) AddScaled(read[i], state.data + i * state.stride, w.o, V);
  for (int s = 0; s <= t; ++s) AddScaled(w.scores[s], w.v + s * V, w.o, V);
}

// The state after the tile's `len` rows.
inline void ChunkAdvance(const LinearAttentionArgs& a, int len, bool gated, const StateView& state,
                         ChunkScratch& w) {
  const int K = a.key_dim, V = a.value_dim;
  const float* keys = w.k;
  if (gated) {
    keys = w.k_damped;
    float* after = w.factor;
    std::fill_n(after, K, 1.0f);
    for (int b = (len - 1) / kSub; b >= 0; --b) {
      for (int s = b * kSub; s < std::min(len, (b + 1) * kSub); ++s) {
        Multiply(after, w.k_damped + s * K, K);
      }
      Multiply(w.sub_decay + b * K, after, K);
    }
    for (int i = 0; i < K; ++i) {
      float* row = state.data + i * state.stride;
      const float decay = after[i];
      ForVectors(V, [=](auto d, size_t c) HWY_ATTR {
        hn::StoreU(hn::Mul(hn::LoadU(d, row + c), hn::Set(d, decay)), d, row + c);
      });
    }
  }
  for (int i = 0; i < K; ++i) {
    for (int s = 0; s < len; ++s) {
      AddScaled(keys[s * K + i], w.v + s * V, state.data + i * state.stride, V);
    }
  }
}

template <typename T>
void ChunkState(const LinearAttentionArgs& a, int seq, int state_head) {
  const HeadMap heads(a, state_head);
  const int K = a.key_dim, V = a.value_dim;
  const bool gated = a.gate_kind != GateKind::kNone;
  thread_local std::vector<float> memory;
  ChunkScratch w(K, V, memory);
  const StateView state(a, seq, state_head, 0, V, w.dropped_state);
  state.Begin();
  const int64_t end = a.seqs.cu_seqlens[seq + 1];
  for (int64_t t0 = a.seqs.cu_seqlens[seq]; t0 < end; t0 += kTile) {
    const int len = static_cast<int>(std::min<int64_t>(kTile, end - t0));
    if (gated) SumGates(a, t0, len, heads, w);
    for (int t = 0; t < len; ++t) {
      const int64_t row = t0 + t;
      Convert(static_cast<const T*>(a.k) + row * a.k_stride + heads.group * K, w.k + t * K, K);
      Convert(static_cast<const T*>(a.v) + row * a.v_stride + heads.group * V, w.v + t * V, V);
      const int last = std::min(len, (t / kSub + 1) * kSub) - 1;
      if (gated) Damp(w.k + t * K, w.local + last * K, w.local + t * K, w.k_damped + t * K, K);
    }
    for (int rep = 0; rep < heads.reps; ++rep) {
      const int head = heads.first + rep;
      for (int t = 0; t < len; ++t) {
        const int64_t row = t0 + t;
        LoadScaled(static_cast<const T*>(a.q) + row * a.q_stride + head * K, a.scale, w.q + t * K,
                   K);
        if (gated) Damp(w.q + t * K, w.local + t * K, nullptr, w.q_damped + t * K, K);
        ChunkOutput(a, t, gated, state, w);
        Convert(w.o, static_cast<T*>(a.o) + row * a.o_stride + head * V, V);
      }
    }
    ChunkAdvance(a, len, gated, state, w);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#endif  // GLA_KERNELS_CPU_ATTENTION_CHUNK_INL_H_
