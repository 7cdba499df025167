// The recurrence in tiles of 16 tokens, by small matrix products.
//
// Within a tile, with D(s, t) the product of the decays of the tokens after s up to t, and D(0, t),
// D(s, end) those from the tile's start and to its end:
//   A_ts = sum_k q_t k_s D(s, t)                     s <= t
//   o_t  = sum_s A_ts v_s + (q_t D(0, t)) S
//   S    = D(0, end) S + sum_s (k_s D(s, end))^T v_s
// Products of decays are at most 1, so nothing is ever divided by a decay. Tiles are small because
// here, unlike on a GPU, the state rests in the first-level cache between them.

// The usual guard, once per instruction set.
#if defined(GLA_KERNELS_CPU_ATTENTION_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GLA_KERNELS_CPU_ATTENTION_CHUNK_INL_H_
#undef GLA_KERNELS_CPU_ATTENTION_CHUNK_INL_H_
#else
#define GLA_KERNELS_CPU_ATTENTION_CHUNK_INL_H_
#endif

#include <algorithm>
#include <vector>

#include "kernels/cpu/attention_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

// Tiles whose keys are made ready together; then each strip of columns goes through all of them.
constexpr int kTilesPerBlock = 4;

// The arrays of one state, or of some of its columns.
struct ChunkScratch {
  ChunkScratch(int padded_k, int strips, int reps, std::vector<float>& memory) {
    const size_t keys = static_cast<size_t>(kMaxTile) * padded_k, pairs = kMaxTile * kMaxTile,
                 rows = kMaxTile * kStrip;
    memory.resize(static_cast<size_t>(strips) * padded_k * kStrip +
                  kTilesPerBlock * (reps + 1) * keys + kTilesPerBlock * padded_k +
                  kTilesPerBlock * reps * pairs + pairs + 3 * keys + 2 * rows);
    float* next = memory.data();
    const auto take = [&next](size_t n) { return (next += n) - n; };
    state = take(static_cast<size_t>(strips) * padded_k * kStrip);
    q = take(kTilesPerBlock * reps * keys), k = take(kTilesPerBlock * keys);
    tile_decay = take(kTilesPerBlock * static_cast<size_t>(padded_k));
    scores = take(kTilesPerBlock * reps * pairs), pair_decays = take(pairs);
    decay = take(keys), transposed_k = take(keys), raw_q = take(keys);
    v = take(rows), o = take(rows);
  }

  float* state;       // [strips, padded_k, 32]
  float* q;           // [4, reps, 16, padded_k]: scale q_t D(0, t)
  float* k;           // [4, 16, padded_k]: k_s D(s, end)
  float* tile_decay;  // [4, padded_k]: D(0, end)
  float* scores;      // [4, reps, 16, 16]: A
  float* pair_decays;
  float *decay, *transposed_k, *raw_q;
  float *v, *o;  // [16, 32]
};

// One block of tokens, from `row` on.
struct ChunkBlock {
  int64_t row;
  int len;
  int tiles() const { return (len + kMaxTile - 1) / kMaxTile; }
  int64_t tile_row(int tile) const { return row + tile * kMaxTile; }
  int tile_len(int tile) const { return std::min(kMaxTile, len - tile * kMaxTile); }
};

template <typename T>
void PrepareBlock(const LinearAttentionArgs& a, const HeadMap& heads, const ChunkBlock& block,
                  ChunkScratch& w) {
  const GateView gate(a);
  const int K = a.key_dim, padded_k = PaddedKeys(K), keys = kMaxTile * padded_k;
  const bool gated = gate.kind != GateKind::kNone, per_key = gate.kind == GateKind::kPerKey;
  for (int tile = 0; tile < block.tiles(); ++tile) {
    const int64_t row = block.tile_row(tile);
    const int len = block.tile_len(tile);
    float* k = w.k + tile * keys;
    LoadTile(static_cast<const T*>(a.k) + row * a.k_stride + heads.group * K, a.k_stride, len, K,
             padded_k, 1.0f, k);
    if (gated) LoadDecays(gate, row, len, heads, K, w.decay);
    if (!per_key) PairDecays(gated ? w.decay : nullptr, len, padded_k, w.pair_decays);
    for (int rep = 0; rep < heads.reps; ++rep) {
      float* q = w.q + (tile * heads.reps + rep) * keys;
      float* scores = w.scores + (tile * heads.reps + rep) * kMaxTile * kMaxTile;
      LoadTile(static_cast<const T*>(a.q) + row * a.q_stride + (heads.first + rep) * K, a.q_stride,
               len, K, padded_k, a.scale, q);
      if (per_key) {
        PerKeyScores(q, k, w.decay, len, padded_k, scores);
      } else {
        SharedDecayScores(q, k, w.pair_decays, padded_k, w.transposed_k, scores);
      }
      if (gated) DampFromStart(w.decay, len, padded_k, q, w.tile_decay + tile * padded_k);
    }
    if (gated) DampToEnd(w.decay, len, padded_k, k);
  }
}

