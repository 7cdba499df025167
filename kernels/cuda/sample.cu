// From logits to tokens: one block to a row, however many rows there are.
//
// Logits are compared as 32-bit keys that order as the floats do, so that ranks and ties are exact.
// Probabilities are kept as exp((logit - largest) / temperature), at most 1, and summed in double
// in an order fixed by the vocabulary's size. A set of likeliest tokens is (key, last id): all
// tokens above the key, and those at the key with an id up to the last. Finding one takes a
// bisection of the 2^32 keys, each step one pass over the row: no sorting, and no memory but the
// adjusted logits.
#include <cmath>

#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// Larger floats have larger keys; -0 counts as 0.
__device__ uint32_t KeyOf(float x) {
  const uint32_t bits = __float_as_uint(x == 0 ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float LogitOf(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// A token and its key in one number: larger for larger logits, then for lower ids. Never 0.
__device__ uint64_t RankOf(float logit, int token) {
  return uint64_t{KeyOf(logit)} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(token));
}
__device__ int TokenOf(uint64_t rank) {
  return static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(rank));
}
__device__ uint32_t KeyOfRank(uint64_t rank) { return static_cast<uint32_t>(rank >> 32); }

struct Shared {
  double sums[kWarps];
  unsigned long long ranks[kWarps];
};

// The largest rank of the block's, in every thread.
__device__ uint64_t BlockMax(uint64_t rank, Shared& shared) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint64_t other =
        __shfl_xor_sync(0xFFFFFFFFu, static_cast<unsigned long long>(rank), mask);
    rank = other > rank ? other : rank;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.ranks[threadIdx.x / 32] = rank;
  __syncthreads();
  rank = shared.ranks[0];
  for (int w = 1; w < kWarps; ++w) rank = shared.ranks[w] > rank ? shared.ranks[w] : rank;
  return rank;
}

// The largest rank in a row below `bound`; 0, whose TokenOf() is -1, when there is none.
__device__ uint64_t LargestBelow(const float* logits, int vocab, uint64_t bound, Shared& shared) {
  uint64_t largest = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    const uint64_t rank = RankOf(logits[i], i);
    if (rank < bound && rank > largest) largest = rank;
  }
  return BlockMax(largest, shared);
}

// The largest rank in a row, and whether a logit is NaN or +inf, in every thread.
__device__ uint64_t LikeliestOf(const float* logits, int vocab, bool* is_bad, Shared& shared) {
  uint64_t largest = 0;
  bool bad = false;
  const auto take = [&](float logit, int token) {
    bad = bad || !(logit < INFINITY);
    const uint64_t rank = RankOf(logit, token);
    largest = rank > largest ? rank : largest;
  };
  if (vocab % 4 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0) {
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i < vocab; i += 4 * kThreads) {
      const float4 x = LoadFour(logits + i);
      take(x.x, i), take(x.y, i + 1), take(x.z, i + 2), take(x.w, i + 3);
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < vocab; i += kThreads) take(logits[i], i);
  }
  *is_bad = __syncthreads_or(bad) != 0;
  return BlockMax(largest, shared);
}

// The sum of f(token) over [0, vocab), in every thread.
template <typename F>
__device__ double SumOf(int vocab, const F& f, Shared& shared) {
  double sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < vocab; i += kThreads) sum += f(i);
  return BlockSum<kThreads>(sum, shared.sums);
}

// The first token at which the sum of f over the tokens up to it exceeds `target`; should rounding
// leave the whole sum short of it, the last token with f > 0. -1 when f is 0 everywhere.
//
// By narrowing: the range is cut in 32, a warp sums each part, and the part that holds the answer
// is the next range.
template <typename F>
__device__ int FirstToExceed(int vocab, double target, const F& f, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int begin = 0, end = vocab;
  for (;;) {
    const int part = CeilDiv(end - begin, kWarps);
    const int from = begin + warp * part, to = min(from + part, end);
    double sum = 0;
    for (int i = from + lane; i < to; i += 32) sum += f(i);
    sum = WarpSum(sum);
    __syncthreads();
    if (lane == 0) shared.sums[warp] = sum;
    __syncthreads();
    int found = -1;
    double before = 0, below = 0;  // the sum before part w, and before part `found`
    for (int w = 0; w < kWarps; ++w) {
      const double here = shared.sums[w];
      if (here > 0) {
        found = w;
        below = before;
        if (before + here > target) break;
      }
      before += here;
    }
    if (found < 0) return -1;
    begin += found * part;
    end = min(begin + part, end);
    target -= below;
    if (part == 1) return begin;
  }
}

// The likeliest tokens of a row, see the file's head.
struct TopSet {
  uint32_t key;
  int last;  // id

  __device__ bool Has(uint32_t k, int token) const {
    return k > key || (k == key && token <= last);
  }
};

// The fewest of `set`'s likeliest tokens whose sum of f(token, key) reaches `goal`; at least one. f
// may not be negative, nor smaller for a larger key.
template <typename F>
__device__ TopSet Reach(const float* logits, int vocab, uint32_t largest_key, const TopSet& set,
                        double goal, const F& f, Shared& shared) {
  const auto sum_from = [&](uint32_t least) {
    return SumOf(
        vocab,
        [&](int i) {
          const uint32_t key = KeyOf(logits[i]);
          return key >= least && set.Has(key, i) ? f(i, key) : 0.0;
        },
        shared);
  };
  // The largest key from which on the sum reaches the goal. It lies in [low, high).
  uint32_t low = set.key, high = largest_key + 1;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (sum_from(middle) >= goal) {
      low = middle;
    } else {
      high = middle;
    }
  }
  // Of the tokens with this very key, as many as it takes.
  const double above = low == largest_key ? 0.0 : sum_from(low + 1);
  const double each = f(-1, low);
  const double count = each > 0 ? fmax(1.0, ceil((goal - above) / each)) : 1.0;
  const int last = FirstToExceed(
      vocab, count - 0.5,
      [&](int i) { return KeyOf(logits[i]) == low && set.Has(low, i) ? 1.0 : 0.0; }, shared);
  return {low, last};
}

