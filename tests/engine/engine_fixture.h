// A whole engine around a tiny model, and a sink that remembers what it was told.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "tests/testing/tiny_model.h"

namespace gla {

// Token t is " t<t>", but for those that the test spells. 1 begins, 2 ends; both are special.
class TestTokenizer : public Tokenizer {
 public:
  explicit TestTokenizer(std::map<int32_t, std::string> spelt = {}) : spelt_(std::move(spelt)) {}

  int vocab_size() const override { return 2048; }
  int bos_token_id() const override { return 1; }
  int eos_token_id() const override { return 2; }
  bool adds_bos() const override { return true; }
  bool adds_eos() const override { return false; }
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view, bool, bool) const override {
    return absl::UnimplementedError("not needed here");
  }
  std::string Piece(int32_t id) const override { return TokenBytes(id, false, false); }
  BadBytes bad_bytes() const override { return BadBytes::kEachSequence; }
  bool IsSpecial(int32_t id) const override { return id == 1 || id == 2; }
  std::string TokenBytes(int32_t id, bool, bool skip_special) const override {
    if (skip_special && IsSpecial(id)) return "";
    const auto it = spelt_.find(id);
    return it != spelt_.end() ? it->second : absl::StrCat(" t", id);
  }

 private:
  const std::map<int32_t, std::string> spelt_;
};

// What a request gave.
struct Outcome {
  std::vector<int32_t> tokens;
  std::string text;  // of all events and the finish
  std::vector<std::string> pieces;
  std::vector<TokenLogprob> logprobs;
  std::vector<int64_t> prefill;  // tokens done, as reported
  FinishEvent finish;
  int finishes = 0;
};

class RecordingSink : public TokenSink {
 public:
  // Run on the engine thread, after the event is recorded; with the number of tokens so far.
  std::function<void(int)> on_token;
  std::function<void(int64_t)> on_prefill;
  std::function<void()> on_finish;

  void OnPrefill(int64_t done, int64_t) override {
    {
      std::lock_guard<std::mutex> lock(mu_);
      outcome_.prefill.push_back(done);
    }
    if (on_prefill) on_prefill(done);
  }
  void OnToken(const TokenEvent& event) override {
    int count;
    {
      std::lock_guard<std::mutex> lock(mu_);
      outcome_.tokens.push_back(event.token);
      outcome_.text += event.text;
      outcome_.pieces.push_back(event.text);
      if (event.logprob.has_value()) outcome_.logprobs.push_back(*event.logprob);
      count = static_cast<int>(outcome_.tokens.size());
    }
    if (on_token) on_token(count);
  }
  void OnFinish(const FinishEvent& event) override {
    if (on_finish) on_finish();
    // Notified under the lock: the waiter may destroy the sink as soon as it has it.
    std::lock_guard<std::mutex> lock(mu_);
    outcome_.finish = event;
    outcome_.text += event.text;
    ++outcome_.finishes;
    finished_.notify_all();
  }

  // Waits for the finish.
  Outcome Get() {
    std::unique_lock<std::mutex> lock(mu_);
    finished_.wait(lock, [this] { return outcome_.finishes > 0; });
    return outcome_;
  }

 private:
  std::mutex mu_;
  std::condition_variable finished_;
  Outcome outcome_;
};

inline std::string ReasonOf(const absl::Status& status) {
  const auto reason = status.GetPayload(kReasonUrl);
  return reason.has_value() ? std::string(*reason) : "";
}

inline int RetryMsOf(const absl::Status& status) {
  const auto ms = status.GetPayload(kRetryMsUrl);
  return ms.has_value() ? std::stoi(std::string(*ms)) : -1;
}

// A clock that stands still until it is moved. Thread-safe.
class ManualClock {
 public:
  Clock clock() {
    return [this] { return Instant(std::chrono::nanoseconds(now_.load())); };
  }
  void Advance(double seconds) { now_ += static_cast<int64_t>(seconds * 1e9); }

 private:
  std::atomic<int64_t> now_ = int64_t{1000} * 1000 * 1000 * 1000;
};

struct EngineSetup {
  EngineOptions engine = {.max_num_seqs = 8,
                          .max_num_batched_tokens = 128,
                          .max_prefill_chunk = 32,
                          .num_slots = 24,
                          .poison_freed_slots = true};
  PrefillForm prefill_form = PrefillForm::kRecurrent;
  StateFormat state_format = StateFormat::kFloat32;
  DType dtype = DType::kFloat32;
  int max_logit_rows = 96;
  std::string model_folder;  // empty: the tiny random model
  std::map<int32_t, std::string> spelt;
  bool start = true;
};

