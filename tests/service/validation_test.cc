// Every rule of service/convert.cc, over the wire: the code, the field and what the message says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "test_server.h"

namespace gla {
namespace {

using Change = std::function<void(v1::GenerateRequest&)>;

struct Rule {
  const char* name;
  Change change;
  const char* field;
  const char* expected;  // a part of the message
};

v1::SamplingParams& Sampling(v1::GenerateRequest& r) { return *r.mutable_sampling(); }

const float kNan = std::nanf("");

const Rule kRules[] = {
    {"NoPrompt", [](auto& r) { r.clear_prompt(); }, "prompt", "got neither"},
    {"EmptyText", [](auto& r) { r.set_text(""); }, "text", "at least one token"},
    {"EmptyIds", [](auto& r) { r.mutable_token_ids()->clear_ids(); }, "token_ids", "got none"},
    {"InvalidUtf8", [](auto& r) { r.set_text("ab\xff"); }, "text", "2"},
    {"TextTooLong", [](auto& r) { r.set_text(std::string((1 << 20) + 1, 'a')); }, "text",
     "at most 1048576 bytes, got 1048577"},
    {"TooManyTokens",
     [](auto& r) {
       for (int i = 0; i < 32769; ++i) r.mutable_token_ids()->add_ids(5);
     },
     "token_ids", "at most 32768 tokens, got 32770"},
    {"TokenTooLarge", [](auto& r) { r.mutable_token_ids()->add_ids(2048); }, "token_ids",
     "[0, 2048), got 2048"},
    {"TokenNegative", [](auto& r) { r.mutable_token_ids()->add_ids(-1); }, "token_ids", "got -1"},
    {"ZeroNewTokens", [](auto& r) { r.set_max_new_tokens(0); }, "max_new_tokens",
     "[1, 8192], got 0"},
    {"TooManyNewTokens", [](auto& r) { r.set_max_new_tokens(8193); }, "max_new_tokens",
     "[1, 8192], got 8193"},
    {"NegativeNewTokens", [](auto& r) { r.set_max_new_tokens(-5); }, "max_new_tokens", "got -5"},
    {"TemperatureNegative", [](auto& r) { Sampling(r).set_temperature(-1); },
     "sampling.temperature", "[0, 100], got -1"},
    {"TemperatureTooHigh", [](auto& r) { Sampling(r).set_temperature(101); },
     "sampling.temperature", "got 101"},
    {"TemperatureNan", [](auto& r) { Sampling(r).set_temperature(kNan); }, "sampling.temperature",
     "got nan"},
    {"TopKNegative", [](auto& r) { Sampling(r).set_top_k(-1); }, "sampling.top_k", "got -1"},
    {"TopKBeyondVocabulary", [](auto& r) { Sampling(r).set_top_k(2049); }, "sampling.top_k",
     "[0, 2048], got 2049"},
    {"TopPZero", [](auto& r) { Sampling(r).set_top_p(0); }, "sampling.top_p", "(0, 1], got 0"},
    {"TopPTooHigh", [](auto& r) { Sampling(r).set_top_p(1.5); }, "sampling.top_p", "got 1.5"},
    {"TopPNan", [](auto& r) { Sampling(r).set_top_p(kNan); }, "sampling.top_p", "got nan"},
    {"MinPTooHigh", [](auto& r) { Sampling(r).set_min_p(1.1f); }, "sampling.min_p", "got 1.1"},
    {"MinPNegative", [](auto& r) { Sampling(r).set_min_p(-0.1f); }, "sampling.min_p", "got -0.1"},
    {"RepetitionZero", [](auto& r) { Sampling(r).set_repetition_penalty(0); },
     "sampling.repetition_penalty", "(0, 100], got 0"},
    {"RepetitionNan", [](auto& r) { Sampling(r).set_repetition_penalty(kNan); },
     "sampling.repetition_penalty", "got nan"},
    {"PresenceTooHigh", [](auto& r) { Sampling(r).set_presence_penalty(2.5); },
     "sampling.presence_penalty", "[-2, 2], got 2.5"},
    {"FrequencyTooLow", [](auto& r) { Sampling(r).set_frequency_penalty(-3); },
     "sampling.frequency_penalty", "got -3"},
    {"BiasOfUnknownToken", [](auto& r) { (*Sampling(r).mutable_logit_bias())[9999] = 1; },
     "sampling.logit_bias", "got 9999"},
    {"BiasTooLarge", [](auto& r) { (*Sampling(r).mutable_logit_bias())[5] = 101; },
     "sampling.logit_bias", "[-100, 100], got 101"},
    {"BiasInfinite", [](auto& r) { (*Sampling(r).mutable_logit_bias())[5] = INFINITY; },
     "sampling.logit_bias", "got inf"},
    {"TooManyBiases",
     [](auto& r) {
       for (int i = 0; i < 1025; ++i) (*Sampling(r).mutable_logit_bias())[i] = 1;
     },
     "sampling.logit_bias", "[0, 1024], got 1025"},
    {"TooManyStops",
     [](auto& r) {
       for (int i = 0; i < 17; ++i) r.add_stop(std::string(1, 'x'));
     },
     "stop", "at most 16 strings, got 17"},
    {"EmptyStop", [](auto& r) { r.add_stop(""); }, "stop", "got 0 bytes"},
    {"StopTooLong", [](auto& r) { r.add_stop(std::string(65, 'x')); }, "stop", "got 65 bytes"},
    {"StopNotUtf8", [](auto& r) { r.add_stop("\xc3"); }, "stop", "byte 0"},
    {"StopOverlongUtf8", [](auto& r) { r.add_stop("a\xe0\x80\x80"); }, "stop", "byte 1"},
    {"StopSurrogate", [](auto& r) { r.add_stop("\xed\xa0\x80"); }, "stop", "byte 0"},
    {"TooManyStopTokens",
     [](auto& r) {
       for (int i = 0; i < 65; ++i) r.add_stop_token_ids(i);
     },
     "stop_token_ids", "at most 64 ids, got 65"},
    {"StopTokenUnknown", [](auto& r) { r.add_stop_token_ids(2048); }, "stop_token_ids", "got 2048"},
    {"LogprobsNegative", [](auto& r) { r.set_logprobs(-1); }, "logprobs", "[0, 20], got -1"},
    {"LogprobsTooMany", [](auto& r) { r.set_logprobs(21); }, "logprobs", "got 21"},
    {"RequestIdTooLong", [](auto& r) { r.set_request_id(std::string(129, 'x')); }, "request_id",
     "at most 128 printable"},
    {"RequestIdNotPrintable", [](auto& r) { r.set_request_id("a\nb"); }, "request_id", "a\\nb"},
    {"SessionIdTooLong", [](auto& r) { r.set_session_id(std::string(129, 'x')); }, "session_id",
     "1 .. 128 characters"},
    {"SessionIdCharacters", [](auto& r) { r.set_session_id("a b"); }, "session_id", "a b"},
    {"PositionWithoutSession", [](auto& r) { r.set_expected_position(0); }, "expected_position",
     "session_id"},
    {"PositionNegative",
     [](auto& r) {
       r.set_session_id("s");
       r.set_expected_position(-1);
     },
     "expected_position", "got -1"},
};

class Validation : public testing::TestWithParam<Rule> {
 protected:
  static void SetUpTestSuite() { server_ = new TestServer(); }
  static void TearDownTestSuite() { delete server_; }
  static TestServer* server_;
};
TestServer* Validation::server_ = nullptr;

TEST_P(Validation, AnswersInvalidArgumentNamingTheField) {
  const Rule& rule = GetParam();
  v1::GenerateRequest request = Greedy({1}, 4);
  rule.change(request);
  const double before = server_->Metric("gla_rejections_total{reason=\"invalid_argument\"}") +
                        server_->Metric("gla_rejections_total{reason=\"prompt_too_long\"}");
  const Answer answer = Generate(*server_, request);
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(answer.status.error_message(), testing::StartsWith(absl::StrCat(rule.field, ": ")));
  EXPECT_THAT(answer.status.error_message(), testing::HasSubstr(rule.expected));
  EXPECT_EQ(answer.num_messages, 0);
  const auto bad = DetailOf<google::rpc::BadRequest>(answer.status);
  ASSERT_EQ(bad.field_violations_size(), 1);
  EXPECT_EQ(bad.field_violations(0).field(), rule.field);
  const auto info = DetailOf<google::rpc::ErrorInfo>(answer.status);
  EXPECT_THAT(info.reason(), testing::AnyOf("INVALID_FIELD", "PROMPT_TOO_LONG"));
  EXPECT_EQ(info.domain(), "gla-server");
  EXPECT_TRUE(WaitFor([&] {
    return server_->Metric("gla_rejections_total{reason=\"invalid_argument\"}") +
               server_->Metric("gla_rejections_total{reason=\"prompt_too_long\"}") ==
           before + 1;
  }));
}

INSTANTIATE_TEST_SUITE_P(Fields, Validation, testing::ValuesIn(kRules),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_F(Validation, UnknownModelIsNotFound) {
  v1::GenerateRequest request = Greedy({1}, 4);
  request.set_model("other");
  const Answer answer = Generate(*server_, request);
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(ReasonIn(answer.status), "MODEL_NOT_FOUND");
  EXPECT_THAT(answer.status.error_message(), testing::HasSubstr("\"bard-6m\""));
}

TEST_F(Validation, TheLimitsThemselvesAreGood) {
  v1::GenerateRequest request = Greedy({1, 2047}, 1);
  Sampling(request).set_temperature(100);
  Sampling(request).set_top_k(2048);
  Sampling(request).set_top_p(1);
  Sampling(request).set_min_p(1);
  Sampling(request).set_repetition_penalty(100);
  Sampling(request).set_presence_penalty(-2);
  Sampling(request).set_frequency_penalty(2);
  (*Sampling(request).mutable_logit_bias())[2047] = -100;
  for (int i = 0; i < 16; ++i) request.add_stop(std::string(64, static_cast<char>('a' + i)));
  for (int i = 0; i < 64; ++i) request.add_stop_token_ids(i);
  request.set_logprobs(20);
  request.set_model("bard-6m");
  request.set_request_id(std::string(128, '~'));
  const Answer answer = Generate(*server_, request);
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
  ASSERT_EQ(answer.logprobs.size(), 1u);
  EXPECT_EQ(answer.logprobs[0].top_token_ids_size(), 20);
}

TEST_F(Validation, ScoreAndTokenizeAndDetokenizeCheckTheirFields) {
  const auto score = [&](const v1::ScoreRequest& request) {
    grpc::ClientContext context;
    v1::ScoreResponse response;
    return server_->inference->Score(&context, request, &response).error_message();
  };
  v1::ScoreRequest request;
  EXPECT_THAT(score(request), testing::HasSubstr("input: expected text or token_ids"));
  request.mutable_token_ids()->add_ids(1);
  EXPECT_THAT(score(request), testing::HasSubstr("token_ids: expected at least 2 tokens, got 1"));
  request.mutable_token_ids()->add_ids(4000);
  EXPECT_THAT(score(request), testing::HasSubstr("got 4000"));
  request.set_text("\xff");
  EXPECT_THAT(score(request), testing::HasSubstr("text: "));

  grpc::ClientContext first, second;
  v1::TokenizeRequest tokenize;
  tokenize.set_text("a\xff");
  v1::TokenizeResponse tokens;
  EXPECT_EQ(server_->inference->Tokenize(&first, tokenize, &tokens).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  v1::DetokenizeRequest detokenize;
  detokenize.add_token_ids(2048);
  v1::DetokenizeResponse text;
  EXPECT_EQ(server_->inference->Detokenize(&second, detokenize, &text).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

}  // namespace
}  // namespace gla
