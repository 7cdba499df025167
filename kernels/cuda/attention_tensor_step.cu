// The gradients of the chunkwise form on tensor cores where a step has one decay, or none: no state
// but the starts of segments leaves the chip, and nothing is prepared but the sums of gates.
//
// All three gradients are one walk from tile to tile, with other inputs:
//   out_t = f_t (query_t S) + sum_s A_ts value_s    A_ts = scale (query_t . key_s) 2^-|G_t - G_s|
//   S = D S + sum_s key_s^T (h_s value_s)
// over the tokens s of t's tile that are not ahead of it on the way:
//        query  key  value  on the way   S [rows, columns]        f           h
//   dq   do     v    k      forwards     the state, transposed    scale 2^G   2^(G_C - G)
//   dk   v      do   q      backwards    its gradient, transposed 2^(G_C - G) scale 2^G
//   dv   k      q    do     backwards    its gradient             2^(G_C - G) scale 2^G
// A block has 64 columns of a head's S in registers, all rows, and walks through a segment.
//
// The gate's gradient is the sum over all pairs s < t <= t' of what t' has of s: with
// X_t = q_t . dq_t, Y_s = k_s . dk_s, each split into its pairs with other tiles and within,
//   dg_t = Z + sum_{t' >= t} X_t' + sum_{s < t} Y_s + sum_{t' >= t} (X - Y)_t' within the tile
// t, t' and s in one tile, and Z = D S dS of the tile, the pairs across it. With W the sum over
// S dS where a tile ends, which at a sequence's end is given,
//   Z = W - sum over the tile of Y    W where the tile before ends = Z + sum over the tile of X
// so W goes from tile to tile and needs no states, if nothing is lost on the way: all must be sums
// of the same rounded terms. What a state is made of (h value in bfloat16) is what X and Y take
// beside it; and where a state is rounded to be an operand, what it loses is multiplied out for the
// tile's sum (`lost`).
#include "kernels/cuda/attention_tensor.cuh"
#include "kernels/cuda/attention_tensor_entry.h"
#include "kernels/cuda/tensor_map.h"

namespace gla {
namespace {

enum class StepWalk {
  kOutputs,   // out
  kProducts,  // the same, and X or Y
};

// The matrices, by their places in StepProblem::maps.
enum StepInput { kQueries, kKeys, kValues, kOutputGradients, kStepInputs };

struct StepJob {
  StepInput query, key, value;
  StepInput partner;   // of `out` in X or Y
  int rows, columns;   // of a head's S
  bool is_transposed;  // S [rows, columns] as [columns, rows] in memory
  bool backwards;
  bf16* out;  // [T, H, columns]
  States initial, final;
  States across;  // what the last S is multiplied with for W at the sequence's end
};

struct StepProblem {
  CUtensorMap maps[kStepInputs];  // boxes of 64 tokens x 64 columns
  TensorProblem p;
  float* gates;  // G: [tiles, H, 64]
  // By job, 0 forwards and 1 backwards, and by 64 columns.
  float2* products;     // X, Y, with other tiles and within the tile: [2, parts, tiles, H, 64]
  float* tile_sums;     // of X, Y with other tiles: [2, parts, tiles, H, kTileSums]
  float* end_products;  // W at a sequence's end, in parts: [parts, N, H, kEndSums]
  float* across;        // Z: [tiles, H]
  StepJob jobs[2];
  int num_jobs;

