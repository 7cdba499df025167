// Prepare and Chain of attention_tensor.cuh.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attention_tensor.cuh"

namespace gla {
namespace {

// ---- Where tiles and segments begin -------------------------------------------------------------

constexpr int kBeginsThreads = 1024;  // at most

__global__ void __launch_bounds__(kBeginsThreads) BeginsKernel(const TensorProblem p) {
  __shared__ int sums[2][kBeginsThreads];
  __shared__ int carry[2];
  WaitForPrevious();
  AllowNext();
  const int id = threadIdx.x, threads = blockDim.x;
  if (id < 2) carry[id] = 0;
  for (int first = 0; first < p.num_seqs; first += threads) {
    const int n = first + id;
    int tiles = 0, segments = 0;
    if (n < p.num_seqs) {
      tiles = CeilDiv(p.cu_seqlens[n + 1] - p.cu_seqlens[n], kTileTokens);
      segments = max(1, CeilDiv(tiles, p.SegmentTiles(tiles)));
    }
    sums[0][id] = tiles, sums[1][id] = segments;
    __syncthreads();
    for (int step = 1; step < threads; step *= 2) {
      const int a = id >= step ? sums[0][id - step] : 0, b = id >= step ? sums[1][id - step] : 0;
      __syncthreads();
      sums[0][id] += a, sums[1][id] += b;
      __syncthreads();
    }
    if (n < p.num_seqs) {
      p.tile_begin[n + 1] = carry[0] + sums[0][id];
      p.segment_begin[n + 1] = carry[1] + sums[1][id];
    }
    __syncthreads();
    if (id < 2) carry[id] += sums[id][threads - 1];
    __syncthreads();
  }
  if (id == 0) p.tile_begin[0] = p.segment_begin[0] = 0;
}

// ---- Prepare ------------------------------------------------------------------------------------

// Per key: a thread has 16 tokens (a block of A) of two neighbouring keys. With L_t the sum of
// gates from the block's start to t, e the last of them and m the middle between the first and the
// last, everything is made from two powers per element:
//   qd_t = q_t 2^(L_t - m)    kd_s = k_s 2^(m - L_s)
// A's diagonal blocks are qd kd; q~, k~ and the other blocks take a factor <= 1 per block and key:
//   A_bc = (qd_b W_bc) kd_c    W_bc = 2^m_b 2^(gates between b and c) 2^(e_c - m_c)
// A product below 2^-126 may come out as 0, at most 2^-26 of what is added to it. Where a block's
// gates span more than kLargestSpan, its q refer to its start and its k to its end, and its
// diagonal block is summed pair by pair.
template <int K>
struct KeyPrepareShared {
  static constexpr int kPitch = K + 8;
  static constexpr int kThreads = 2 * K;
  static constexpr int kParts = K / 64;  // of the sum over keys
  bf16 q[kTileTokens][kPitch];
  bf16 k[kTileTokens][kPitch];
  float first[4][K], last[4][K];  // L of a block's first and last token
  float weights[6][K];            // W of (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)
  int is_wide[kThreads / 32];     // by warp