// Philox4x32-10 (Salmon et al. 2011), first word of four.
__device__ uint32_t Philox(uint64_t seed, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

__device__ float Adjusted(float logit, const SampleRow& row, const TokenAdjustment& adjustment) {
  logit += adjustment.bias;
  if (adjustment.seen) {
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
  }
  logit -= row.frequency_penalty * static_cast<float>(adjustment.generated_count);
  if (adjustment.generated_count > 0) logit -= row.presence_penalty;
  return logit;
}

__global__ void __launch_bounds__(kThreads, 1) SampleKernel(const SampleArgs a) {
  __shared__ Shared shared;
  const int r = blockIdx.x;
  const SampleRow row = a.rows[r];
  const float* const unadjusted = a.logits + int64_t{r} * a.vocab;
  const int first = a.adjustment_offsets[r], end = a.adjustment_offsets[r + 1];
  const float* logits = unadjusted;
  if (first < end) {
    float* const adjusted = a.scratch + int64_t{r} * a.vocab;
#pragma unroll 4
    for (int i = threadIdx.x; i < a.vocab; i += kThreads) adjusted[i] = unadjusted[i];
    __syncthreads();
    for (int i = first + threadIdx.x; i < end; i += kThreads) {
      const TokenAdjustment adjustment = a.adjustments[i];
      adjusted[adjustment.token] = Adjusted(unadjusted[adjustment.token], row, adjustment);
    }
    __syncthreads();
    logits = adjusted;
  }

  bool is_bad;
  const uint64_t best = LikeliestOf(logits, a.vocab, &is_bad, shared);
  const uint32_t best_key = KeyOfRank(best);
  const float largest = LogitOf(best_key);
  if (is_bad || largest == -INFINITY) {
    if (threadIdx.x == 0) a.tokens[r] = -1;
    return;
  }
  if (row.temperature <= 0) {
    if (threadIdx.x == 0) a.tokens[r] = TokenOf(best);
    return;
  }

  const auto weight = [&](uint32_t key) {
    return static_cast<double>(expf((LogitOf(key) - largest) / row.temperature));
  };
  TopSet kept = {0, a.vocab};
  if (row.top_k > 0 && row.top_k < a.vocab) {
    kept = Reach(
        logits, a.vocab, best_key, kept, row.top_k, [](int, uint32_t) { return 1.0; }, shared);
  }
  if (row.top_p < 1) {
    const double total = SumOf(
        a.vocab,
        [&](int i) {
          const uint32_t key = KeyOf(logits[i]);
          return kept.Has(key, i) ? weight(key) : 0.0;
        },
        shared);
    kept = Reach(
        logits, a.vocab, best_key, kept, row.top_p * total,
        [&](int, uint32_t key) { return weight(key); }, shared);
  }
  const auto kept_weight = [&](int i) {
    const uint32_t key = KeyOf(logits[i]);
    if (!kept.Has(key, i)) return 0.0;
    const double w = weight(key);
    return w >= row.min_p ? w : 0.0;  // the likeliest has weight 1
  };
  const double total = SumOf(a.vocab, kept_weight, shared);
  const double uniform = Philox(row.seed, row.counter) * (1.0 / 4294967296.0);
  const int token = FirstToExceed(a.vocab, uniform * total, kept_weight, shared);
  if (threadIdx.x == 0) a.tokens[r] = token;
}

__global__ void __launch_bounds__(kThreads, 1) LogprobsKernel(const LogprobArgs a) {
  __shared__ Shared shared;
  const int r = blockIdx.x;
  const float* const logits = a.logits + int64_t{r} * a.vocab;
  uint64_t rank = LargestBelow(logits, a.vocab, ~uint64_t{0}, shared);
  const float largest = LogitOf(KeyOfRank(rank));
  const double log_sum = log(SumOf(
      a.vocab, [&](int i) { return static_cast<double>(expf(logits[i] - largest)); }, shared));
  const auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - largest - log_sum);
  };
  if (threadIdx.x == 0) {
    const int target = a.targets[r];
    a.logprobs[r] = target < 0 ? 0.0f : logprob(logits[target]);
  }
  for (int n = 0; n < a.top_n; ++n) {
    if (n > 0) rank = LargestBelow(logits, a.vocab, rank, shared);
    if (threadIdx.x != 0) continue;
    const int token = TokenOf(rank);
    a.top_tokens[int64_t{r} * a.top_n + n] = token;
    a.top_logprobs[int64_t{r} * a.top_n + n] = token < 0 ? NAN : logprob(logits[token]);
  }
}

}  // namespace

void Sample(Device& device, const SampleArgs& a) {
  if (a.num_rows == 0) return;
  const cudaStream_t stream = Queue(device);
  SampleKernel<<<GridOf(a.num_rows), kThreads, 0, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
}

void Logprobs(Device& device, const LogprobArgs& a) {
  GLA_REQUIRES(a.top_n >= 0 && a.top_n <= 20 && a.top_n <= a.vocab,
               "top_n up to 20 and the vocabulary");
  if (a.num_rows == 0) return;
  const cudaStream_t stream = Queue(device);
  LogprobsKernel<<<GridOf(a.num_rows), kThreads, 0, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
