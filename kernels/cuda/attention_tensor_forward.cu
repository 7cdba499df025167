// The forward pass of the chunkwise form on tensor cores: Prepare, then from tile to tile
//   o = q~ S + A v    S = D S + k~^T v
// with S in registers: no state but a sequence's last leaves the chip.
//
// Inside a segment S is kept as P s + E, s the segment's start state, P the product of the decays
// since and E what the segment itself has added. So the start state of the next segment is
// fma(P, s, E) whether one block walks through all segments of a sequence, or FindStarts has made E
// and s of all segments before and each is a block's own: the bits are the same, and the choice can
// be made by what fills the device.
#include <algorithm>

#include "kernels/cuda/attention_tensor.cuh"
#include "kernels/cuda/attention_tensor_entry.h"

namespace gla {
namespace {

template <int K>
struct WalkShape {
  static constexpr int kGroups = K / 64;  // of four warps, 64 rows of the state each
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kBlocks = K == 64 ? 3 : K == 128 ? 2 : 1;  // on a multiprocessor at once
  static constexpr int kImageBytes = K * kTileRowBytes;           // of q~, k~ or S
  static constexpr int kStages = 2;
  static constexpr int kStageBytes = 2 * kImageBytes + 2 * kTileBytes;  // q~, k~, A, v
  static constexpr size_t kBytes = 1024 + kStages * kStageBytes + kImageBytes;
};

// A block to a (segment or sequence, head, 64 columns of V).
template <int K>
__global__ void __launch_bounds__(WalkShape<K>::kThreads, WalkShape<K>::kBlocks)
    WalkKernel(const TensorProblem p, const States initial, const States final, bf16* o,
               int64_t o_stride) {
  using Shape = WalkShape<K>;
  constexpr int kThreads = Shape::kThreads;
  extern __shared__ __align__(1024) char raw_shared[];
  char* const stages = AlignedShared(raw_shared);
  char* const state = stages + Shape::kStages * Shape::kStageBytes;  // S; then the tile of o
  WaitForPrevious();
  AllowNext();
  const int id = threadIdx.x, group = GroupOfWarps();
  const int value_tiles = p.value_dim / 64, value_tile = blockIdx.x % value_tiles;
  const int head = blockIdx.x / value_tiles % p.heads;
  const int item = blockIdx.x / value_tiles / p.heads;
  const int seq = p.is_segmented ? FindSequence(p.segment_begin, p.num_seqs, item) : item;
  if (seq < 0) return;
  const int first_tile = p.tile_begin[seq], num_tiles = p.tile_begin[seq + 1] - first_tile;
  const int each = p.SegmentTiles(num_tiles);
  const int begin = p.is_segmented ? (item - p.segment_begin[seq]) * each : 0;
  const int end = p.is_segmented ? min(num_tiles, begin + each) : num_tiles;
  const int64_t row_begin = p.cu_seqlens[seq];
  const int length = p.cu_seqlens[seq + 1] - static_cast<int>(row_begin);
  const int64_t column = int64_t{head} * p.value_dim + 64 * value_tile;
  const int row = 64 * group + SumRow(0);  // and row + 8

  const auto index_of = [&](int tile) { return int64_t{first_tile + tile} * p.heads + head; };
  const auto load = [&](int tile) {
    if (tile < end) {
      char* const stage = stages + tile % Shape::kStages * Shape::kStageBytes;
      const int64_t index = index_of(tile);
      CopyLinear<Shape::kImageBytes, kThreads>(stage, p.queries + index * Shape::kImageBytes, id);
      CopyLinear<Shape::kImageBytes, kThreads>(stage + Shape::kImageBytes,
                                               p.keys + index * Shape::kImageBytes, id);
      CopyLinear<kTileBytes, kThreads>(stage + 2 * Shape::kImageBytes,
                                       p.scores + index * kTileBytes, id);
      CopyTile<kThreads>(stage + 2 * Shape::kImageBytes + kTileBytes,
                         p.v + (row_begin + int64_t{kTileTokens} * tile) * p.v_stride + column,
                         p.v_stride, min(kTileTokens, length - kTileTokens * tile), id);
    }
    CommitCopies();
  };
  float next_decays[2] = {};
  const auto load_decays = [&](int tile) {
    if (tile >= end) return;
    const float* const from = p.decays + index_of(tile) * K + row;
    next_decays[0] = from[0], next_decays[1] = from[8];
  };

  load(begin);
  load_decays(begin);
  float start[32] = {}, own[32] = {}, product[2] = {1, 1};  // s, E, P
  // where element pair i of a thread stands in a state of [K, V]
  const auto place = [&](int i) {
    return (int64_t{head} * K + row + (i & 2 ? 8 : 0)) * p.value_dim + 64 * value_tile +
           SumColumn(i / 4, 0);
  };
  const float* from = initial.Of(seq);
  if (p.is_segmented) from = p.starts[0] + int64_t{item} * p.heads * K * p.value_dim;
  if (from != nullptr) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const float2 pair = *reinterpret_cast<const float2*>(from + place(i));
      start[i] = pair.x, start[i + 1] = pair.y;
    }
  }
  int left = each;  // tiles of this segment

