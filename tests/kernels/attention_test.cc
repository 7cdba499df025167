// The recurrence in both forms against the naive double-precision one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/slots.h"
#include "tests/testing/near.h"

namespace gla {
namespace {

using reference::Doubles;

enum class Form { kRecurrent, kChunk, kChunkWorkspace };
enum class Gates { kNormal, kZero, kStrong, kErasing, kLongMemory };

struct Case {
  int H, G, K, V;
  GateKind kind = GateKind::kPerKey;
  Gates gates = Gates::kNormal;
  bool normalize = false;
  DType dtype = DType::kFloat32;
  DType gate_dtype = DType::kFloat32;

  int state_heads() const { return kind == GateKind::kConstant ? H : G; }
  int row_width() const { return H * K + G * K + G * V; }  // q, k, v side by side
  int o_stride() const { return H * V + 8; }
  int gate_width() const {
    return kind == GateKind::kPerKey ? G * K : kind == GateKind::kScalar ? G : 0;
  }
  int64_t state_size() const { return int64_t{state_heads()} * K * V; }
  int64_t state_stride() const { return state_size() + (normalize ? G * K : 0) + 4; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(K)); }
  std::string name() const {
    std::ostringstream out;
    out << "H" << H << " G" << G << " K" << K << " V" << V << " gate kind "
        << static_cast<int>(kind) << " gates " << static_cast<int>(gates)
        << (normalize ? " normalized " : " ") << NameOf(dtype) << ", gate " << NameOf(gate_dtype);
    return out.str();
  }
};

// Log decays as flash-linear-attention's tests draw them, and the hard ones.
std::vector<float> MakeGates(const Case& c, int rows) {
  if (c.kind == GateKind::kNone) return {};
  if (c.kind == GateKind::kConstant) {
    std::vector<float> gates(c.H);
    for (int h = 0; h < c.H; ++h) gates[h] = std::log(1 - std::exp2(-5.0f - h));
    return Rounded(gates, c.gate_dtype);
  }
  std::vector<float> gates = Normal(size_t(rows) * c.gate_width(), 1, 5);
  std::mt19937 random(6);
  for (size_t i = 0; i < gates.size(); ++i) {
    const float log_sigmoid = -std::log1p(std::exp(-gates[i]));
    switch (c.gates) {
      case Gates::kNormal:
        gates[i] = log_sigmoid / 16;
        break;
      case Gates::kZero:
        gates[i] = 0;
        break;
      case Gates::kStrong:
        gates[i] = random() % 2 == 0 ? -30 : log_sigmoid / 0.1f;
        break;
      case Gates::kErasing:
        gates[i] = random() % 23 == 0 ? -1e4f : log_sigmoid / 16;
        break;
      case Gates::kLongMemory:
        gates[i] = -1e-3f * std::abs(gates[i]);
        break;
    }
  }
  return Rounded(gates, c.gate_dtype);
}

struct Inputs {
  Inputs(const Case& c, int rows, int slots)
      : qkv(Normal(size_t(rows) * c.row_width(), 1, 1)),
        gates(MakeGates(c, rows)),
        state(Normal(size_t(slots) * c.state_stride(), 1, 2)) {
    if (c.normalize) {  // positive, as after a feature map: the denominator stays clear of zero
      for (float& x : qkv) x = std::abs(x);
      for (float& x : state) x = std::abs(x);
    }
    qkv = Rounded(qkv, c.dtype);
  }

