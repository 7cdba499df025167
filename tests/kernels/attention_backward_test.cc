// The gradients of the linear-attention operators, in both forms, against the naive reverse
// recurrence in double precision; and that one against finite differences.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/testing/near.h"

namespace gla {
namespace {

using reference::Doubles;

constexpr AttentionForm kForms[] = {AttentionForm::kRecurrent, AttentionForm::kChunkwise};
constexpr GateKind kKinds[] = {GateKind::kNone, GateKind::kConstant, GateKind::kScalar,
                               GateKind::kPerKey};

enum class Gates { kNormal, kZero, kStrong, kVeryStrong, kErasing, kLongMemory };

struct Case {
  int H, G, K, V;
  GateKind kind = GateKind::kPerKey;
  Gates gates = Gates::kNormal;
  DType dtype = DType::kFloat32;
  DType gate_dtype = DType::kFloat32;
  bool initial_state = true, d_o = true, d_final_state = true;
  bool d_initial_state = true;  // wanted

  int state_heads() const { return kind == GateKind::kConstant ? H : G; }
  bool has_d_gate() const { return kind == GateKind::kScalar || kind == GateKind::kPerKey; }
  size_t gate_size(int rows) const {
    if (kind == GateKind::kNone) return 0;
    if (kind == GateKind::kConstant) return H;
    return size_t(rows) * G * (kind == GateKind::kPerKey ? K : 1);
  }
  float scale() const { return 1 / std::sqrt(static_cast<float>(K)); }
  std::string name(AttentionForm form) const {
    std::ostringstream out;
    out << (form == AttentionForm::kRecurrent ? "recurrent" : "chunk") << " H" << H << " G" << G
        << " K" << K << " V" << V << " gate kind " << static_cast<int>(kind) << " gates "
        << static_cast<int>(gates) << " " << NameOf(dtype) << ", gate " << NameOf(gate_dtype)
        << (initial_state ? " initial_state" : "") << (d_o ? " d_o" : "")
        << (d_final_state ? " d_final_state" : "") << (d_initial_state ? " d_initial_state" : "");
    return out.str();
  }
};

std::vector<float> MakeGates(const Case& c, int rows) {
  std::vector<float> gates = Normal(c.gate_size(rows), 1, 5);
  if (c.kind == GateKind::kConstant) {
    for (int h = 0; h < c.H; ++h) gates[h] = std::log(1 - std::exp2(-5.0f - h));
    return Rounded(gates, c.gate_dtype);
  }
  std::mt19937 random(6);
  for (float& gate : gates) {
    const float log_sigmoid = -std::log1p(std::exp(-gate));
    switch (c.gates) {
      case Gates::kNormal:
        gate = log_sigmoid / 16;
        break;
      case Gates::kZero:
        gate = 0;
        break;
      case Gates::kStrong:  // -3 to -30
        gate = -3 - 27 * (random() % 1024) / 1024.0f;
        break;
      case Gates::kVeryStrong:  // the gradient is all but zero, and still has its digits
        gate = -30;
        break;
      case Gates::kErasing:
        gate = random() % 23 == 0 ? -1e4f : log_sigmoid / 16;
        break;
      case Gates::kLongMemory:
        gate = -1e-3f * std::abs(gate);
        break;
    }
  }
  return Rounded(gates, c.gate_dtype);
}

// Everything that is given, on the host. Absent ones are made too, and left out of the call.
struct Inputs {
  Inputs(const Case& c, const std::vector<int>& lengths) : lengths(lengths) {
    const size_t rows = std::accumulate(lengths.begin(), lengths.end(), 0);
    const size_t states = lengths.size() * c.state_heads() * c.K * c.V;
    q = Rounded(Normal(rows * c.H * c.K, 1, 1), c.dtype);
    k = Rounded(Normal(rows * c.G * c.K, 1, 2), c.dtype);
    v = Rounded(Normal(rows * c.G * c.V, 1, 3), c.dtype);
    d_o = Rounded(Normal(rows * c.H * c.V, 1, 4), c.dtype);
    gate = MakeGates(c, static_cast<int>(rows));
    initial_state = Normal(states, 1, 7);
    d_final_state = Normal(states, 1, 8);
  }
  int num_rows() const { return std::accumulate(lengths.begin(), lengths.end(), 0); }

