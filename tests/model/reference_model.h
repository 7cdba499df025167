// The networks written down as plainly as possible, in double and one token at a time: the judge of
// how the model wires its kernels together. Follows the definition of fla's layers, not our code.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/model_config.h"
#include "model/weight_source.h"

namespace gla {

using Vec = std::vector<double>;

class ReferenceModel {
 public:
  ReferenceModel(const ModelConfig& config, WeightSource& source) : c_(config), source_(source) {}

  // The logits after each token of one sequence from the empty state, one row after another.
  std::vector<double> Logits(const std::vector<int32_t>& tokens) {
    states_.clear();
    std::vector<double> all;
    for (size_t position = 0; position < tokens.size(); ++position) {
      const Vec& table = Weight("model.embeddings.weight", {c_.vocab_size, c_.hidden_size});
      Vec x(table.begin() + int64_t{tokens[position]} * c_.hidden_size,
            table.begin() + (int64_t{tokens[position]} + 1) * c_.hidden_size);
      for (int layer = 0; layer < c_.num_layers; ++layer) {
        const std::string name = absl::StrCat("model.layers.", layer, ".");
        Add(x, Attention(name + "attn.", RmsNorm(x, name + "attn_norm.weight"), position));
        Add(x, Mlp(name + "mlp.", RmsNorm(x, name + "mlp_norm.weight")));
      }
      const std::string head =
          c_.tie_word_embeddings ? "model.embeddings.weight" : "lm_head.weight";
      const Vec row = Linear(head, RmsNorm(x, "model.norm.weight"), c_.vocab_size);
      all.insert(all.end(), row.begin(), row.end());
    }
    return all;
  }

 private:
  const Vec& Weight(const std::string& name, const std::vector<int64_t>& shape) {
    Vec& values = weights_[name];
    if (!values.empty()) return values;
    const HostWeight weight = *source_.Get(name, shape);
    const std::vector<uint8_t> bytes = ConvertWeight(weight.matrix, DType::kFloat32);
    const auto* floats = reinterpret_cast<const float*>(bytes.data());
    values.assign(floats, floats + bytes.size() / sizeof(float));
    return values;
  }

  static void Add(Vec& x, const Vec& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }
  static double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static double Silu(double x) { return x * Sigmoid(x); }

  Vec Linear(const std::string& name, const Vec& x, int out, const std::string& bias = "") {
    const int in = static_cast<int>(x.size());
    const Vec& w = Weight(name, {out, in});
    Vec y(out);
    for (int o = 0; o < out; ++o) {
      for (int i = 0; i < in; ++i) y[o] += w[int64_t{o} * in + i] * x[i];
    }
    if (!bias.empty()) Add(y, Weight(bias, {out}));
    return y;
  }

