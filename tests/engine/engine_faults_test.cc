// Non-finite logits and states and reused memory: one request pays, nobody else notices.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/engine/engine_fixture.h"
#include "tests/model/model_folder.h"

namespace gla {
namespace {

using ::testing::HasSubstr;

constexpr int32_t kTrigger = 777;

std::string ReadFile(const std::string& path) {
  std::ostringstream bytes;
  bytes << std::ifstream(path, std::ios::binary).rdbuf();
  return bytes.str();
}

// The bytes of a bfloat16 safetensors file, element by element.
class Tensors {
 public:
  explicit Tensors(std::string file) : file_(std::move(file)) {
    uint64_t length = 0;
    for (size_t i = 8; i-- > 0;) length = length << 8 | static_cast<uint8_t>(file_.at(i));
    header_ = nlohmann::json::parse(file_.substr(8, length));
    data_ = 8 + length;
  }
  void Put(const std::string& name, size_t row, size_t column, float value) {
    const auto& entry = header_.at(name);
    const size_t columns = entry.at("shape").at(1);
    const size_t begin = entry.at("data_offsets").at(0);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const auto bf16 = static_cast<uint16_t>(bits >> 16);
    std::memcpy(&file_[data_ + begin + 2 * (row * columns + column)], &bf16, sizeof(bf16));
  }
  std::vector<std::string> NamesThatEndWith(const std::string& ending) const {
    std::vector<std::string> names;
    for (const auto& item : header_.items()) {
      if (std::string_view(item.key()).ends_with(ending)) names.push_back(item.key());
    }
    return names;
  }
  size_t Columns(const std::string& name) const { return header_.at(name).at("shape").at(1); }
  const std::string& file() const { return file_; }

 private:
  std::string file_;
  nlohmann::json header_;
  size_t data_ = 0;
};

// bard-6m with one hidden dimension that only the token kTrigger sets, and a huge weight on it:
// what overflows at kTrigger are its logits, and no state, or the second layer's keys, and so its
// state.
enum class Overflow { kLogits, kState };

void WriteOverflowingModel(const testing::ModelFolder& folder, Overflow overflow) {
  Tensors tensors(ReadFile(kBardFolder + "/model.safetensors"));
  for (size_t token = 0; token < 2048; ++token) {
    tensors.Put("model.embeddings.weight", token, 0, token == kTrigger ? 1e4f : 0.0f);
  }
  for (const char* ending : {"o_proj.weight", "down_proj.weight"}) {
    for (const std::string& name : tensors.NamesThatEndWith(ending)) {
      for (size_t i = 0; i < tensors.Columns(name); ++i) tensors.Put(name, 0, i, 0);
    }
  }
  if (overflow == Overflow::kLogits) {
    tensors.Put("lm_head.weight", 5, 0, 3e38f);
  } else {
    tensors.Put("model.layers.1.attn.k_proj.weight", 3, 0, 3e38f);
  }
  folder.Write("model.safetensors", tensors.file());
  folder.Write("config.json", ReadFile(kBardFolder + "/config.json"));
}

template <Overflow overflow>
EngineSetup Overflowing() {
  static const testing::ModelFolder folder;
  static const bool written = (WriteOverflowingModel(folder, overflow), true);
  EngineSetup setup;
  if (written) setup.model_folder = folder.path();
  return setup;
}

class NumericGuardTest : public ::testing::Test {
 protected:
  double trips() { return engine_.metrics().numeric_guard_trips_total.Value(); }

  TestEngine engine_{Overflowing<Overflow::kLogits>()};
};

// Rows without logits: those inside a prompt, and the one in which a session takes its last token.
class StateGuardTest : public ::testing::Test {
 protected:
  StateGuardTest() {
    for (const char* id : {"s", "twin"}) {
      EXPECT_TRUE(engine_.Create(id).ok());
      engine_.Run(Sampled(Tokens(5), 6, 1, id));
    }
    before_ = engine_.Find("s")->position;
  }
  // `outcome` is of a request on "s", which must be as it was before.
  void ExpectRolledBack(const Outcome& outcome, const std::string& message) {
    EXPECT_EQ(outcome.finish.status.code(), absl::StatusCode::kInternal);
    EXPECT_EQ(std::string(outcome.finish.status.message()), message);
    EXPECT_EQ(outcome.finish.reason, FinishReason::kError);
    EXPECT_EQ(outcome.finish.session_position, before_);
    EXPECT_EQ(engine_.metrics().numeric_guard_trips_total.Value(), 1);
    EXPECT_EQ(engine_.Find("s")->position, before_);
    const Outcome after = engine_.Run(Sampled({50, 60}, 8, 3, "s"));
    EXPECT_TRUE(after.finish.status.ok()) << after.finish.status;
    EXPECT_EQ(after.tokens, engine_.Run(Sampled({50, 60}, 8, 3, "twin")).tokens);
    EXPECT_TRUE(engine_.IsIdle(2));
  }

