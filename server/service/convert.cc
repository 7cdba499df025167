#include "service/convert.h"

#include <cmath>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "service/status.h"

namespace gla {
namespace {

constexpr int kMaxStops = 16;
constexpr int kMaxStopBytes = 64;
constexpr int kMaxStopTokens = 64;
constexpr int kMaxLogitBias = 1024;
constexpr int kMaxLogprobs = 20;
constexpr int kMaxRequestIdChars = 128;
constexpr int kMaxSessionIdChars = 128;

// An interval with closed ends, but for an open lower one where said.
template <typename T>
absl::Status CheckRange(const std::string& field, T value, T low, T high, bool open_low = false) {
  // Written so that NaN fails.
  const bool good = (open_low ? value > low : value >= low) && value <= high;
  if (good) return absl::OkStatus();
  return FieldError(
      field, absl::StrCat("expected ", open_low ? "(" : "[", low, ", ", high, "], got ", value));
}

absl::Status CheckToken(const std::string& field, int32_t id, const Serving& serving) {
  if (id >= 0 && id < serving.info.vocab_size()) return absl::OkStatus();
  return FieldError(
      field, absl::StrCat("expected token ids in [0, ", serving.info.vocab_size(), "), got ", id));
}

// Length of the character that starts at text[i], or 0 when it is no valid UTF-8.
size_t CharacterLength(const std::string& text, size_t i) {
  const auto byte = [&](size_t k) { return static_cast<unsigned char>(text[k]); };
  const unsigned char c = byte(i);
  const size_t n = c < 0x80                ? 1
                   : c >= 0xc2 && c < 0xe0 ? 2
                   : c >= 0xe0 && c < 0xf0 ? 3
                   : c >= 0xf0 && c < 0xf5 ? 4
                                           : 0;
  if (n == 0 || n > text.size() - i) return 0;
  for (size_t k = 1; k < n; ++k) {
    if ((byte(i + k) & 0xc0) != 0x80) return 0;
  }
  if (n > 2) {  // overlong forms, surrogates, beyond U+10FFFF
    const unsigned char d = byte(i + 1);
    if ((c == 0xe0 && d < 0xa0) || (c == 0xed && d > 0x9f) || (c == 0xf0 && d < 0x90) ||
        (c == 0xf4 && d > 0x8f)) {
      return 0;
    }
  }
  return n;
}

absl::Status CheckUtf8(const std::string& field, const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const size_t n = CharacterLength(text, i);
    if (n == 0) return FieldError(field, absl::StrCat("expected UTF-8, got byte ", i, " invalid"));
    i += n;
  }
  return absl::OkStatus();
}

absl::Status CheckRequestId(const std::string& id) {
  bool printable = id.size() <= kMaxRequestIdChars;
  for (const unsigned char c : id) printable = printable && absl::ascii_isprint(c);
  if (printable) return absl::OkStatus();
  return FieldError("request_id", absl::StrCat("expected at most ", kMaxRequestIdChars,
                                               " printable ASCII characters, got ", Shown(id)));
}

absl::Status CheckPromptLength(const std::string& field, size_t tokens, const Serving& serving) {
  const auto limit = static_cast<size_t>(serving.info.max_prompt_tokens());
  if (tokens <= limit) return absl::OkStatus();
  return FieldError(field, absl::StrCat("expected at most ", limit, " tokens, got ", tokens),
                    "PROMPT_TOO_LONG");
}

absl::StatusOr<std::vector<int32_t>> EncodeText(const std::string& text, bool add_special,
                                                const Serving& serving) {
  if (text.size() > kMaxTextBytes) {
    return FieldError("text",
                      absl::StrCat("expected at most ", kMaxTextBytes, " bytes, got ", text.size()),
                      "PROMPT_TOO_LONG");
  }
  absl::StatusOr<std::vector<int32_t>> ids = serving.tokenizer.Encode(text, add_special);
  if (ids.ok()) return ids;
  if (!absl::IsInvalidArgument(ids.status())) return ids.status();
  return FieldError("text", std::string(absl::StripPrefix(ids.status().message(), "text: ")));
}

absl::StatusOr<std::vector<int32_t>> CheckedIds(const v1::TokenIds& ids, const Serving& serving) {
  GLA_RETURN_IF_ERROR(CheckPromptLength("token_ids", static_cast<size_t>(ids.ids_size()), serving));
  for (const int32_t id : ids.ids()) GLA_RETURN_IF_ERROR(CheckToken("token_ids", id, serving));
  return std::vector<int32_t>(ids.ids().begin(), ids.ids().end());
}

absl::Status SetPrompt(const v1::GenerateRequest& request, const Serving& serving,
                       GenerateParams& params) {
  if (request.has_text()) {
    // Without the special tokens: the begin token depends on the session's position, which only the
    // engine knows, and an end token after a prompt would end it.
    GLA_ASSIGN_OR_RETURN(params.prompt, EncodeText(request.text(), false, serving));
    const Tokenizer& tokenizer = serving.tokenizer;
    if (tokenizer.adds_bos() && tokenizer.bos_token_id() >= 0) {
      params.bos_if_start = tokenizer.bos_token_id();
    }
    GLA_RETURN_IF_ERROR(CheckPromptLength("text", params.prompt.size(), serving));
  } else if (request.has_token_ids()) {
    GLA_ASSIGN_OR_RETURN(params.prompt, CheckedIds(request.token_ids(), serving));
  } else {
    return FieldError("prompt", "expected text or token_ids, got neither");
  }
  if (params.prompt.empty()) {
    return FieldError(request.has_text() ? "text" : "token_ids",
                      "expected at least one token, got none");
  }
  return absl::OkStatus();
}

absl::StatusOr<SamplingParams> ToSampling(const v1::SamplingParams& in, const Serving& serving,
                                          RandomSource& random) {
  SamplingParams out;
  if (in.has_temperature()) out.temperature = in.temperature();
  if (in.has_top_k()) out.top_k = in.top_k();
  if (in.has_top_p()) out.top_p = in.top_p();
  if (in.has_min_p()) out.min_p = in.min_p();
  if (in.has_repetition_penalty()) out.repetition_penalty = in.repetition_penalty();
  if (in.has_presence_penalty()) out.presence_penalty = in.presence_penalty();
  if (in.has_frequency_penalty()) out.frequency_penalty = in.frequency_penalty();
  GLA_RETURN_IF_ERROR(CheckRange("sampling.temperature", out.temperature, 0.f, 100.f));
  GLA_RETURN_IF_ERROR(CheckRange("sampling.top_k", out.top_k, 0, serving.info.vocab_size()));
  GLA_RETURN_IF_ERROR(CheckRange("sampling.top_p", out.top_p, 0.f, 1.f, /*open_low=*/true));
  GLA_RETURN_IF_ERROR(CheckRange("sampling.min_p", out.min_p, 0.f, 1.f));
  GLA_RETURN_IF_ERROR(
      CheckRange("sampling.repetition_penalty", out.repetition_penalty, 0.f, 100.f, true));
  GLA_RETURN_IF_ERROR(CheckRange("sampling.presence_penalty", out.presence_penalty, -2.f, 2.f));
  GLA_RETURN_IF_ERROR(CheckRange("sampling.frequency_penalty", out.frequency_penalty, -2.f, 2.f));
  GLA_RETURN_IF_ERROR(
      CheckRange("sampling.logit_bias", static_cast<int>(in.logit_bias_size()), 0, kMaxLogitBias));
  for (const auto& [id, bias] : in.logit_bias()) {
    GLA_RETURN_IF_ERROR(CheckToken("sampling.logit_bias", id, serving));
    GLA_RETURN_IF_ERROR(CheckRange("sampling.logit_bias", bias, -100.f, 100.f));
    out.logit_bias.emplace_back(id, bias);
  }
  out.seed = in.has_seed() ? in.seed() : random.Seed();
  return out;
}

absl::Status SetStops(const v1::GenerateRequest& request, const Serving& serving,
                      GenerateParams& params) {
  if (request.stop_size() > kMaxStops) {
    return FieldError("stop", absl::StrCat("expected at most ", kMaxStops, " strings, got ",
                                           request.stop_size()));
  }
  for (const std::string& stop : request.stop()) {
    if (stop.empty() || stop.size() > kMaxStopBytes) {
      return FieldError("stop", absl::StrCat("expected strings of 1 .. ", kMaxStopBytes,
                                             " bytes, got ", stop.size(), " bytes"));
    }
    GLA_RETURN_IF_ERROR(CheckUtf8("stop", stop));
  }
  if (request.stop_token_ids_size() > kMaxStopTokens) {
    return FieldError("stop_token_ids", absl::StrCat("expected at most ", kMaxStopTokens,
                                                     " ids, got ", request.stop_token_ids_size()));
  }
  for (const int32_t id : request.stop_token_ids()) {
    GLA_RETURN_IF_ERROR(CheckToken("stop_token_ids", id, serving));
  }
  params.stop.assign(request.stop().begin(), request.stop().end());
  params.stop_token_ids.assign(request.stop_token_ids().begin(), request.stop_token_ids().end());
  params.ignore_eos = request.ignore_eos();
  return absl::OkStatus();
}

absl::Status SetSession(const v1::GenerateRequest& request, GenerateParams& params) {
  params.session_id = request.session_id();
  if (!params.session_id.empty()) GLA_RETURN_IF_ERROR(CheckSessionId(params.session_id));
  if (!request.has_expected_position()) return absl::OkStatus();
  if (params.session_id.empty()) {
    return FieldError("expected_position", "expected a session_id beside it, got none");
  }
  if (request.expected_position() < 0) {
    return FieldError("expected_position",
                      absl::StrCat("expected 0 or more, got ", request.expected_position()));
  }
  params.expected_position = request.expected_position();
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckModel(const std::string& model, const Serving& serving) {
  if (model.empty() || model == serving.info.model()) return absl::OkStatus();
  return WithReason(absl::NotFoundError(absl::StrCat("model: expected \"", serving.info.model(),
                                                     "\" or nothing, got ", Shown(model))),
                    "MODEL_NOT_FOUND");
}

absl::Status CheckSessionId(const std::string& id) {
  bool good = !id.empty() && id.size() <= kMaxSessionIdChars;
  for (const unsigned char c : id) {
    good = good && (absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-');
  }
  if (good) return absl::OkStatus();
  return FieldError("session_id", absl::StrCat("expected 1 .. ", kMaxSessionIdChars,
                                               " characters of [A-Za-z0-9._-], got ", Shown(id)));
}

absl::StatusOr<GenerateParams> ToParams(const v1::GenerateRequest& request, const Serving& serving,
                                        RandomSource& random) {
  GLA_RETURN_IF_ERROR(CheckModel(request.model(), serving));
  GLA_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  GenerateParams params;
  params.request_id = request.request_id().empty() ? absl::StrCat("r-", RandomSource::Hex(8))
                                                   : request.request_id();
  GLA_RETURN_IF_ERROR(SetSession(request, params));
  params.max_new_tokens = request.has_max_new_tokens()
                              ? request.max_new_tokens()
                              : std::min(kDefaultMaxNewTokens, serving.info.max_new_tokens());
  GLA_RETURN_IF_ERROR(
      CheckRange("max_new_tokens", params.max_new_tokens, 1, serving.info.max_new_tokens()));
  GLA_ASSIGN_OR_RETURN(params.sampling, ToSampling(request.sampling(), serving, random));
  GLA_RETURN_IF_ERROR(SetStops(request, serving, params));
  if (request.has_logprobs()) {
    params.logprobs = request.logprobs();
    GLA_RETURN_IF_ERROR(CheckRange("logprobs", params.logprobs, 0,
                                   std::min(kMaxLogprobs, serving.info.vocab_size())));
  }
  // Last, for it is the only part that takes time.
  GLA_RETURN_IF_ERROR(SetPrompt(request, serving, params));
  return params;
}

absl::StatusOr<ScoreParams> ToParams(const v1::ScoreRequest& request, const Serving& serving) {
  GLA_RETURN_IF_ERROR(CheckModel(request.model(), serving));
  GLA_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  ScoreParams params;
  params.request_id = request.request_id().empty() ? absl::StrCat("r-", RandomSource::Hex(8))
                                                   : request.request_id();
  const std::string field = request.has_text() ? "text" : "token_ids";
  if (request.has_text()) {
    GLA_ASSIGN_OR_RETURN(params.tokens, EncodeText(request.text(), true, serving));
    GLA_RETURN_IF_ERROR(CheckPromptLength(field, params.tokens.size(), serving));
  } else if (request.has_token_ids()) {
    GLA_ASSIGN_OR_RETURN(params.tokens, CheckedIds(request.token_ids(), serving));
  } else {
    return FieldError("input", "expected text or token_ids, got neither");
  }
  if (params.tokens.size() < 2) {
    return FieldError(field,
                      absl::StrCat("expected at least 2 tokens, got ", params.tokens.size()));
  }
  return params;
}

v1::GenerateRequest ToRequest(v1::ConverseTurn&& turn, const v1::ConverseOpen& open,
                              const std::string& session_id) {
  v1::GenerateRequest request;
  if (turn.has_text()) request.set_text(std::move(*turn.mutable_text()));
  if (turn.has_token_ids()) *request.mutable_token_ids() = std::move(*turn.mutable_token_ids());
  request.set_session_id(session_id);
  if (turn.has_expected_position()) request.set_expected_position(turn.expected_position());
  if (turn.has_max_new_tokens()) request.set_max_new_tokens(turn.max_new_tokens());
  *request.mutable_sampling() = turn.has_sampling() ? turn.sampling() : open.sampling();
  *request.mutable_stop() = std::move(*turn.mutable_stop());
  *request.mutable_stop_token_ids() = std::move(*turn.mutable_stop_token_ids());
  request.set_ignore_eos(turn.ignore_eos());
  if (turn.has_logprobs()) request.set_logprobs(turn.logprobs());
  return request;
}

void Append(const TokenEvent& event, v1::GenerateResponse* message) {
  message->add_token_ids(event.token);
  message->mutable_text()->append(event.text);
  if (!event.logprob.has_value()) return;
  v1::TokenLogprobs* logprobs = message->add_logprobs();
  logprobs->set_token_id(event.token);
  logprobs->set_logprob(event.logprob->logprob);
  for (const auto& [id, logprob] : event.logprob->top) {
    logprobs->add_top_token_ids(id);
    logprobs->add_top_logprobs(logprob);
  }
}

void SetFinish(const FinishEvent& event, v1::GenerateResponse* message) {
  message->mutable_text()->append(event.text);
  v1::Finish* finish = message->mutable_finish();
  switch (event.reason) {
    case FinishReason::kLength:
      finish->set_reason(v1::FINISH_REASON_LENGTH);
      break;
    case FinishReason::kEos:
      finish->set_reason(v1::FINISH_REASON_EOS);
      break;
    case FinishReason::kStop:
      finish->set_reason(v1::FINISH_REASON_STOP_SEQUENCE);
      break;
    case FinishReason::kCancelled:
      finish->set_reason(v1::FINISH_REASON_CANCELLED);
      break;
    case FinishReason::kDeadline:
    case FinishReason::kError:
      break;  // told by the status
  }
  finish->mutable_usage()->set_tokens_restored(event.tokens_restored);
  finish->mutable_usage()->set_tokens_prefilled(event.tokens_prefilled);
  finish->mutable_usage()->set_tokens_generated(event.tokens_generated);
  *finish->mutable_timings() = ToProto(event.timings);
  finish->set_session_id(event.session_id);
  finish->set_session_position(event.session_position);
  finish->set_seed(event.seed);
  finish->set_stop_sequence(event.stop_sequence);
}

v1::Timings ToProto(const RequestTimings& timings) {
  v1::Timings out;
  out.set_queue(timings.queue);
  out.set_prefill(timings.prefill);
  out.set_decode(timings.decode);
  out.set_time_to_first_token(timings.time_to_first_token);
  out.set_total(timings.total);
  return out;
}

v1::Session ToProto(const SessionInfo& info) {
  v1::Session out;
  out.set_session_id(info.id);
  out.set_position(info.position);
  out.set_state_bytes(info.state_bytes);
  out.set_busy(info.busy);
  out.set_idle_seconds(info.idle_seconds);
  out.set_idle_ttl_seconds(info.idle_ttl_seconds);
  out.set_age_seconds(info.age_seconds);
  return out;
}

}  // namespace gla
