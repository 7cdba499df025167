// The forward pass of the chunkwise form on tensor cores: Prepare, then from tile to tile
//   o = q~ S + A v    S = D S + k~^T v
// with S in registers: no state but a sequence's last leaves the chip.
//
// Inside a segment S is kept as P s + E, s the segment's start state, P the product of the decays
// since and E what the segment itself has added. So the start state of the next segment is
// fma(P, s, E) whether one block walks through all segments of a sequence, or a pass before has
// made E of all segments, a scan s, and each segment is a block's own: the bits are the same, and
// the choice can be made by what fills the device.
#include <algorithm>
#include <limits>

#include "kernels/cuda/attention_tensor.cuh"
#include "kernels/cuda/attention_tensor_entry.h"
#include "kernels/cuda/tensor_map.h"

namespace gla {
namespace {

// kDeep: more copies under way, for one block to a multiprocessor.
template <int K, bool kDeep>
struct WalkShape {
  static constexpr int kGroups = K / 64;  // of four warps, 64 rows of the state each
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kBlocks =  // on a multiprocessor
      kDeep || K == 256 ? 1 : 2;
  static constexpr int kStages = kDeep ? 4 : K == 64 ? 3 : 2;
  static constexpr int kImageBytes = K * kTileRowBytes;  // of q~, k~ or S
  static constexpr int kCopiedBytes =
      2 * kImageBytes + kTileBytes;  // of a stage: k~, q~, A; then v
  static constexpr int kStageBytes = kCopiedBytes + kTileBytes;
  static constexpr size_t kBytes = 1024 + kStages * kStageBytes + kImageBytes;
};

// A block to a (segment or sequence, head, 64 columns of V).
template <int K, bool kDeep>
__global__ void __launch_bounds__(WalkShape<K, kDeep>::kThreads, WalkShape<K, kDeep>::kBlocks)
    WalkKernel(const TensorProblem p, const States initial, const States final, bf16* o,
               int64_t o_stride) {
  using Shape = WalkShape<K, kDeep>;
  constexpr int kThreads = Shape::kThreads, kStages = Shape::kStages;
  extern __shared__ __align__(1024) char raw_shared[];
  const uint32_t barriers = SharedAddress(raw_shared);
  if (barriers % 1024 != 0) __trap();
  char* const stages = raw_shared + 1024;
  char* const state = stages + kStages * Shape::kStageBytes;  // S; then the tile of o
  const auto full = [&](int stage) { return barriers + 8 * stage; };
  const int id = threadIdx.x, group = GroupOfWarps();
  if (id == 0) {
    for (int i = 0; i < kStages; ++i) InitBarrier(full(i), 1);
    FenceBarriers();
  }
  __syncthreads();
  WaitForPrevious();
  AllowNext();
  const int value_tiles = p.value_dim / 64, value_tile = blockIdx.x % value_tiles;
  const int head = blockIdx.x / value_tiles % p.heads;
  const int item = blockIdx.x / value_tiles / p.heads;
  SegmentPlace at;
  if (!at.Find(p, item)) return;
  const int seq = at.seq, first_tile = at.first_tile, begin = at.begin, each = at.each;
  const bool is_last = at.is_last;
  const int count = at.end - begin;
  const int64_t row_begin = p.cu_seqlens[seq] + int64_t{kTileTokens} * begin;
  const int length = p.cu_seqlens[seq + 1] - static_cast<int>(row_begin);
  const int64_t column = int64_t{head} * p.value_dim + 64 * value_tile;
  const int64_t item_head = int64_t{item} * p.heads + head;
  const int row = 64 * group + SumRow(0);  // and row + 8

  // From here on tiles count from `begin`.
  const auto index_of = [&](int tile) {
    return int64_t{first_tile + begin + tile} * p.heads + head;
  };
  const auto stage_of = [&](int tile) { return stages + tile % kStages * Shape::kStageBytes; };
  // What a tile has as images; by one thread.
  const auto copy = [&](int tile) {
    if (tile >= count) return;
    const uint32_t barrier = full(tile % kStages), to = SharedAddress(stage_of(tile));
    const int64_t index = index_of(tile);
    ArriveExpecting(barrier, Shape::kCopiedBytes);
    CopyBulk(to, p.keys + index * Shape::kImageBytes, Shape::kImageBytes, barrier);
    CopyBulk(to + Shape::kImageBytes, p.queries + index * Shape::kImageBytes, Shape::kImageBytes,
             barrier);
    CopyBulk(to + 2 * Shape::kImageBytes, p.scores + index * kTileBytes, kTileBytes, barrier);
  };
  const auto load_values = [&](int tile) {
    if (tile < count) {
      CopyTile<kThreads>(stage_of(tile) + Shape::kCopiedBytes,
                         p.v + (row_begin + int64_t{kTileTokens} * tile) * p.v_stride + column,
                         p.v_stride, min(kTileTokens, length - kTileTokens * tile), id);
    }
    CommitCopies();
  };
  float next_decays[2] = {};
  const auto load_decays = [&](int tile) {
    if (tile >= count) return;
    const float* const from = p.decays + index_of(tile) * K + row;
    next_decays[0] = from[0], next_decays[1] = from[8];
  };

  if (id == 0) {
    for (int i = 0; i < kStages; ++i) copy(i);
  }
  for (int i = 0; i < kStages - 1; ++i) load_values(i);
  load_decays(0);
  float start[32] = {}, own[32] = {}, product[2] = {1, 1};  // s, E, P
  // where element pair i of a thread stands in a state of [K, V]
  const auto place = [&](int i) {
    return int64_t{row + (i & 2 ? 8 : 0)} * p.value_dim + 64 * value_tile + SumColumn(i / 4, 0);
  };
  const int64_t head_size = int64_t{K} * p.value_dim;
  const float* from = nullptr;
  if (p.is_segmented) {
    from = p.starts[0] + item_head * head_size;
  } else if (initial.Of(seq) != nullptr) {
    from = initial.Of(seq) + head * head_size;
  }
  if (from != nullptr) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const float2 pair = *reinterpret_cast<const float2*>(from + place(i));
      start[i] = pair.x, start[i + 1] = pair.y;
    }
  }
  int left = each;  // tiles of this segment

