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

constexpr int kPrepareThreads = 256;

// ---- Prepare ------------------------------------------------------------------------------------

template <int K>
struct KeyPrepareShared {
  static constexpr int kPitch = K + 8;
  bf16 q[kTileTokens][kPitch];
  bf16 k[kTileTokens][kPitch];
  float sums[kTileTokens][kPitch];  // G
  float totals[kPrepareThreads];
  int is_wide[4];  // blocks of 16 tokens whose gates span too much

  // In the place of q and k: A of the second half of K by warp and lane, and then all of A.
  __device__ float (*halves())[32][33] { return reinterpret_cast<float(*)[32][33]>(q); }
  __device__ char* scores() { return reinterpret_cast<char*>(q); }
  static_assert(2 * sizeof(bf16[kTileTokens][kPitch]) >= sizeof(float[4][32][33]));
};

// Element pair (row, column), (row, column + 1) of q or k times 2^(sign (G - ref)).
template <int K>
__device__ uint32_t Factored(const bf16 (*x)[K + 8], const float (*sums)[K + 8], int row,
                             int column, float2 ref, float sign) {
  const float2 pair = UnpackBf16(*reinterpret_cast<const uint32_t*>(&x[row][column]));
  const float2 g = *reinterpret_cast<const float2*>(&sums[row][column]);
  return PackBf16(pair.x * Exp2(sign * (g.x - ref.x)), pair.y * Exp2(sign * (g.y - ref.y)));
}

// A block to a (tile, head). Warps b and b + 4 make the rows of A of tokens 16 b .. 16 b + 15, each
// of half of K.
template <int K>
__global__ void __launch_bounds__(kPrepareThreads) PrepareKeyKernel(const TensorProblem p) {
  extern __shared__ __align__(16) char raw_shared[];
  auto& shared = *reinterpret_cast<KeyPrepareShared<K>*>(raw_shared);
  constexpr int kPieces = K / 8;
  WaitForPrevious();
  AllowNext();
  TilePlace at;
  if (!at.Find(p, blockIdx.x)) return;
  const int id = threadIdx.x, warp = id / 32, lane = id % 32;

  LoadQueriesAndKeys<K, kPrepareThreads>(p, at, shared.q, shared.k);
  if (id < 4) shared.is_wide[id] = 0;
  SumKeyGates<K, kPrepareThreads>(p, at, &shared.sums[0][0], K + 8, shared.totals);
  for (int i = id; i < 4 * K; i += kPrepareThreads) {
    const int block = i / K, c = i % K;
    const float span = shared.sums[16 * block][c] - shared.sums[16 * block + 15][c];
    if (span > kLargestSpan) shared.is_wide[block] = 1;
  }
  if (id < K) p.decays[at.index * K + id] = Exp2(shared.sums[kTileTokens - 1][id]);
  WaitCopies<0>();
  __syncthreads();

  // q~ and k~
  char* const queries = p.queries + at.index * (K / 64) * kTileBytes;
  char* const keys = p.keys + at.index * (K / 64) * kTileBytes;
  for (int i = id; i < kTileTokens * kPieces; i += kPrepareThreads) {
    const int t = i / kPieces, c = i % kPieces * 8;
    float fq[8], fk[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float g = shared.sums[t][c + e];
      fq[e] = p.scale * Exp2(g);
      fk[e] = Exp2(shared.sums[kTileTokens - 1][c + e] - g);
    }
    const int to = c / 64 * kTileBytes + TilePiece(t, c % 64 / 8);
    *reinterpret_cast<uint4*>(queries + to) =
        Scaled(*reinterpret_cast<const uint4*>(&shared.q[t][c]), fq);
    *reinterpret_cast<uint4*>(keys + to) =
        Scaled(*reinterpret_cast<const uint4*>(&shared.k[t][c]), fk);
  }

  // A: block row b against the blocks before it, referred to G just before b; against itself,
  // referred to the middle of its gates.
  const int b = warp % 4, half = warp / 4, g = lane / 4, c0 = lane % 4 * 2;
  const int t0 = 16 * b;
  float a[4][2][4] = {};  // [block][8 columns][element]
  for (int step = half * (K / 32); step < (half + 1) * (K / 32); ++step) {
    const int c = 16 * step + c0;
    const auto pair = [&](int row, int column) {
      return *reinterpret_cast<const float2*>(&shared.sums[row][column]);
    };
    const auto load_a = [&](float2 ref0, float2 ref1, uint32_t(&x)[4]) {
      x[0] = Factored<K>(shared.q, shared.sums, t0 + g, c, ref0, 1);
      x[1] = Factored<K>(shared.q, shared.sums, t0 + g + 8, c, ref0, 1);
      x[2] = Factored<K>(shared.q, shared.sums, t0 + g, c + 8, ref1, 1);
      x[3] = Factored<K>(shared.q, shared.sums, t0 + g + 8, c + 8, ref1, 1);
    };
    const auto add = [&](int block, const uint32_t(&x)[4], float2 ref0, float2 ref1) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int s = 16 * block + 8 * n + g;
        const uint32_t y[2] = {Factored<K>(shared.k, shared.sums, s, c, ref0, -1),
                               Factored<K>(shared.k, shared.sums, s, c + 8, ref1, -1)};
#pragma unroll
        for (int other = 0; other < 4; ++other) {  // registers want constant indices
          if (other == block) Mma16x8x16(a[other][n], x, y);
        }
      }
    };
    uint32_t x[4];
    if (b > 0) {
      const float2 ref0 = pair(t0 - 1, c), ref1 = pair(t0 - 1, c + 8);
      load_a(ref0, ref1, x);
      for (int block = 0; block < b; ++block) add(block, x, ref0, ref1);
    }
    const auto middle = [&](int column) {
      const float2 first = pair(t0, column), last = pair(t0 + 15, column);
      return float2{0.5f * (first.x + last.x), 0.5f * (first.y + last.y)};
    };
    const float2 ref0 = middle(c), ref1 = middle(c + 8);
    load_a(ref0, ref1, x);
    add(b, x, ref0, ref1);
  }
  if (shared.is_wide[b] && half == 0) {  // exact, pair by pair; the other half adds nothing
#pragma unroll 1
    for (int n = 0; n < 2; ++n) {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const int t = t0 + g + (e & 2 ? 8 : 0), s = t0 + 8 * n + c0 + (e & 1);
        float sum = 0;
        for (int c = 0; c < K && s <= t; ++c) {
          sum += ToFloat(shared.q[t][c]) * ToFloat(shared.k[s][c]) *
                 Exp2(shared.sums[t][c] - shared.sums[s][c]);
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) {  // registers want constant indices
          if (i == b * 8 + n * 4 + e) a[i / 8][i / 4 % 2][i % 4] = sum;
        }
      }
    }
  }
  const bool is_replaced = shared.is_wide[b];
  __syncthreads();  // q and k give their place
  float(&exchange)[33] = shared.halves()[b][lane];
  if (half == 1) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      exchange[i] = is_replaced && i / 8 == b ? 0 : a[i / 8][i / 4 % 2][i % 4];
    }
  }
  __syncthreads();
  if (half == 0) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      a[i / 8][i / 4 % 2][i % 4] += exchange[i];
      a[i / 8][i / 4 % 2][i % 4 + 1] += exchange[i + 1];
    }
  }
  __syncthreads();
  if (half == 0) {
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
  for (int i = id * 16; i < kTileBytes; i += kPrepareThreads * 16) {
    *reinterpret_cast<uint4*>(p.scores + at.index * kTileBytes + i) =
        *reinterpret_cast<const uint4*>(shared.scores() + i);
  }
}

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

