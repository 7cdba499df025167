// A linear-attention language model: weights on the device and the forward pass over a step plan.
//
// Built once from a checkpoint; every tensor's shape, and every layer's output against the next
// one's input, is checked then (the per-head norm gives [T, H, V]; the output projection wants [T,
// H * V]). Const but for its activation buffers; used by one thread, the engine's.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kernels.h"
#include "model/checkpoint.h"
#include "model/model_config.h"
#include "model/step_plan.h"

namespace gla {

enum class PrefillForm { kRecurrent, kChunkwise };

struct ModelOptions {
  DType dtype = DType::kFloat32;  // activations: float32 or bfloat16. Weights are kept as bfloat16
                                  // when dtype is bfloat16 or the checkpoint is, else as float32.
  int max_rows = 2048;            // T of the largest step; activations are allocated for it
  int max_seqs = 64;              // N of the largest step
  int max_logit_rows = 256;       // R of the largest step
  // How runs of more than one token are computed. kRecurrent: bits do not depend on how a text is
  // cut into steps and turns. kChunkwise: tiles of tokens, equal up to rounding.
  PrefillForm prefill_form = PrefillForm::kRecurrent;
  // How states rest in their slots; arithmetic on them is float32.
  StateFormat state_format = StateFormat::kFloat32;
  // GPU: the decode rows of a step are replayed from a recording of their kernels (a CUDA graph,
  // one for each of a few numbers of rows), and so are up to 1024 other rows. False: queued anew in
  // every step.
  bool record_steps = true;
  // False: in steps of more than 256 decode rows the products of a GPU are cuBLASLt's, which are
  // faster there but add in another order than the kernels for few rows. Then a decode row's bits
  // depend on whether its step had more than 256.
  bool batch_invariant = true;
  // RetNet: rotary frequencies rounded to bfloat16, as in an fla model that was cast to bfloat16
  // and back. False: exact, as in one that was loaded by from_pretrained.
  bool rotary_bfloat16_frequencies = false;
};

class Model {
 public:
  // Reads the weights; `checkpoint` is not needed afterwards. InvalidArgument when tensors do not
  // fit the config; ResourceExhausted when device memory runs out.
  static absl::StatusOr<std::unique_ptr<Model>> Load(Device& device, const ModelConfig& config,
                                                     Checkpoint& checkpoint,
                                                     const ModelOptions& options);
  // Random weights of the config's shapes, for benches and tests (deterministic in `seed`).
  static absl::StatusOr<std::unique_ptr<Model>> Random(Device& device, const ModelConfig& config,
                                                       uint64_t seed, const ModelOptions& options);
  ~Model();

  const ModelConfig& config() const;
  const ModelOptions& options() const;
  // One slot: all layers' states one after another, a multiple of 256.
  int64_t state_bytes() const;
  int64_t weight_bytes() const;
  // The embedding table, counted in weight_bytes(): a step reads one row of it per token.
  int64_t embedding_bytes() const;

  // GPU, with record_steps: makes all recordings of steps on the states at `states`, which take
  // some ms each; otherwise the first step of each size makes its own.
  void Record(void* states);

  // Runs the plan over the state slots at `states` (device memory; slot s at s * state_bytes())
  // and returns the logits [R, vocab] float32 in device memory, valid until the next call. Queued,
  // not waited for. `finite` (device memory [T], or null) receives for each row 1 when what the
  // layers made of it is finite, else 0. A state with a value that is not finite makes every later
  // row of its sequence so: rows that are finite mean a sound state.
  // A token ~i of the plan stands for sampled[i] (device memory, read when the queue comes to it),
  // or for token 0 where that is below 0.
  // REQUIRES: the plan is within the options' limits, other tokens are in [0, vocab).
  const float* Forward(const StepPlan& plan, void* states, int32_t* finite = nullptr,
                       const int32_t* sampled = nullptr);

 private:
  struct Impl;
  explicit Model(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace gla
