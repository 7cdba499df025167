// Prepare and Chain of attention_tensor.cuh.
#include <algorithm>

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

template <int K>
__global__ void __launch_bounds__(2 * K, K == 256 ? 1 : 256 / K)
    PrepareKeyKernel(const TensorProblem p) {
  extern __shared__ __align__(1024) char raw_shared[];
  using Shared = KeyPrepareShared<K>;
  auto& shared = *reinterpret_cast<Shared*>(raw_shared);
  WaitForPrevious();
  AllowNext();
  if (K == 256) Stagger(kMultiprocessors, 4000);
  TilePlace at;
  const bool is_few = p.num_seqs <= kFewSeqs;
  if (!(is_few ? at.FindFirst(p, blockIdx.x) : at.Find(p, blockIdx.x))) return;
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
  SumGatePairs(p, row0 * p.gate_stride + column, tokens, sums);
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
  extern __shared__ __align__(1024) char raw_shared[];
  constexpr int kTiles = K / 64;
  char* const q = AlignedShared(raw_shared);
  char* const k = q + kTiles * kTileBytes;
  char* const scores = k + kTiles * kTileBytes;
  float* const sums = reinterpret_cast<float*>(scores + kTileBytes);
  WaitForPrevious();
  AllowNext();
  TilePlace at;
  const bool is_few = p.num_seqs <= kFewSeqs;
  if (!(is_few ? at.FindFirst(p, blockIdx.x) : at.Find(p, blockIdx.x))) return;
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
    *reinterpret_cast<uint4*>(p.queries + image + i * 16) =
        Scaled(*reinterpret_cast<const uint4*>(q + i * 16), fq);
    *reinterpret_cast<uint4*>(p.keys + image + i * 16) =
        Scaled(*reinterpret_cast<const uint4*>(k + i * 16), fk);
  }
  __syncthreads();
  for (int i = id * 16; i < kTileBytes; i += kPrepareThreads * 16) {
    *reinterpret_cast<uint4*>(p.scores + at.index * kTileBytes + i) =
        *reinterpret_cast<const uint4*>(scores + i);
  }
}

// ---- Chain --------------------------------------------------------------------------------------

enum class ChainOut {
  kStates,    // before every tile, and the last one
  kEnds,      // of segments from zero, and their decays
  kStepEnds,  // the same of keys as they are and one decay per step
};

// kWide: tiles of 64 columns to a block. Two read the keys half as often.
template <int K, ChainOut kOut, int kWide>
struct ChainShape {
  static constexpr int kGroups = K / 64;  // of four warps, 64 rows of the state each
  static constexpr int kThreads = 128 * kGroups;
  static constexpr bool kHasStates = kOut == ChainOut::kStates;
  static constexpr int kStages = kHasStates && kWide * K > 256 ? 2 : 3;
  static constexpr int kImageBytes = K * kTileRowBytes;                        // of keys or S
  static constexpr int kStageBytes = kImageBytes + kWide * kTileBytes + 1024;  // D or G at the end
  static constexpr int kStagedBytes = kHasStates ? kWide * kImageBytes : 0;    // a state
  static constexpr size_t kBytes = 1024 + kStages * kStageBytes + 2 * kStagedBytes;
};