  // In the place of q and k, one after the other: parts of A by warp and lane; where a block is
  // wide, G; all of A.
  __device__ float (*parts())[32][33] { return reinterpret_cast<float(*)[32][33]>(q); }
  __device__ float (*sums())[K] { return reinterpret_cast<float(*)[K]>(q); }
  __device__ char* scores() { return reinterpret_cast<char*>(q); }
  static_assert(2 * sizeof(bf16[kTileTokens][kPitch]) >= sizeof(float[4 * kParts - 4 + 1][32][33]));
  static_assert(2 * sizeof(bf16[kTileTokens][kPitch]) >= sizeof(float[kTileTokens][K]));
};

// Log2 decays of two neighbouring keys, summed along 16 tokens of which `tokens` are there.
template <typename T>
__device__ void SumGatePairs(const T* from, int64_t stride, int tokens, float2 (&sums)[16]) {
  using Pair = std::conditional_t<sizeof(T) == 4, float2, uint32_t>;
  Pair pairs[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    pairs[i] = Pair{};
    if (i < tokens) pairs[i] = *reinterpret_cast<const Pair*>(from);
    from += stride;
  }
  float2 sum = {0, 0};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float2 g;
    if constexpr (sizeof(T) == 4) {
      g = pairs[i];
    } else {
      g = UnpackBf16(pairs[i]);
    }
    sum.x += BoundedGate(g.x), sum.y += BoundedGate(g.y);
    sums[i] = sum;
  }
}

template <int K>
__global__ void __launch_bounds__(2 * K, K == 256 ? 1 : 256 / K)
    PrepareKeyKernel(const TensorProblem p) {
  extern __shared__ __align__(16) char raw_shared[];
  using Shared = KeyPrepareShared<K>;
  auto& shared = *reinterpret_cast<Shared*>(raw_shared);
  WaitForPrevious();
  AllowNext();
  TilePlace at;
  if (!at.Find(p, blockIdx.x)) return;
  const int id = threadIdx.x, warp = id / 32, lane = id % 32;
  const int c = id % (K / 2) * 2, own = id / (K / 2);  // keys and block
  const int tokens = at.tokens - 16 * own;
  const int64_t row0 = at.row0 + 16 * own, column = int64_t{at.head} * K + c;
  uint32_t q[16], k[16];
  const bf16* from_q = p.q + row0 * p.q_stride + column;
  const bf16* from_k = p.k + row0 * p.k_stride + column;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    q[i] = k[i] = 0;
    if (i < tokens) {
      q[i] = *reinterpret_cast<const uint32_t*>(from_q);
      k[i] = *reinterpret_cast<const uint32_t*>(from_k);
    }
    from_q += p.q_stride, from_k += p.k_stride;
  }
  float2 sums[16];  // L
  const int64_t from = row0 * p.gate_stride + column;
  if (p.gate_dtype == DType::kFloat32) {
    SumGatePairs(static_cast<const float*>(p.gate) + from, p.gate_stride, tokens, sums);
  } else {
    SumGatePairs(static_cast<const bf16*>(p.gate) + from, p.gate_stride, tokens, sums);
  }
  const float2 first = sums[0], last = sums[15];
  *reinterpret_cast<float2*>(&shared.first[own][c]) = first;
  *reinterpret_cast<float2*>(&shared.last[own][c]) = last;
  const bool spans = first.x - last.x > kLargestSpan || first.y - last.y > kLargestSpan;
  const int any_spans = __any_sync(0xFFFFFFFFu, spans);
  if (lane == 0) shared.is_wide[warp] = any_spans;
  __syncthreads();

  constexpr int kWarps = K / 64;  // to a block
  const auto is_wide = [&](int block) {
    int any = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) any |= shared.is_wide[block * kWarps + i];
    return any != 0;
  };
  const auto last_of = [&](int block) {
    return *reinterpret_cast<const float2*>(&shared.last[block][c]);
  };
  // what a block's k refer to
  const auto reference = [&](float2 first, float2 last, bool wide) {
    return wide ? last : float2{0.5f * (first.x + last.x), 0.5f * (first.y + last.y)};
  };
  const bool wide = is_wide(own);
  const float2 k_ref = reference(first, last, wide), q_ref = wide ? float2{0, 0} : k_ref;
  float2 before = {0, 0}, after = {0, 0};  // gates of the blocks before and after
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = last_of(i);
    if (i < own) before.x += x.x, before.y += x.y;
    if (i > own) after.x += x.x, after.y += x.y;
  }
  {
    float2 between = q_ref;
#pragma unroll
    for (int i = 2; i >= 0; --i) {
      if (i >= own) continue;
      const float2 e = last_of(i), f = *reinterpret_cast<const float2*>(&shared.first[i][c]);
      const float2 ref = reference(f, e, is_wide(i));
      const float2 weight = Exp2(float2{between.x + (e.x - ref.x), between.y + (e.y - ref.y)});
      *reinterpret_cast<float2*>(&shared.weights[own * (own - 1) / 2 + i][c]) = weight;
      between.x += e.x, between.y += e.y;
    }
  }
  if (own == 3) {
    *reinterpret_cast<float2*>(p.decays + at.index * K + c) =
        Exp2(float2{before.x + last.x, before.y + last.y});
  }
  float2 to_queries = Exp2(float2{before.x + q_ref.x, before.y + q_ref.y});
  to_queries.x *= p.scale, to_queries.y *= p.scale;
  const float2 to_keys = Exp2(float2{(last.x - k_ref.x) + after.x, (last.y - k_ref.y) + after.y});
  // a warp writes whole rows of 128 bytes
  const int64_t image = (at.index * (K / 64) + c / 64) * kTileBytes + 16 * own * kTileRowBytes;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 l = sums[i];
    const float2 qd = Product(UnpackBf16(q[i]), Exp2(float2{l.x - q_ref.x, l.y - q_ref.y}));
    const float2 kd = Product(UnpackBf16(k[i]), Exp2(float2{k_ref.x - l.x, k_ref.y - l.y}));
    *reinterpret_cast<uint32_t*>(&shared.q[16 * own + i][c]) = PackBf16(qd);
    *reinterpret_cast<uint32_t*>(&shared.k[16 * own + i][c]) = PackBf16(kd);
    const int64_t to = image + TileElement(i, c % 64);
    *reinterpret_cast<uint32_t*>(p.queries + to) = PackBf16(Product(qd, to_queries));
    *reinterpret_cast<uint32_t*>(p.keys + to) = PackBf16(Product(kd, to_keys));
  }
  __syncthreads();

  // A: a warp to a block of rows and a part of the keys
  const int b = warp % 4, part = warp / 4, g = lane / 4, c0 = lane % 4 * 2, t0 = 16 * b;
  float a[4][2][4] = {};  // [block][8 columns][element]