  __device__ int64_t tile_heads() const { return p.max_tiles() * p.heads; }
};
// A warp's part each: of the holders' eight (what rounding lost), then of the readers' four.
constexpr int kEndSums = 8, kTileSums = kEndSums + 4;

constexpr int kHolderRegisters = 184, kReaderRegisters = 136;  // of a thread, where uneven

// kChunks: of 64 rows of S. Some groups of four warps have S and move it on; others, tile by tile
// in turns, read it and make out, and one thread of theirs copies.
template <int kChunks, StepWalk kWalk>
struct StepShape {
  static constexpr bool kProducts = kWalk == StepWalk::kProducts;
  static constexpr int kHolders = kChunks == 1 ? 1 : 2;
  static constexpr int kReaders = kChunks == 8 ? 1 : 2;
  static constexpr int kPerGroup = kChunks / kHolders;
  static constexpr int kThreads = 128 * (kHolders + kReaders);
  static constexpr bool kUneven = kChunks == 8;  // holders need more registers than readers
  // A zone has a tile's value (and partner), as they come or scaled. Where there is room, three for
  // those that come and one for scaled ones. Else two that take turns: when S has moved on, the
  // scaled ones give their place to the next tile's.
  static constexpr int kZoneBytes = kProducts ? 2 * kTileBytes : kTileBytes;
  static constexpr bool kIsTight = kChunks == 8;
  static constexpr int kZones = kIsTight ? 2 : 4, kRawZones = kIsTight ? 2 : 3;
  // A slot has 64 columns of a tile's query and key.
  static constexpr int kSlotBytes = 2 * kTileBytes;
  static constexpr int kStages = kIsTight ? 1 : 2;  // tiles of slots
  static constexpr int kHeaderBytes = 2048;         // barriers, gates
  static constexpr size_t kBytes =
      kHeaderBytes + kZones * kZoneBytes + kChunks * kTileBytes + kStages * kChunks * kSlotBytes;
};

// A block to a (job, segment or sequence, head, 64 columns of S).
template <int kChunks, StepWalk kWalk>
__global__ void __launch_bounds__(StepShape<kChunks, kWalk>::kThreads, 1)
    StepWalkKernel(const __grid_constant__ StepProblem w) {
  using Shape = StepShape<kChunks, kWalk>;
  constexpr bool kProducts = Shape::kProducts;
  constexpr int kHolders = Shape::kHolders, kReaders = Shape::kReaders;
  constexpr int kPerGroup = Shape::kPerGroup, kStages = Shape::kStages;
  constexpr int kHolderThreads = 128 * kHolders;
  constexpr int kRowStep = 16 * kTileRowBytes >> 4, kColumnStep = 32 >> 4;  // of operands
  constexpr int kSlotStep = Shape::kSlotBytes >> 4;
  const TensorProblem& p = w.p;
  const StepJob& job = w.jobs[blockIdx.x % w.num_jobs];
  extern __shared__ __align__(1024) char raw_shared[];
  const uint32_t header = SharedAddress(raw_shared);
  if (header % 1024 != 0) __trap();
  // Barriers. `full`: a slot's bytes have come; `moved`: S has moved on by the slot's rows.
  const auto full = [&](int stage, int c) { return header + 8 * (stage * kChunks + c); };
  const auto moved = [&](int stage, int c) { return header + 128 + 8 * (stage * kChunks + c); };
  const auto values_full = [&](int zone) { return header + 256 + 8 * zone; };
  const uint32_t state_read = header + 288;
  // Of threads, by number: 1 and 2 + group are groups' own.
  const auto state_full = [](int i) { return 6 + i % 2; };  // a reader may begin
  constexpr int kTileRead = 8;                              // where tight: its zone is free
  static_assert(8 * kStages * kChunks <= 128 && 8 * Shape::kRawZones <= 32);
  float* const gates = reinterpret_cast<float*>(raw_shared + 1024);  // G, by zone
  char* const zones = raw_shared + Shape::kHeaderBytes;
  char* const state = zones + Shape::kZones * Shape::kZoneBytes;  // S in bfloat16
  char* const slots = state + kChunks * kTileBytes;
  const int id = threadIdx.x, lane = id % 32, warp = id / 32;
  if (id == 0) {
    for (int i = 0; i < kStages * kChunks; ++i) {
      InitBarrier(full(0, i), 1);
      InitBarrier(moved(0, i), 4);
    }
    for (int i = 0; i < Shape::kRawZones; ++i) InitBarrier(values_full(i), 1);
    InitBarrier(state_read, 4);
    FenceBarriers();
  }
  __syncthreads();
  WaitForPrevious();
  AllowNext();

  const int parts = job.columns / 64, block = blockIdx.x / w.num_jobs;
  const int part = block % parts, head = block / parts % p.heads, item = block / parts / p.heads;
  SegmentPlace at;
  if (!at.Find(p, item)) return;
  const int seq = at.seq, first_tile = at.first_tile, num_tiles = at.num_tiles, begin = at.begin;
  const bool is_last = at.is_last;
  const int count = at.end - begin;
  const int row_begin = p.cu_seqlens[seq], length = p.cu_seqlens[seq + 1] - row_begin;
  const bool backwards = job.backwards;
  const float scale = p.scale;
  // The i-th tile on the way.
  const auto tile_of = [&](int i) { return backwards ? num_tiles - 1 - (begin + i) : begin + i; };
  const auto index_of = [&](int i) { return int64_t{first_tile + tile_of(i)} * p.heads + head; };
  const auto product_row = [&](int i) {
    return (int64_t{backwards} * parts + part) * w.tile_heads() + index_of(i);
  };
  const auto stage_of = [&](int i) { return slots + i % kStages * (kChunks * Shape::kSlotBytes); };
  const auto zone_of = [&](int i) { return zones + i % Shape::kRawZones * Shape::kZoneBytes; };
  const auto gates_of = [&](int i) { return gates + i % Shape::kRawZones * kTileTokens; };
  // of stages, and of zones
  const auto round_of = [&](int i) { return i / kStages & 1; };
  const auto values_round_of = [&](int i) { return i / Shape::kRawZones & 1; };
  const auto to_end = [](const float* g, int row) { return Exp2(g[kTileTokens - 1] - g[row]); };
  const auto from_start = [&](const float* g, int row) { return scale * Exp2(g[row]); };

  const int group = GroupOfWarps();
  if (group >= kHolders) {
    if constexpr (Shape::kUneven) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kReaderRegisters));
    }
    const bool is_copier = id % 128 == 0;
    const auto copy_chunk = [&](int i, int c) {
      const uint32_t barrier = full(i % kStages, c);
      const int column = head * (64 * kChunks) + 64 * c;
      const int row = row_begin + kTileTokens * tile_of(i);
      const uint32_t to = SharedAddress(stage_of(i) + c * Shape::kSlotBytes);
      ArriveExpecting(barrier, Shape::kSlotBytes);
      CopyBox(to, w.maps[job.query], barrier, column, row);
      CopyBox(to + kTileBytes, w.maps[job.key], barrier, column, row);
    };
    const auto copy_values = [&](int i) {
      const uint32_t barrier = values_full(i % Shape::kRawZones), to = SharedAddress(zone_of(i));
      const int row = row_begin + kTileTokens * tile_of(i), column = head * job.columns + 64 * part;
      ArriveExpecting(barrier, Shape::kZoneBytes + kTileTokens * 4);
      CopyBox(to, w.maps[job.value], barrier, column, row);
      if constexpr (kProducts) {
        CopyBox(to + kTileBytes, w.maps[job.partner], barrier, column, row);
      }
      CopyBulk(SharedAddress(gates_of(i)), w.gates + index_of(i) * kTileTokens, kTileTokens * 4,
               barrier);
    };
    // Fills the slot again that tile i has left. A product is the whole group's: when it has ended
    // for one warp, it has for all.
    const auto copy_again = [&](int i, int c) {
      if (i + kStages >= count) return;
      WaitBarrier(moved(i % kStages, c), round_of(i));
      copy_chunk(i + kStages, c);
    };
    if (id == kHolderThreads) {
      for (int i = 0; i < min(count, Shape::kIsTight ? 1 : Shape::kRawZones); ++i) copy_values(i);
      for (int i = 0; i < min(count, kStages); ++i) {
        for (int c = 0; c < kChunks; ++c) copy_chunk(i, c);
      }
    }
    __syncwarp();
    for (int i = group - kHolders; i < count; i += kReaders) {
      const int tile = tile_of(i), tokens = min(kTileTokens, length - kTileTokens * tile);
      char* const value = zone_of(i);
      const float* const g = gates_of(i);
      uint64_t query = TileOperand<kAlongColumns>(stage_of(i), 0);
      uint64_t rows_of_state = TileOperand<kAlongRows>(state, 0);
      uint32_t partner = SharedAddress(value + kTileBytes) + TilePiece(SumRow(0), 0) + lane % 4 * 4;
      // so that what is added to them is not kept in registers from tile to tile
      asm volatile("" : "+l"(query), "+l"(rows_of_state), "+r"(partner));
      asm volatile("bar.sync %0, %1;" ::"r"(state_full(i)), "n"(kHolderThreads + 128) : "memory");
      float scores[32], out[32];
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        scores[n] = out[n] = 0;
        asm volatile("" : "+f"(scores[n]), "+f"(out[n]));  // before the products begin
      }
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c) {
        WaitBarrier(full(i % kStages, c), round_of(i));
        BeginProducts();
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          Wgmma<64, kAlongColumns, kAlongColumns>(scores, query + n * kColumnStep,
                                                  query + (kTileBytes >> 4) + n * kColumnStep);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          Wgmma<64, kAlongColumns, kAlongRows>(out, query + n * kColumnStep,
                                               rows_of_state + n * kRowStep);
        }
        CommitProducts();
        query += kSlotStep, rows_of_state += kTileBytes >> 4;
        if (c > 0) {
          WaitProducts<1>();
          if (is_copier) copy_again(i, c - 1);
          __syncwarp();
        }
      }
      WaitProducts<0>();
      __syncwarp();
      if (lane == 0) Arrive(state_read);
      const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory"); };
      if (is_copier) {
        copy_again(i, kChunks - 1);
        if (Shape::kIsTight && i + 1 < count) copy_values(i + 1);
      }
      __syncwarp();

      uint32_t a[4][4];
      const float sign = backwards ? -1.0f : 1.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = SumRow(2 * half), first = backwards ? row : 0;
        const unsigned others =
            backwards ? max(tokens - row, 0) : row + 1;  // that count, from `first` on
        const float gate = sign * g[row];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int column = SumColumn(j, 0);
          const float2 other = *reinterpret_cast<const float2*>(g + column);
          const auto score = [&](int at, float other_gate, float x) {
            const float factor = scale * Exp2(fmaf(-sign, other_gate, gate));
            return static_cast<unsigned>(at - first) < others ? factor * x : 0.0f;
          };
          a[j / 2][j % 2 * 2 + half] =
              PackBf16(score(column, other.x, scores[4 * j + 2 * half]),
                       score(column + 1, other.y, scores[4 * j + 2 * half + 1]));
        }
      }
      const auto out_factor = [&](int row) {
        return backwards ? to_end(g, row) : from_start(g, row);
      };
      const float factors[2] = {out_factor(SumRow(0)), out_factor(SumRow(2))};
      // The partner of elements n and n + 1; eight columns further are another 16-byte piece.
      const auto partner_of = [&](int n) {
        uint32_t pair;
        asm volatile("ld.shared.b32 %0, [%1];"
                     : "=r"(pair)
                     : "r"((partner ^ (n / 4) << 4) + n / 2 % 2 * 8 * kTileRowBytes));
        return UnpackBf16(pair);
      };
      float products[2] = {}, before[2] = {}, after[2] = {};
      if constexpr (kProducts) {
#pragma unroll
        for (int n = 0; n < 32; n += 2) {
          const int half = n / 2 % 2;
          const float2 x = partner_of(n);
          const float2 y = UnpackBf16(PackBf16(x.x * factors[half], x.y * factors[half]));
          products[half] = fmaf(y.x, out[n], fmaf(y.y, out[n + 1], products[half]));
          before[half] = fmaf(x.x, out[n], fmaf(x.y, out[n + 1], before[half]));
        }
      }