class TestEngine {
 public:
  explicit TestEngine(const EngineSetup& setup = {})
      : tokenizer_(setup.spelt), metrics_({"0", "test", "test", "tiny", "gla", "float32"}) {
    device_ = OpenTestDevice();
    const ModelOptions options = {.dtype = setup.dtype,
                                  .max_rows = setup.engine.max_num_batched_tokens,
                                  .max_seqs = setup.engine.max_num_seqs,
                                  .max_logit_rows = setup.max_logit_rows,
                                  .prefill_form = setup.prefill_form,
                                  .state_format = setup.state_format};
    model_ = setup.model_folder.empty() ? MakeTinyModel(*device_, options)
                                        : LoadModel(*device_, setup.model_folder, options);
    engine_ = ValueOrDie(Engine::Create(*device_, *model_, tokenizer_, metrics_, setup.engine));
    if (setup.start) engine_->Start();
  }

  Engine* operator->() { return engine_.get(); }
  Metrics& metrics() { return metrics_; }
  Device& device() { return *device_; }
  void Reset() { engine_.reset(); }

  Outcome Run(GenerateParams params) {
    RecordingSink sink;
    const auto id = engine_->Submit(std::move(params), &sink);
    if (!id.ok()) return Refused(id.status());
    return sink.Get();
  }
  // Submits while the engine thread stands still, so that the sink's hooks see `id`.
  void SubmitKnown(GenerateParams params, RecordingSink& sink, RequestId& id) {
    std::promise<void> go;
    engine_->GetSession("", [&](auto) { go.get_future().wait(); });
    id = ValueOrDie(engine_->Submit(std::move(params), &sink));
    go.set_value();
    (void)Find("");  // `go` is not needed any more
  }
  Outcome Score(std::vector<int32_t> tokens) {
    RecordingSink sink;
    ScoreParams params;
    params.tokens = std::move(tokens);
    const auto id = engine_->Submit(std::move(params), &sink);
    if (!id.ok()) return Refused(id.status());
    return sink.Get();
  }

  absl::StatusOr<SessionInfo> Create(const std::string& id, std::optional<int64_t> ttl = {}) {
    std::promise<absl::StatusOr<SessionInfo>> promise;
    engine_->CreateSession(id, ttl, [&](auto info) { promise.set_value(std::move(info)); });
    return promise.get_future().get();
  }
  absl::StatusOr<SessionInfo> Find(const std::string& id) {
    std::promise<absl::StatusOr<SessionInfo>> promise;
    engine_->GetSession(id, [&](auto info) { promise.set_value(std::move(info)); });
    return promise.get_future().get();
  }
  absl::Status Delete(const std::string& id) {
    std::promise<absl::Status> promise;
    engine_->DeleteSession(id, [&](auto status) { promise.set_value(std::move(status)); });
    return promise.get_future().get();
  }
  std::vector<SessionInfo> List() {
    std::promise<std::vector<SessionInfo>> promise;
    engine_->ListSessions([&](auto all) { promise.set_value(std::move(all)); });
    return promise.get_future().get();
  }

  double finished(const std::string& reason) { return metrics_.Finished(reason).Value(); }
  double prompt_tokens() { return metrics_.prompt_tokens_total.Value(); }

  // Nothing runs or waits, and slots are held by `pinned` sessions only.
  bool IsIdle(int pinned = 0) {
    (void)Find("");  // a turn of the engine
    return metrics_.requests_running.Value() == 0 && metrics_.requests_queued.Value() == 0 &&
           metrics_.queued_tokens.Value() == 0 && metrics_.slots_used.Value() == pinned &&
           metrics_.slots_pinned.Value() == pinned;
  }

 private:
  static Outcome Refused(const absl::Status& status) {
    Outcome outcome;
    outcome.finish.status = status;
    outcome.finish.reason = FinishReason::kError;
    return outcome;
  }

  TestTokenizer tokenizer_;
  Metrics metrics_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Engine> engine_;
};

// Greedy, to the full length.
inline GenerateParams Greedy(std::vector<int32_t> prompt, int max_new_tokens,
                             const std::string& session = "") {
  GenerateParams params;
  params.prompt = std::move(prompt);
  params.session_id = session;
  params.max_new_tokens = max_new_tokens;
  params.sampling.temperature = 0;
  params.ignore_eos = true;
  return params;
}

// Draws, so that the text goes on changing.
inline GenerateParams Sampled(std::vector<int32_t> prompt, int max_new_tokens, uint64_t seed,
                              const std::string& session = "") {
  GenerateParams params = Greedy(std::move(prompt), max_new_tokens, session);
  params.sampling.temperature = 1;
  params.sampling.seed = seed;
  return params;
}

inline std::vector<int32_t> Tokens(int count, int32_t first = 3) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(3 + (first * 31 + i * 17) % 2000);
  return tokens;
}

}  // namespace gla