  std::vector<int> lengths;
  std::vector<float> q, k, v, d_o, gate, initial_state, d_final_state;
};

struct Result {
  std::vector<float> dq, dk, dv, d_gate, d_initial_state;  // absent ones are empty
};

// An output of `n` elements with a few more behind it that must stay untouched.
struct Output {
  static constexpr size_t kGuard = 16;
  Output(size_t n, DType dtype) : n(n), dtype(dtype), buffer(Poisoned(n + kGuard, dtype)) {}
  std::vector<float> Take() const {
    std::vector<float> values = DownloadAs(buffer, n + kGuard, dtype);
    EXPECT_TRUE(AllNaN({values.begin() + n, values.end()})) << "written past the end";
    values.resize(n);
    return values;
  }
  size_t n;
  DType dtype;
  DeviceBuffer buffer;
};

// Never an empty array: a pointer that is given is not null.
DeviceBuffer UploadGiven(std::vector<float> values, DType dtype) {
  values.resize(values.size() + 16, NAN);
  return UploadAs(values, dtype);
}

Result RunBackward(AttentionForm form, const Case& c, const Inputs& in) {
  const DeviceBuffer q = UploadGiven(in.q, c.dtype), k = UploadGiven(in.k, c.dtype),
                     v = UploadGiven(in.v, c.dtype), d_o = UploadGiven(in.d_o, c.dtype),
                     gate = UploadGiven(in.gate, c.gate_dtype),
                     initial_state = UploadGiven(in.initial_state, DType::kFloat32),
                     d_final_state = UploadGiven(in.d_final_state, DType::kFloat32);
  const Output dq(in.q.size(), c.dtype), dk(in.k.size(), c.dtype), dv(in.v.size(), c.dtype),
      d_gate(c.has_d_gate() ? in.gate.size() : 0, c.gate_dtype),
      d_initial_state(c.d_initial_state ? in.initial_state.size() : 0, DType::kFloat32);
  std::vector<int32_t> cu_seqlens = {0};
  for (int len : in.lengths) cu_seqlens.push_back(cu_seqlens.back() + len);
  const DeviceBuffer device_cu_seqlens = Upload(cu_seqlens);
  LinearAttentionBackwardArgs args = {
      .q = q.data(),
      .k = k.data(),
      .v = v.data(),
      .gate_kind = c.kind,
      .gate = c.kind != GateKind::kNone ? gate.data() : nullptr,
      .gate_dtype = c.gate_dtype,
      .initial_state = c.initial_state ? initial_state.as<float>() : nullptr,
      .d_o = c.d_o ? d_o.data() : nullptr,
      .d_final_state = c.d_final_state ? d_final_state.as<float>() : nullptr,
      .dq = dq.buffer.data(),
      .dk = dk.buffer.data(),
      .dv = dv.buffer.data(),
      .d_gate = c.has_d_gate() ? d_gate.buffer.data() : nullptr,
      .d_initial_state = c.d_initial_state ? d_initial_state.buffer.as<float>() : nullptr,
      .cu_seqlens = device_cu_seqlens.as<int32_t>(),
      .num_seqs = static_cast<int>(in.lengths.size()),
      .num_rows = cu_seqlens.back(),
      .max_len = *std::max_element(in.lengths.begin(), in.lengths.end()),
      .num_heads = c.H,
      .num_kv_heads = c.G,
      .key_dim = c.K,
      .value_dim = c.V,
      .state_heads = c.state_heads(),
      .scale = c.scale(),
      .dtype = c.dtype,
      .workspace = nullptr};
  const size_t bytes = LinearAttentionBackwardBytes(TestDevice(), args, form);
  const Output workspace(bytes / sizeof(float) + 1, DType::kFloat32);
  args.workspace = workspace.buffer.data();
  if (form == AttentionForm::kRecurrent) {
    RecurrentLinearAttentionBackward(TestDevice(), args);
  } else {
    ChunkLinearAttentionBackward(TestDevice(), args);
  }
  workspace.Take();
  return {dq.Take(), dk.Take(), dv.Take(), d_gate.Take(), d_initial_state.Take()};
}

reference::AttentionProblem Problem(const Case& c, const Inputs& in) {
  const auto doubles = [](const std::vector<float>& x) { return Doubles(x.begin(), x.end()); };
  return {c.H,
          c.G,
          c.K,
          c.V,
          c.kind,
          c.scale(),
          in.lengths,
          doubles(in.q),
          doubles(in.k),
          doubles(in.v),
          doubles(in.gate),
          c.initial_state ? doubles(in.initial_state) : Doubles()};
}

reference::AttentionGradients Expected(const Case& c, const Inputs& in) {
  return reference::AttentionBackward(
      Problem(c, in), c.d_o ? Doubles(in.d_o.begin(), in.d_o.end()) : Doubles(),
      c.d_final_state ? Doubles(in.d_final_state.begin(), in.d_final_state.end()) : Doubles());
}

void Judge(const Case& c, const reference::AttentionGradients& want, const Result& got) {
  const double tolerance = StateTolerance(c.dtype);
  EXPECT_TRUE(IsNear(got.dq, want.dq, tolerance)) << "dq";
  EXPECT_TRUE(IsNear(got.dk, want.dk, tolerance)) << "dk";
  EXPECT_TRUE(IsNear(got.dv, want.dv, tolerance)) << "dv";
  if (c.has_d_gate()) {
    EXPECT_TRUE(IsNear(got.d_gate, want.d_gate, std::max(tolerance, StateTolerance(c.gate_dtype))))
        << "d_gate";
  }
  if (c.d_initial_state) {
    EXPECT_TRUE(IsNear(got.d_initial_state, want.d_initial_state, tolerance)) << "d_initial_state";
  }
}

void Check(const Case& c, const std::vector<int>& lengths) {
  const Inputs in(c, lengths);
  const reference::AttentionGradients want = Expected(c, in);
  for (AttentionForm form : kForms) {
    SCOPED_TRACE(c.name(form));
    Judge(c, want, RunBackward(form, c, in));
  }
}

const std::vector<int> kLengths = {1, 0, 63, 64, 65, 127, 129, 193, 0};
const std::vector<int> kFew = {1, 17, 0, 65, 100};

// ---- The judge itself ---------------------------------------------------------------------------

double Loss(const reference::AttentionProblem& p, const Doubles& d_o, const Doubles& d_state) {
  const reference::AttentionOutputs out = reference::AttentionForward(p);
  return std::inner_product(out.o.begin(), out.o.end(), d_o.begin(), 0.0) +
         std::inner_product(out.final_state.begin(), out.final_state.end(), d_state.begin(), 0.0);
}

TEST(AttentionReference, GradientsAreFiniteDifferences) {
  for (GateKind kind : kKinds) {
    for (Case c : {Case{.H = 1, .G = 1, .K = 3, .V = 4}, Case{.H = 4, .G = 2, .K = 2, .V = 3},
                   Case{.H = 3, .G = 1, .K = 5, .V = 1}}) {
      c.kind = kind;
      SCOPED_TRACE(c.name(AttentionForm::kRecurrent));
      const Inputs in(c, {4, 0, 1, 7});
      reference::AttentionProblem p = Problem(c, in);
      for (double& gate : p.gate) gate *= 10;  // so that it matters
      const Doubles d_o(in.d_o.begin(), in.d_o.end()),
          d_state(in.d_final_state.begin(), in.d_final_state.end());
      const reference::AttentionGradients got = reference::AttentionBackward(p, d_o, d_state);
      const auto differences = [&](Doubles reference::AttentionProblem::*input) {
        Doubles result;
        for (double& x : p.*input) {
          const double kept = x, step = 1e-5;
          x = kept + step;
          const double above = Loss(p, d_o, d_state);
          x = kept - step;
          result.push_back((above - Loss(p, d_o, d_state)) / (2 * step));
          x = kept;
        }
        return result;
      };
      using P = reference::AttentionProblem;
      EXPECT_TRUE(IsNear(got.dq, differences(&P::q), 1e-8));
      EXPECT_TRUE(IsNear(got.dk, differences(&P::k), 1e-8));
      EXPECT_TRUE(IsNear(got.dv, differences(&P::v), 1e-8));
      EXPECT_TRUE(IsNear(got.d_gate, differences(&P::gate), 1e-8));
      EXPECT_TRUE(IsNear(got.d_initial_state, differences(&P::initial_state), 1e-8));
    }
  }
}

// ---- Arithmetic ---------------------------------------------------------------------------------

TEST(LinearAttentionBackward, EqualsArithmeticForEveryKindOfGateAndType) {
  for (GateKind kind : kKinds) {
    for (DType dtype : kAttentionTypes) {
      Check({.H = 5, .G = 5, .K = 32, .V = 64, .kind = kind, .dtype = dtype}, kLengths);
      Check({.H = 2, .G = 2, .K = 32, .V = 64, .kind = kind, .dtype = dtype, .gate_dtype = dtype},
            kFew);
    }
  }
}

TEST(LinearAttentionBackward, EqualsArithmeticOverALongText) {
  for (GateKind kind : kKinds) {
    Check({.H = 2, .G = 2, .K = 32, .V = 64, .kind = kind}, {1000, 3});
    Check({.H = 1, .G = 1, .K = 32, .V = 64, .kind = kind, .gates = Gates::kLongMemory}, {1025});
  }
}

TEST(LinearAttentionBackward, EqualsArithmeticForOddAndLargeHeads) {
  for (GateKind kind : kKinds) {
    for (DType dtype : kAttentionTypes) {
      Check({.H = 3, .G = 3, .K = 60, .V = 100, .kind = kind, .dtype = dtype}, kFew);
      Check({.H = 2, .G = 2, .K = 100, .V = 60, .kind = kind, .dtype = dtype}, kFew);
      Check({.H = 2, .G = 2, .K = 64, .V = 64, .kind = kind, .dtype = dtype}, kFew);
      Check({.H = 2, .G = 2, .K = 128, .V = 256, .kind = kind, .dtype = dtype}, {1, 65, 30});
      Check({.H = 1, .G = 1, .K = 320, .V = 640, .kind = kind, .dtype = dtype}, {1, 33});
      Check({.H = 2, .G = 2, .K = 1, .V = 1, .kind = kind, .dtype = dtype}, {1, 70});
      Check({.H = 1, .G = 1, .K = 7, .V = 3, .kind = kind, .dtype = dtype}, kFew);
    }
  }
}

// bfloat16 at these sizes runs on tensor cores where there are any.
TEST(LinearAttentionBackward, EqualsArithmeticAtTheSizesOfTensorCores) {
  for (GateKind kind : kKinds) {
    Case c = {.H = 2, .G = 2, .K = 64, .V = 64, .kind = kind, .dtype = DType::kBFloat16};
    Check(c, kLengths);
    c.K = 128, c.V = 128, c.gate_dtype = DType::kBFloat16;
    Check(c, kFew);
    c.K = 256, c.V = 128;
    Check(c, kFew);
    c.K = 128, c.V = 256, c.gate_dtype = DType::kFloat32;
    Check(c, {130, 0, 1});
    c.K = 256, c.V = 512;
    Check(c, {65, 1});
    for (int key_dim : {64, 128, 256}) {  // one tile of V, an odd number
      c.K = key_dim;
      for (int value_dim : {64, 192}) {
        c.V = value_dim;
        Check(c, {65, 1});
      }
    }
    c.K = 64;
    c.H = c.G = 1;  // segments
    for (int value_dim : {128, 256, 512}) {
      c.V = value_dim;
      Check(c, {2100});
    }
    c.V = 64;
    Check(c, {2100, 0, 50, 2049});
    for (int bits = 0; bits < 16; ++bits) {
      c.initial_state = (bits & 1) != 0;
      c.d_o = (bits & 2) != 0;
      c.d_final_state = (bits & 4) != 0;
      c.d_initial_state = (bits & 8) != 0;
      if (c.d_o || c.d_final_state) Check(c, {70, 0, 1});
    }
  }
  struct Size {
    int heads, key_dim, value_dim;
    std::vector<int> lengths;
  };
  const Size sizes[] = {{1, 64, 128, {2200}},
                        {2, 64, 64, kLengths},
                        {1, 128, 64, kFew},
                        {1, 256, 192, {65, 0, 1, 130}}};
  for (Gates gates : {Gates::kZero, Gates::kStrong, Gates::kErasing, Gates::kLongMemory}) {
    for (GateKind kind : {GateKind::kScalar, GateKind::kPerKey}) {
      for (const Size& size : sizes) {
        Check({.H = size.heads,
               .G = size.heads,
               .K = size.key_dim,
               .V = size.value_dim,
               .kind = kind,
               .gates = gates,
               .dtype = DType::kBFloat16},
              size.lengths);
      }
    }
  }
}

// Tiles are read whole, whoever the rows behind a sequence's end belong to.
TEST(LinearAttentionBackward, NaNInAnotherSequenceStaysThere) {
  for (AttentionForm form : kForms) {
    for (GateKind kind : kKinds) {
      for (int dim : {64, 128, 256}) {
        const Case c = {
            .H = 2, .G = 2, .K = dim, .V = 2 * dim, .kind = kind, .dtype = DType::kBFloat16};
        SCOPED_TRACE(c.name(form));
        const std::vector<int> lengths = {70, 30, 50};
        const Inputs in(c, lengths);
        Inputs poisoned = in;
        const auto poison = [&](std::vector<float>& x, int rows, int first, int count) {
          const size_t width = x.size() / rows;
          std::fill_n(x.begin() + first * width, count * width, NAN);
        };
        for (auto member : {&Inputs::q, &Inputs::k, &Inputs::v, &Inputs::d_o}) {
          poison(poisoned.*member, 150, 70, 30);
        }
        if (c.has_d_gate()) poison(poisoned.gate, 150, 70, 30);
        poison(poisoned.initial_state, 3, 1, 1);
        poison(poisoned.d_final_state, 3, 1, 1);
        const Result want = RunBackward(form, c, in), got = RunBackward(form, c, poisoned);
        const auto expect_same = [&](const std::vector<float>& x, const std::vector<float>& y,
                                     int rows, int first, int count, const char* what) {
          const auto part = [&](const std::vector<float>& all) {
            const size_t width = all.size() / rows;
            return std::vector<float>(all.begin() + first * width,
                                      all.begin() + (first + count) * width);
          };
          EXPECT_TRUE(IsSameBits(part(x), part(y))) << what << " from row " << first;
        };
        for (const auto& [first, count] : {std::pair{0, 70}, std::pair{100, 50}}) {
          expect_same(got.dq, want.dq, 150, first, count, "dq");
          expect_same(got.dk, want.dk, 150, first, count, "dk");
          expect_same(got.dv, want.dv, 150, first, count, "dv");
          if (c.has_d_gate()) {
            expect_same(got.d_gate, want.d_gate, 150, first, count, "d_gate");
          }
        }
        for (int seq : {0, 2}) {
          expect_same(got.d_initial_state, want.d_initial_state, 3, seq, 1, "d_initial_state");
        }
      }
    }
  }
}

TEST(LinearAttentionBackward, EqualsArithmeticWithGroupedHeads) {
  for (GateKind kind : kKinds) {
    for (DType dtype : kAttentionTypes) {
      Check({.H = 6, .G = 2, .K = 32, .V = 64, .kind = kind, .dtype = dtype}, kFew);
      Check({.H = 4, .G = 1, .K = 60, .V = 100, .kind = kind, .dtype = dtype}, kFew);
    }
  }
}

TEST(LinearAttentionBackward, EmptySequencesPassTheGradientOn) {
  for (GateKind kind : kKinds) {
    Check({.H = 2, .G = 2, .K = 16, .V = 32, .kind = kind}, {0, 16});
    Check({.H = 2, .G = 2, .K = 16, .V = 32, .kind = kind}, {0, 0, 15});
    Check({.H = 2, .G = 2, .K = 16, .V = 32, .kind = kind}, {0});
    Check({.H = 2, .G = 2, .K = 16, .V = 32, .kind = kind, .d_final_state = false}, {0, 5, 0});
  }
}

TEST(LinearAttentionBackward, HardGatesAreSafeInEveryForm) {
  for (Gates gates : {Gates::kZero, Gates::kStrong, Gates::kVeryStrong, Gates::kErasing}) {
    for (GateKind kind : {GateKind::kScalar, GateKind::kPerKey}) {
      for (DType dtype : kAttentionTypes) {
        if (gates == Gates::kVeryStrong && dtype != DType::kFloat32) continue;
        Check({.H = 5, .G = 5, .K = 32, .V = 64, .kind = kind, .gates = gates, .dtype = dtype},
              kLengths);
        Check({.H = 4,
               .G = 2,
               .K = 60,
               .V = 100,
               .kind = kind,
               .gates = gates,
               .dtype = dtype,
               .gate_dtype = dtype},
              kFew);
      }
    }
  }
}

TEST(LinearAttentionBackward, OneErasingGateInsideABlock) {
  for (GateKind kind : {GateKind::kScalar, GateKind::kPerKey}) {
    Case c = {.H = 2, .G = 2, .K = 32, .V = 64, .kind = kind};
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      c.dtype = dtype, c.K = dtype == DType::kFloat32 ? 32 : 64;
      for (float erasing : {-1e4f, -INFINITY}) {
        for (int row : {0, 1, 15, 16, 23, 63, 64, 99}) {
          Inputs in(c, {100});
          const size_t width = in.gate.size() / 100;
          std::fill_n(in.gate.begin() + row * width, width, erasing);
          const reference::AttentionGradients want = Expected(c, in);
          for (AttentionForm form : kForms) {
            SCOPED_TRACE(::testing::Message()
                         << c.name(form) << " gate " << erasing << " in " << row);
            Judge(c, want, RunBackward(form, c, in));
          }
        }
      }
    }
  }
}

// ---- What is given, and what is wanted ----------------------------------------------------------

TEST(LinearAttentionBackward, EveryCombinationOfPresentAndAbsent) {
  for (GateKind kind : kKinds) {
    for (int bits = 0; bits < 16; ++bits) {
      Case c = {.H = 4, .G = 2, .K = 20, .V = 36, .kind = kind};
      c.initial_state = (bits & 1) != 0;
      c.d_o = (bits & 2) != 0;
      c.d_final_state = (bits & 4) != 0;
      c.d_initial_state = (bits & 8) != 0;
      if (!c.d_o && !c.d_final_state) continue;  // no loss
      Check(c, {70, 0, 1});
      c.dtype = DType::kBFloat16;
      Check(c, {70, 0, 1});
    }
  }
}

TEST(LinearAttentionBackward, AZeroGateIsNoGate) {
  const Case none = {.H = 2, .G = 2, .K = 32, .V = 64, .kind = GateKind::kNone};
  Case zero = none;
  zero.kind = GateKind::kPerKey;
  zero.gates = Gates::kZero;
  for (AttentionForm form : kForms) {
    const Result a = RunBackward(form, none, Inputs(none, kFew)),
                 b = RunBackward(form, zero, Inputs(zero, kFew));
    EXPECT_TRUE(IsNear(a.dq, b.dq, 1e-5));
    EXPECT_TRUE(IsNear(a.dk, b.dk, 1e-5));
    EXPECT_TRUE(IsNear(a.dv, b.dv, 1e-5));
    EXPECT_TRUE(IsNear(a.d_initial_state, b.d_initial_state, 1e-5));
  }
}

TEST(LinearAttentionBackward, NoSequencesIsNoWork) {
  LinearAttentionBackwardArgs args = {};
  args.num_heads = args.num_kv_heads = args.state_heads = 2;
  args.key_dim = args.value_dim = 8;
  RecurrentLinearAttentionBackward(TestDevice(), args);
  ChunkLinearAttentionBackward(TestDevice(), args);
  TestDevice().Synchronize();
}

// ---- Pieces, company, repetition ----------------------------------------------------------------

// Rows [first, first + count) of a one-sequence problem, with the states at its ends still to set.
Inputs Piece(const Case& c, const Inputs& in, int first, int count) {
  const auto rows = [&](const std::vector<float>& x) {
    const size_t width = x.size() / in.num_rows();
    return std::vector<float>(x.begin() + first * width, x.begin() + (first + count) * width);
  };
  Inputs piece = in;
  piece.lengths = {count};
  piece.q = rows(in.q);
  piece.k = rows(in.k);
  piece.v = rows(in.v);
  piece.d_o = rows(in.d_o);
  if (c.has_d_gate()) piece.gate = rows(in.gate);
  return piece;
}

TEST(LinearAttentionBackward, CutAnywhereAndCarriedOnEqualsWhole) {
  const int len = 193;
  for (GateKind kind : kKinds) {
    const Case c = {.H = 4, .G = 2, .K = 32, .V = 48, .kind = kind};
    const Inputs in(c, {len});
    const reference::AttentionGradients want = Expected(c, in);
    for (const std::vector<int>& cuts :
         {std::vector<int>{1, 192}, {64, 129}, {7, 0, 93, 93}, {16, 1, 31, 80, 65}, {192, 1}}) {
      for (AttentionForm form : kForms) {
        SCOPED_TRACE(::testing::Message() << c.name(form) << ", first piece " << cuts[0]);
        std::vector<Inputs> pieces;
        int done = 0;
        std::vector<float> state = in.initial_state;
        for (int count : cuts) {
          Inputs piece = Piece(c, in, done, count);
          piece.initial_state = state;
          const Doubles next = reference::AttentionForward(Problem(c, piece)).final_state;
          state.assign(next.begin(), next.end());
          pieces.push_back(std::move(piece));
          done += count;
        }
        ASSERT_EQ(done, len);
        Result all;
        std::vector<float> d_state = in.d_final_state;
        for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
          piece->d_final_state = d_state;
          const Result got = RunBackward(form, c, *piece);
          d_state = got.d_initial_state;
          for (auto member : {&Result::dq, &Result::dk, &Result::dv, &Result::d_gate}) {
            (all.*member).insert((all.*member).begin(), (got.*member).begin(), (got.*member).end());
          }
        }
        all.d_initial_state = d_state;
        Judge(c, want, all);
      }
    }
  }
}