#pragma unroll
      for (int n = 0; n < 32; ++n) out[n] *= factors[n / 2 % 2];
      BeginProducts();
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        WgmmaFromRegisters<kAlongRows>(out, a[n], TileOperand<kAlongRows>(value, n));
      }
      CommitProducts();
      WaitProducts<0>();
      if constexpr (kProducts) {
#pragma unroll
        for (int n = 0; n < 32; n += 2) {
          const float2 x = partner_of(n);
          after[n / 2 % 2] = fmaf(x.x, out[n], fmaf(x.y, out[n + 1], after[n / 2 % 2]));
        }
        const int64_t to = product_row(i);
        const float all = WarpSum(products[0] + products[1]);
        if (lane == 0) w.tile_sums[to * kTileSums + kEndSums + warp % 4] = all;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x = products[half], y = after[half] - factors[half] * before[half];
          for (int mask = 1; mask < 4; mask *= 2) {
            x += __shfl_xor_sync(0xFFFFFFFFu, x, mask);
            y += __shfl_xor_sync(0xFFFFFFFFu, y, mask);
          }
          if (lane % 4 == 0) w.products[to * kTileTokens + SumRow(2 * half)] = {x, y};
        }
      }
      uint32_t pairs[16];
#pragma unroll
      for (int n = 0; n < 16; ++n) pairs[n] = PackBf16(out[2 * n], out[2 * n + 1]);
      meet();  // the value has been read: its place serves to bring rows together
      StoreSums(value, pairs);
      meet();
      const int64_t stride = int64_t{p.heads} * job.columns;
      StoreTile<128>(job.out + (row_begin + int64_t{kTileTokens} * tile) * stride +
                         int64_t{head} * job.columns + 64 * part,
                     stride, value, tokens, id % 128);
      if constexpr (Shape::kIsTight) {
        if (i + 1 < count) {
          asm volatile("bar.arrive %0, %1;" ::"n"(kTileRead), "n"(kHolderThreads + 128) : "memory");
        }
      } else {
        FenceShared();
        meet();
        if (is_copier && i + Shape::kRawZones < count) copy_values(i + Shape::kRawZones);
        __syncwarp();
      }
    }
    return;
  }

  if constexpr (Shape::kUneven) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kHolderRegisters));
  }
  const auto meet = [&] { asm volatile("bar.sync 1, %0;" ::"n"(kHolderThreads) : "memory"); };
  // Where element i of this thread's chunk j stands in a head's state in memory.
  const int64_t row_step = job.is_transposed ? 1 : job.columns;
  const int64_t column_step = job.is_transposed ? 64 * kChunks : 1;
  const auto place = [&](int j, int i) {
    return (64 * (group * kPerGroup + j) + SumRow(i)) * row_step +
           (64 * part + SumColumn(i / 4, i)) * column_step;
  };
  const int64_t head_size = int64_t{64 * kChunks} * job.columns;
  const int64_t item_head = int64_t{item} * p.heads + head;
  float s[kPerGroup][32] = {};
  const float* from = nullptr;
  if (p.is_segmented) {
    from = p.starts[backwards] + item_head * head_size;
  } else if (job.initial.Of(seq) != nullptr) {
    from = job.initial.Of(seq) + head * head_size;
  }
  if (from != nullptr) {
#pragma unroll
    for (int j = 0; j < kPerGroup; ++j) {
#pragma unroll
      for (int i = 0; i < 32; ++i) s[j][i] = from[place(j, i)];
    }
  }
  // This warp's of eight parts of a sum.
  const auto store_sum = [&](float* sums, float sum) {
    sums[warp] = sum;
    if (kHolders == 1) sums[warp + 4] = 0;
  };
  for (int i = 0; i < count; ++i) {
    const int tokens = min(kTileTokens, length - kTileTokens * tile_of(i));
    char* const value = zone_of(i);
    char* const scaled = zones + (Shape::kIsTight ? ~i & 1 : 3) * Shape::kZoneBytes;
    const float* const g = gates_of(i);
    char* const query = stage_of(i);
    char* const key = query + kTileBytes;
    WaitBarrier(values_full(i % Shape::kRawZones), values_round_of(i));
    if (Shape::kIsTight && i > 0) {
      asm volatile("bar.sync %0, %1;" ::"n"(kTileRead), "n"(kHolderThreads + 128) : "memory");
    }
    meet();  // S has moved on by the tile before
#pragma unroll
    for (int piece = id; piece < kTileTokens * 8; piece += kHolderThreads) {
      const int row = piece / 8;
      const float a = to_end(g, row), b = from_start(g, row);
      uint4 x = *reinterpret_cast<const uint4*>(value + piece * 16);
      if (row >= tokens) *reinterpret_cast<uint4*>(value + piece * 16) = x = {0, 0, 0, 0};
      *reinterpret_cast<uint4*>(scaled + piece * 16) = Scaled(x, backwards ? b : a);
      if constexpr (kProducts) {
        char* const partner = value + kTileBytes + piece * 16;
        uint4 y = *reinterpret_cast<const uint4*>(partner);
        if (row >= tokens) *reinterpret_cast<uint4*>(partner) = y = {0, 0, 0, 0};
        *reinterpret_cast<uint4*>(scaled + kTileBytes + piece * 16) = Scaled(y, backwards ? a : b);
      }
    }
    if (tokens < kTileTokens) {  // what follows belongs to others, who may have NaN there
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c) {
        WaitBarrier(full(i % kStages, c), round_of(i));
        for (int j = tokens * kTileRowBytes + id * 16; j < kTileBytes; j += kHolderThreads * 16) {
          *reinterpret_cast<uint4*>(key + c * Shape::kSlotBytes + j) = {0, 0, 0, 0};
          *reinterpret_cast<uint4*>(query + c * Shape::kSlotBytes + j) = {0, 0, 0, 0};
        }
      }
    }
    if (i > 0) WaitBarrier(state_read, (i - 1) & 1);
