// The recurrence in tiles of 16 tokens, by small matrix products.
//
// Within a tile, with the products of decays D of attention_tile-inl.h:
//   A_ts = sum_k q_t k_s D(s, t)                     s <= t
//   o_t  = sum_s A_ts v_s + (q_t D(0, t)) S
//   S    = D(0, end) S + sum_s (k_s D(s, end))^T v_s
// Tiles are small because here, unlike on a GPU, the state rests in the first-level cache between
// them.

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
  ChunkScratch(int padded_k, int strips, int reps, std::vector<float>& memory)
      : padded_k(padded_k), reps(reps) {
    const size_t k = padded_k, tiles = kTilesPerBlock;
    memory.resize(strips * k * kStrip + tiles * ((reps + 1) * kMaxTile * k + k + reps * kPairs) +
                  2 * kMaxTile * kStrip + TileScratch::Size(padded_k));
    float* next = memory.data();
    const auto take = [&next](size_t n) { return (next += n) - n; };
    state = take(strips * k * kStrip);
    keys = {take(tiles * reps * kMaxTile * k), take(tiles * kMaxTile * k), take(tiles * k),
            take(tiles * reps * kPairs)};
    v = take(kMaxTile * kStrip), o = take(kMaxTile * kStrip);
    scratch = next;
  }
  TileKeys tile(int i) const {
    return {keys.q + i * reps * kMaxTile * padded_k, keys.k + i * kMaxTile * padded_k,
            keys.decay + i * padded_k, keys.scores + i * reps * kPairs};
  }

  int padded_k, reps;
  float* state;   // [strips, padded_k, 32]
  TileKeys keys;  // of the first tile in the block
  float *v, *o;   // [16, 32]
  float* scratch;
};

// One block of tokens, from `row` on.
struct ChunkBlock {
  int64_t row;
  int len;
  int tiles() const { return (len + kMaxTile - 1) / kMaxTile; }
  int64_t tile_row(int tile) const { return row + tile * kMaxTile; }
  int tile_len(int tile) const { return std::min(kMaxTile, len - tile * kMaxTile); }
};

// The columns [col, col + 32) of the block's output, and of the state after it.
template <typename T>
void AdvanceStripByTiles(const LinearAttentionArgs& a, const HeadMap& heads,
                         const ChunkBlock& block, int col, const ChunkScratch& w, float* strip) {
  const int cols = std::min(kStrip, a.value_dim - col);
  for (int i = 0; i < block.tiles(); ++i) {
    const int64_t row = block.tile_row(i);
    const int len = block.tile_len(i);
    const TileKeys keys = w.tile(i);
    LoadTile<kMaxTile>(
        static_cast<const T*>(a.v) + row * a.v_stride + heads.group * a.value_dim + col, a.v_stride,
        len, cols, kStrip, 1.0f, w.v);
    for (int rep = 0; rep < heads.reps; ++rep) {
      ReadStrip<kMaxTile>(len, w.padded_k, keys.q + rep * kMaxTile * w.padded_k, strip, 1,
                          keys.scores + rep * kPairs, kMaxTile, 1, w.v, w.o);
      T* o = static_cast<T*>(a.o) + row * a.o_stride + (heads.first + rep) * a.value_dim + col;
      for (int t = 0; t < len; ++t) Convert(w.o + t * kStrip, o + t * a.o_stride, cols);
    }
    UpdateStrip(len, w.padded_k, a.gate_kind == GateKind::kNone ? nullptr : keys.decay, keys.k, w.v,
                strip);
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
  const TileInputs inputs{a.q, a.k, a.q_stride, a.k_stride, K, a.scale, GateView(a)};
  const TileScratch scratch(w.scratch, padded_k);
  const int64_t end = a.seqs.cu_seqlens[seq + 1];
  constexpr int kBlock = kTilesPerBlock * kMaxTile;
  for (int64_t row = a.seqs.cu_seqlens[seq]; row < end; row += kBlock) {
    const ChunkBlock block{row, static_cast<int>(std::min<int64_t>(kBlock, end - row))};
    for (int i = 0; i < block.tiles(); ++i) {
      PrepareTile<kMaxTile, T>(inputs, heads, block.tile_row(i), block.tile_len(i), scratch,
                               w.tile(i));
    }
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
