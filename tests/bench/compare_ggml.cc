// What a decode step's matrix products and gated linear attention cost in ggml, for
// compare_ggml.py, which builds this against a checkout of ggml.
//
// One graph: per layer the products of in_proj, the gate, out_proj, gate and up, down, then
// lm_head; bfloat16 weights, float32 activations; and ggml_gated_linear_attn, whose heads are
// square, on as many state elements. Inputs are constants, so that nothing else is computed or
// copied.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Shape {
  int64_t hidden, layers, keys, values, gate_rank, intermediate, vocab, head_dim, seqs;
};

class Step {
 public:
  explicit Step(const Shape& s)
      : shape_(s), context_(ggml_init({Bytes(s), nullptr, /*no_alloc=*/false})) {
    if (context_ == nullptr) std::abort();
    graph_ = ggml_new_graph_custom(context_, 16 * s.layers + 64, false);
    ggml_tensor* const x = Floats(s.hidden, s.seqs);
    ggml_tensor* const low = Floats(s.gate_rank, s.seqs);
    ggml_tensor* const mixed = Floats(s.values, s.seqs);
    ggml_tensor* const mlp = Floats(s.intermediate, s.seqs);
    const int64_t heads = s.keys * s.values / Heads(s) / (s.head_dim * s.head_dim);
    ggml_tensor* const rows =
        ggml_reshape_3d(context_, Floats(s.head_dim * heads, s.seqs), s.head_dim, heads, s.seqs);
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      Product(x, 2 * s.keys + 2 * s.values + s.gate_rank);
      Product(low, s.keys);
      ggml_tensor* const state = Floats(s.head_dim * s.head_dim * heads, s.seqs);
      Add(ggml_gated_linear_attn(context_, rows, rows, rows, rows, state, 1.0f));
      Product(mixed, s.hidden);
      Product(x, 2 * s.intermediate);
      Product(mlp, s.hidden);
    }
    Product(x, s.vocab);
  }
  ~Step() { ggml_free(context_); }
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  int64_t weight_bytes() const { return weight_bytes_; }

  // Median milliseconds.
  double Time(int threads, int repeats) {
    ggml_threadpool_params params = ggml_threadpool_params_default(threads);
    params.poll = 100;
    ggml_threadpool* const pool = ggml_threadpool_new(&params);
    ggml_cplan plan = ggml_graph_plan(graph_, threads, pool);
    std::vector<uint8_t> work(plan.work_size);
    plan.work_data = work.data();
    std::vector<double> times;
    for (int i = -5; i < repeats; ++i) {
      const auto start = std::chrono::steady_clock::now();
      if (ggml_graph_compute(graph_, &plan) != GGML_STATUS_SUCCESS) std::abort();
      const std::chrono::duration<double, std::milli> took =
          std::chrono::steady_clock::now() - start;
      if (i >= 0) times.push_back(took.count());
    }
    ggml_threadpool_free(pool);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

 private:
  static int64_t Heads(const Shape& s) { return s.keys / s.head_dim; }

  static size_t Bytes(const Shape& s) {
    const int64_t products =
        s.hidden * (2 * s.keys + 3 * s.values + s.gate_rank + 3 * s.intermediate) +
        s.gate_rank * s.keys;
    const int64_t outputs =
        2 * s.keys + 2 * s.values + s.gate_rank + s.keys + 2 * s.hidden + 3 * s.intermediate;
    const int64_t states = 2 * s.keys * s.values / Heads(s);
    return 2 * (s.layers * products + s.hidden * s.vocab) +
           4 * s.seqs * (s.layers * (outputs + states + s.values) + 2 * s.vocab) +
           (s.layers + 1) * (size_t{1} << 16) + (size_t{64} << 20);
  }

  ggml_tensor* Floats(int64_t width, int64_t rows) {
    ggml_tensor* const tensor = ggml_new_tensor_2d(context_, GGML_TYPE_F32, width, rows);
    float* const data = ggml_get_data_f32(tensor);
    for (int64_t i = 0; i < width * rows; ++i) data[i] = 0.001f * static_cast<float>(i % 997);
    return tensor;
  }

  void Product(ggml_tensor* x, int64_t out) {
    ggml_tensor* const weight = ggml_new_tensor_2d(context_, GGML_TYPE_BF16, x->ne[0], out);
    auto* const data = static_cast<uint16_t*>(weight->data);
    for (int64_t i = 0; i < ggml_nelements(weight); ++i) data[i] = 0x3C00 + i % 251;
    weight_bytes_ += static_cast<int64_t>(ggml_nbytes(weight));
    Add(ggml_mul_mat(context_, weight, x));
  }

  void Add(ggml_tensor* node) { ggml_build_forward_expand(graph_, node); }

  Shape shape_;
  ggml_context* context_;
  ggml_cgraph* graph_;
  int64_t weight_bytes_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  int64_t numbers[11];
  if (argc != 12) {
    std::fputs(
        "usage: compare_ggml HIDDEN LAYERS KEYS VALUES GATE_RANK INTERMEDIATE VOCAB HEAD_DIM "
        "SEQS THREADS STEPS\n",
        stderr);
    return 2;
  }
  for (int i = 0; i < 11; ++i) numbers[i] = std::atoll(argv[i + 1]);
  Shape shape;
  std::memcpy(&shape, numbers, sizeof(shape));
  Step step(shape);
  const double ms = step.Time(static_cast<int>(numbers[9]), static_cast<int>(numbers[10]));
  std::printf("{\"ms_per_step\": %.4f, \"weight_bytes\": %lld}\n", ms,
              static_cast<long long>(step.weight_bytes()));
  return 0;
}