void ExpectSameBits(const Result& got, const Result& want) {
  EXPECT_TRUE(IsSameBits(got.dq, want.dq)) << "dq";
  EXPECT_TRUE(IsSameBits(got.dk, want.dk)) << "dk";
  EXPECT_TRUE(IsSameBits(got.dv, want.dv)) << "dv";
  EXPECT_TRUE(IsSameBits(got.d_gate, want.d_gate)) << "d_gate";
  EXPECT_TRUE(IsSameBits(got.d_initial_state, want.d_initial_state)) << "d_initial_state";
}

TEST(LinearAttentionBackward, TheSameCallTwiceGivesTheSameBits) {
  for (AttentionForm form : kForms) {
    for (GateKind kind : kKinds) {
      for (const Case& c : {Case{.H = 4, .G = 2, .K = 32, .V = 64, .kind = kind},
                            Case{.H = 1, .G = 1, .K = 128, .V = 256, .kind = kind},
                            Case{.H = 3, .G = 3, .K = 60, .V = 100, .kind = kind}}) {
        SCOPED_TRACE(c.name(form));
        const Inputs in(c, {3, 65, 0, 130});
        const Result first = RunBackward(form, c, in);
        for (int i = 0; i < 3; ++i) ExpectSameBits(RunBackward(form, c, in), first);
      }
    }
  }
}