#pragma unroll 1
  for (int step = 4 * part; step < 4 * part + 4; ++step) {
    const int column = 16 * step + c0;
    const auto pair = [&](const bf16(*x)[K + 8], int row, int to_right) {
      return *reinterpret_cast<const uint32_t*>(&x[row][column + to_right]);
    };
    const uint32_t x[4] = {pair(shared.q, t0 + g, 0), pair(shared.q, t0 + g + 8, 0),
                           pair(shared.q, t0 + g, 8), pair(shared.q, t0 + g + 8, 8)};
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      if (block > b) continue;
      uint32_t weighted[4] = {x[0], x[1], x[2], x[3]};
      if (block < b) {
        const float* const weights = &shared.weights[b * (b - 1) / 2 + block][column];
        const float2 w[2] = {*reinterpret_cast<const float2*>(weights),
                             *reinterpret_cast<const float2*>(weights + 8)};
#pragma unroll
        for (int i = 0; i < 4; ++i) weighted[i] = PackBf16(Product(UnpackBf16(x[i]), w[i / 2]));
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = 16 * block + 8 * n + g;
        const uint32_t y[2] = {pair(shared.k, row, 0), pair(shared.k, row, 8)};
        Mma16x8x16(a[block][n], weighted, y);
      }
    }
  }
  __syncthreads();  // q and k give their place
  if (part > 0) {
    float(&exchange)[33] = shared.parts()[4 * part - 4 + b][lane];
#pragma unroll
    for (int i = 0; i < 32; ++i) exchange[i] = a[i / 8][i / 4 % 2][i % 4];
  }
  __syncthreads();
  if (part == 0) {
#pragma unroll
    for (int other = 1; other < Shared::kParts; ++other) {
      const float(&exchange)[33] = shared.parts()[4 * other - 4 + b][lane];
#pragma unroll
      for (int i = 0; i < 32; ++i) a[i / 8][i / 4 % 2][i % 4] += exchange[i];
    }
  }
  __syncthreads();
  if (is_wide(0) || is_wide(1) || is_wide(2) || is_wide(3)) {
    float2 sum = {0, 0};
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      if (i < tokens) {
        const int64_t from = (row0 + i) * p.gate_stride + column;
        sum.x += BoundedGate(p.Gate(from)), sum.y += BoundedGate(p.Gate(from + 1));
      }
      *reinterpret_cast<float2*>(&shared.sums()[16 * own + i][c]) = sum;
    }
    __syncthreads();
    if (part == 0 && is_wide(b)) {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {
        const int t = t0 + g + (i & 2 ? 8 : 0), s = t0 + 8 * (i / 4) + c0 + (i & 1);
        float sum = 0;
        if (s <= t && t < at.tokens) {
          const bf16* const from_q = p.q + (at.row0 + t) * p.q_stride + int64_t{at.head} * K;
          const bf16* const from_k = p.k + (at.row0 + s) * p.k_stride + int64_t{at.head} * K;
          for (int j = 0; j < K; ++j) {
            sum += ToFloat(from_q[j]) * ToFloat(from_k[j]) *
                   Exp2(shared.sums()[t][j] - shared.sums()[s][j]);
          }
        }
#pragma unroll
        for (int j = 0; j < 32; ++j) {  // registers want constant indices
          if (j == b * 8 + i) a[j / 8][j / 4 % 2][j % 4] = sum;
        }
      }
    }
    __syncthreads();
  }
  if (part == 0) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int block = i / 8, n = i / 4 % 2, e = i % 4;
      const int t = t0 + g + (e & 2 ? 8 : 0), s = 16 * block + 8 * n + c0;
      // above the diagonal there may be anything, infinity too
      const float low = s <= t ? p.scale * a[block][n][e] : 0;
      const float high = s + 1 <= t ? p.scale * a[block][n][e + 1] : 0;
      *reinterpret_cast<uint32_t*>(shared.scores() + TileElement(t, s)) = PackBf16(low, high);
    }
  }
  __syncthreads();
  for (int i = id * 16; i < kTileBytes; i += Shared::kThreads * 16) {
    *reinterpret_cast<uint4*>(p.scores + at.index * kTileBytes + i) =
        *reinterpret_cast<const uint4*>(shared.scores() + i);
  }
}