  for (int tile = begin; tile < end; ++tile) {
    const char* const queries = stages + tile % Shape::kStages * Shape::kStageBytes;
    const char* const keys = queries + Shape::kImageBytes;
    const char* const scores = keys + Shape::kImageBytes;
    const char* const values = scores + kTileBytes;
    WaitCopies<0>();
    FenceShared();
    __syncthreads();  // also: nobody reads the other stage or `state` any more
    load(tile + 1);
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
    for (int i = 0; i < 32; ++i) own[i] *= decays[i / 2 % 2];

    const auto update = [&] {
      BeginProducts();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Wgmma<64, kAlongRows, kAlongRows>(own,
                                          TileOperand<kAlongRows>(keys + group * kTileBytes, i),
                                          TileOperand<kAlongRows>(values, i));
      }
      CommitProducts();
    };
    if (group != (tile - begin) % Shape::kGroups) {
      update();
      __syncthreads();  // S is whole
      WaitProducts<0>();
      continue;
    }
    // the groups take turns at o
    float sum[32];
    update();
    __syncthreads();
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

  float* const to = end == num_tiles ? final.Of(seq) : nullptr;
  if (to == nullptr) return;
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    const float factor = product[i / 2 % 2];
    float2 pair = {start[i], start[i + 1]};
    if (begin < end) pair = {fmaf(factor, pair.x, own[i]), fmaf(factor, pair.y, own[i + 1])};
    *reinterpret_cast<float2*>(to + place(i)) = pair;
  }
}

// Blocks of WalkKernel that fill the device once.
int WalkSlots(int key_dim) { return key_dim == 256 ? 128 : 256; }
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
  if (CeilDiv(p.max_len, kTileTokens) > kUncutTiles && p.segment_goal > 1) {
    const int64_t seqs = std::min(p.num_seqs, kMaxSegmentedSeqs);
    const int64_t tiles = p.num_rows / kTileTokens + seqs;
    p.max_segments = std::min(seqs * p.segment_goal, seqs + tiles / kLeastSegmentTiles);
    // Walked from end to end, sequences of the longest one's length must come near to filling it.
    const int64_t blocks = int64_t{p.num_rows} / p.max_len * columns;
    p.is_segmented = p.num_seqs <= kMaxSegmentedSeqs && blocks < 96;
  }
  return p;
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
  const States initial = {a.state, a.seqs.read_slots, a.state_stride};
  const States final = {a.state, a.seqs.write_slots, a.state_stride};
  if (p.is_segmented) {  // also reads the slots before anyone writes them
    Chains chains = {.count = 1};
    chains.of[0] = {.keys = p.keys,
                    .values = p.v,
                    .value_stride = p.v_stride,
                    .backwards = false,
                    .initial = initial,
                    .final = {}};
    FindStarts(device, p, chains);
  }
  const int64_t items = p.is_segmented ? p.max_segments : p.num_seqs;
  WithKeyDim(p.key_dim, [&]<int K>() {
    LaunchOverlapped(device, WalkKernel<K>,
                     {.blocks = GridOf(items * p.heads * (p.value_dim / 64)),
                      .threads = WalkShape<K>::kThreads,
                      .shared_bytes = WalkShape<K>::kBytes},
                     p, initial, final, static_cast<bf16*>(a.o), a.o_stride);
  });
}

}  // namespace gla