#pragma unroll
    for (int j = 0; j < kPerGroup; ++j) {
      uint32_t pairs[16];
#pragma unroll
      for (int n = 0; n < 16; ++n) pairs[n] = PackBf16(s[j][2 * n], s[j][2 * n + 1]);
      StoreSums(state + (group * kPerGroup + j) * kTileBytes, pairs);
    }
    FenceShared();
    __syncwarp();
    asm volatile("bar.arrive %0, %1;" ::"r"(state_full(i)), "n"(kHolderThreads + 128) : "memory");
    meet();

    const float decay = Exp2(g[kTileTokens - 1]);
    float lost = 0;
    uint64_t own_key = TileOperand<kAlongRows>(key + group * kPerGroup * Shape::kSlotBytes, 0);
    uint64_t scaled_value = TileOperand<kAlongRows>(scaled, 0);
    asm volatile("" : "+l"(own_key), "+l"(scaled_value));
#pragma unroll
    for (int j = 0; j < kPerGroup; ++j) {
      WaitBarrier(full(i % kStages, group * kPerGroup + j), round_of(i));
      if constexpr (kProducts) {
        constexpr int kColumns = kPerGroup > 1 ? 32 : 64;  // at once
#pragma unroll
        for (int first = 0; first < 64; first += kColumns) {
          float increment[kColumns / 2];
          BeginProducts();
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            Wgmma<kColumns, kAlongRows, kAlongRows>(
                increment, own_key - (kTileBytes >> 4) + j * kSlotStep + n * kRowStep,
                scaled_value + ((kTileBytes + 2 * first) >> 4) + n * kRowStep, n > 0);
          }
          CommitProducts();
          WaitProducts<0>();
#pragma unroll
          for (int n = 0; n < kColumns / 2; n += 2) {
            const float2 x = {s[j][first / 2 + n], s[j][first / 2 + n + 1]};
            // in another order than above, or the compiler keeps those pairs at hand
            const float2 kept = UnpackBf16(PackBf16(x.y, x.x));
            lost = fmaf(x.x - kept.y, increment[n], lost);
            lost = fmaf(x.y - kept.x, increment[n + 1], lost);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        s[j][n] *= decay;
        asm volatile("" : "+f"(s[j][n]));  // before the products begin
      }
      BeginProducts();
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Wgmma<64, kAlongRows, kAlongRows>(s[j], own_key + j * kSlotStep + n * kRowStep,
                                          scaled_value + n * kRowStep);
      }
      CommitProducts();
      WaitProducts<0>();
      __syncwarp();
      if (lane == 0) Arrive(moved(i % kStages, group * kPerGroup + j));
    }
    if constexpr (kProducts) {
      lost = WarpSum(lost);
      if (lane == 0) store_sum(w.tile_sums + product_row(i) * kTileSums, lost);
    }
  }

  float* to = nullptr;
  if (is_last && job.final.Of(seq) != nullptr) to = job.final.Of(seq) + head * head_size;
  const float* across = nullptr;
  if constexpr (kProducts) {
    if (is_last && job.across.Of(seq) != nullptr) across = job.across.Of(seq) + head * head_size;
  }
  float product = 0;