constexpr int kPrepareThreads = 256;  // one decay per step

template <int K>
constexpr size_t StepPrepareBytes() {
  return 1024 + 2 * (K / 64) * kTileBytes + kTileBytes + kTileTokens * sizeof(float);
}

// One decay per step: A = scale (q k^T) 2^(G_t - G_s), by one product.
template <int K>
__global__ void __launch_bounds__(kPrepareThreads) PrepareStepKernel(const TensorProblem p) {
  extern __shared__ __align__(16) char raw_shared[];
  constexpr int kTiles = K / 64;
  char* const q = AlignedShared(raw_shared);
  char* const k = q + kTiles * kTileBytes;
  char* const scores = k + kTiles * kTileBytes;
  float* const sums = reinterpret_cast<float*>(scores + kTileBytes);
  WaitForPrevious();
  AllowNext();
  TilePlace at;
  if (!at.Find(p, blockIdx.x)) return;
  const int id = threadIdx.x;

  for (int i = 0; i < kTiles; ++i) {
    const int64_t column = int64_t{at.head} * K + 64 * i;
    CopyTile<kPrepareThreads>(q + i * kTileBytes, p.q + at.row0 * p.q_stride + column, p.q_stride,
                              at.tokens, id);
    CopyTile<kPrepareThreads>(k + i * kTileBytes, p.k + at.row0 * p.k_stride + column, p.k_stride,
                              at.tokens, id);
  }
  CommitCopies();
  SumStepGates(p, at, sums);
  if (id < K) p.decays[at.index * K + id] = Exp2(sums[kTileTokens - 1]);
  WaitCopies<0>();
  FenceShared();
  __syncthreads();

  if (id < 128) {
    float a[32];
    BeginProducts();
#pragma unroll
    for (int i = 0; i < K / 16; ++i) {
      Wgmma<64, kAlongColumns, kAlongColumns>(
          a, TileOperand<kAlongColumns>(q + i / 4 * kTileBytes, i % 4),
          TileOperand<kAlongColumns>(k + i / 4 * kTileBytes, i % 4), i > 0);
    }
    CommitProducts();
    WaitProducts<0>();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int t = SumRow(e), s = SumColumn(j, e);
        const float low = s <= t ? p.scale * Exp2(sums[t] - sums[s]) * a[4 * j + e] : 0;
        const float high =
            s + 1 <= t ? p.scale * Exp2(sums[t] - sums[s + 1]) * a[4 * j + e + 1] : 0;
        *reinterpret_cast<uint32_t*>(scores + TileElement(t, s)) = PackBf16(low, high);
      }
    }
  }
  // q~ and k~, piece by piece where they lie in the tile
  const int64_t image = at.index * kTiles * kTileBytes;
  for (int i = id; i < kTiles * kTileTokens * 8; i += kPrepareThreads) {
    const float g = sums[i / 8 % kTileTokens];
    const float fq = p.scale * Exp2(g), fk = Exp2(sums[kTileTokens - 1] - g);
    const float all_q[8] = {fq, fq, fq, fq, fq, fq, fq, fq};
    const float all_k[8] = {fk, fk, fk, fk, fk, fk, fk, fk};
    *reinterpret_cast<uint4*>(p.queries + image + i * 16) =
        Scaled(*reinterpret_cast<const uint4*>(q + i * 16), all_q);
    *reinterpret_cast<uint4*>(p.keys + image + i * 16) =
        Scaled(*reinterpret_cast<const uint4*>(k + i * 16), all_k);
  }
  __syncthreads();
  for (int i = id * 16; i < kTileBytes; i += kPrepareThreads * 16) {
    *reinterpret_cast<uint4*>(p.scores + at.index * kTileBytes + i) =
        *reinterpret_cast<const uint4*>(scores + i);
  }
}

