// Naive double-precision definitions of the kernels: the judge of every backend.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

#include "kernels/kernels.h"

namespace gla::reference {

using Doubles = std::vector<double>;

inline double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double Silu(double x) { return x * Sigmoid(x); }

// [rows, in] x [out, in]^T
inline Doubles Matmul(const std::vector<float>& x, const std::vector<float>& w, int rows, int in,
                      int out) {
  Doubles y(static_cast<size_t>(rows) * out);
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < out; ++n) {
      double sum = 0;
      for (int k = 0; k < in; ++k) {
        sum += static_cast<double>(x[static_cast<size_t>(r) * in + k]) *
               w[static_cast<size_t>(n) * in + k];
      }
      y[static_cast<size_t>(r) * out + n] = sum;
    }
  }
  return y;
}

// One group of a row; empty: no learned scale, no gate.
inline Doubles RmsNorm(const Doubles& x, const Doubles& weight, const Doubles& gate, double eps,
                       bool normalize) {
  double squares = 0;
  for (double v : x) squares += v * v;
  const double scale = normalize ? 1 / std::sqrt(squares / static_cast<double>(x.size()) + eps) : 1;
  Doubles y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    y[i] = x[i] * scale * (weight.empty() ? 1 : weight[i]) * (gate.empty() ? 1 : Silu(gate[i]));
  }
  return y;
}

// `x` holds the bias already.
inline double LogSigmoidGate(double x, double normalizer, const float* clamp_min) {
  const double gate = (std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x)))) / normalizer;
  return clamp_min == nullptr ? gate : std::max<double>(gate, *clamp_min);
}

// Causal depthwise convolution of one sequence: inputs [W - 1 + len, C], those of the state first.
inline Doubles ShortConv(const Doubles& inputs, const std::vector<float>& weight,
                         const std::vector<float>& bias, int channels, int width, bool silu) {
  Doubles y;
  for (size_t t = 0; (t + width) * channels <= inputs.size(); ++t) {
    for (int c = 0; c < channels; ++c) {
      double sum = bias.empty() ? 0 : bias[c];
      for (int w = 0; w < width; ++w) sum += weight[c * width + w] * inputs[(t + w) * channels + c];
      y.push_back(silu ? Silu(sum) : sum);
    }
  }
  return y;
}

// One head of a feature map.
inline Doubles Map(FeatureMap map, const Doubles& x, const Doubles& x2, bool normalize) {
  const size_t n = x.size();
  Doubles y(n);
  for (size_t i = 0; i < n; ++i) {
    const double v = x[i], relu = std::max(v, 0.0);
    const double u = 0.7978845608028654 * v * (1 + 0.044715 * v * v);
    switch (map) {
      case FeatureMap::kIdentity:
        y[i] = v;
        break;
      case FeatureMap::kRelu:
        y[i] = relu;
        break;
      case FeatureMap::kElu:
        y[i] = v > 0 ? v + 1 : std::exp(v);
        break;
      case FeatureMap::kSilu:
        y[i] = Silu(v);
        break;
      case FeatureMap::kSigmoid:
        y[i] = Sigmoid(v);
        break;
      case FeatureMap::kSquaredRelu:
        y[i] = relu * relu;
        break;
      case FeatureMap::kGelu:
        y[i] = 0.5 * v * (1 + std::tanh(u));
        break;
      case FeatureMap::kProduct:
        y[i] = v * x2[i];
        break;
      case FeatureMap::kSoftmax2:
      case FeatureMap::kDpfp:
        break;
    }
  }
  if (map == FeatureMap::kSoftmax2) {
    y.resize(2 * n);
    double largest = 0, sum = 0;
    for (double v : x) largest = std::max(largest, 2 * std::abs(v));
    for (size_t i = 0; i < 2 * n; ++i) {
      y[i] = std::exp((i < n ? 2 * x[i] : -2 * x[i - n]) - largest);
      sum += y[i];
    }
    for (double& v : y) v /= sum;
  } else if (map == FeatureMap::kDpfp) {
    Doubles both(2 * n);
    for (size_t i = 0; i < n; ++i)
      both[i] = std::max(x[i], 0.0), both[n + i] = std::max(-x[i], 0.0);
    y.clear();
    for (size_t roll = 1; roll <= 4; ++roll) {
      for (size_t i = 0; i < 2 * n; ++i) y.push_back(both[i] * both[(i + 2 * n - roll) % (2 * n)]);
    }
  }
  if (normalize) {
    const double sum = std::accumulate(y.begin(), y.end(), 0.0) + 1e-4;
    for (double& v : y) v /= sum;
  }
  return y;
}