#pragma unroll
  for (int j = 0; j < kPerGroup; ++j) {
    if (to != nullptr) {
#pragma unroll
      for (int i = 0; i < 32; ++i) to[place(j, i)] = s[j][i];
    }
    if (across != nullptr) {
#pragma unroll
      for (int i = 0; i < 32; ++i) product = fmaf(s[j][i], across[place(j, i)], product);
    }
  }
  if constexpr (kProducts) {
    product = WarpSum(product);
    if (is_last && !backwards && lane == 0) {
      const int64_t row = (int64_t{part} * p.num_seqs + seq) * p.heads + head;
      store_sum(w.end_products + row * kEndSums, product);
    }
  }
}

// G of every tile and head: a warp each.
__global__ void __launch_bounds__(256) StepGatesKernel(const __grid_constant__ StepProblem w) {
  WaitForPrevious();
  AllowNext();
  TilePlace at;
  if (!at.Find(w.p, int64_t{blockIdx.x} * 8 + threadIdx.x / 32)) return;
  const int lane = threadIdx.x % 32;
  *reinterpret_cast<float2*>(w.gates + at.index * kTileTokens + 2 * lane) =
      StepGateSums(w.p, at, lane);
}

constexpr int kAcrossThreads = 256;

// The sum of kCount values, a multiple of four.
template <int kCount>
__device__ float SumOf(const float* x) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 four = LoadFour(x + i);
    sum += (four.x + four.y) + (four.z + four.w);
  }
  return sum;
}

