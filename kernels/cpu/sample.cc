// From logits to tokens and log probabilities; the definition stands in kernels.h.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sample.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

constexpr size_t kSumBlock = 128;

// The largest of x [n]. NaN, when there is one.
float MaxOrNan(const float* x, size_t n) {
  const FloatTag d;
  const size_t lanes = hn::Lanes(d);
  auto largest = hn::Set(d, -std::numeric_limits<float>::infinity());
  auto sum_of_nans = hn::Zero(d);  // NaN as soon as one x is: x - x, but 0 for infinities
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto v = hn::LoadU(d, x + i);
    largest = hn::Max(largest, v);
    sum_of_nans = hn::Add(sum_of_nans, hn::IfThenElse(hn::Eq(v, v), hn::Zero(d), v));
  }
  float result = hn::GetLane(hn::MaxOfLanes(d, largest));
  float nans = hn::GetLane(hn::SumOfLanes(d, sum_of_nans));
  for (; i < n; ++i) {
    if (std::isnan(x[i])) nans = x[i];
    result = std::fmax(result, x[i]);
  }
  return std::isnan(nans) ? nans : result;
}

// y = exp((x - max) / divisor); y may be x, or null. Returns the sum of y.
double ExpRow(const float* x, float max, float divisor, float* y, size_t n) {
  double sum = 0;
  for (size_t begin = 0; begin < n; begin += kSumBlock) {
    sum += SumVectors(std::min(kSumBlock, n - begin), [=](auto d, size_t i) HWY_ATTR {
      const auto shifted = hn::Sub(hn::LoadU(d, x + begin + i), hn::Set(d, max));
      const auto e = ExpOfNegative(d, hn::Div(shifted, hn::Set(d, divisor)));
      if (y != nullptr) hn::StoreU(e, d, y + begin + i);
      return e;
    });
  }
  return sum;
}

// The first i at which the running sum of the e that are at least `least` exceeds
// `u` times their sum; the last with e > 0 where rounding leaves none. Sums go by blocks: for each
// its own sum, then inside the one that holds the answer element by element.
int DrawToken(const float* e, size_t n, float least, double u) {
  const auto kept = [=](auto d, size_t i) HWY_ATTR {
    const auto v = hn::LoadU(d, e + i);
    return hn::IfThenElseZero(hn::Ge(v, hn::Set(d, least)), v);
  };
  const size_t num_blocks = (n + kSumBlock - 1) / kSumBlock;
  thread_local std::vector<double> sums;
  sums.resize(num_blocks);
  double total = 0;
  for (size_t b = 0; b < num_blocks; ++b) {
    const size_t begin = b * kSumBlock;
    sums[b] = SumVectors(std::min(kSumBlock, n - begin),
                         [=](auto d, size_t i) HWY_ATTR { return kept(d, begin + i); });
    total += sums[b];
  }
  const double target = u * total;
  double running = 0;
  int last = -1;
  for (size_t b = 0; b < num_blocks; ++b) {
    if (sums[b] > 0 && running + sums[b] > target) {
      double inside = running;
      for (size_t i = b * kSumBlock; i < std::min(n, (b + 1) * kSumBlock); ++i) {
        const float v = hn::GetLane(kept(OneFloatTag(), i));
        if (v > 0) last = static_cast<int>(i);
        if ((inside += v) > target && v > 0) return last;
      }
      return last;
    }
    running += sums[b];
  }
  for (size_t i = 0; i < n; ++i) {
    if (hn::GetLane(kept(OneFloatTag(), i)) > 0) last = static_cast<int>(i);
  }
  return last;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(MaxOrNan);
HWY_EXPORT(ExpRow);
HWY_EXPORT(DrawToken);

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Word 0 of Philox4x32-10 with counter (low, high, 0, 0) and key (low, high).
uint32_t Philox(uint64_t seed, uint64_t counter) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof(c));
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return c[0];
}

// A token as one number: the larger, the likelier (by logit, then the lower id).
uint64_t RankOf(float logit, int token) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // -0 ranks as 0
  const uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(token));
}
int TokenOf(uint64_t rank) { return static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(rank)); }

// Ranks [0, n), likeliest first as far as they are asked for.
class Ranking {
 public:
  explicit Ranking(std::vector<uint64_t>& ranks) : ranks_(ranks) {}

  // Only the `k` likeliest remain.
  void KeepLikeliest(size_t k) {
    if (k >= ranks_.size()) return;
    std::nth_element(ranks_.begin(), ranks_.begin() + k, ranks_.end(), std::greater<>());
    ranks_.resize(k);
  }
  size_t size() const { return ranks_.size(); }
  int token(size_t i) const { return TokenOf(ranks_[i]); }

  // Sorts so far that place i is final. A few likeliest tokens hold most of the mass, so most of a
  // large vocabulary is never sorted.
  void SortUpTo(size_t i) {
    while (i >= sorted_) {
      const size_t end = std::min(ranks_.size(), std::max<size_t>(64, sorted_ * 4));
      if (end < ranks_.size()) {
        std::nth_element(ranks_.begin() + sorted_, ranks_.begin() + end, ranks_.end(),
                         std::greater<>());
      }
      std::sort(ranks_.begin() + sorted_, ranks_.begin() + end, std::greater<>());
      sorted_ = end;
    }
  }

 private:
  std::vector<uint64_t>& ranks_;
  size_t sorted_ = 0;
};

