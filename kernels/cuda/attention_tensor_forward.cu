// The forward pass of the chunkwise form on tensor cores: Prepare, Chain, then every tile's
//   o = q~ S + A v
// at once, S the state before the tile.
#include "kernels/cuda/attention_tensor.cuh"
#include "kernels/cuda/attention_tensor_entry.h"

namespace gla {
namespace {

template <int K>
constexpr size_t OutputBytes() {
  return 1024 + 2 * K * kTileRowBytes + 2 * kTileBytes;
}

// A block to a (tile, head, 64 columns of V).
template <int K>
__global__ void __launch_bounds__(128)
    OutputKernel(const TensorProblem p, const char* states, bf16* o, int64_t o_stride) {
  extern __shared__ __align__(16) char raw_shared[];
  char* const queries = AlignedShared(raw_shared);
  char* const state = queries + K * kTileRowBytes;
  char* const scores = state + K * kTileRowBytes;
  char* const values = scores + kTileBytes;
  const int value_tiles = p.value_dim / 64, value_tile = blockIdx.x % value_tiles;
  TilePlace at;
  if (!at.Find(p, blockIdx.x / value_tiles)) return;
  const int id = threadIdx.x;
  const int64_t column = int64_t{at.head} * p.value_dim + 64 * value_tile;
  CopyLinear<K * kTileRowBytes, 128>(queries, p.queries + at.index * K * kTileRowBytes, id);
  CopyLinear<K * kTileRowBytes, 128>(
      state, states + (at.index * value_tiles + value_tile) * K * kTileRowBytes, id);
  CopyLinear<kTileBytes, 128>(scores, p.scores + at.index * kTileBytes, id);
  CopyTile<128>(values, p.v + at.row0 * p.v_stride + column, p.v_stride, at.tokens, id);
  CommitCopies();
  WaitCopies<0>();
  FenceShared();
  __syncthreads();

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
  __syncthreads();  // `values` becomes the result's place

#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    *reinterpret_cast<uint32_t*>(values + TileElement(SumRow(i), SumColumn(i / 4, 0))) =
        PackBf16(sum[i], sum[i + 1]);
  }
  __syncthreads();
  StoreTile<128>(o + at.row0 * o_stride + column, o_stride, values, at.tokens, id);
}

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
  return p;
}

int64_t StateImageBytes(const TensorProblem& p) {
  return p.max_tiles() * p.heads * p.value_dim / 64 * p.key_dim * kTileRowBytes;
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
  return PlaceWorkspace(p, 1, nullptr) + StateImageBytes(p);
}

void TensorForward(Device& device, const LinearAttentionArgs& a) {
  const cudaStream_t stream = Queue(device);
  TensorProblem p = ProblemOf(a);
  char* const workspace = static_cast<char*>(a.workspace);
  char* const states = workspace + PlaceWorkspace(p, 1, workspace);
  Prepare(p, stream);
  Chains chains = {.count = 1};
  chains.of[0] = {.keys = p.keys,
                  .values = p.v,
                  .value_stride = p.v_stride,
                  .backwards = false,
                  .initial = {a.state, a.seqs.read_slots, a.state_stride},
                  .final = {a.state, a.seqs.write_slots, a.state_stride},
                  .states = states};
  Chain(p, chains, stream);
  WithKeyDim(p.key_dim, [&]<int K>() {
    AllowShared(OutputKernel<K>, OutputBytes<K>());
    OutputKernel<K>
        <<<GridOf(p.max_tiles() * p.heads * (p.value_dim / 64)), 128, OutputBytes<K>(), stream>>>(
            p, states, static_cast<bf16*>(a.o), a.o_stride);
  });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