  TestEngine engine_{Overflowing<Overflow::kState>()};
  int64_t before_ = 0;
};

TEST_F(NumericGuardTest, RollsTheSessionBackAndLeavesNeighboursUntouched) {
  for (const char* id : {"s", "twin"}) {
    ASSERT_TRUE(engine_.Create(id).ok());
    engine_.Run(Sampled(Tokens(5), 6, 1, id));
  }
  const int64_t before = engine_.Find("s")->position;
  const std::vector<int32_t> alone = engine_.Run(Sampled(Tokens(9), 80, 2)).tokens;

  RecordingSink neighbour, faulty;
  neighbour.on_token = [&](int count) {
    if (count == 10) {
      EXPECT_TRUE(engine_->Submit(Greedy({10, 20, kTrigger}, 4, "s"), &faulty).ok());
    }
  };
  ASSERT_TRUE(engine_->Submit(Sampled(Tokens(9), 80, 2), &neighbour).ok());
  const Outcome outcome = faulty.Get();
  EXPECT_EQ(outcome.finish.status.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(std::string(outcome.finish.status.message()),
            absl::StrCat("non-finite logits at step 0 (token position ", before + 2, ")"));
  EXPECT_EQ(outcome.finish.reason, FinishReason::kError);
  EXPECT_TRUE(outcome.tokens.empty());
  EXPECT_EQ(outcome.finish.session_position, before);
  EXPECT_EQ(neighbour.Get().tokens, alone);
  EXPECT_EQ(trips(), 1);
  EXPECT_EQ(engine_.finished("error"), 1);

  EXPECT_EQ(engine_.Find("s")->position, before);
  EXPECT_EQ(engine_.Run(Sampled({50, 60}, 8, 3, "s")).tokens,
            engine_.Run(Sampled({50, 60}, 8, 3, "twin")).tokens);
  EXPECT_TRUE(engine_.IsIdle(2));
}

TEST_F(NumericGuardTest, InMidGenerationKeepsWhatWasReportedOutOfTheSession) {
  ASSERT_TRUE(engine_.Create("s").ok());
  GenerateParams params = Greedy(Tokens(5), 20, "s");
  params.sampling.logit_bias = {{kTrigger, 100.0f}};  // the first token
  const Outcome outcome = engine_.Run(params);
  EXPECT_EQ(outcome.tokens, std::vector<int32_t>{kTrigger});
  EXPECT_THAT(std::string(outcome.finish.status.message()), HasSubstr("step 1"));
  EXPECT_EQ(outcome.finish.session_position, 0);
  EXPECT_EQ(engine_.Find("s")->position, 0);
  EXPECT_TRUE(engine_.IsIdle(0));
}

TEST_F(NumericGuardTest, EndsAScoring) {
  const Outcome outcome = engine_.Score({5, 6, kTrigger, 7, 8});
  EXPECT_EQ(outcome.finish.status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(outcome.finish.status.message()), HasSubstr("step 2"));
  EXPECT_EQ(trips(), 1);
  // As a target only, it is never run.
  EXPECT_TRUE(engine_.Score({5, 6, kTrigger}).finish.status.ok());
}

TEST_F(NumericGuardTest, LeavesASessionWhoseStateIsSound) {
  ASSERT_TRUE(engine_.Create("s").ok());
  GenerateParams params = Greedy(Tokens(5), 1, "s");
  params.sampling.logit_bias = {{kTrigger, 100.0f}};
  EXPECT_TRUE(engine_.Run(params).finish.status.ok());  // nobody asked what comes after kTrigger
  EXPECT_EQ(engine_.Find("s")->position, 6);
  EXPECT_TRUE(engine_.Run(Greedy({50, 60}, 3, "s")).finish.status.ok());
  EXPECT_EQ(trips(), 0);
}

TEST_F(StateGuardTest, ARowInsideAPromptChunk) {
  const std::vector<int32_t> alone = engine_.Run(Sampled(Tokens(9), 80, 2)).tokens;
  RecordingSink neighbour, faulty;
  std::vector<int32_t> prompt = Tokens(100);  // four chunks; kTrigger is in the second one
  prompt[40] = kTrigger;
  neighbour.on_token = [&](int count) {
    if (count == 10) {
      EXPECT_TRUE(engine_->Submit(Greedy(prompt, 4, "s"), &faulty).ok());
    }
  };
  ASSERT_TRUE(engine_->Submit(Sampled(Tokens(9), 80, 2), &neighbour).ok());
  const Outcome outcome = faulty.Get();
  EXPECT_EQ(neighbour.Get().tokens, alone);
  EXPECT_EQ(outcome.prefill, std::vector<int64_t>{32});
  ExpectRolledBack(outcome,
                   absl::StrCat("non-finite activations at token position ", before_ + 40));
}

TEST_F(StateGuardTest, TheRowInWhichASessionTakesItsLastToken) {
  GenerateParams params = Greedy({10, 20}, 1, "s");
  params.sampling.logit_bias = {{kTrigger, 100.0f}};
  const Outcome outcome = engine_.Run(params);
  EXPECT_EQ(outcome.tokens, std::vector<int32_t>{kTrigger});
  ExpectRolledBack(outcome, absl::StrCat("non-finite activations at token position ", before_ + 2));
}

TEST_F(StateGuardTest, ARowWithLogits) {
  ExpectRolledBack(engine_.Run(Greedy({10, kTrigger}, 4, "s")),
                   absl::StrCat("non-finite logits at step 0 (token position ", before_ + 1, ")"));
}

// A stop that is learnt while the step after it runs: the same, judged from that step.
TEST_F(NumericGuardTest, LeavesASessionThatStopsWithSoundState) {
  ASSERT_TRUE(engine_.Create("s").ok());
  GenerateParams params = Greedy(Tokens(5), 20, "s");
  params.sampling.logit_bias = {{kTrigger, 100.0f}};
  params.stop_token_ids = {kTrigger};
  const Outcome outcome = engine_.Run(params);
  EXPECT_EQ(outcome.finish.reason, FinishReason::kStop);
  EXPECT_EQ(outcome.finish.session_position, 6);
  EXPECT_TRUE(engine_.Run(Greedy({50, 60}, 3, "s")).finish.status.ok());
  EXPECT_EQ(trips(), 0);
}

TEST_F(StateGuardTest, TheTokenByWhichASessionStops) {
  GenerateParams params = Greedy({10, 20}, 20, "s");
  params.sampling.logit_bias = {{kTrigger, 100.0f}};
  params.stop_token_ids = {kTrigger};
  const Outcome outcome = engine_.Run(params);
  EXPECT_EQ(outcome.tokens, std::vector<int32_t>{kTrigger});
  ExpectRolledBack(outcome, absl::StrCat("non-finite activations at token position ", before_ + 2));
}

TEST_F(StateGuardTest, ATokenThatRunsWhenTheRequestIsCancelled) {
  RecordingSink sink;
  RequestId id = 0;
  sink.on_token = [&](int) { engine_->Cancel(id); };
  GenerateParams params = Greedy({10, 20}, 20, "s");
  params.sampling.logit_bias = {{kTrigger, 100.0f}};
  engine_.SubmitKnown(params, sink, id);
  const Outcome outcome = sink.Get();
  EXPECT_EQ(outcome.finishes, 1);
  ExpectRolledBack(outcome, absl::StrCat("non-finite activations at token position ", before_ + 2));
}

TEST(StateGuard, ChunkwiseToo) {
  EngineSetup setup = Overflowing<Overflow::kState>();
  setup.prefill_form = PrefillForm::kChunkwise;
  setup.engine.max_num_batched_tokens = 256;
  setup.engine.max_prefill_chunk = 128;
  TestEngine engine(setup);
  ASSERT_TRUE(engine.Create("s").ok());
  std::vector<int32_t> prompt = Tokens(300);
  prompt[70] = kTrigger;
  const Outcome outcome = engine.Run(Greedy(prompt, 4, "s"));
  EXPECT_EQ(outcome.finish.status.code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(outcome.prefill.empty());
  EXPECT_EQ(engine.Find("s")->position, 0);
  EXPECT_TRUE(engine.Run(Greedy({50, 60}, 3, "s")).finish.status.ok());
}

TEST(SlotReuse, ShowsNothingOfTheFormerOwner) {
  EngineSetup setup;  // freed slots are filled with NaN: one stale read would end a request
  setup.engine.max_num_seqs = 2;
  setup.engine.num_slots = 3;
  TestEngine engine(setup);
  const std::vector<int32_t> want = engine.Run(Sampled(Tokens(6), 12, 5)).tokens;
  for (int round = 0; round < 30; ++round) {
    ASSERT_TRUE(engine.Create("s").ok());
    EXPECT_TRUE(engine.Run(Sampled(Tokens(40, round), 5, 1, "s")).finish.status.ok());
    ASSERT_TRUE(engine.Delete("s").ok());
    EXPECT_EQ(engine.Run(Sampled(Tokens(6), 12, 5)).tokens, want);
  }
  EXPECT_EQ(engine.metrics().numeric_guard_trips_total.Value(), 0);
}

}  // namespace
}  // namespace gla