  // An empty name: no learned scale.
  Vec RmsNorm(const Vec& x, const std::string& name) {
    double squares = 0;
    for (const double value : x) squares += value * value;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) + c_.norm_eps);
    Vec y = x;
    for (size_t i = 0; i < y.size(); ++i) {
      y[i] *= scale;
      if (!name.empty()) y[i] *= Weight(name, {static_cast<int64_t>(x.size())})[i];
    }
    return y;
  }

  Vec Mlp(const std::string& name, const Vec& x) {
    Vec gate = Linear(name + "gate_proj.weight", x, c_.intermediate_size);
    const Vec up = Linear(name + "up_proj.weight", x, c_.intermediate_size);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = Silu(gate[i]) * up[i];
    return Linear(name + "down_proj.weight", gate, c_.hidden_size);
  }

  // The last conv_size inputs weighted, then SiLU.
  Vec Convolve(const std::string& name, const Vec& x) {
    const int channels = static_cast<int>(x.size()), width = c_.conv_size;
    const Vec& w = Weight(name + ".weight", {channels, 1, width});
    std::vector<Vec>& history = history_[name];
    if (states_.count(name) == 0) history.assign(width, Vec(channels));  // a new sequence
    states_[name];
    history.erase(history.begin());
    history.push_back(x);
    Vec y(channels);
    for (int ch = 0; ch < channels; ++ch) {
      for (int i = 0; i < width; ++i) y[ch] += w[ch * width + i] * history[i][ch];
      y[ch] = Silu(y[ch]);
    }
    return y;
  }

  Vec MapHead(const std::string& name, const Vec& x) {
    const int dim = static_cast<int>(x.size());
    const auto layer = [&](const std::string& which, const std::string& bias) {
      return Linear(name + which + ".weight", x, dim, bias.empty() ? "" : name + bias + ".bias");
    };
    const auto each = [](Vec v, double (*f)(double)) {
      for (double& value : v) value = f(value);
      return v;
    };
    switch (c_.feature_map) {
      case QkMap::kNone:
      case QkMap::kIdentity:
        return x;
      case QkMap::kRelu:
        return each(x, [](double v) { return std::max(v, 0.0); });
      case QkMap::kElu:
        return each(x, [](double v) { return v >= 0 ? v + 1 : std::exp(v); });
      case QkMap::kSilu:
        return each(x, Silu);
      case QkMap::kSigmoid:
        return each(x, Sigmoid);
      case QkMap::kSquaredRelu:
        return each(x, [](double v) { return v > 0 ? v * v : 0.0; });
      case QkMap::kGelu:
        return each(x, [](double v) {
          return 0.5 * v * (1 + std::tanh(0.79788456 * v * (1 + 0.044715 * v * v)));
        });
      case QkMap::kT2r:
        return each(layer(".layer", ""), [](double v) { return std::max(v, 0.0); });
      case QkMap::kElementwiseProduct: {
        Vec y = layer(".layer1", ".layer1");
        const Vec other = layer(".layer2", ".layer2");
        for (int i = 0; i < dim; ++i) y[i] *= other[i];
        return y;
      }
      case QkMap::kHedgehog: {
        const Vec y = layer(".layer", ".layer");
        Vec both(2 * dim);
        double sum = 0;
        for (int i = 0; i < dim; ++i)
          both[i] = std::exp(2 * y[i]), both[dim + i] = std::exp(-2 * y[i]);
        for (const double value : both) sum += value;
        for (double& value : both) value /= sum;
        return both;
      }
      case QkMap::kDpfp: {
        Vec both(2 * dim), y;
        for (int i = 0; i < dim; ++i) {
          both[i] = std::max(x[i], 0.0);
          both[dim + i] = std::max(-x[i], 0.0);
        }
        for (int roll = 1; roll <= 4; ++roll) {
          for (int i = 0; i < 2 * dim; ++i)
            y.push_back(both[i] * both[(i - roll + 2 * dim) % (2 * dim)]);
        }
        return y;
      }
    }
    return x;
  }

  // Head `h` of `x`, mapped, normalized and turned.
  Vec QueryOrKey(const std::string& map, const Vec& x, int h, bool normalize, size_t position) {
    const int dim = c_.head_key_dim;
    Vec y = MapHead(map, Vec(x.begin() + h * dim, x.begin() + (h + 1) * dim));
    if (normalize) {
      double sum = 1e-4;
      for (const double value : y) sum += value;
      for (double& value : y) value /= sum;
    }
    if (c_.family != ModelFamily::kRetNet) return y;
    const int half = dim / 2;
    for (int i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * std::pow(10000.0, -2.0 * i / dim);
      const double low = y[i], high = y[half + i];
      y[i] = low * std::cos(angle) - high * std::sin(angle);
      y[half + i] = high * std::cos(angle) + low * std::sin(angle);
    }
    return y;
  }

  Vec Attention(const std::string& name, const Vec& x, size_t position) {
    const int heads = c_.num_heads, kv_heads = c_.num_kv_heads;
    const int key_dim = c_.feature_dim, value_dim = c_.head_value_dim;
    Vec q = Linear(name + "q_proj.weight", x, heads * c_.head_key_dim);
    Vec k = Linear(name + "k_proj.weight", x, kv_heads * c_.head_key_dim);
    Vec v = Linear(name + "v_proj.weight", x, kv_heads * value_dim);
    if (c_.use_short_conv) {
      q = Convolve(name + "q_conv1d", q);
      k = Convolve(name + "k_conv1d", k);
      v = Convolve(name + "v_conv1d", v);
    }
    Vec gate;
    if (c_.family == ModelFamily::kGla) {
      gate = Linear(name + "gk_proj.1.weight",
                    Linear(name + "gk_proj.0.weight", x, c_.gate_low_rank_dim),
                    kv_heads * c_.head_key_dim, name + "gk_proj.1.bias");
      for (double& g : gate) {
        g = std::log(Sigmoid(g)) / c_.gate_logit_normalizer;
        if (c_.clamp_min) g = std::max(g, static_cast<double>(*c_.clamp_min));
      }
    }
    const std::string q_map = name + "feature_map_q";
    const std::string k_map = c_.tie_feature_map_qk ? q_map : name + "feature_map_k";
    const Vec output_gate =
        c_.use_output_gate ? Linear(name + "g_proj.weight", x, heads * value_dim) : Vec();
    std::string norm = name + (c_.family == ModelFamily::kLinearAttention ? "norm.weight"
                               : c_.use_output_gate && c_.fuse_norm ? "g_norm_swish_gate.weight"
                                                                    : "g_norm.weight");
    if (!c_.elementwise_affine) norm.clear();

    Vec merged;
    for (int h = 0; h < heads; ++h) {
      const int group = h / (heads / kv_heads);
      const Vec qh = QueryOrKey(q_map, q, h, c_.norm_q, position);
      const Vec kh = QueryOrKey(k_map, k, group, c_.norm_k, position);
      Vec& state = states_[absl::StrCat(name, h)];
      state.resize(key_dim * value_dim);
      Vec& key_sum = states_[absl::StrCat(name, h, "/key_sum")];
      key_sum.resize(key_dim);
      Vec o(value_dim);
      double weight = 0;
      for (int i = 0; i < key_dim; ++i) {
        double decay = 1;
        if (!gate.empty()) decay = std::exp(gate[group * key_dim + i]);
        if (c_.family == ModelFamily::kRetNet) decay = 1 - std::exp2(-5.0 - h);
        key_sum[i] += kh[i];
        const double scaled_q = qh[i] / std::sqrt(static_cast<double>(key_dim));
        weight += scaled_q * key_sum[i];
        for (int j = 0; j < value_dim; ++j) {
          double& s = state[i * value_dim + j];
          s = decay * s + kh[i] * v[group * value_dim + j];
          o[j] += scaled_q * s;
        }
      }
      if (c_.norm_feature_map) {
        for (double& value : o) value /= weight + 1e-10;
      }
      if (c_.output_norm) o = RmsNorm(o, norm);
      for (int j = 0; j < value_dim; ++j) {
        merged.push_back(c_.use_output_gate ? o[j] * Silu(output_gate[h * value_dim + j]) : o[j]);
      }
    }
    return Linear(name + "o_proj.weight", merged, c_.hidden_size);
  }

  const ModelConfig c_;
  WeightSource& source_;
  std::map<std::string, Vec> weights_;
  std::map<std::string, Vec> states_;
  std::map<std::string, std::vector<Vec>> history_;
};

}  // namespace gla