  for (int tile = 0; tile < count; ++tile) {
    const char* const keys = stage_of(tile);
    const char* const values = keys + Shape::kCopiedBytes;
    WaitCopies<kStages - 2>();
    FenceShared();
    WaitBarrier(full(tile % kStages), tile / kStages & 1);
    __syncthreads();  // also: this block has done with the tile before, and with `state`
    load_values(tile + kStages - 1);
    if (tile > 0 && id == 0) copy(tile + kStages - 1);
    if (left == 0) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        start[i] = fmaf(product[i / 2 % 2], start[i], own[i]);
        own[i] = 0;
      }
      product[0] = product[1] = 1;
      left = each;
    }
    --left;
    char* const rows = state + group * kTileBytes;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const float factor = product[i / 2 % 2];
      *reinterpret_cast<uint32_t*>(rows + TileElement(SumRow(i), SumColumn(i / 4, 0))) =
          PackBf16(fmaf(factor, start[i], own[i]), fmaf(factor, start[i + 1], own[i + 1]));
    }
    FenceShared();
    const float decays[2] = {next_decays[0], next_decays[1]};
    load_decays(tile + 1);
    product[0] *= decays[0], product[1] *= decays[1];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      own[i] *= decays[i / 2 % 2];
      asm volatile("" : "+f"(own[i]));  // before the products begin
    }

    BeginProducts();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Wgmma<64, kAlongRows, kAlongRows>(own, TileOperand<kAlongRows>(keys + group * kTileBytes, i),
                                        TileOperand<kAlongRows>(values, i));
    }
    CommitProducts();
    __syncthreads();                       // S is whole
    if (group != tile % Shape::kGroups) {  // the groups take turns at o
      WaitProducts<0>();
      continue;
    }
    const char* const queries = keys + Shape::kImageBytes;
    const char* const scores = queries + Shape::kImageBytes;
    float sum[32];
    BeginProducts();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Wgmma<64, kAlongColumns, kAlongRows>(sum, TileOperand<kAlongColumns>(scores, i),
                                           TileOperand<kAlongRows>(values, i), i > 0);
    }