void Prepare(Device& device, const TensorProblem& p) {
  const unsigned threads = std::min(kBeginsThreads, RoundUp(p.num_seqs, 32));
  LaunchOverlapped(device, BeginsKernel, {.blocks = 1, .threads = threads}, p);
  WithKeyDim(p.key_dim, [&]<int K>() {
    const bool per_key = p.gate_kind == GateKind::kPerKey;
    LaunchOverlapped(
        device, per_key ? &PrepareKeyKernel<K> : &PrepareStepKernel<K>,
        {.blocks = GridOf(p.max_tiles() * p.heads),
         .threads = kPrepareThreads,
         .shared_bytes = per_key ? sizeof(KeyPrepareShared<K>) : StepPrepareBytes<K>()},
        p);
  });
}

void FindStarts(Device& device, const TensorProblem& p, const Chains& chains) {
  WithKeyDim(p.key_dim, [&]<int K>() { LaunchChain<K, true>(device, p, chains); });
  const int64_t fours = int64_t{p.num_seqs} * p.heads * p.key_dim * p.value_dim / 4;
  LaunchOverlapped(device, ScanKernel,
                   {.blocks = GridOf(CeilDiv<int64_t>(fours, 256) * chains.count), .threads = 256},
                   p, chains);
}

void Chain(Device& device, const TensorProblem& p, const Chains& chains) {
  if (p.is_segmented) FindStarts(device, p, chains);
  WithKeyDim(p.key_dim, [&]<int K>() { LaunchChain<K, false>(device, p, chains); });
}

}  // namespace gla