void Adjust(const SampleRow& row, const TokenAdjustment* begin, const TokenAdjustment* end,
            float* logits) {
  for (const TokenAdjustment* a = begin; a != end; ++a) {
    float l = logits[a->token] + a->bias;
    if (a->seen != 0) l = l > 0 ? l / row.repetition_penalty : l * row.repetition_penalty;
    l -= row.frequency_penalty * static_cast<float>(a->generated_count);
    if (a->generated_count > 0) l -= row.presence_penalty;
    logits[a->token] = l;
  }
}

// Sets e of the tokens that top-k and top-p drop to 0. `logits` give the order.
void DropUnlikely(const SampleRow& row, const float* logits, int vocab, float* e) {
  const bool top_k = row.top_k > 0 && row.top_k < vocab, top_p = row.top_p < 1;
  if (!top_k && !top_p) return;
  thread_local std::vector<uint64_t> ranks;
  ranks.resize(vocab);
  for (int i = 0; i < vocab; ++i) ranks[i] = RankOf(logits[i], i);
  Ranking ranking(ranks);
  if (top_k) ranking.KeepLikeliest(row.top_k);
  size_t kept = ranking.size();
  if (top_p) {
    double total = 0;
    for (size_t i = 0; i < ranking.size(); ++i) total += e[ranking.token(i)];
    const double wanted = static_cast<double>(row.top_p) * total;
    double sum = 0;
    for (kept = 0; kept < ranking.size() && (kept == 0 || sum < wanted); ++kept) {
      ranking.SortUpTo(kept);
      sum += e[ranking.token(kept)];
    }
  }
  thread_local std::vector<float> survivors;
  survivors.resize(kept);
  for (size_t i = 0; i < kept; ++i) survivors[i] = e[ranking.token(i)];
  std::fill_n(e, vocab, 0.0f);
  for (size_t i = 0; i < kept; ++i) e[ranking.token(i)] = survivors[i];
}

int SampleOne(const SampleArgs& a, int r) {
  const SampleRow& row = a.rows[r];
  const float* given = a.logits + static_cast<size_t>(r) * a.vocab;
  const TokenAdjustment* begin = a.adjustments + a.adjustment_offsets[r];
  const TokenAdjustment* end = a.adjustments + a.adjustment_offsets[r + 1];
  thread_local std::vector<float> adjusted;
  const float* logits = given;
  if (begin != end) {
    adjusted.assign(given, given + a.vocab);
    Adjust(row, begin, end, adjusted.data());
    logits = adjusted.data();
  }
  const float max = HWY_DYNAMIC_DISPATCH(MaxOrNan)(logits, a.vocab);
  if (!(max < kInfinity) || max == -kInfinity) return -1;
  if (row.temperature == 0) {
    return static_cast<int>(std::find(logits, logits + a.vocab, max) - logits);
  }
  float* e = a.scratch + static_cast<size_t>(r) * a.vocab;
  HWY_DYNAMIC_DISPATCH(ExpRow)(logits, max, row.temperature, e, a.vocab);
  DropUnlikely(row, logits, a.vocab, e);
  const double u = Philox(row.seed, row.counter) * 0x1p-32;
  return HWY_DYNAMIC_DISPATCH(DrawToken)(e, a.vocab, row.min_p, u);
}

void LogprobOne(const LogprobArgs& a, int r) {
  const float* logits = a.logits + static_cast<size_t>(r) * a.vocab;
  const int target = a.targets[r];
  float max = 0;
  double log_sum = 0;
  if (target >= 0 || a.top_n > 0) {
    max = HWY_DYNAMIC_DISPATCH(MaxOrNan)(logits, a.vocab);
    log_sum = std::log(HWY_DYNAMIC_DISPATCH(ExpRow)(logits, max, 1.0f, nullptr, a.vocab));
  }
  const auto logprob = [&](int token) {
    return static_cast<float>(static_cast<double>(logits[token]) - max - log_sum);
  };
  a.logprobs[r] = target < 0 ? 0.0f : logprob(target);
  if (a.top_n == 0) return;
  std::vector<uint64_t> best(a.top_n, 0);  // likeliest first
  for (int i = 0; i < a.vocab; ++i) {
    const uint64_t rank = RankOf(logits[i], i);
    if (rank <= best.back()) continue;
    const auto place = std::upper_bound(best.begin(), best.end(), rank, std::greater<>());
    std::move_backward(place, best.end() - 1, best.end());
    *place = rank;
  }
  for (int n = 0; n < a.top_n; ++n) {
    const int token = TokenOf(best[n]);
    a.top_tokens[r * a.top_n + n] = token;
    a.top_logprobs[r * a.top_n + n] = logprob(token);
  }
}

}  // namespace

void Sample(Device& device, const SampleArgs& a) {
  ParallelFor(device, a.num_rows, a.vocab * 2 * kExpNs, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) a.tokens[r] = SampleOne(a, static_cast<int>(r));
  });
}

void Logprobs(Device& device, const LogprobArgs& a) {
  GLA_CHECK(a.top_n >= 0 && a.top_n <= std::min(20, a.vocab));
  ParallelFor(device, a.num_rows, a.vocab * 2 * kExpNs, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) LogprobOne(a, static_cast<int>(r));
  });
}

}  // namespace gla
#endif  // HWY_ONCE