// Z of each tile of a (sequence, head), from the last one on.
__global__ void __launch_bounds__(kAcrossThreads)
    AcrossKernel(const __grid_constant__ StepProblem w) {
  __shared__ float sums[kAcrossThreads / 32];
  WaitForPrevious();
  AllowNext();
  const TensorProblem& p = w.p;
  const int head = blockIdx.x % p.heads, seq = blockIdx.x / p.heads, id = threadIdx.x;
  const int first_tile = p.tile_begin[seq], num_tiles = p.tile_begin[seq + 1] - first_tile;
  const int parts = p.key_dim / 64;
  float carry = 0;
  for (int part = 0; part < parts; ++part) {
    carry += SumOf<kEndSums>(w.end_products +
                             ((int64_t{part} * p.num_seqs + seq) * p.heads + head) * kEndSums);
  }
  for (int base = (num_tiles - 1) / kAcrossThreads * kAcrossThreads; base >= 0;
       base -= kAcrossThreads) {
    const int tile = base + id;
    const int64_t index = int64_t{first_tile + tile} * p.heads + head;
    float own = 0, all_y = 0;
    if (tile < num_tiles) {
      for (int part = 0; part < parts; ++part) {
        const float* const x = w.tile_sums + (part * w.tile_heads() + index) * kTileSums;
        const float y = SumOf<kTileSums>(x + parts * w.tile_heads() * kTileSums);
        own += SumOf<kTileSums>(x) - y, all_y += y;
      }
    }
    float from_here = own;  // in the warp, then in the block
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_down_sync(0xFFFFFFFFu, from_here, step);
      if (id % 32 + step < 32) from_here += other;
    }
    const float next = __shfl_down_sync(0xFFFFFFFFu, from_here, 1);
    __syncthreads();  // `sums` has been read
    if (id % 32 == 0) sums[id / 32] = from_here;
    __syncthreads();
    float all = 0, later = 0;  // of the warps
    for (int i = kAcrossThreads / 32 - 1; i >= 0; --i) {
      if (i == id / 32) later = all;
      all += sums[i];
    }
    if (tile < num_tiles) {
      w.across[index] = (carry + ((id % 32 < 31 ? next : 0) + later)) - all_y;
    }
    carry += all;
  }
}