// The columns [col, col + 32) of the block's output, and of the state after it.
template <typename T>
void AdvanceStripByTiles(const LinearAttentionArgs& a, const HeadMap& heads,
                         const ChunkBlock& block, int col, ChunkScratch& w, float* strip) {
  const int padded_k = PaddedKeys(a.key_dim), keys = kMaxTile * padded_k;
  const int cols = std::min(kStrip, a.value_dim - col);
  for (int tile = 0; tile < block.tiles(); ++tile) {
    const int64_t row = block.tile_row(tile);
    const int len = block.tile_len(tile);
    LoadTile(static_cast<const T*>(a.v) + row * a.v_stride + heads.group * a.value_dim + col,
             a.v_stride, len, cols, kStrip, 1.0f, w.v);
    for (int rep = 0; rep < heads.reps; ++rep) {
      const int at = tile * heads.reps + rep;
      ReadStrip(len, padded_k, w.q + at * keys, strip, w.scores + at * kMaxTile * kMaxTile,
                kMaxTile, 1, w.v, w.o);
      T* o = static_cast<T*>(a.o) + row * a.o_stride + (heads.first + rep) * a.value_dim + col;
      for (int t = 0; t < len; ++t) Convert(w.o + t * kStrip, o + t * a.o_stride, cols);
    }
    UpdateStrip(len, padded_k,
                a.gate_kind == GateKind::kNone ? nullptr : w.tile_decay + tile * padded_k,
                w.k + tile * keys, w.v, strip);
  }
}

// Strips [first_strip, last_strip) of one state of one sequence.
template <typename T>
void ChunkState(const LinearAttentionArgs& a, int seq, int state_head, int first_strip,
                int last_strip) {
  const HeadMap heads(a, state_head);
  const int K = a.key_dim, V = a.value_dim, padded_k = PaddedKeys(K);
  const int64_t offset = static_cast<int64_t>(state_head) * K * V;
  const int32_t read = a.seqs.read_slots[seq], write = a.seqs.write_slots[seq];
  thread_local std::vector<float> memory;
  ChunkScratch w(padded_k, last_strip - first_strip, heads.reps, memory);
  const auto strip_at = [&](int strip) {
    return w.state + static_cast<int64_t>(strip - first_strip) * padded_k * kStrip;
  };
  for (int strip = first_strip; strip < last_strip; ++strip) {
    LoadStateStrip(read < 0 ? nullptr : a.state + read * a.state_stride + offset, K, V,
                   strip * kStrip, strip_at(strip));
  }
  const int64_t end = a.seqs.cu_seqlens[seq + 1];
  constexpr int kBlock = kTilesPerBlock * kMaxTile;
  for (int64_t row = a.seqs.cu_seqlens[seq]; row < end; row += kBlock) {
    const ChunkBlock block{row, static_cast<int>(std::min<int64_t>(kBlock, end - row))};
    PrepareBlock<T>(a, heads, block, w);
    for (int strip = first_strip; strip < last_strip; ++strip) {
      AdvanceStripByTiles<T>(a, heads, block, strip * kStrip, w, strip_at(strip));
    }
  }
  if (write < 0) return;
  for (int strip = first_strip; strip < last_strip; ++strip) {
    StoreStateStrip(strip_at(strip), K, V, strip * kStrip,
                    a.state + write * a.state_stride + offset);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#endif  // GLA_KERNELS_CPU_ATTENTION_CHUNK_INL_H_