// ---- Chain --------------------------------------------------------------------------------------

template <int K>
struct ChainShape {
  static constexpr int kGroups = K / 64;  // of four warps, 64 rows of the state each
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kStages = 3;
  static constexpr int kStageBytes = K * kTileRowBytes + kTileBytes + 1024;  // keys, values, D
  static constexpr size_t kBytes = 1024 + kStages * kStageBytes + K * kTileRowBytes;
};

// A block to a (segment, head, 64 columns of V): S [K, 64] in registers. With kEnds, from zero and
// without the tiles' states: the segment's own contribution, and its decay.
template <int K, bool kEnds>
__global__ void __launch_bounds__(ChainShape<K>::kThreads)
    ChainKernel(const TensorProblem p, const Chains chains) {
  using Shape = ChainShape<K>;
  WaitForPrevious();
  AllowNext();
  const ChainArgs& args = chains.of[blockIdx.x % chains.count];
  const int block = blockIdx.x / chains.count;
  extern __shared__ __align__(16) char raw_shared[];
  char* const stages = AlignedShared(raw_shared);
  char* const staging = stages + Shape::kStages * Shape::kStageBytes;
  const int id = threadIdx.x, group = id / 128;
  const int value_tiles = p.value_dim / 64, value_tile = block % value_tiles;
  const int head = block / value_tiles % p.heads;
  const int segment = block / value_tiles / p.heads;
  const int seq = FindSequence(p.segment_begin, p.num_seqs, segment);
  if (seq < 0) return;
  const int first_tile = p.tile_begin[seq], num_tiles = p.tile_begin[seq + 1] - first_tile;
  const int place = segment - p.segment_begin[seq];
  const bool is_last = segment + 1 == p.segment_begin[seq + 1];
  if (kEnds && is_last) return;
  const int each = p.SegmentTiles(num_tiles);
  const int begin = place * each, end = min(num_tiles, begin + each);
  const int64_t row_begin = p.cu_seqlens[seq];
  const int length = p.cu_seqlens[seq + 1] - static_cast<int>(row_begin);
  const int64_t segment_head = int64_t{segment} * p.heads + head;
  const int row = 64 * group + SumRow(0);  // and row + 8

  const auto tile_of = [&](int i) { return args.backwards ? num_tiles - 1 - i : i; };
  const auto load = [&](int i) {
    if (i < end) {
      char* const stage = stages + i % Shape::kStages * Shape::kStageBytes;
      const int tile = tile_of(i);
      const int64_t index = int64_t{first_tile + tile} * p.heads + head;
      CopyLinear<K * kTileRowBytes, Shape::kThreads>(stage, args.keys + index * K * kTileRowBytes,
                                                     id);
      const bf16* values = args.values +
                           (row_begin + int64_t{kTileTokens} * tile) * args.value_stride +
                           int64_t{head} * p.value_dim + 64 * value_tile;
      CopyTile<Shape::kThreads>(stage + K * kTileRowBytes, values, args.value_stride,
                                min(kTileTokens, length - kTileTokens * tile), id);
      CopyLinear<K * 4, Shape::kThreads>(stage + K * kTileRowBytes + kTileBytes,
                                         reinterpret_cast<const char*>(p.decays + index * K), id);
    }
    CommitCopies();
  };

  float s[32] = {};
  const float* initial = nullptr;
  if constexpr (!kEnds) {
    if (p.is_segmented) {
      initial = p.starts[args.backwards] + segment_head * K * p.value_dim;
    } else if (args.initial.Of(seq) != nullptr) {
      initial = args.initial.Of(seq) + int64_t{head} * K * p.value_dim;
    }
  }
  for (int i = 0; i < Shape::kStages - 1; ++i) load(begin + i);
  if (initial != nullptr) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const float2 pair =
          *reinterpret_cast<const float2*>(initial + int64_t{row + (i & 2 ? 8 : 0)} * p.value_dim +
                                           64 * value_tile + SumColumn(i / 4, 0));
      s[i] = pair.x, s[i + 1] = pair.y;
    }
  }
  float decay_product[2] = {1, 1};

  for (int i = begin; i < end; ++i) {
    char* const stage = stages + i % Shape::kStages * Shape::kStageBytes;
    WaitCopies<Shape::kStages - 2>();
    FenceShared();
    __syncthreads();  // also: nobody reads the stage any more that is filled next
    load(i + Shape::kStages - 1);
    if constexpr (!kEnds) {
#pragma unroll
      for (int j = 0; j < 32; j += 2) {
        *reinterpret_cast<uint32_t*>(staging +
                                     TileElement(row + (j & 2 ? 8 : 0), SumColumn(j / 4, 0))) =
            PackBf16(s[j], s[j + 1]);
      }
    }
    const float* const decays =
        reinterpret_cast<const float*>(stage + K * kTileRowBytes + kTileBytes);
    const float d[2] = {decays[row], decays[row + 8]};
    if constexpr (kEnds) decay_product[0] *= d[0], decay_product[1] *= d[1];
#pragma unroll
    for (int j = 0; j < 32; ++j) s[j] *= d[j / 2 % 2];
    BeginProducts();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Wgmma<64, kAlongRows, kAlongRows>(s, TileOperand<kAlongRows>(stage + group * kTileBytes, j),
                                        TileOperand<kAlongRows>(stage + K * kTileRowBytes, j));
    }
    CommitProducts();
    if constexpr (!kEnds) {  // while the products run; a group's 64 rows are its own
      asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
      const int64_t index = int64_t{first_tile + tile_of(i)} * p.heads + head;
      const int64_t image =
          (index * value_tiles + value_tile) * K * kTileRowBytes + group * kTileBytes;
      for (int j = id % 128 * 16; j < kTileBytes; j += 128 * 16) {
        *reinterpret_cast<uint4*>(args.states + image + j) =
            *reinterpret_cast<const uint4*>(staging + group * kTileBytes + j);
      }
    }
    WaitProducts<0>();
  }

  float* out = nullptr;
  if constexpr (kEnds) {
    out = p.starts[args.backwards] + segment_head * K * p.value_dim;
    if (value_tile == 0 && id % 4 == 0) {
      float* const decays = p.segment_decays[args.backwards] + segment_head * K + row;
      decays[0] = decay_product[0];
      decays[8] = decay_product[1];
    }
  } else if (is_last && args.final.Of(seq) != nullptr) {
    out = args.final.Of(seq) + int64_t{head} * K * p.value_dim;
  }
  if (out != nullptr) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      *reinterpret_cast<float2*>(out + int64_t{row + (i & 2 ? 8 : 0)} * p.value_dim +
                                 64 * value_tile + SumColumn(i / 4, 0)) = {s[i], s[i + 1]};
    }
  }
}

