// An attention layer written down as plainly as possible, in double and one token at a time: the
// judge of the layers with gradients. Follows the definition of fla's layers, not our code.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "model/attention_layer.h"
#include "model/qk_map.h"
#include "model/weight_source.h"
#include "tests/kernels/reference.h"

namespace gla {

// One sequence's input, or its result in the place of what it comes from. Sizes as in
// AttentionLayerState, without N; a part that the layer does not have is empty.
struct NaiveSequence {
  int64_t start_position = 0;
  std::vector<double> x;  // [T, D]; of a result: y
  std::vector<double> recurrent, key_sum, conv;
};

class NaiveLayer {
 public:
  using Doubles = std::vector<double>;

  NaiveLayer(const AttentionLayerConfig& config, WeightSource& source, const std::string& prefix)
      : c_(config), source_(source), prefix_(prefix) {}

  // Simple GLA and retention decay per query head, so each has a state of its own.
  int state_heads() const {
    const bool per_query_head = c_.op == AttentionOp::kRetention || repeats_heads();
    return per_query_head ? c_.num_heads : c_.num_kv_heads;
  }
  // fla's simple GLA repeats k and v for the query heads that share them.
  int kv_heads() const { return repeats_heads() ? c_.num_heads : c_.num_kv_heads; }
  int channels() const {
    return c_.num_heads * c_.head_key_dim + kv_heads() * (c_.head_key_dim + c_.head_value_dim);
  }
  size_t recurrent_size() const {
    return size_t(state_heads()) * c_.feature_dim() * c_.head_value_dim;
  }
  size_t key_sum_size() const {
    return c_.normalize ? size_t(c_.num_kv_heads) * c_.feature_dim() : 0;
  }
  size_t conv_size() const { return c_.use_short_conv ? size_t(c_.conv_size - 1) * channels() : 0; }

  // Empty states are zero.
  NaiveSequence Run(NaiveSequence in) {
    const size_t D = c_.hidden_size, rows = in.x.size() / D;
    in.recurrent.resize(recurrent_size());
    in.key_sum.resize(key_sum_size());
    in.conv.resize(conv_size());
    Doubles y;
    for (size_t t = 0; t < rows; ++t) {
      const Doubles x(in.x.begin() + t * D, in.x.begin() + (t + 1) * D);
      const Doubles out = Step(x, in.start_position + static_cast<int64_t>(t), in);
      y.insert(y.end(), out.begin(), out.end());
    }
    in.x = y;
    return in;
  }

 private:
  bool repeats_heads() const { return c_.op == AttentionOp::kSimpleGla && c_.use_gate; }

  const Doubles& Weight(const std::string& name, const std::vector<int64_t>& shape) {
    Doubles& values = weights_[name];
    if (!values.empty()) return values;
    const HostWeight weight = *source_.Get(prefix_ + name, shape);
    const std::vector<uint8_t> bytes = ConvertWeight(weight.matrix, DType::kFloat32);
    const auto* floats = reinterpret_cast<const float*>(bytes.data());
    values.assign(floats, floats + bytes.size() / sizeof(float));
    return values;
  }

  Doubles Linear(const std::string& name, const Doubles& x, int out, bool has_bias = false) {
    const int in = static_cast<int>(x.size());
    const Doubles& w = Weight(name + ".weight", {out, in});
    Doubles y(out);
    for (int o = 0; o < out; ++o) {
      for (int i = 0; i < in; ++i) y[o] += w[int64_t{o} * in + i] * x[i];
      if (has_bias) y[o] += Weight(name + ".bias", {out})[o];
    }
    return y;
  }

  // [G * width] to [H * width], each head as often as query heads read it.
  Doubles Repeat(const Doubles& x, int width) const {
    if (!repeats_heads()) return x;
    Doubles y;
    for (int h = 0; h < c_.num_heads; ++h) {
      const int group = h / (c_.num_heads / c_.num_kv_heads);
      y.insert(y.end(), x.begin() + group * width, x.begin() + (group + 1) * width);
    }
    return y;
  }