// The recurrence of one query head: S = diag(exp(gate)) S + k v^T, o = scale q S. `row(t)` gives
// the pointers of token t; `gates` gives K log decays or is empty.
struct HeadRow {
  const float *q, *k, *v;
  Doubles gates;
};
struct HeadResult {
  Doubles o;        // [len, V]
  Doubles state;    // [K, V]
  Doubles key_sum;  // [K]
};
inline HeadResult LinearAttention(int len, int K, int V, double scale, bool normalize,
                                  Doubles state, Doubles key_sum,
                                  const std::function<HeadRow(int)>& row) {
  Doubles o(static_cast<size_t>(len) * V, 0.0);
  for (int t = 0; t < len; ++t) {
    const HeadRow in = row(t);
    double denominator = 1e-10;
    for (int i = 0; i < K; ++i) {
      const double decay = in.gates.empty() ? 1.0 : std::exp(in.gates[i]);
      const double q = scale * in.q[i], k = in.k[i];
      key_sum[i] += k;
      denominator += q * key_sum[i];
      double* s = state.data() + static_cast<size_t>(i) * V;
      for (int j = 0; j < V; ++j) {
        s[j] = s[j] * decay + k * in.v[j];
        o[static_cast<size_t>(t) * V + j] += q * s[j];
      }
    }
    if (normalize) {
      for (int j = 0; j < V; ++j) o[static_cast<size_t>(t) * V + j] /= denominator;
    }
  }
  return {std::move(o), std::move(state), std::move(key_sum)};
}

// The linear-attention operators over whole tensors, everything in double and token by token, in
// the layouts of LinearAttentionBackwardArgs. A scalar or constant gate counts for each of its
// keys.
struct AttentionProblem {
  int H, G, K, V;
  GateKind kind = GateKind::kNone;
  double scale = 1;
  std::vector<int> lengths;
  Doubles q, k, v, gate;
  Doubles initial_state;  // empty: zero

  int state_heads() const { return kind == GateKind::kConstant ? H : G; }
  int reps() const { return H / state_heads(); }  // query heads per state
  size_t state_size() const { return static_cast<size_t>(K) * V; }
  // Where row t of a state's group, or of one of its query heads, starts.
  size_t at_group(int t, int state, int dim) const {
    return (static_cast<size_t>(t) * G + state / (state_heads() / G)) * dim;
  }
  size_t at_head(int t, int state, int rep, int dim) const {
    return (static_cast<size_t>(t) * H + state * reps() + rep) * dim;
  }
  size_t gate_index(int t, int state, int i) const {
    if (kind == GateKind::kConstant) return state;
    return kind == GateKind::kScalar ? at_group(t, state, 1) : at_group(t, state, K) + i;
  }
  double decay(int t, int state, int i) const {
    return kind == GateKind::kNone ? 1.0 : std::exp(gate[gate_index(t, state, i)]);
  }
  // S_t = diag(decay) S_{t-1} + k_t^T v_t
  void Advance(int t, int state, double* s) const {
    const double* row_v = v.data() + at_group(t, state, V);
    for (int i = 0; i < K; ++i, s += V) {
      const double d = decay(t, state, i), key = k[at_group(t, state, K) + i];
      for (int j = 0; j < V; ++j) s[j] = d * s[j] + key * row_v[j];
    }
  }
  // S of sequence `seq` before its first row.
  Doubles Start(int seq, int state) const {
    if (initial_state.empty()) return Doubles(state_size(), 0.0);
    const auto first =
        initial_state.begin() + (static_cast<size_t>(seq) * state_heads() + state) * state_size();
    return {first, first + state_size()};
  }
};

struct AttentionOutputs {
  Doubles o, final_state;
};
inline AttentionOutputs AttentionForward(const AttentionProblem& p) {
  AttentionOutputs out;
  const int rows = std::accumulate(p.lengths.begin(), p.lengths.end(), 0);
  out.o.assign(static_cast<size_t>(rows) * p.H * p.V, 0.0);
  int first = 0;
  for (int seq = 0; seq < static_cast<int>(p.lengths.size()); first += p.lengths[seq++]) {
    for (int state = 0; state < p.state_heads(); ++state) {
      Doubles s = p.Start(seq, state);
      for (int t = first; t < first + p.lengths[seq]; ++t) {
        p.Advance(t, state, s.data());
        for (int rep = 0; rep < p.reps(); ++rep) {
          double* o = out.o.data() + p.at_head(t, state, rep, p.V);
          for (int i = 0; i < p.K; ++i) {
            const double q = p.scale * p.q[p.at_head(t, state, rep, p.K) + i];
            for (int j = 0; j < p.V; ++j) o[j] += q * s[static_cast<size_t>(i) * p.V + j];
          }
        }
      }
      out.final_state.insert(out.final_state.end(), s.begin(), s.end());
    }
  }
  return out;
}

