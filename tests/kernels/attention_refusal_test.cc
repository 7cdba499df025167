// Malformed calls of the operators: each is refused by a message that names operator, argument,
// expected and found. The tensors of these calls have addresses that no memory is behind, so a
// kernel or a copy that ran in spite of the refusal would end the test program.
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/attention.h"
#include "tests/kernels/harness.h"

namespace gla {
namespace {

using Shape = std::vector<int64_t>;

constexpr AttentionOp kOps[] = {AttentionOp::kLinearAttention, AttentionOp::kSimpleGla,
                                AttentionOp::kRetention, AttentionOp::kGla};

struct Call {
  AttentionInputs in;
  AttentionResultGradients gradients;
};

Tensor Nowhere(Shape shape, DType dtype = DType::kFloat32) {
  return {reinterpret_cast<const void*>(uintptr_t{4096}), dtype, std::move(shape)};
}

// T = 7, H = 4, G = 2, K = 64, V = 32, N = 2, everything given that the operator allows.
Call Valid(AttentionOp op) {
  Call call;
  call.in = {.op = op,
             .q = Nowhere({7, 4, 64}),
             .k = Nowhere({7, 2, 64}),
             .v = Nowhere({7, 2, 32}),
             .initial_state = Nowhere({2, 2, 64, 32}),
             .cu_seqlens = {0, 3, 7}};
  call.gradients = {.d_o = Nowhere({7, 4, 32}), .d_final_state = Nowhere({2, 2, 64, 32})};
  if (op == AttentionOp::kSimpleGla) call.in.gate = Nowhere({7, 2});
  if (op == AttentionOp::kGla) call.in.gate = Nowhere({7, 2, 64});
  if (op == AttentionOp::kRetention) {
    call.in.gate = Nowhere({4});
    call.in.initial_state = call.gradients.d_final_state = Nowhere({2, 4, 64, 32});
  }
  return call;
}

Call Normalized() {
  Call call = Valid(AttentionOp::kLinearAttention);
  call.in.normalize = true;
  call.in.initial_key_sum = call.gradients.d_final_key_sum = Nowhere({2, 2, 64});
  return call;
}

// B = 2, T = 3.
Call Batched(AttentionOp op) {
  Call call = Valid(op);
  call.in.cu_seqlens.clear();
  for (Tensor* tensor : {&call.in.q, &call.in.k, &call.in.v, &*call.gradients.d_o}) {
    tensor->shape[0] = 3;
    tensor->shape.insert(tensor->shape.begin(), 2);
  }
  if (op == AttentionOp::kSimpleGla) call.in.gate = Nowhere({2, 3, 2});
  if (op == AttentionOp::kGla) call.in.gate = Nowhere({2, 3, 2, 64});
  return call;
}

struct Malformed {
  Call call;
  std::function<void(Call&)> spoil;
  std::string message;
};

constexpr AttentionOp kLinear = AttentionOp::kLinearAttention, kSimple = AttentionOp::kSimpleGla,
                      kRetention = AttentionOp::kRetention, kGla = AttentionOp::kGla;

const Malformed kMalformedInputs[] = {
    // rank
    {Valid(kGla), [](Call& c) { c.in.q.shape = {7}; },
     "gla: q: expected shape [T, H, K] or [B, T, H, K], found [7]"},
    {Valid(kLinear), [](Call& c) { c.in.q.shape = {}; },
     "linear_attention: q: expected shape [T, H, K] or [B, T, H, K], found []"},
    {Valid(kGla),
     [](Call& c) {
       c.in.q.shape = {1, 1, 7, 4, 64};
     },
     "gla: q: expected shape [T, H, K] or [B, T, H, K], found [1, 1, 7, 4, 64]"},
    {Valid(kGla),
     [](Call& c) {
       c.in.k.shape = {7, 64};
     },
     "gla: k: expected shape [T, G, K] = [7, G, 64] as q, found [7, 64]"},
    {Batched(kGla),
     [](Call& c) {
       c.in.k.shape = {6, 2, 64};
     },
     "gla: k: expected shape [B, T, G, K] = [2, 3, G, 64] as q, found [6, 2, 64]"},
    {Valid(kSimple),
     [](Call& c) {
       c.in.v.shape = {1, 7, 2, 32};
     },
     "simple_gla: v: expected shape [T, G, V] = [7, 2, V] as k, found [1, 7, 2, 32]"},
    // lengths, heads, K, V
    {Valid(kGla), [](Call& c) { c.in.k.shape[0] = 8; },
     "gla: k: expected shape [T, G, K] = [7, G, 64] as q, found [8, 2, 64]"},
    {Valid(kGla), [](Call& c) { c.in.v.shape[0] = 6; },
     "gla: v: expected shape [T, G, V] = [7, 2, V] as k, found [6, 2, 32]"},
    {Batched(kLinear), [](Call& c) { c.in.v.shape[0] = 1; },
     "linear_attention: v: expected shape [B, T, G, V] = [2, 3, 2, V] as k, found [1, 3, 2, 32]"},
    {Valid(kRetention), [](Call& c) { c.in.k.shape[2] = 32; },
     "retention: k: expected shape [T, G, K] = [7, G, 64] as q, found [7, 2, 32]"},
    {Valid(kGla), [](Call& c) { c.in.v.shape[1] = 4; },
     "gla: v: expected shape [T, G, V] = [7, 2, V] as k, found [7, 4, 32]"},
    {Valid(kLinear), [](Call& c) { c.in.k.shape[1] = c.in.v.shape[1] = 3; },
     "linear_attention: heads of k: expected a divisor of the 4 heads of q, found 3"},
    {Valid(kLinear), [](Call& c) { c.in.k.shape[1] = c.in.v.shape[1] = 8; },
     "linear_attention: heads of k: expected a divisor of the 4 heads of q, found 8"},
    {Valid(kGla), [](Call& c) { c.in.q.shape[1] = 0; },
     "gla: heads of q: expected 1 to 8388608, found 0"},
    {Valid(kGla), [](Call& c) { c.in.k.shape[1] = c.in.v.shape[1] = 0; },
     "gla: heads of k: expected 1 to 8388608, found 0"},
    {Valid(kGla), [](Call& c) { c.in.q.shape[2] = c.in.k.shape[2] = 0; },
     "gla: key dimension: expected 1 to 2048, found 0"},
    {Valid(kGla), [](Call& c) { c.in.v.shape[2] = 0; },
     "gla: value dimension: expected 1 to 1048576, found 0"},
    {Valid(kGla), [](Call& c) { c.in.q.shape[0] = -7; },
     "gla: q: expected dimensions from 0 to 2147483647, found [-7, 4, 64]"},
    {Valid(kGla), [](Call& c) { c.in.v.shape[2] = -32; },
     "gla: v: expected dimensions from 0 to 2147483647, found [7, 2, -32]"},
    {Batched(kGla), [](Call& c) { c.in.q.shape[0] = c.in.k.shape[0] = c.in.v.shape[0] = 0; },
     "gla: sequences: expected 1 to 2147483647, found 0"},
    // beyond what the kernels count in int, or hold
    {Valid(kGla), [](Call& c) { c.in.q.shape[0] = int64_t{1} << 31; },
     "gla: q: expected dimensions from 0 to 2147483647, found [2147483648, 4, 64]"},
    {Batched(kGla),
     [](Call& c) {
       for (Tensor* t : {&c.in.q, &c.in.k, &c.in.v}) t->shape[0] = t->shape[1] = 1 << 16;
     },
     "gla: rows: expected 0 to 2147483647, found 4294967296"},
    {Batched(kGla),
     [](Call& c) {
       for (Tensor* t : {&c.in.q, &c.in.k, &c.in.v}) t->shape[0] = 1 << 25, t->shape[1] = 1;
     },
     "gla: sequences: expected N * S * V * ceil(K / 64) of at most 1073741824, found 33554432 * 2 "
     "* 32 * 1"},
    {Valid(kGla), [](Call& c) { c.in.q.shape[2] = c.in.k.shape[2] = 2049; },
     "gla: key dimension: expected 1 to 2048, found 2049"},
    {Valid(kGla), [](Call& c) { c.in.v.shape[2] = 1 << 21; },
     "gla: value dimension: expected 1 to 1048576, found 2097152"},
    {Valid(kRetention), [](Call& c) { c.in.q.shape[1] = 1 << 23; },
     "retention: elements of a row of q, H * K: expected 1 to 8388608, found 536870912"},
    {Valid(kRetention), [](Call& c) { c.in.q.shape[1] = 1 << 15, c.in.v.shape[2] = 1 << 10; },
     "retention: elements of a row of o, H * V: expected 1 to 8388608, found 33554432"},
    {Valid(kGla), [](Call& c) { c.in.q.shape[1] = 258; },
     "gla: query heads per state: expected 1 to 128, found 129"},
    {Valid(kGla),
     [](Call& c) {
       c.in.q.shape = {7, 64, 520}, c.in.k.shape[2] = 520;
     },
     "gla: query heads per state * K rounded up to 64: expected at most 16384, found 32 * 576"},
    // dtypes
    {Valid(kGla), [](Call& c) { c.in.k.dtype = DType::kBFloat16; },
     "gla: k: expected dtype float32 as q, found bfloat16"},
    {Valid(kGla), [](Call& c) { c.in.q.dtype = c.in.k.dtype = DType::kFloat16; },
     "gla: v: expected dtype float16 as k, found float32"},
    {Valid(kGla), [](Call& c) { c.in.gate->dtype = DType::kBFloat16; },
     "gla: gate: expected dtype float32 as k, found bfloat16"},
    {Valid(kSimple),
     [](Call& c) {
       c.in.q.dtype = c.in.k.dtype = c.in.v.dtype = DType::kBFloat16;
       c.in.gate->dtype = DType::kFloat16;
     },
     "simple_gla: gate: expected dtype float32 or bfloat16 as k, found float16"},
    {Valid(kGla), [](Call& c) { c.in.initial_state->dtype = DType::kBFloat16; },
     "gla: initial_state: expected dtype float32, found bfloat16"},
    {Normalized(), [](Call& c) { c.in.initial_key_sum->dtype = DType::kFloat16; },
     "linear_attention: initial_key_sum: expected dtype float32, found float16"},
    // data
    {Valid(kGla), [](Call& c) { c.in.q.data = nullptr; },
     "gla: q: expected data of [7, 4, 64] float32, found a null pointer"},
    {Valid(kGla), [](Call& c) { c.in.v.data = nullptr; },
     "gla: v: expected data of [7, 2, 32] float32, found a null pointer"},
    {Valid(kRetention), [](Call& c) { c.in.gate->data = nullptr; },
     "retention: gate: expected data of [4] float32, found a null pointer"},
    {Valid(kGla), [](Call& c) { c.in.initial_state->data = nullptr; },
     "gla: initial_state: expected data of [2, 2, 64, 32] float32, found a null pointer"},
    {Valid(kGla), [](Call& c) { c.in.k.data = reinterpret_cast<void*>(uintptr_t{4098}); },
     "gla: k: expected data at a multiple of 4 bytes, found address 0x1002"},
    // cu_seqlens
    {Valid(kGla), [](Call& c) { c.in.cu_seqlens = {}; },
     "gla: cu_seqlens: expected N + 1 offsets from 0 to T = 7, N of at least 1, found 0 offsets"},
    {Valid(kGla), [](Call& c) { c.in.cu_seqlens = {0}; },
     "gla: cu_seqlens: expected N + 1 offsets from 0 to T = 7, N of at least 1, found 1 offsets"},
    {Valid(kGla),
     [](Call& c) {
       c.in.cu_seqlens = {1, 3, 7};
     },
     "gla: cu_seqlens: expected the first offset 0, found 1"},
    {Valid(kGla),
     [](Call& c) {
       c.in.cu_seqlens = {0, 5, 3, 7};
     },
     "gla: cu_seqlens: expected offset 2 of at least 5, found 3"},
    {Valid(kGla),
     [](Call& c) {
       c.in.cu_seqlens = {0, 3, 6};
     },
     "gla: cu_seqlens: expected the last offset T = 7 as q, found 6"},
    {Valid(kGla),
     [](Call& c) {
       c.in.cu_seqlens = {0, 3, 8};
     },
     "gla: cu_seqlens: expected the last offset T = 7 as q, found 8"},
    {Batched(kGla),
     [](Call& c) {
       c.in.cu_seqlens = {0, 3, 6};
     },
     "gla: cu_seqlens: expected none for a batched q, found 3 offsets"},
    // gate
    {Valid(kLinear),
     [](Call& c) {
       c.in.gate = Nowhere({7, 2});
     },
     "linear_attention: gate: expected none, found [7, 2] float32"},
    {Valid(kRetention), [](Call& c) { c.in.gate.reset(); },
     "retention: gate: expected shape [H] = [4] as q, found none"},
    {Valid(kRetention), [](Call& c) { c.in.gate->shape = {2}; },
     "retention: gate: expected shape [H] = [4] as q, found [2]"},
    {Valid(kRetention),
     [](Call& c) {
       c.in.gate->shape = {7, 4};
     },
     "retention: gate: expected shape [H] = [4] as q, found [7, 4]"},
    {Valid(kGla),
     [](Call& c) {
       c.in.gate->shape = {7, 2};
     },
     "gla: gate: expected shape [T, G, K] = [7, 2, 64] as k, found [7, 2]"},
    {Valid(kGla),
     [](Call& c) {
       c.in.gate->shape = {7, 4, 64};
     },
     "gla: gate: expected shape [T, G, K] = [7, 2, 64] as k, found [7, 4, 64]"},
    {Valid(kGla),
     [](Call& c) {
       c.in.gate->shape = {6, 2, 64};
     },
     "gla: gate: expected shape [T, G, K] = [7, 2, 64] as k, found [6, 2, 64]"},
    {Valid(kGla),
     [](Call& c) {
       c.in.gate->shape = {7, 2, 1};
     },
     "gla: gate: expected shape [T, G, K] = [7, 2, 64] as k, found [7, 2, 1]"},
    {Valid(kSimple),
     [](Call& c) {
       c.in.gate->shape = {7, 2, 64};
     },
     "simple_gla: gate: expected shape [T, G] = [7, 2] as k, found [7, 2, 64]"},
    {Valid(kSimple),
     [](Call& c) {
       c.in.gate->shape = {7, 4};
     },
     "simple_gla: gate: expected shape [T, G] = [7, 2] as k, found [7, 4]"},
    {Batched(kSimple),
     [](Call& c) {
       c.in.gate->shape = {6, 2};
     },
     "simple_gla: gate: expected shape [B, T, G] = [2, 3, 2] as k, found [6, 2]"},
    // states
    {Valid(kGla), [](Call& c) { c.in.initial_state->shape[0] = 3; },
     "gla: initial_state: expected shape [N, S, K, V] = [2, 2, 64, 32], found [3, 2, 64, 32]"},
    {Valid(kGla), [](Call& c) { c.in.initial_state->shape[1] = 4; },
     "gla: initial_state: expected shape [N, S, K, V] = [2, 2, 64, 32], found [2, 4, 64, 32]"},
    {Valid(kRetention), [](Call& c) { c.in.initial_state->shape[1] = 2; },
     "retention: initial_state: expected shape [N, S, K, V] = [2, 4, 64, 32], found [2, 2, 64, "
     "32]"},
    {Valid(kGla),
     [](Call& c) {
       c.in.initial_state->shape = {2, 2, 32, 64};
     },
     "gla: initial_state: expected shape [N, S, K, V] = [2, 2, 64, 32], found [2, 2, 32, 64]"},
    {Batched(kGla),
     [](Call& c) {
       c.in.initial_state->shape = {2, 64, 32};
     },
     "gla: initial_state: expected shape [N, S, K, V] = [2, 2, 64, 32], found [2, 64, 32]"},
    {Normalized(),
     [](Call& c) {
       c.in.initial_key_sum->shape = {2, 64};
     },
     "linear_attention: initial_key_sum: expected shape [N, G, K] = [2, 2, 64], found [2, 64]"},
    {Valid(kLinear),
     [](Call& c) {
       c.in.initial_key_sum = Nowhere({2, 2, 64});
     },
     "linear_attention: initial_key_sum: expected none without normalize, found [2, 2, 64] "
     "float32"},
    // options
    {Valid(kGla), [](Call& c) { c.in.normalize = true; },
     "gla: normalize: expected false but for linear_attention, found true"},
    {Normalized(), [](Call& c) { c.in.form = AttentionForm::kChunkwise; },
     "linear_attention: form: expected recurrent with normalize, found chunkwise"},
    {Valid(kGla), [](Call& c) { c.in.scale = NAN; },
     "gla: scale: expected a finite number, found nan"},
    {Valid(kGla), [](Call& c) { c.in.scale = -INFINITY; },
     "gla: scale: expected a finite number, found -inf"},
};

const Malformed kMalformedGradients[] = {
    {Valid(kGla), [](Call& c) { c.gradients = {}; },
     "gla: gradients: expected at least one of d_o, d_final_state and d_final_key_sum, found none"},
    {Valid(kGla),
     [](Call& c) {
       c.gradients.d_o->shape = {7, 2, 32};
     },
     "gla: d_o: expected shape [T, H, V] = [7, 4, 32] as o, found [7, 2, 32]"},
    {Valid(kGla),
     [](Call& c) {
       c.gradients.d_o->shape = {7, 128};
     },
     "gla: d_o: expected shape [T, H, V] = [7, 4, 32] as o, found [7, 128]"},
    {Batched(kGla),
     [](Call& c) {
       c.gradients.d_o->shape = {6, 4, 32};
     },
     "gla: d_o: expected shape [B, T, H, V] = [2, 3, 4, 32] as o, found [6, 4, 32]"},
    {Valid(kGla), [](Call& c) { c.gradients.d_o->dtype = DType::kBFloat16; },
     "gla: d_o: expected dtype float32 as o, found bfloat16"},
    {Valid(kGla), [](Call& c) { c.gradients.d_o->data = nullptr; },
     "gla: d_o: expected data of [7, 4, 32] float32, found a null pointer"},
    {Valid(kGla), [](Call& c) { c.gradients.d_final_state->shape[0] = 1; },
     "gla: d_final_state: expected shape [N, S, K, V] = [2, 2, 64, 32], found [1, 2, 64, 32]"},
    {Valid(kRetention), [](Call& c) { c.gradients.d_final_state->shape[1] = 2; },
     "retention: d_final_state: expected shape [N, S, K, V] = [2, 4, 64, 32], found [2, 2, 64, "
     "32]"},
    {Valid(kGla), [](Call& c) { c.gradients.d_final_state->dtype = DType::kFloat16; },
     "gla: d_final_state: expected dtype float32, found float16"},
    {Valid(kLinear),
     [](Call& c) {
       c.gradients.d_final_key_sum = Nowhere({2, 2, 64});
     },
     "linear_attention: d_final_key_sum: expected none without normalize, found [2, 2, 64] "
     "float32"},
    {Normalized(),
     [](Call& c) {
       c.gradients.d_final_key_sum->shape = {2, 4, 64};
     },
     "linear_attention: d_final_key_sum: expected shape [N, G, K] = [2, 2, 64], found [2, 4, 64]"},
    {Normalized(), [](Call& c) { c.gradients.d_final_key_sum->data = nullptr; },
     "linear_attention: d_final_key_sum: expected data of [2, 2, 64] float32, found a null "
     "pointer"},
};

void ExpectRefused(const absl::Status& status, const std::string& message) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(std::string(status.message()), message);
}

TEST(CheckAttention, AcceptsTheCallsThatTheTableSpoils) {
  std::vector<Call> calls = {Normalized()};
  for (AttentionOp op : kOps) calls.push_back(Valid(op)), calls.push_back(Batched(op));
  for (const Call& call : calls) {
    EXPECT_EQ(CheckAttention(call.in), absl::OkStatus());
    EXPECT_EQ(CheckAttentionGradients(call.in, call.gradients), absl::OkStatus());
  }
}

void RefuseEveryMalformedCall() {
  for (const Malformed& malformed : kMalformedInputs) {
    Call call = malformed.call;
    malformed.spoil(call);
    SCOPED_TRACE(malformed.message);
    ExpectRefused(CheckAttention(call.in), malformed.message);
    for (bool want_final_state : {false, true}) {
      ExpectRefused(AttentionForward(TestDevice(), call.in, want_final_state).status(),
                    malformed.message);
    }
    ExpectRefused(AttentionBackward(TestDevice(), call.in, call.gradients).status(),
                  malformed.message);
  }
  for (const Malformed& malformed : kMalformedGradients) {
    Call call = malformed.call;
    malformed.spoil(call);
    SCOPED_TRACE(malformed.message);
    EXPECT_EQ(CheckAttention(call.in), absl::OkStatus());
    ExpectRefused(AttentionBackward(TestDevice(), call.in, call.gradients).status(),
                  malformed.message);
  }
  TestDevice().Synchronize();  // whatever was launched would have failed by now
}

TEST(CheckAttention, RefusesEveryMalformedCallByName) {
  EXPECT_GE(std::size(kMalformedInputs) + std::size(kMalformedGradients), 40u);
  RefuseEveryMalformedCall();
}

// On a host other processes come and go all the time; on a GPU, seldom: what is lost in every call
// is lost in every try.
TEST(CheckAttention, ARefusedCallKeepsNoMemory) {
  bool kept = OnCuda();
  for (int i = 0; i < 50 && kept; ++i) {
    const size_t before = TestDevice().memory_free();
    RefuseEveryMalformedCall();
    kept = TestDevice().memory_free() != before;
  }
  EXPECT_FALSE(kept);
}

TEST(CheckAttention, AnyFiniteScaleIsTaken) {
  for (float scale : {1.0f, 0.0f, -0.5f, 1e30f}) {
    Call call = Valid(kGla);
    call.in.scale = scale;
    EXPECT_EQ(CheckAttention(call.in), absl::OkStatus()) << scale;
  }
}

// What a layer asks when it is built gives the words that a call would get.
TEST(CheckAttentionShape, SaysWhatTheCallWouldBeTold) {
  const AttentionShape valid = {.op = kGla,
                                .num_heads = 4,
                                .num_kv_heads = 2,
                                .key_dim = 64,
                                .value_dim = 32,
                                .num_rows = 100,
                                .num_seqs = 3};
  EXPECT_EQ(CheckAttentionShape(valid), absl::OkStatus());
  AttentionShape shape = valid;
  shape.num_kv_heads = 3;
  ExpectRefused(CheckAttentionShape(shape),
                "gla: heads of k: expected a divisor of the 4 heads of q, found 3");
  shape = valid;
  shape.key_dim = 4096;
  ExpectRefused(CheckAttentionShape(shape), "gla: key dimension: expected 1 to 2048, found 4096");
  shape = valid;
  shape.num_rows = -1;
  ExpectRefused(CheckAttentionShape(shape), "gla: rows: expected 0 to 2147483647, found -1");
  shape = valid;
  shape.num_seqs = int64_t{1} << 40;
  ExpectRefused(CheckAttentionShape(shape),
                "gla: sequences: expected 1 to 2147483647, found 1099511627776");
  shape = valid;
  shape.normalize = true;
  ExpectRefused(CheckAttentionShape(shape),
                "gla: normalize: expected false but for linear_attention, found true");
}

// Too large for any memory, and well formed: a status, and again nothing is launched.
TEST(Attention, SaysWhenDeviceMemoryRunsOut) {
  Call call = Valid(kGla);
  const int64_t rows = 2'000'000'000;
  for (Tensor* tensor :
       {&call.in.q, &call.in.k, &call.in.v, &*call.in.gate, &*call.gradients.d_o}) {
    tensor->shape[0] = rows;
  }
  call.in.cu_seqlens = {0, 1, static_cast<int32_t>(rows)};
  for (const absl::Status& status :
       {AttentionForward(TestDevice(), call.in, true).status(),
        AttentionBackward(TestDevice(), call.in, call.gradients).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(std::string(status.message()).find("gla: device memory: expected room for "), 0u)
        << status.message();
  }
  TestDevice().Synchronize();
}

}  // namespace
}  // namespace gla