  // Weight `w` of each channel of one convolution.
  Doubles Taps(const std::string& name, int channels, int w) {
    const Doubles& all = Weight(name + ".weight", {channels, 1, c_.conv_size});
    Doubles taps(channels);
    for (int i = 0; i < channels; ++i) taps[i] = all[i * c_.conv_size + w];
    return taps;
  }

  static void Append(Doubles& to, const Doubles& more) {
    to.insert(to.end(), more.begin(), more.end());
  }

  // The channels q | k | v, through the convolution: silu(sum of the last inputs, weighted).
  Doubles Convolve(const Doubles& qkv, Doubles& state) {
    const int queries = c_.num_heads * c_.head_key_dim;
    const int keys = c_.num_kv_heads * c_.head_key_dim;
    const int values = c_.num_kv_heads * c_.head_value_dim;
    const auto join = [&](const Doubles& q, const Doubles& k, const Doubles& v) {
      Doubles all = q;
      Append(all, Repeat(k, c_.head_key_dim));
      Append(all, Repeat(v, c_.head_value_dim));
      return all;
    };
    Append(state, qkv);  // [conv_size, channels]
    Doubles y(qkv.size(), 0.0);
    if (c_.conv_bias) {
      y = join(Weight("q_conv1d.bias", {queries}), Weight("k_conv1d.bias", {keys}),
               Weight("v_conv1d.bias", {values}));
    }
    for (int w = 0; w < c_.conv_size; ++w) {
      const Doubles taps = join(Taps("q_conv1d", queries, w), Taps("k_conv1d", keys, w),
                                Taps("v_conv1d", values, w));
      for (size_t i = 0; i < y.size(); ++i) y[i] += taps[i] * state[w * qkv.size() + i];
    }
    state.erase(state.begin(), state.begin() + static_cast<int64_t>(qkv.size()));
    for (double& value : y) value = reference::Silu(value);
    return y;
  }