// A block to a (segment or sequence, head, 64 kWide columns of V): S in registers.
template <int K, ChainOut kOut, int kWide>
__global__ void __launch_bounds__(ChainShape<K, kOut, kWide>::kThreads)
    ChainKernel(const TensorProblem p, const __grid_constant__ Chains chains) {
  using Shape = ChainShape<K, kOut, kWide>;
  constexpr int kStages = Shape::kStages, kImageBytes = Shape::kImageBytes;
  constexpr bool kHasStates = Shape::kHasStates, kIsStep = kOut == ChainOut::kStepEnds;
  constexpr int kDecayBytes = kIsStep ? kTileTokens * 4 : K * 4;
  extern __shared__ __align__(1024) char raw_shared[];
  const uint32_t barriers = SharedAddress(raw_shared);
  if (barriers % 1024 != 0) __trap();
  char* const stages = raw_shared + 1024;
  char* const staging = stages + kStages * Shape::kStageBytes;  // two states
  const auto full = [&](int stage) { return barriers + 8 * stage; };
  const int id = threadIdx.x, group = GroupOfWarps();
  if (id == 0) {
    for (int i = 0; i < kStages; ++i) InitBarrier(full(i), 1);
    FenceBarriers();
  }
  __syncthreads();
  WaitForPrevious();
  AllowNext();
  const ChainArgs& args = chains.of[blockIdx.x % chains.count];
  const int block = blockIdx.x / chains.count;
  const int value_tiles = p.value_dim / 64, parts = value_tiles / kWide;
  const int value_tile = block % parts * kWide;
  const int head = block / parts % p.heads;
  const int segment = block / parts / p.heads;
  SegmentPlace at;
  if (!at.Find(p, segment)) return;
  const int seq = at.seq, first_tile = at.first_tile, num_tiles = at.num_tiles;
  const int begin = at.begin, end = at.end;
  const bool is_last = at.is_last;
  if (!kHasStates && is_last) return;
  const int64_t row_begin = p.cu_seqlens[seq];
  const int length = p.cu_seqlens[seq + 1] - static_cast<int>(row_begin);
  const int64_t segment_head = int64_t{segment} * p.heads + head;
  const int row = 64 * group + SumRow(0);  // and row + 8

  const auto tile_of = [&](int i) { return args.backwards ? num_tiles - 1 - i : i; };
  const auto tokens_of = [&](int i) { return min(kTileTokens, length - kTileTokens * tile_of(i)); };
  const auto stage_of = [&](int i) { return stages + (i - begin) % kStages * Shape::kStageBytes; };
  // By one thread.
  const auto load = [&](int i) {
    if (i >= end) return;
    const uint32_t barrier = full((i - begin) % kStages), to = SharedAddress(stage_of(i));
    const int64_t index = int64_t{first_tile + tile_of(i)} * p.heads + head;
    const int first_row = static_cast<int>(row_begin) + kTileTokens * tile_of(i);
    ArriveExpecting(barrier, kImageBytes + kWide * kTileBytes + kDecayBytes);
    if constexpr (kIsStep) {
      for (int c = 0; c < K / 64; ++c) {
        CopyBox(to + c * kTileBytes, args.raw_keys, barrier, head * K + 64 * c, first_row);
      }
    } else {
      CopyBulk(to, args.keys + index * kImageBytes, kImageBytes, barrier);
    }
    for (int w = 0; w < kWide; ++w) {
      CopyBox(to + kImageBytes + w * kTileBytes, args.values, barrier,
              head * p.value_dim + 64 * (value_tile + w), first_row);
    }
    CopyBulk(to + kImageBytes + kWide * kTileBytes,
             kIsStep ? chains.gates + index * kTileTokens : p.decays + index * K, kDecayBytes,
             barrier);
  };
  // Waits for a tile and makes operands of it.
  const auto make_ready = [&](int i) {
    char* const values = stage_of(i) + kImageBytes;
    const int tokens = tokens_of(i);
    WaitBarrier(full((i - begin) % kStages), (i - begin) / kStages & 1);
    if (kIsStep && id < kTileTokens) {
      float* const g = reinterpret_cast<float*>(values + kWide * kTileBytes);
      g[kTileTokens + id] =
          args.backwards ? p.scale * Exp2(g[id]) : Exp2(g[kTileTokens - 1] - g[id]);
    }
    if (tokens < kTileTokens) {  // what follows belongs to others, who may have NaN there
      const auto clear = [&](char* tile) {
        for (int j = tokens * kTileRowBytes + id * 16; j < kTileBytes; j += Shape::kThreads * 16) {
          *reinterpret_cast<uint4*>(tile + j) = {0, 0, 0, 0};
        }
      };
#pragma unroll 1
      for (int w = 0; w < kWide; ++w) clear(values + w * kTileBytes);
#pragma unroll 1
      for (int c = 0; c < (kIsStep ? K / 64 : 0); ++c) clear(stage_of(i) + c * kTileBytes);
      __syncwarp();  // products are waited for by whole warps
    }
  };

  constexpr int kSums = 32 * kWide;
  float s[kSums] = {};
  // where element pair i of a thread stands in a state of [K, V]
  const auto place = [&](int i) {
    return int64_t{row + (i & 2 ? 8 : 0)} * p.value_dim + 64 * value_tile + SumColumn(i / 4, 0);
  };
  const float* initial = nullptr;
  if constexpr (kHasStates) {
    if (p.is_segmented) {
      initial = p.starts[args.backwards] + segment_head * K * p.value_dim;
    } else if (args.initial.Of(seq) != nullptr) {
      initial = args.initial.Of(seq) + int64_t{head} * K * p.value_dim;
    }
  }
  if (id == 0) {
    for (int i = 0; i < kStages; ++i) load(begin + i);
  }
  __syncwarp();
  if (initial != nullptr) {
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      const float2 pair = *reinterpret_cast<const float2*>(initial + place(i));
      s[i] = pair.x, s[i + 1] = pair.y;
    }
  }
  float decay_product[2] = {1, 1};

  if (begin < end) make_ready(begin);
  for (int i = begin; i < end; ++i) {
    const char* const keys = stage_of(i) + group * kTileBytes;
    const char* const values = stage_of(i) + kImageBytes;
    // of the group's rows; 64 columns further is the next image
    char* const image = staging + (i & 1) * Shape::kStagedBytes + group * kTileBytes;
    if (kHasStates && id % 128 == 0) WaitBulkReads<kWide>();
    FenceShared();
    __syncthreads();  // also: nobody reads the tile before any more
    if (id == 0 && i > begin) load(i - 1 + kStages);
    __syncwarp();
    if constexpr (kHasStates) {
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        uint32_t pairs[16];
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          pairs[j] = PackBf16(s[32 * w + 2 * j], s[32 * w + 2 * j + 1]);
        }
        StoreSums(image + w * kImageBytes, pairs);
      }
      FenceShared();
    }
    const float* const decays = reinterpret_cast<const float*>(values + kWide * kTileBytes);
    float d[2];
    if constexpr (kIsStep) {
      d[0] = d[1] = Exp2(decays[kTileTokens - 1]);
    } else {
      d[0] = decays[row], d[1] = decays[row + 8];
    }
    if constexpr (!kHasStates) decay_product[0] *= d[0], decay_product[1] *= d[1];
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
      s[j] *= d[j / 2 % 2];
      asm volatile("" : "+f"(s[j]));  // before the products begin
    }
    if constexpr (kIsStep) {  // keys through registers, where a token's factor meets them
      const int lane = id % 32, warp = id % 128 / 32;
      uint32_t a[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t raw[4];
        LoadTransposed(
            SharedAddress(keys) + TileElement(16 * j + lane % 16, 16 * warp + lane / 16 * 8), raw);
        const float* const at = decays + kTileTokens + 16 * j + lane % 4 * 2;
        const float2 first = *reinterpret_cast<const float2*>(at);
        const float2 second = *reinterpret_cast<const float2*>(at + 8);
        a[j][0] = PackBf16(Product(UnpackBf16(raw[0]), first));
        a[j][1] = PackBf16(Product(UnpackBf16(raw[2]), first));
        a[j][2] = PackBf16(Product(UnpackBf16(raw[1]), second));
        a[j][3] = PackBf16(Product(UnpackBf16(raw[3]), second));
        BeginProducts();
#pragma unroll
        for (int w = 0; w < kWide; ++w) {
          WgmmaFromRegisters<kAlongRows>(reinterpret_cast<float(&)[32]>(s[32 * w]), a[j],
                                         TileOperand<kAlongRows>(values + w * kTileBytes, j));
        }
      }
    } else {
      BeginProducts();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Wgmma<64 * kWide, kAlongRows, kAlongRows>(s, TileOperand<kAlongRows>(keys, j),
                                                  TileOperand<kAlongRows>(values, j, kTileBytes));
      }
    }
    CommitProducts();
    // While the products run:
    if constexpr (kHasStates) {  // a group's 64 rows are its own
      asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
      if (id % 128 == 0) {
        const int64_t index = int64_t{first_tile + tile_of(i)} * p.heads + head;
        char* const to =
            args.states + (index * value_tiles + value_tile) * kImageBytes + group * kTileBytes;
        for (int w = 0; w < kWide; ++w) {
          StoreBulk(to + w * kImageBytes, SharedAddress(image + w * kImageBytes), kTileBytes);
        }
      }
      __syncwarp();
    }
    if (i + 1 < end) make_ready(i + 1);
    WaitProducts<0>();
  }
  if (kHasStates && id % 128 == 0) WaitBulkReads<0>();

  float* out = nullptr;
  if constexpr (!kHasStates) {
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
    for (int i = 0; i < kSums; i += 2) {
      *reinterpret_cast<float2*>(out + place(i)) = {s[i], s[i + 1]};
    }
  }
}