// From the segments' own contributions to their start states, four neighbours to a thread.
__global__ void __launch_bounds__(256) ScanKernel(const TensorProblem p, const Chains chains) {
  WaitForPrevious();
  AllowNext();
  const ChainArgs& args = chains.of[blockIdx.x % chains.count];
  const int64_t state = int64_t{p.key_dim} * p.value_dim;
  const int64_t item = (int64_t{blockIdx.x / chains.count} * 256 + threadIdx.x) * 4;
  const int64_t head_seq = item / state, offset = item % state;
  const int head = static_cast<int>(head_seq % p.heads);
  const int seq = static_cast<int>(head_seq / p.heads);
  if (seq >= p.num_seqs) return;
  float4 start = {0, 0, 0, 0};
  const float* const initial = args.initial.Of(seq);
  if (initial != nullptr) start = LoadFour(initial + head * state + offset);
  const int key = static_cast<int>(offset / p.value_dim);
  const int last = p.segment_begin[seq + 1] - 1;
  constexpr int kAhead = 8;  // loads under way at once
  for (int first = p.segment_begin[seq]; first <= last; first += kAhead) {
    float4 own[kAhead];
    float d[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= last) break;
      const int64_t index = int64_t{first + i} * p.heads + head;
      own[i] = LoadFour(p.starts[args.backwards] + index * state + offset);
      d[i] = p.segment_decays[args.backwards][index * p.key_dim + key];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i > last) break;
      const int64_t index = int64_t{first + i} * p.heads + head;
      StoreFour(p.starts[args.backwards] + index * state + offset, start);
      if (first + i == last) break;
      start = {fmaf(d[i], start.x, own[i].x), fmaf(d[i], start.y, own[i].y),
               fmaf(d[i], start.z, own[i].z), fmaf(d[i], start.w, own[i].w)};
    }
  }
}