#pragma unroll
    for (int i = 0; i < K / 16; ++i) {
      Wgmma<64, kAlongColumns, kAlongRows>(
          sum, TileOperand<kAlongColumns>(queries + i / 4 * kTileBytes, i % 4),
          TileOperand<kAlongRows>(state, i));
    }
    CommitProducts();
    WaitProducts<0>();
    const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); };
    meet();  // the group has read S
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      *reinterpret_cast<uint32_t*>(state + TileElement(SumRow(i), SumColumn(i / 4, 0))) =
          PackBf16(sum[i], sum[i + 1]);
    }
    meet();
    StoreTile<128>(o + (row_begin + int64_t{kTileTokens} * tile) * o_stride + column, o_stride,
                   state, min(kTileTokens, length - kTileTokens * tile), id % 128);
  }
  if (!is_last || final.Of(seq) == nullptr) return;
  float* const to = final.Of(seq) + head * head_size;
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    const float factor = product[i / 2 % 2];
    // without tokens a state is carried as it is
    *reinterpret_cast<float2*>(to + place(i)) =
        count == 0 ? float2{start[i], start[i + 1]}
                   : float2{fmaf(factor, start[i], own[i]), fmaf(factor, start[i + 1], own[i + 1])};
  }
}

// What WalkKernel takes beside the problem, and how many segments or sequences there are at most.
struct WalkArgs {
  States initial, final;
  bf16* o;
  int64_t o_stride;
  int64_t items;
};

template <int K, bool kDeep>
void LaunchWalk(Device& device, const TensorProblem& p, const WalkArgs& w) {
  using Shape = WalkShape<K, kDeep>;
  const int value_tiles = p.value_dim / 64;
  LaunchOverlapped(device, WalkKernel<K, kDeep>,
                   {.blocks = GridOf(w.items * p.heads * value_tiles),
                    .threads = Shape::kThreads,
                    .shared_bytes = Shape::kBytes},
                   p, w.initial, w.final, w.o, w.o_stride);
}

// Blocks of WalkKernel that fill the device once.
int WalkSlots(int key_dim) { return key_dim == 256 ? 128 : 256; }
constexpr int kLeastSegmentTiles = 4;
// From here on twice the segments, whose ends take wide blocks then: 466 -> 447 us (H4 K256 V512).
constexpr int kLongTiles = 256;
// More sequences than these are never walked segment by segment, which bounds the workspace.
constexpr int kMaxSegmentedSeqs = 16;