  // A head of queries or keys: mapped, divided by its sum, turned.
  Doubles MapHead(const std::string& name, Doubles x, bool normalize, int64_t position) {
    Doubles x2;
    const int dim = c_.head_key_dim;
    if (c_.feature_map == QkMap::kElementwiseProduct) {
      x2 = Linear(name + ".layer2", x, dim, true);
      x = Linear(name + ".layer1", x, dim, true);
    } else if (c_.feature_map == QkMap::kHedgehog) {
      x = Linear(name + ".layer", x, dim, true);
    } else if (c_.feature_map == QkMap::kT2r) {
      x = Linear(name + ".layer", x, dim);
    }
    Doubles y = reference::Map(KernelOf(c_.feature_map), x, x2, normalize);
    if (c_.op != AttentionOp::kRetention) return y;
    const size_t half = y.size() / 2;
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) *
                           std::pow(10000.0, -2.0 * static_cast<double>(i) / (2.0 * half));
      const double low = y[i], high = y[half + i];
      y[i] = low * std::cos(angle) - high * std::sin(angle);
      y[half + i] = high * std::cos(angle) + low * std::sin(angle);
    }
    return y;
  }

  // The log gate of every head and key dimension, or of every head.
  Doubles Gate(const Doubles& x) {
    if (!c_.use_gate) return {};
    Doubles gate;
    if (c_.op == AttentionOp::kGla) {
      gate = Linear("gk_proj.1", Linear("gk_proj.0", x, c_.gate_low_rank_dim),
                    c_.num_kv_heads * c_.head_key_dim, true);
    } else {
      gate = Linear("gk_proj", x, c_.num_heads, true);
    }
    for (double& g : gate) {
      const float* clamp = c_.clamp_min ? &*c_.clamp_min : nullptr;
      g = reference::LogSigmoidGate(g, c_.gate_logit_normalizer, clamp);
    }
    return gate;
  }

  Doubles Step(const Doubles& x, int64_t position, NaiveSequence& state) {
    const int H = c_.num_heads, dim = c_.head_key_dim, K = c_.feature_dim(), V = c_.head_value_dim;
    Doubles qkv = Linear("q_proj", x, H * dim);
    Append(qkv, Repeat(Linear("k_proj", x, c_.num_kv_heads * dim), dim));
    Append(qkv, Repeat(Linear("v_proj", x, c_.num_kv_heads * V), V));
    if (c_.use_short_conv) qkv = Convolve(qkv, state.conv);
    const double* q = qkv.data();
    const double* k = q + H * dim;
    const double* v = k + kv_heads() * dim;
    const Doubles gate = Gate(x);
    const std::string k_map = c_.tie_feature_map_qk ? "feature_map_q" : "feature_map_k";

    const int states_per_kv = state_heads() / kv_heads(), reads = H / state_heads();
    Doubles o(H * V, 0.0);
    for (int s = 0; s < state_heads(); ++s) {
      const int kv = s / states_per_kv;
      const Doubles key =
          MapHead(k_map, Doubles(k + kv * dim, k + (kv + 1) * dim), c_.norm_k, position);
      double* S = &state.recurrent[size_t(s) * K * V];
      double* z = c_.normalize ? &state.key_sum[size_t(kv) * K] : nullptr;
      for (int i = 0; i < K; ++i) {
        double decay = 1;
        if (c_.op == AttentionOp::kRetention) decay = 1 - std::exp2(-5.0 - s);
        if (c_.op == AttentionOp::kSimpleGla && c_.use_gate) decay = std::exp(gate[s]);
        if (c_.op == AttentionOp::kGla && c_.use_gate) decay = std::exp(gate[kv * K + i]);
        if (z != nullptr) z[i] += key[i];
        for (int j = 0; j < V; ++j) S[i * V + j] = decay * S[i * V + j] + key[i] * v[kv * V + j];
      }
      for (int h = s * reads; h < (s + 1) * reads; ++h) {
        const Doubles query =
            MapHead("feature_map_q", Doubles(q + h * dim, q + (h + 1) * dim), c_.norm_q, position);
        double weight = 0;
        for (int i = 0; i < K; ++i) {
          const double scaled = query[i] / std::sqrt(static_cast<double>(K));
          if (z != nullptr) weight += scaled * z[i];
          for (int j = 0; j < V; ++j) o[h * V + j] += scaled * S[i * V + j];
        }
        for (int j = 0; z != nullptr && j < V; ++j) o[h * V + j] /= weight + 1e-10;
      }
    }
    return Linear("o_proj", Normed(o, x), c_.hidden_size);
  }

  // Each head of o, normed and times its output gate; heads stay merged.
  Doubles Normed(const Doubles& o, const Doubles& x) {
    const int V = c_.head_value_dim;
    const std::string norm = c_.op == AttentionOp::kLinearAttention ? "norm"
                             : c_.use_output_gate && c_.fuse_norm   ? "g_norm_swish_gate"
                                                                    : "g_norm";
    Doubles gate, merged, weight;
    if (c_.use_output_gate) gate = Linear("g_proj", x, c_.num_heads * V);
    if (c_.output_norm && c_.elementwise_affine) weight = Weight(norm + ".weight", {V});
    for (int h = 0; h < c_.num_heads; ++h) {
      const Doubles gates = gate.empty() ? Doubles() : Doubles(&gate[h * V], &gate[h * V] + V);
      Append(merged, reference::RmsNorm(Doubles(&o[h * V], &o[h * V] + V), weight, gates,
                                        c_.norm_eps, c_.output_norm));
    }
    return merged;
  }

  const AttentionLayerConfig c_;
  WeightSource& source_;
  const std::string prefix_;
  std::map<std::string, Doubles> weights_;
};

}  // namespace gla