// dg: a warp to a tile and head.
__global__ void __launch_bounds__(256)
    StepGateGradientKernel(const __grid_constant__ StepProblem w, void* d_gate) {
  WaitForPrevious();
  AllowNext();
  const TensorProblem& p = w.p;
  TilePlace at;
  if (!at.Find(p, int64_t{blockIdx.x} * 8 + threadIdx.x / 32)) return;
  const int lane = threadIdx.x % 32, parts = p.key_dim / 64, t = 2 * lane;
  // of two tokens: from here on, and before
  float2 from_here = {0, 0}, before = {0, 0};
  for (int part = 0; part < parts; ++part) {
    const float2* const from = w.products + (part * w.tile_heads() + at.index) * kTileTokens + t;
    const float4 x = *reinterpret_cast<const float4*>(from);
    const float4 y = *reinterpret_cast<const float4*>(from + parts * w.tile_heads() * kTileTokens);
    from_here.x += x.x + (x.y - y.y), from_here.y += x.z + (x.w - y.w);
    before.x += y.x, before.y += y.z;
  }
  if (t >= at.tokens) from_here.x = before.x = 0;
  if (t + 1 >= at.tokens) from_here.y = before.y = 0;
  float after = 0, earlier = 0;  // of the other lanes
  {
    float suffix = from_here.x + from_here.y, prefix = before.x + before.y;
    for (int step = 1; step < 32; step *= 2) {
      const float x = __shfl_down_sync(0xFFFFFFFFu, suffix, step);
      const float y = __shfl_up_sync(0xFFFFFFFFu, prefix, step);
      if (lane + step < 32) suffix += x;
      if (lane >= step) prefix += y;
    }
    const float x = __shfl_down_sync(0xFFFFFFFFu, suffix, 1);
    const float y = __shfl_up_sync(0xFFFFFFFFu, prefix, 1);
    after = lane < 31 ? x : 0;
    earlier = lane > 0 ? y : 0;
  }
  const float z = w.across[at.index];
  const int64_t to = (at.row0 + t) * p.gate_stride + at.head;
  if (t < at.tokens) {
    StoreGate(p, d_gate, to, z + ((from_here.x + from_here.y + after) + earlier));
  }
  if (t + 1 < at.tokens) {
    StoreGate(p, d_gate, to + p.gate_stride, z + ((from_here.y + after) + (earlier + before.x)));
  }
}

// The parts of the workspace from `memory` on, and its bytes (memory null: only counts).
size_t PlaceStepWorkspace(StepProblem& w, bool with_products, char* memory) {
  TensorProblem& p = w.p;
  size_t used = 0;
  const auto place = [&]<typename T>(T*& pointer, int64_t count) {
    pointer = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
    used += RoundUp<size_t>(count * sizeof(T), 256);
  };
  const int64_t tile_heads = p.max_tiles() * p.heads, segment_heads = p.max_segments * p.heads;
  const int64_t parts = p.key_dim / 64;
  place(p.tile_begin, p.num_seqs + 1);
  place(p.segment_begin, p.num_seqs + 1);
  place(w.gates, tile_heads * kTileTokens);
  for (int i = 0; i < 2; ++i) {
    place(p.starts[i], segment_heads * p.key_dim * p.value_dim);
    place(p.segment_decays[i], segment_heads * p.key_dim);
  }
  if (!with_products) return used;
  place(w.products, 2 * parts * tile_heads * kTileTokens);
  place(w.tile_sums, 2 * parts * tile_heads * kTileSums);
  place(w.end_products, parts * p.num_seqs * p.heads * kEndSums);
  place(w.across, tile_heads);
  return used;
}

template <int kChunks, StepWalk kWalk>
void LaunchStepWalk(Device& device, const StepProblem& w) {
  using Shape = StepShape<kChunks, kWalk>;
  const int64_t items = w.p.is_segmented ? w.p.max_segments : w.p.num_seqs;
  LaunchOverlapped(device, StepWalkKernel<kChunks, kWalk>,
                   {.blocks = GridOf(items * w.p.heads * (w.jobs[0].columns / 64) * w.num_jobs),
                    .threads = Shape::kThreads,
                    .shared_bytes = Shape::kBytes},
                   w);
}