TensorProblem ProblemOf(const LinearAttentionArgs& a) {
  TensorProblem p{};
  p.q = static_cast<const bf16*>(a.q);
  p.k = static_cast<const bf16*>(a.k);
  p.v = static_cast<const bf16*>(a.v);
  p.gate_kind = a.gate_kind;
  p.gate = a.gate;
  p.gate_dtype = a.gate_dtype;
  p.q_stride = a.q_stride, p.k_stride = a.k_stride, p.v_stride = a.v_stride;
  p.gate_stride = a.gate_stride;
  p.cu_seqlens = a.seqs.cu_seqlens;
  p.num_seqs = a.seqs.num_seqs, p.num_rows = a.seqs.num_rows, p.max_len = a.seqs.max_len;
  p.heads = a.num_heads, p.key_dim = a.key_dim, p.value_dim = a.value_dim;
  p.scale = a.scale;
  const int columns = p.heads * (p.value_dim / 64);
  p.segment_goal = std::max(1, WalkSlots(p.key_dim) / columns);
  p.least_segment_tiles = kLeastSegmentTiles;
  p.long_tiles = p.key_dim == 256 ? kLongTiles : std::numeric_limits<int>::max();
  if (CeilDiv(p.max_len, kTileTokens) > kUncutTiles && p.segment_goal > 1) {
    const int64_t seqs = std::min(p.num_seqs, kMaxSegmentedSeqs);
    const int64_t tiles = p.num_rows / kTileTokens + seqs;
    const int most = CeilDiv(p.max_len, kTileTokens) < p.long_tiles ? 1 : 2;
    p.max_segments = std::min(seqs * most * p.segment_goal, seqs + tiles / kLeastSegmentTiles);
    // Walked from end to end, sequences of the longest one's length must come near to filling it.
    const int64_t blocks = int64_t{p.num_rows} / p.max_len * columns;
    p.is_segmented = p.num_seqs <= kMaxSegmentedSeqs && blocks < 96;
  }
  return p;
}

int64_t WalkItems(const TensorProblem& p) {
  if (!p.is_segmented) return p.num_seqs;
  if (p.num_seqs > 1) return p.max_segments;
  const int tiles = CeilDiv(p.num_rows, kTileTokens);  // or fewer
  const int goal = tiles < p.long_tiles ? p.segment_goal : 2 * p.segment_goal;
  return std::min(goal, CeilDiv(tiles, p.least_segment_tiles));
}

}  // namespace

bool TensorForwardFits(const LinearAttentionArgs& a) {
  const auto aligned = [&](const void* data, int64_t stride) {
    return AllowsPieces(data, stride, a.dtype);
  };
  return a.dtype == DType::kBFloat16 && a.key_sum_state == nullptr &&
         a.num_kv_heads == a.num_heads && a.state_heads == a.num_heads &&
         TensorDimsFit(a.key_dim, a.value_dim) && aligned(a.q, a.q_stride) &&
         aligned(a.k, a.k_stride) && aligned(a.v, a.v_stride) && aligned(a.o, a.o_stride) &&
         (a.gate_kind != GateKind::kPerKey || AllowsPieces(a.gate, a.gate_stride, a.gate_dtype)) &&
         IsAligned(a.state, 16) && a.state_stride % 4 == 0;
}

size_t TensorForwardBytes(const LinearAttentionArgs& a) {
  TensorProblem p = ProblemOf(a);
  return PlaceWorkspace(p, 1, nullptr);
}

void TensorForward(Device& device, const LinearAttentionArgs& a) {
  TensorProblem p = ProblemOf(a);
  PlaceWorkspace(p, 1, static_cast<char*>(a.workspace));
  Prepare(device, p);
  const WalkArgs w = {.initial = {a.state, a.seqs.read_slots, a.state_stride},
                      .final = {a.state, a.seqs.write_slots, a.state_stride},
                      .o = static_cast<bf16*>(a.o),
                      .o_stride = a.o_stride,
                      .items = WalkItems(p)};
  if (p.is_segmented) {
    Chains chains = {.count = 1};
    chains.of[0] = {.keys = p.keys,
                    .values = TilesOf(p.v, p.num_rows, p.heads, p.value_dim, p.v_stride),
                    .backwards = false,
                    .initial = w.initial,  // read before anyone writes a slot
                    .final = {}};
    SegmentStarts(device, p, chains);
  }
  WithKeyDim(p.key_dim, [&]<int K>() {
    if constexpr (K == 128) {
      if (w.items * p.heads * (p.value_dim / 64) <= kMultiprocessors) {
        return LaunchWalk<K, true>(device, p, w);
      }
    }
    LaunchWalk<K, false>(device, p, w);
  });
}

}  // namespace gla