// From the segments' own contributions to their start states, four neighbours to a thread.
__global__ void __launch_bounds__(256)
    ScanKernel(const TensorProblem p, const __grid_constant__ Chains chains) {
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

// From each segment's own contribution to its start state, in p.starts.
void ScanSegments(Device& device, const TensorProblem& p, const Chains& chains) {
  const int64_t fours = int64_t{p.num_seqs} * p.heads * p.key_dim * p.value_dim / 4;
  LaunchOverlapped(device, ScanKernel,
                   {.blocks = GridOf(CeilDiv<int64_t>(fours, 256) * chains.count), .threads = 256},
                   p, chains);
}

template <int K, ChainOut kOut, int kWide>
void LaunchChain(Device& device, const TensorProblem& p, const Chains& chains, int64_t blocks) {
  using Shape = ChainShape<K, kOut, kWide>;
  LaunchOverlapped(
      device, ChainKernel<K, kOut, kWide>,
      {.blocks = GridOf(blocks), .threads = Shape::kThreads, .shared_bytes = Shape::kBytes}, p,
      chains);
}

// Wide where such blocks come near to filling the device: 96 of them.
template <ChainOut kOut>
void LaunchChain(Device& device, const TensorProblem& p, const Chains& chains) {
  const int64_t segments = p.is_segmented ? p.max_segments : p.num_seqs;
  const int64_t blocks = segments * p.heads * (p.value_dim / 64) * chains.count;
  const bool is_wide = p.value_dim % 128 == 0 && blocks >= 192;
  WithKeyDim(p.key_dim, [&]<int K>() {
    if constexpr (K > 64) {
      if (is_wide) return LaunchChain<K, kOut, 2>(device, p, chains, blocks / 2);
    }
    LaunchChain<K, kOut, 1>(device, p, chains, blocks);
  });
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
  if (p.num_seqs > kFewSeqs) FindTiles(device, p);
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

void SegmentStarts(Device& device, const TensorProblem& p, const Chains& chains) {
  LaunchChain<ChainOut::kEnds>(device, p, chains);
  ScanSegments(device, p, chains);
}

void Chain(Device& device, const TensorProblem& p, const Chains& chains) {
  if (p.is_segmented) SegmentStarts(device, p, chains);
  LaunchChain<ChainOut::kStates>(device, p, chains);
}

void StepStarts(Device& device, const TensorProblem& p, const Chains& chains) {
  LaunchChain<ChainOut::kStepEnds>(device, p, chains);
  ScanSegments(device, p, chains);
}

}  // namespace gla