struct AttentionGradients {
  Doubles dq, dk, dv, d_gate, d_initial_state;
};
// Of sum(o * d_o) + sum(final_state * d_final_state); an empty one is zero.
inline AttentionGradients AttentionBackward(const AttentionProblem& p, const Doubles& d_o,
                                            const Doubles& d_final_state) {
  AttentionGradients out{
      Doubles(p.q.size()), Doubles(p.k.size()), Doubles(p.v.size()), Doubles(p.gate.size()), {}};
  const size_t size = p.state_size();
  int first = 0;
  for (int seq = 0; seq < static_cast<int>(p.lengths.size()); first += p.lengths[seq++]) {
    const int len = p.lengths[seq];
    for (int state = 0; state < p.state_heads(); ++state) {
      Doubles states = p.Start(seq, state);  // S before row 0, after row 0, ...
      states.resize((len + 1) * size);
      for (int t = 0; t < len; ++t) {
        double* next = states.data() + (t + 1) * size;
        std::copy_n(next - size, size, next);
        p.Advance(first + t, state, next);
      }
      Doubles ds(size, 0.0);  // with respect to S after the row in work
      if (!d_final_state.empty()) {
        const size_t at = (static_cast<size_t>(seq) * p.state_heads() + state) * size;
        std::copy_n(d_final_state.begin() + at, size, ds.begin());
      }
      for (int t = len - 1; t >= 0; --t) {
        const int row = first + t;
        const double* before = states.data() + t * size;
        const double* after = before + size;
        for (int rep = 0; rep < p.reps() && !d_o.empty(); ++rep) {
          const double* d_out = d_o.data() + p.at_head(row, state, rep, p.V);
          for (int i = 0; i < p.K; ++i) {
            const size_t at_q = p.at_head(row, state, rep, p.K) + i;
            double sum = 0;
            for (int j = 0; j < p.V; ++j) {
              sum += after[i * p.V + j] * d_out[j];
              ds[i * p.V + j] += p.scale * p.q[at_q] * d_out[j];
            }
            out.dq[at_q] = p.scale * sum;
          }
        }
        const double* v = p.v.data() + p.at_group(row, state, p.V);
        double* dv = out.dv.data() + p.at_group(row, state, p.V);
        for (int i = 0; i < p.K; ++i) {
          const size_t at_k = p.at_group(row, state, p.K) + i;
          const double decay = p.decay(row, state, i);
          double dk = 0, d_decay = 0;
          for (int j = 0; j < p.V; ++j) {
            double& d = ds[i * p.V + j];
            dk += d * v[j];
            dv[j] += d * p.k[at_k];
            d_decay += d * before[i * p.V + j];
            d *= decay;
          }
          out.dk[at_k] += dk;
          if (p.kind != GateKind::kNone) out.d_gate[p.gate_index(row, state, i)] += decay * d_decay;
        }
      }
      out.d_initial_state.insert(out.d_initial_state.end(), ds.begin(), ds.end());
    }
  }
  return out;
}

// Philox4x32-10 of counter (c0, c1, c2, c3) and key (k0, k1).
struct PhiloxWords {
  uint32_t w[4];
};
inline PhiloxWords Philox(PhiloxWords c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = 0xD2511F53ull * c.w[0], p1 = 0xCD9E8D57ull * c.w[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.w[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.w[3] ^ k1, static_cast<uint32_t>(p0)}};
  }
  return c;
}
inline double PhiloxUniform(uint64_t seed, uint64_t counter) {
  const PhiloxWords words =
      Philox({{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}},
             static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return words.w[0] * 0x1p-32;
}

// Ids, likeliest first.
inline std::vector<int> Ranked(const std::vector<float>& logits) {
  std::vector<int> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  return ids;
}

// The weight of every token that may be drawn; 0 for the others.
inline Doubles Weights(const std::vector<float>& logits, const SampleRow& row) {
  const std::vector<int> ids = Ranked(logits);
  Doubles e(logits.size(), 0.0);
  size_t kept = row.top_k > 0 ? std::min<size_t>(row.top_k, ids.size()) : ids.size();
  double total = 0, sum = 0;
  const auto weight = [&](int id) {
    return std::exp((static_cast<double>(logits[id]) - logits[ids[0]]) / row.temperature);
  };
  for (size_t i = 0; i < kept; ++i) total += weight(ids[i]);
  for (size_t i = 0; i < kept; ++i) {
    if (i > 0 && row.top_p < 1 && sum >= row.top_p * total) break;
    sum += weight(ids[i]);
    if (weight(ids[i]) >= row.min_p) e[ids[i]] = weight(ids[i]);
  }
  return e;
}

}  // namespace gla::reference