template <int K, bool kEnds>
void LaunchChain(Device& device, const TensorProblem& p, const Chains& chains) {
  using Shape = ChainShape<K>;
  const int64_t segments = p.is_segmented ? p.max_segments : p.num_seqs;
  LaunchOverlapped(device, ChainKernel<K, kEnds>,
                   {.blocks = GridOf(segments * p.heads * (p.value_dim / 64) * chains.count),
                    .threads = Shape::kThreads,
                    .shared_bytes = Shape::kBytes},
                   p, chains);
}

}  // namespace

size_t PlaceWorkspace(TensorProblem& p, int num_chains, char* memory) {
  size_t used = 0;
  const auto place = [&]<typename T>(T*& pointer, int64_t bytes) {
    pointer = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
    used += RoundUp<size_t>(bytes, 1024);
  };
  const int64_t tile_heads = p.max_tiles() * p.heads;
  place(p.tile_begin, (p.num_seqs + 1) * int64_t{4});
  place(p.segment_begin, (p.num_seqs + 1) * int64_t{4});
  place(p.queries, tile_heads * (p.key_dim / 64) * kTileBytes);
  place(p.keys, tile_heads * (p.key_dim / 64) * kTileBytes);
  place(p.scores, tile_heads * kTileBytes);
  place(p.decays, tile_heads * p.key_dim * 4);
  const int64_t segment_heads = p.max_segments * p.heads;
  for (int i = 0; i < num_chains; ++i) {
    place(p.starts[i], segment_heads * p.key_dim * p.value_dim * 4);
    place(p.segment_decays[i], segment_heads * p.key_dim * 4);
  }
  return used;
}

void FindTiles(Device& device, const TensorProblem& p) {
  const unsigned threads = std::min(kBeginsThreads, RoundUp(p.num_seqs, 32));
  LaunchOverlapped(device, BeginsKernel, {.blocks = 1, .threads = threads}, p);
}

void Prepare(Device& device, const TensorProblem& p) {
  FindTiles(device, p);
  WithKeyDim(p.key_dim, [&]<int K>() {
    const unsigned blocks = GridOf(p.max_tiles() * p.heads);
    if (p.gate_kind == GateKind::kPerKey) {
      using Shared = KeyPrepareShared<K>;
      LaunchOverlapped(
          device, PrepareKeyKernel<K>,
          {.blocks = blocks, .threads = Shared::kThreads, .shared_bytes = sizeof(Shared)}, p);
    } else {
      LaunchOverlapped(
          device, PrepareStepKernel<K>,
          {.blocks = blocks, .threads = kPrepareThreads, .shared_bytes = StepPrepareBytes<K>()}, p);
    }
  });
}

void ScanSegments(Device& device, const TensorProblem& p, const Chains& chains) {
  const int64_t fours = int64_t{p.num_seqs} * p.heads * p.key_dim * p.value_dim / 4;
  LaunchOverlapped(device, ScanKernel,
                   {.blocks = GridOf(CeilDiv<int64_t>(fours, 256) * chains.count), .threads = 256},
                   p, chains);
}

void Chain(Device& device, const TensorProblem& p, const Chains& chains) {
  WithKeyDim(p.key_dim, [&]<int K>() {
    if (p.is_segmented) {
      LaunchChain<K, true>(device, p, chains);
      ScanSegments(device, p, chains);
    }
    LaunchChain<K, false>(device, p, chains);
  });
}

}  // namespace gla