template <StepWalk kWalk>
void LaunchStepWalk(Device& device, const StepProblem& w) {
  switch (w.jobs[0].rows) {
    case 64:
      return LaunchStepWalk<1, kWalk>(device, w);
    case 128:
      return LaunchStepWalk<2, kWalk>(device, w);
    case 256:
      return LaunchStepWalk<4, kWalk>(device, w);
    case 512:
      return LaunchStepWalk<8, kWalk>(device, w);
  }
  GLA_REQUIRES(false, "64, 128, 256 or 512 rows");
}

}  // namespace

size_t TensorStepBackwardBytes(const TensorProblem& p, bool wants_gate) {
  StepProblem w = {.p = p};
  return PlaceStepWorkspace(w, wants_gate, nullptr);
}

void TensorStepBackward(Device& device, const TensorProblem& problem,
                        const LinearAttentionBackwardArgs& a) {
  const bool wants_gate = a.d_gate != nullptr;
  StepProblem w = {.p = problem};
  TensorProblem& p = w.p;
  PlaceStepWorkspace(w, wants_gate, static_cast<char*>(a.workspace));
  const auto map_of = [&](const void* data, int dim) {
    return TilesOf(data, p.num_rows, p.heads, dim, int64_t{p.heads} * dim);
  };
  w.maps[kQueries] = map_of(p.q, p.key_dim);
  w.maps[kKeys] = map_of(p.k, p.key_dim);
  w.maps[kValues] = map_of(p.v, p.value_dim);
  w.maps[kOutputGradients] = map_of(a.d_o, p.value_dim);
  const int64_t stride = int64_t{p.heads} * p.key_dim * p.value_dim;
  const States initial = {const_cast<float*>(a.initial_state), nullptr, stride};
  const States d_final = {const_cast<float*>(a.d_final_state), nullptr, stride};
  const StepJob dq = {.query = kOutputGradients,
                      .key = kValues,
                      .value = kKeys,
                      .partner = kQueries,
                      .rows = p.value_dim,
                      .columns = p.key_dim,
                      .is_transposed = true,
                      .backwards = false,
                      .out = static_cast<bf16*>(a.dq),
                      .initial = initial,
                      .across = d_final};
  const StepJob dk = {.query = kValues,
                      .key = kOutputGradients,
                      .value = kQueries,
                      .partner = kKeys,
                      .rows = p.value_dim,
                      .columns = p.key_dim,
                      .is_transposed = true,
                      .backwards = true,
                      .out = static_cast<bf16*>(a.dk),
                      .initial = d_final};
  const StepJob dv = {.query = kKeys,
                      .key = kQueries,
                      .value = kOutputGradients,
                      .partner = kValues,
                      .rows = p.key_dim,
                      .columns = p.value_dim,
                      .is_transposed = false,
                      .backwards = true,
                      .out = static_cast<bf16*>(a.dv),
                      .initial = d_final,
                      .final = {a.d_initial_state, nullptr, stride}};
  const int64_t tile_heads = p.max_tiles() * p.heads;
  const LaunchShape warps = {.blocks = GridOf(CeilDiv<int64_t>(tile_heads, 8)), .threads = 256};
  FindTiles(device, p);
  LaunchOverlapped(device, StepGatesKernel, warps, w);
  w.jobs[0] = dq, w.jobs[1] = dk, w.num_jobs = 2;
  if (p.is_segmented) {
    Chains chains = {.count = 2, .gates = w.gates};
    chains.of[0] = {.raw_keys = w.maps[kKeys],
                    .values = w.maps[kValues],
                    .backwards = false,
                    .initial = initial};
    chains.of[1] = {.raw_keys = w.maps[kQueries],
                    .values = w.maps[kOutputGradients],
                    .backwards = true,
                    .initial = d_final};
    StepStarts(device, p, chains);
  }
  StepProblem values = w;
  values.jobs[0] = dv, values.num_jobs = 1;
  // Few sequences leave room for both; with many, the gate's small kernels find it beside dv.
  device.SideBySide(
      [&] { LaunchStepWalk<StepWalk::kOutputs>(device, values); },
      [&] {
        if (!wants_gate) return LaunchStepWalk<StepWalk::kOutputs>(device, w);
        LaunchStepWalk<StepWalk::kProducts>(device, w);
        LaunchOverlapped(
            device, AcrossKernel,
            {.blocks = GridOf(int64_t{p.num_seqs} * p.heads), .threads = kAcrossThreads}, w);
        LaunchOverlapped(device, StepGateGradientKernel, warps, w, a.d_gate);
      });
}

}  // namespace gla