  std::vector<float> qkv;  // [rows, row_width]
  std::vector<float> gates;
  std::vector<float> state;  // [slots, state_stride]: state, key sum, padding
};

struct Result {
  std::vector<float> o;      // [rows, o_stride]
  std::vector<float> state;  // as in Inputs
};

Result RunAttention(Form form, const Case& c, const Inputs& in, const Sequences& seqs) {
  std::vector<float> host_gates = in.gates;
  if (c.kind != GateKind::kNone) host_gates.push_back(0);  // an array also when there are no rows
  DeviceBuffer qkv = UploadAs(in.qkv, c.dtype), gates = UploadAs(host_gates, c.gate_dtype),
               state = Upload(in.state);
  const size_t o_size = size_t(seqs.num_rows) * c.o_stride();
  DeviceBuffer o = Poisoned(std::max<size_t>(o_size, 1), c.dtype);
  const size_t width = SizeOf(c.dtype);
  LinearAttentionArgs args = {
      .q = qkv.data(),
      .k = qkv.as<char>() + c.H * c.K * width,
      .v = qkv.as<char>() + (c.H + c.G) * c.K * width,
      .gate_kind = c.kind,
      .gate = gates.data(),
      .gate_dtype = c.gate_dtype,
      .o = o.data(),
      .state = state.as<float>(),
      .key_sum_state = c.normalize ? state.as<float>() + c.state_size() : nullptr,
      .state_stride = c.state_stride(),
      .seqs = seqs,
      .num_heads = c.H,
      .num_kv_heads = c.G,
      .key_dim = c.K,
      .value_dim = c.V,
      .state_heads = c.state_heads(),
      .q_stride = c.row_width(),
      .k_stride = c.row_width(),
      .v_stride = c.row_width(),
      .o_stride = c.o_stride(),
      .gate_stride = c.gate_width(),
      .scale = c.scale(),
      .dtype = c.dtype};
  const size_t bytes =
      form == Form::kChunkWorkspace ? ChunkLinearAttentionBytes(TestDevice(), args) : 0;
  const DeviceBuffer workspace(TestDevice(), bytes);
  args.workspace = workspace.data();
  if (form == Form::kRecurrent) {
    RecurrentLinearAttention(TestDevice(), args);
  } else {
    ChunkLinearAttention(TestDevice(), args);
  }
  return {DownloadAs(o, o_size, c.dtype), Download<float>(state, in.state.size())};
}

Result RunAttention(Form form, const Case& c, const Inputs& in, const Ragged& seqs) {
  return RunAttention(form, c, in, seqs.view());
}

struct Expected {
  std::vector<Doubles> o;        // of each sequence, [len, H, V]
  std::vector<Doubles> written;  // of each sequence, its final [state, key sum]
};

Expected Reference(const Case& c, const Inputs& in, const Ragged& seqs) {
  Expected want;
  for (int n = 0; n < seqs.num_seqs(); ++n) {
    const int len = seqs.lengths[n], first = seqs.cu_seqlens[n];
    Doubles o(size_t(len) * c.H * c.V);
    Doubles written(c.state_size() + (c.normalize ? c.G * c.K : 0));
    for (int h = 0; h < c.H; ++h) {
      const int g = h / (c.H / c.G), s = c.state_heads() == c.H ? h : g;
      Doubles state(size_t(c.K) * c.V, 0.0), key_sum(c.K, 0.0);
      if (seqs.read_slots[n] >= 0) {
        const float* slot = in.state.data() + seqs.read_slots[n] * c.state_stride();
        std::copy_n(slot + int64_t{s} * c.K * c.V, state.size(), state.begin());
        if (c.normalize) std::copy_n(slot + c.state_size() + g * c.K, c.K, key_sum.begin());
      }
      const auto row = [&](int t) {
        const float* base = in.qkv.data() + size_t(first + t) * c.row_width();
        reference::HeadRow r = {
            base + h * c.K, base + (c.H + g) * c.K, base + (c.H + c.G) * c.K + g * c.V, {}};
        const float* gate = in.gates.data() + size_t(first + t) * c.gate_width();
        if (c.kind == GateKind::kConstant) r.gates.assign(c.K, in.gates[h]);
        if (c.kind == GateKind::kScalar) r.gates.assign(c.K, gate[g]);
        if (c.kind == GateKind::kPerKey) r.gates.assign(gate + g * c.K, gate + (g + 1) * c.K);
        return r;
      };
      const reference::HeadResult result = reference::LinearAttention(
          len, c.K, c.V, c.scale(), c.normalize, std::move(state), std::move(key_sum), row);
      for (int t = 0; t < len; ++t) {
        std::copy_n(result.o.begin() + size_t(t) * c.V, c.V,
                    o.begin() + (size_t(t) * c.H + h) * c.V);
      }
      std::copy(result.state.begin(), result.state.end(), written.begin() + int64_t{s} * c.K * c.V);
      if (c.normalize) {
        std::copy(result.key_sum.begin(), result.key_sum.end(),
                  written.begin() + c.state_size() + g * c.K);
      }
    }
    want.o.push_back(std::move(o));
    want.written.push_back(std::move(written));
  }
  return want;
}

std::vector<float> Slice(const std::vector<float>& from, size_t first, size_t count) {
  return {from.begin() + first, from.begin() + first + count};
}

void Judge(const Case& c, const Inputs& in, const Ragged& seqs, const Expected& want,
           const Result& got) {
  const double o_tolerance = c.dtype == DType::kFloat32 ? 1e-4 : 0.004;
  const double state_tolerance = StateTolerance(c.dtype);
  std::vector<float> untouched = got.state;
  for (int n = 0; n < seqs.num_seqs(); ++n) {
    const auto rows = Slice(got.o, size_t(seqs.cu_seqlens[n]) * c.o_stride(),
                            size_t(seqs.lengths[n]) * c.o_stride());
    EXPECT_TRUE(IsNear(Columns(rows, c.o_stride(), 0, c.H * c.V), want.o[n], o_tolerance))
        << "o of sequence " << n << ", length " << seqs.lengths[n];
    EXPECT_TRUE(AllNaN(Columns(rows, c.o_stride(), c.H * c.V, 8)));
    const int slot = seqs.write_slots[n];
    if (slot < 0) continue;
    const size_t at = slot * c.state_stride(), size = want.written[n].size();
    EXPECT_TRUE(IsNear(Slice(got.state, at, size), want.written[n], state_tolerance))
        << "state of sequence " << n << ", length " << seqs.lengths[n];
    if (seqs.lengths[n] == 0) {  // carried, not computed
      const Doubles& carried = want.written[n];
      EXPECT_TRUE(IsSameBits(Slice(got.state, at, size),
                             std::vector<float>(carried.begin(), carried.end())));
    }
    std::copy_n(in.state.begin() + at, size, untouched.begin() + at);
  }
  EXPECT_TRUE(IsSameBits(untouched, in.state)) << "a slot that nobody writes has changed";
}

void Check(const Case& c, const std::vector<int>& lengths, int shift = 0) {
  const Ragged seqs(lengths, shift, 7);
  const Inputs in(c, seqs.num_rows(), seqs.num_slots);
  const Expected want = Reference(c, in, seqs);
  {
    SCOPED_TRACE(::testing::Message() << "recurrent, " << c.name() << ", shift " << shift);
    Judge(c, in, seqs, want, RunAttention(Form::kRecurrent, c, in, seqs));
  }
  if (c.normalize) return;  // the chunkwise form has no key sum
  SCOPED_TRACE(::testing::Message() << "chunk, " << c.name() << ", shift " << shift);
  Judge(c, in, seqs, want, RunAttention(Form::kChunk, c, in, seqs));
  SCOPED_TRACE("with a workspace");
  Judge(c, in, seqs, want, RunAttention(Form::kChunkWorkspace, c, in, seqs));
}

const std::vector<int> kLengths = {1, 0, 63, 64, 65, 100, 127, 129, 0};
const std::vector<int> kFew = {1, 17, 0, 65, 100};

constexpr GateKind kKinds[] = {GateKind::kNone, GateKind::kConstant, GateKind::kScalar,
                               GateKind::kPerKey};

TEST(LinearAttention, EqualsArithmeticForEveryKindOfGate) {
  for (GateKind kind : kKinds) {
    for (DType dtype : kAttentionTypes) {
      Check({.H = 5, .G = 5, .K = 32, .V = 64, .kind = kind, .dtype = dtype}, kLengths);
      Check({.H = 2, .G = 2, .K = 32, .V = 64, .kind = kind, .dtype = dtype, .gate_dtype = dtype},
            kLengths);
    }
  }
}

TEST(LinearAttention, EqualsArithmeticOverALongText) {
  for (GateKind kind : kKinds) {
    Check({.H = 2, .G = 2, .K = 32, .V = 64, .kind = kind}, {1000, 3});
  }
  Check({.H = 2, .G = 2, .K = 32, .V = 64, .gates = Gates::kLongMemory}, {1000, 3});
}

TEST(LinearAttention, EqualsArithmeticForOddAndLargeHeads) {
  for (GateKind kind : kKinds) {
    for (DType dtype : kAttentionTypes) {
      Check({.H = 3, .G = 3, .K = 60, .V = 100, .kind = kind, .dtype = dtype}, kLengths);
      Check({.H = 2, .G = 2, .K = 64, .V = 64, .kind = kind, .dtype = dtype}, kFew);
      Check({.H = 2, .G = 2, .K = 128, .V = 256, .kind = kind, .dtype = dtype}, {1, 65, 30});
      Check({.H = 1, .G = 1, .K = 320, .V = 640, .kind = kind, .dtype = dtype}, {1, 33});
      Check({.H = 2, .G = 2, .K = 1, .V = 1, .kind = kind, .dtype = dtype}, {1, 70});
    }
  }
}

// bfloat16 at these sizes runs on tensor cores where there are any.
TEST(LinearAttention, EqualsArithmeticAtTheSizesOfTensorCores) {
  for (GateKind kind : kKinds) {
    Case c = {.H = 2, .G = 2, .K = 64, .V = 64, .kind = kind, .dtype = DType::kBFloat16};
    for (int shift = 0; shift < 5; ++shift) Check(c, kLengths, shift);
    c.K = 128, c.V = 128, c.gate_dtype = DType::kBFloat16;
    Check(c, kLengths);
    c.K = 256, c.V = 64;
    Check(c, kFew);
    c.K = 64, c.H = c.G = 1;
    Check(c, {2100, 0, 50, 2048, 2049});  // segments
    for (int shift = 0; shift < 5; ++shift) Check(c, {513, 0, 512, 1300, 767}, shift);
  }
  // one sequence in few and in many segments, in place, and more than are cut into segments
  const Case c = {.H = 2, .G = 2, .K = 128, .V = 128, .dtype = DType::kBFloat16};
  for (int length : {512, 513, 576, 1024, 1025, 4500}) Check(c, {length});
  Check({.H = 4, .G = 4, .K = 128, .V = 256, .dtype = DType::kBFloat16}, {5000, 1});
  Check({.H = 2, .G = 2, .K = 256, .V = 128, .dtype = DType::kBFloat16}, {2100, 700});
  Check({.H = 1, .G = 1, .K = 64, .V = 64, .dtype = DType::kBFloat16},
        {600, 17, 0, 33, 700, 20, 64, 65, 1000, 30, 0, 0, 513, 50, 60, 70, 80, 512, 577});
  for (Gates gates : {Gates::kZero, Gates::kStrong, Gates::kErasing, Gates::kLongMemory}) {
    for (GateKind kind : {GateKind::kScalar, GateKind::kPerKey}) {
      Check({.H = 2,
             .G = 2,
             .K = 64,
             .V = 64,
             .kind = kind,
             .gates = gates,
             .dtype = DType::kBFloat16},
            kLengths);
    }
  }
}

TEST(LinearAttention, EqualsArithmeticWithEveryUseOfSlots) {
  for (int shift = 0; shift < 5; ++shift) {
    Check({.H = 2, .G = 2, .K = 32, .V = 64}, {5, 0, 1, 70, 16, 0, 2, 0, 3, 0}, shift);
    Check({.H = 2, .G = 1, .K = 16, .V = 24, .kind = GateKind::kNone, .normalize = true},
          {5, 0, 1, 70, 16, 0, 2, 0, 3, 0}, shift);
  }
}

TEST(LinearAttention, EqualsArithmeticWithGroupedHeads) {
  for (GateKind kind : kKinds) {
    for (DType dtype : kAttentionTypes) {
      Check({.H = 6, .G = 2, .K = 32, .V = 64, .kind = kind, .dtype = dtype}, kFew);
      Check({.H = 4, .G = 1, .K = 60, .V = 100, .kind = kind, .dtype = dtype}, kFew);
    }
  }
}

TEST(LinearAttention, HardGatesAreSafeInEveryForm) {
  for (Gates gates : {Gates::kZero, Gates::kStrong, Gates::kErasing}) {
    for (GateKind kind : {GateKind::kScalar, GateKind::kPerKey}) {
      for (DType dtype : kAttentionTypes) {
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

TEST(LinearAttention, NormalizesByTheRunningKeySum) {
  for (DType dtype : kAttentionTypes) {
    const Case c = {.H = 5,
                    .G = 5,
                    .K = 32,
                    .V = 64,
                    .kind = GateKind::kNone,
                    .normalize = true,
                    .dtype = dtype};
    Check(c, kLengths);
    Check({.H = 6,
           .G = 2,
           .K = 60,
           .V = 100,
           .kind = GateKind::kNone,
           .normalize = true,
           .dtype = dtype},
          kFew);
  }
}

TEST(LinearAttention, AZeroGateIsNoGate) {
  const Ragged seqs(kFew, 0, 7);
  const Case none = {.H = 2, .G = 2, .K = 32, .V = 64, .kind = GateKind::kNone};
  Case zero = none;
  zero.kind = GateKind::kPerKey;
  zero.gates = Gates::kZero;
  const Inputs in(none, seqs.num_rows(), seqs.num_slots);
  Inputs gated = in;
  gated.gates = MakeGates(zero, seqs.num_rows());
  for (Form form : {Form::kRecurrent, Form::kChunk}) {
    const Result a = RunAttention(form, none, in, seqs), b = RunAttention(form, zero, gated, seqs);
    EXPECT_TRUE(IsNear(Columns(a.o, none.o_stride(), 0, none.H * none.V),
                       Columns(b.o, none.o_stride(), 0, none.H * none.V), 1e-5));
    EXPECT_TRUE(IsNear(a.state, b.state, 1e-5));
  }
}

// ---- Bits ---------------------------------------------------------------------------------------

// The rows [first, first + count) of all inputs.
Inputs Rows(const Case& c, const Inputs& in, int first, int count) {
  Inputs part = in;
  part.qkv = Slice(in.qkv, size_t(first) * c.row_width(), size_t(count) * c.row_width());
  if (c.gate_width() > 0) {
    part.gates = Slice(in.gates, size_t(first) * c.gate_width(), size_t(count) * c.gate_width());
  }
  return part;
}

TEST(RecurrentLinearAttention, CutAnywhereAndCarriedOnEqualsWholeBitForBit) {
  std::vector<Case> cases;
  for (GateKind kind : kKinds) {
    for (DType dtype : kAttentionTypes) {
      cases.push_back({.H = 5, .G = 5, .K = 32, .V = 64, .kind = kind, .dtype = dtype});
      cases.push_back({.H = 4, .G = 2, .K = 60, .V = 100, .kind = kind, .dtype = dtype});
      cases.push_back({.H = 1, .G = 1, .K = 128, .V = 256, .kind = kind, .dtype = dtype});
    }
  }
  cases.push_back({.H = 4, .G = 2, .K = 32, .V = 64, .kind = GateKind::kNone, .normalize = true});
  const int len = 100;
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name());
    const Ragged whole({len}, 0, 7);  // in place
    const Inputs in(c, len, whole.num_slots);
    const Result want = RunAttention(Form::kRecurrent, c, in, whole);
    for (const std::vector<int>& cuts : {std::vector<int>{1, 16, 7, 33, 0, 43},
                                         {64, 36},
                                         {15, 17, 68},
                                         {1, 1, 1, 1, 1, 1, 1, 1, 92}}) {
      Inputs rest = in;
      std::vector<float> o;
      int done = 0;
      for (int piece : cuts) {
        Inputs part = Rows(c, in, done, piece);
        part.state = rest.state;
        const Result got = RunAttention(Form::kRecurrent, c, part, Ragged({piece}, 0, 7));
        o.insert(o.end(), got.o.begin(), got.o.end());
        rest.state = got.state;
        done += piece;
      }
      ASSERT_EQ(done, len);
      ASSERT_TRUE(IsSameBits(Columns(o, c.o_stride(), 0, c.H * c.V),
                             Columns(want.o, c.o_stride(), 0, c.H * c.V)));
      ASSERT_TRUE(IsSameBits(rest.state, want.state));
    }
  }
}

TEST(ChunkLinearAttention, CutAnywhereAndCarriedOnEqualsWhole) {
  const Case c = {.H = 2, .G = 2, .K = 32, .V = 64};
  const Ragged whole({200}, 0, 7);
  const Inputs in(c, 200, whole.num_slots);
  const Result want = RunAttention(Form::kChunk, c, in, whole);
  Inputs rest = in;
  std::vector<float> o;
  int done = 0;
  for (int piece : {7, 64, 1, 100, 28}) {
    Inputs part = Rows(c, in, done, piece);
    part.state = rest.state;
    const Result got = RunAttention(Form::kChunk, c, part, Ragged({piece}, 0, 7));
    o.insert(o.end(), got.o.begin(), got.o.end());
    rest.state = got.state;
    done += piece;
  }
  EXPECT_TRUE(IsNear(Columns(o, c.o_stride(), 0, c.H * c.V),
                     Columns(want.o, c.o_stride(), 0, c.H * c.V), 1e-4));
  EXPECT_TRUE(IsNear(rest.state, want.state, 1e-4));
}

TEST(LinearAttention, ASequencesBitsDependOnNothingButTheSequence) {
  for (Form form : {Form::kRecurrent, Form::kChunk, Form::kChunkWorkspace}) {
    for (GateKind kind : kKinds) {
      for (DType dtype : kAttentionTypes) {
        Case c = {.H = 4, .G = 2, .K = 32, .V = 64, .kind = kind, .dtype = dtype};
        std::vector<int> lengths = {3, 65, 1, 0, 130, 16, 1, 40, 64, 2, 1, 7};
        if (form == Form::kChunkWorkspace) {  // tensor cores, and a sequence of two segments
          c.H = 1, c.G = 1, c.K = 64;
          lengths[4] = 2500;
        }
        SCOPED_TRACE(c.name() + (form == Form::kRecurrent ? " recurrent" : " chunk"));
        const Ragged seqs(lengths, 0, 7);
        const Inputs in(c, seqs.num_rows(), seqs.num_slots);
        const Result all = RunAttention(form, c, in, seqs);
        const Result again = RunAttention(form, c, in, seqs);
        ASSERT_TRUE(IsSameBits(again.state, all.state)) << "the same call twice";
        ASSERT_EQ(std::memcmp(again.o.data(), all.o.data(), all.o.size() * sizeof(float)), 0);
        for (int n = 0; n < seqs.num_seqs(); ++n) {
          Ragged one({lengths[n]}, 0, 7);
          one.device_read_slots = Upload(std::vector<int32_t>{seqs.read_slots[n]});
          one.device_write_slots = Upload(std::vector<int32_t>{seqs.write_slots[n]});
          Inputs part = Rows(c, in, seqs.cu_seqlens[n], lengths[n]);
          const Result alone = RunAttention(form, c, part, one);
          const auto rows = Slice(all.o, size_t(seqs.cu_seqlens[n]) * c.o_stride(),
                                  size_t(lengths[n]) * c.o_stride());
          ASSERT_TRUE(IsSameBits(Columns(alone.o, c.o_stride(), 0, c.H * c.V),
                                 Columns(rows, c.o_stride(), 0, c.H * c.V)))
              << "sequence " << n;
          if (seqs.write_slots[n] < 0) continue;
          const size_t at = seqs.write_slots[n] * c.state_stride();
          ASSERT_TRUE(IsSameBits(Slice(alone.state, at, c.state_size()),
                                 Slice(all.state, at, c.state_size())))
              << "sequence " << n;
        }
      }
    }
  }
}

// Alone a long sequence is walked segment by segment, among many from end to end.
TEST(ChunkLinearAttention, ManyLongSequencesKeepTheBitsOfEachAlone) {
  for (GateKind kind : kKinds) {
    for (int K : {64, 128, 256}) {
      const Case c = {.H = 2, .G = 2, .K = K, .V = 64, .kind = kind, .dtype = DType::kBFloat16};
      SCOPED_TRACE(c.name());
      const Ragged seqs({900, 5, 513, 64, 1500, 0, 577, 512, 1, 2, 3, 4, 5, 6, 7, 8, 700, 65}, 0,
                        7);
      const Inputs in(c, seqs.num_rows(), seqs.num_slots);
      const Result all = RunAttention(Form::kChunkWorkspace, c, in, seqs);
      for (int n : {0, 2, 4, 6, 7, 16}) {
        Ragged one({seqs.lengths[n]}, 0, 7);
        one.device_read_slots = Upload(std::vector<int32_t>{seqs.read_slots[n]});
        one.device_write_slots = Upload(std::vector<int32_t>{seqs.write_slots[n]});
        const Inputs part = Rows(c, in, seqs.cu_seqlens[n], seqs.lengths[n]);
        const Result alone = RunAttention(Form::kChunkWorkspace, c, part, one);
        const auto rows = Slice(all.o, size_t(seqs.cu_seqlens[n]) * c.o_stride(),
                                size_t(seqs.lengths[n]) * c.o_stride());
        ASSERT_TRUE(IsSameBits(Columns(alone.o, c.o_stride(), 0, c.H * c.V),
                               Columns(rows, c.o_stride(), 0, c.H * c.V)))
            << "sequence " << n;
        if (seqs.write_slots[n] < 0) continue;
        const size_t at = seqs.write_slots[n] * c.state_stride();
        ASSERT_TRUE(IsSameBits(Slice(alone.state, at, c.state_size()),
                               Slice(all.state, at, c.state_size())))
            << "sequence " << n;
      }
    }
  }
}

// What a recorded step relies on: rows behind the last sequence, sequences without rows and slots,
// and a larger max_len.
TEST(LinearAttention, UpperBoundsChangeNothing) {
  const std::vector<int> plans[] = {{40}, {700}, {513}, {520, 100, 1}, {64, 900}, {1100}};
  for (Form form : {Form::kRecurrent, Form::kChunk, Form::kChunkWorkspace}) {
    for (GateKind kind : kKinds) {
      for (int K : {64, 128, 256}) {
        for (const std::vector<int>& lengths : plans) {
          const Case c = {.H = 2, .G = 2, .K = K, .V = 64, .kind = kind, .dtype = DType::kBFloat16};
          SCOPED_TRACE(c.name());
          const Ragged exact(lengths, 0, 7);
          Inputs in(c, exact.num_rows(), exact.num_slots);
          const Result want = RunAttention(form, c, in, exact);
          const int rows = exact.num_rows() + 100, seqs = exact.num_seqs() + 5;
          in.qkv.resize(size_t(rows) * c.row_width(), NAN);
          if (kind == GateKind::kScalar || kind == GateKind::kPerKey) {
            in.gates.resize(size_t(rows) * c.gate_width(), NAN);
          }
          std::vector<int32_t> cu = exact.cu_seqlens, read = exact.read_slots,
                               write = exact.write_slots;
          cu.resize(seqs + 1, cu.back()), read.resize(seqs, -1), write.resize(seqs, -1);
          const DeviceBuffer d_cu = Upload(cu), d_read = Upload(read), d_write = Upload(write);
          const Result got = RunAttention(form, c, in,
                                          {.cu_seqlens = d_cu.as<int32_t>(),
                                           .read_slots = d_read.as<int32_t>(),
                                           .write_slots = d_write.as<int32_t>(),
                                           .num_seqs = seqs,
                                           .num_rows = rows,
                                           .max_len = rows});
          ASSERT_TRUE(IsSameBits(got.state, want.state)) << lengths[0];
          const auto o = Slice(got.o, 0, want.o.size());
          ASSERT_EQ(std::memcmp(o.data(), want.o.data(), o.size() * sizeof(float)), 0)
              << lengths[0];
          ASSERT_TRUE(AllNaN(Slice(got.o, want.o.size(), got.o.size() - want.o.size())));
        }
      }
    }
  }
}

TEST(LinearAttention, NoSequencesIsNoWork) {
  LinearAttentionArgs args = {};
  args.num_heads = args.num_kv_heads = args.state_heads = 2;
  args.key_dim = args.value_dim = 8;
  RecurrentLinearAttention(TestDevice(), args);
  ChunkLinearAttention(TestDevice(), args);
  TestDevice().Synchronize();
}

}  // namespace
}  // namespace gla