TEST(LinearAttentionBackward, ASequencesBitsDependOnNothingButTheSequence) {
  for (AttentionForm form : kForms) {
    for (GateKind kind : kKinds) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        Case c = {.H = 4, .G = 2, .K = 32, .V = 144, .kind = kind};
        std::vector<int> lengths = {3, 65, 0, 130, 16, 1, 40};
        if (dtype == DType::kBFloat16) {
          // Tensor cores, and a sequence of two segments. All together, but not one alone, are
          // enough blocks for more columns to a block.
          c = {.H = 8, .G = 8, .K = 128, .V = 128, .kind = kind, .dtype = dtype};
          lengths[3] = 2100;
        }
        SCOPED_TRACE(c.name(form));
        const Inputs in(c, lengths);
        const Result all = RunBackward(form, c, in);
        const size_t state_size = size_t(c.state_heads()) * c.K * c.V;
        int first = 0;
        for (size_t n = 0; n < lengths.size(); first += lengths[n++]) {
          Inputs alone = Piece(c, in, first, lengths[n]);
          const auto state = [&](const std::vector<float>& x) {
            return std::vector<float>(x.begin() + n * state_size, x.begin() + (n + 1) * state_size);
          };
          alone.initial_state = state(in.initial_state);
          alone.d_final_state = state(in.d_final_state);
          Inputs part = in;  // the rows of `all` that belong to this sequence
          part.q = all.dq, part.k = all.dk, part.v = all.dv;
          if (c.has_d_gate()) part.gate = all.d_gate;
          part = Piece(c, part, first, lengths[n]);
          ExpectSameBits(RunBackward(form, c, alone),
                         {part.q, part.k, part.v, c.has_d_gate() ? part.gate : std::vector<float>{},
                          state(all.d_initial_state)});
        }
      }
    }
  }
}

}  // namespace
}  // namespace gla
