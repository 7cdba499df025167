// `gla generate` and `gla chat`: streamed text.
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <memory>

#include "client/command.h"
#include "client/terminal.h"

namespace gla {
namespace {

struct SamplingFlags {
  std::optional<double> temperature, top_p, min_p, repetition_penalty, presence_penalty,
      frequency_penalty;
  std::optional<int32_t> top_k;
  std::optional<uint64_t> seed;
  std::vector<std::string> logit_bias;

  void AddTo(Args* args) {
    args->Add("temperature", &temperature, "0: greedy (default 1)");
    args->Add("top-k", &top_k, "keep the k likeliest tokens; 0: off");
    args->Add("top-p", &top_p, "keep the likeliest tokens up to this mass");
    args->Add("min-p", &min_p, "keep tokens at least this likely, relative to the likeliest");
    args->Add("repetition-penalty", &repetition_penalty, "above 1: seen tokens less likely");
    args->Add("presence-penalty", &presence_penalty, "subtracted once from generated tokens");
    args->Add("frequency-penalty", &frequency_penalty, "subtracted per time generated");
    args->Add("seed", &seed, "same request and seed: same tokens");
    args->Add("logit-bias", &logit_bias, "ID=BIAS");
  }

  std::string Fill(v1::SamplingParams* params) const {
    if (temperature) params->set_temperature(static_cast<float>(*temperature));
    if (top_k) params->set_top_k(*top_k);
    if (top_p) params->set_top_p(static_cast<float>(*top_p));
    if (min_p) params->set_min_p(static_cast<float>(*min_p));
    if (repetition_penalty) {
      params->set_repetition_penalty(static_cast<float>(*repetition_penalty));
    }
    if (presence_penalty) params->set_presence_penalty(static_cast<float>(*presence_penalty));
    if (frequency_penalty) params->set_frequency_penalty(static_cast<float>(*frequency_penalty));
    if (seed) params->set_seed(*seed);
    for (const std::string& entry : logit_bias) {
      const size_t equals = entry.find('=');
      const auto ids = ParseIds(entry.substr(0, equals));
      char* end = nullptr;
      const float bias =
          equals == std::string::npos ? 0 : std::strtof(entry.c_str() + equals + 1, &end);
      if (!ids || ids->size() != 1 || end == nullptr || *end != '\0') {
        return "--logit-bias: expected ID=BIAS, got \"" + entry + "\"";
      }
      (*params->mutable_logit_bias())[ids->front()] = bias;
    }
    return "";
  }
};

// What a streamed answer adds up to.
struct Answer {
  std::vector<int32_t> token_ids;
  std::string text;
  nlohmann::json logprobs = nlohmann::json::array();
  v1::Finish finish;

  void Add(const v1::GenerateResponse& response) {
    token_ids.insert(token_ids.end(), response.token_ids().begin(), response.token_ids().end());
    text += response.text();
    for (const v1::TokenLogprobs& entry : response.logprobs()) {
      nlohmann::json top = nlohmann::json::array();
      for (int i = 0; i < entry.top_token_ids_size(); ++i) {
        top.push_back({{"token_id", entry.top_token_ids(i)}, {"logprob", entry.top_logprobs(i)}});
      }
      logprobs.push_back(
          {{"token_id", entry.token_id()}, {"logprob", entry.logprob()}, {"top", top}});
    }
    if (response.has_finish()) finish = response.finish();
  }
};

std::string ReasonName(v1::FinishReason reason) {
  return v1::FinishReason_Name(reason).substr(sizeof("FINISH_REASON_") - 1);
}

double TokensPerSecond(const v1::Finish& finish) {
  const double seconds = finish.timings().decode();
  return seconds > 0 ? static_cast<double>(finish.usage().tokens_generated() - 1) / seconds : 0;
}

nlohmann::json ToJson(const Answer& answer, bool with_logprobs) {
  const v1::Finish& finish = answer.finish;
  const v1::Timings& timings = finish.timings();
  nlohmann::json json = {{"token_ids", answer.token_ids},
                         {"text", answer.text},
                         {"finish_reason", ReasonName(finish.reason())},
                         {"seed", finish.seed()},
                         {"usage",
                          {{"tokens_restored", finish.usage().tokens_restored()},
                           {"tokens_prefilled", finish.usage().tokens_prefilled()},
                           {"tokens_generated", finish.usage().tokens_generated()}}},
                         {"timings",
                          {{"queue_seconds", timings.queue()},
                           {"prefill_seconds", timings.prefill()},
                           {"decode_seconds", timings.decode()},
                           {"time_to_first_token_seconds", timings.time_to_first_token()},
                           {"total_seconds", timings.total()},
                           {"tokens_per_second", TokensPerSecond(finish)}}}};
  if (!finish.session_id().empty()) {
    json["session_id"] = finish.session_id();
    json["session_position"] = finish.session_position();
  }
  if (!finish.stop_sequence().empty()) json["stop_sequence"] = finish.stop_sequence();
  if (with_logprobs) json["logprobs"] = answer.logprobs;
  return json;
}

void PrintSummary(const v1::Finish& finish) {
  char line[256];
  std::snprintf(line, sizeof(line),
                "[%s: %lld prompt + %lld new tokens, first after %.1f ms, %.0f tokens/s]",
                ReasonName(finish.reason()).c_str(),
                static_cast<long long>(finish.usage().tokens_prefilled()),
                static_cast<long long>(finish.usage().tokens_generated()),
                finish.timings().time_to_first_token() * 1e3, TokensPerSecond(finish));
  std::cerr << Styled(STDERR_FILENO, Style::kFaint, line) << std::endl;
}

}  // namespace

int GenerateCommand(const std::vector<std::string>& arguments) {
  Common common;
  SamplingFlags sampling;
  std::optional<std::string> prompt, prompt_ids, prompt_file;
  std::optional<int32_t> max_new_tokens, logprobs;
  std::optional<int64_t> expected_position;
  std::string session;
  std::vector<std::string> stop;
  std::optional<std::string> stop_token_ids;
  bool ignore_eos = false, echo = false;
  Args args;
  args.Add("prompt", &prompt, "the text to continue");
  args.Add("prompt-ids", &prompt_ids, "token ids instead, as 1,2,3");
  args.Add("prompt-file", &prompt_file, "a file instead; -: standard input");
  args.Add("max-new-tokens", &max_new_tokens, "at most so many (default 256)");
  sampling.AddTo(&args);
  args.Add("stop", &stop, "end before this text");
  args.Add("stop-token-ids", &stop_token_ids, "end after one of these, as 1,2,3");
  args.Add("ignore-eos", &ignore_eos, "go on after the end token");
  args.Add("logprobs", &logprobs, "log probabilities of the chosen and the n likeliest tokens");
  args.Add("session", &session, "continue this session");
  args.Add("expected-position", &expected_position, "refuse if the session is elsewhere");
  args.Add("echo", &echo, "print the prompt before its continuation");
  AddCommon(&args, &common);
  std::vector<std::string> words;
  if (std::string error = args.Parse(arguments, &words); !error.empty()) return UsageError(error);
  if (common.help) {
    std::cout << "gla generate: continue a text, streamed\n" << args.Help();
    return kExitOk;
  }
  if (!words.empty()) return UsageError("generate: unexpected \"" + words[0] + "\"");
  if (prompt.has_value() + prompt_ids.has_value() + prompt_file.has_value() != 1) {
    return UsageError("generate: expected one of --prompt, --prompt-ids, --prompt-file");
  }

  v1::GenerateRequest request;
  if (prompt_ids) {
    const auto ids = ParseIds(*prompt_ids);
    if (!ids) return UsageError("--prompt-ids: expected ids as 1,2,3, got \"" + *prompt_ids + "\"");
    request.mutable_token_ids()->mutable_ids()->Add(ids->begin(), ids->end());
  } else {
    std::string text, error;
    if (prompt) text = *prompt;
    if (prompt_file && !ReadFile(*prompt_file, &text, &error)) return UsageError(error);
    request.set_text(text);
  }
  if (stop_token_ids) {
    const auto ids = ParseIds(*stop_token_ids);
    if (!ids) {
      return UsageError("--stop-token-ids: expected ids as 1,2,3, got \"" + *stop_token_ids + "\"");
    }
    request.mutable_stop_token_ids()->Add(ids->begin(), ids->end());
  }
  if (std::string error = sampling.Fill(request.mutable_sampling()); !error.empty()) {
    return UsageError(error);
  }
  if (max_new_tokens) request.set_max_new_tokens(*max_new_tokens);
  if (logprobs) request.set_logprobs(*logprobs);
  if (expected_position) request.set_expected_position(*expected_position);
  for (const std::string& text : stop) request.add_stop(text);
  request.set_session_id(session);
  request.set_ignore_eos(ignore_eos);
  request.set_report_prefill(IsTerminal(STDERR_FILENO));

  Client client(common.target);
  Answer answer;
  ProgressBar bar("prompt");
  if (echo && !common.json) std::cout << request.text() << std::flush;
  const grpc::Status status = client.Generate(request,
                                              [&](const v1::GenerateResponse& response) {
                                                if (response.has_prefill()) {
                                                  bar.Update(response.prefill().tokens_done(),
                                                             response.prefill().tokens_total());
                                                  return;
                                                }
                                                bar.Clear();
                                                answer.Add(response);
                                                if (!common.json)
                                                  std::cout << response.text() << std::flush;
                                              },
                                              {common.timeout, InterruptibleCall()});
  bar.Clear();
  if (!common.json && !answer.text.empty()) std::cout << std::endl;
  if (!status.ok()) return Report(status, common);
  if (common.json) {
    std::cout << Dump(ToJson(answer, logprobs.has_value())) << std::endl;
  } else {
    PrintSummary(answer.finish);
  }
  return kExitOk;
}

int ChatCommand(const std::vector<std::string>& arguments) {
  Common common;
  SamplingFlags sampling;
  std::optional<int32_t> max_new_tokens;
  std::string session, form = "{}\n";
  std::vector<std::string> stop;
  Args args;
  args.Add("session", &session,
           "resume this session and keep it; default: a new one for this chat");
  args.Add("format", &form, "what is sent for a line; {} is the line (default \"{}\\n\")");
  args.Add("max-new-tokens", &max_new_tokens, "at most so many per turn (default 256)");
  args.Add("stop", &stop, "end a turn before this text");
  sampling.AddTo(&args);
  AddCommon(&args, &common, /*with_timeout=*/false);
  std::vector<std::string> words;
  if (std::string error = args.Parse(arguments, &words); !error.empty()) return UsageError(error);
  if (common.help) {
    std::cout << "gla chat: turn after turn on one session; Ctrl-C ends a turn, Ctrl-D the chat\n"
              << args.Help();
    return kExitOk;
  }
  if (!words.empty()) return UsageError("chat: unexpected \"" + words[0] + "\"");
  const size_t hole = form.find("{}");
  if (hole == std::string::npos)
    return UsageError("--format: expected {} in it, got \"" + form + "\"");

  v1::ConverseOpen open;
  open.set_session_id(session);
  if (std::string error = sampling.Fill(open.mutable_sampling()); !error.empty()) {
    return UsageError(error);
  }
  Client client(common.target);
  std::unique_ptr<Conversation> conversation = client.Converse();
  v1::Session opened;
  if (!conversation->Open(open, &opened)) return Report(conversation->Finish(), common);
  std::cerr << Styled(STDERR_FILENO, Style::kFaint,
                      "[session " + opened.session_id() + " at position " +
                          std::to_string(opened.position()) + "]")
            << std::endl;
  std::string line;
  for (;;) {
    SetInterruptHandler(nullptr);  // at the prompt Ctrl-C leaves
    if (IsTerminal(STDIN_FILENO)) std::cerr << Styled(STDERR_FILENO, Style::kBold, "> ");
    if (!std::getline(std::cin, line)) break;
    v1::ConverseTurn turn;
    turn.set_text(std::string(form).replace(hole, 2, line));
    if (max_new_tokens) turn.set_max_new_tokens(*max_new_tokens);
    for (const std::string& text : stop) turn.add_stop(text);
    SetInterruptHandler([&] { conversation->CancelTurn(); });
    Answer answer;
    const bool alive = conversation->Turn(turn, [&](const v1::GenerateResponse& response) {
      answer.Add(response);
      if (!common.json) std::cout << response.text() << std::flush;
    });
    SetInterruptHandler(nullptr);
    if (!alive) return Report(conversation->Finish(), common);
    if (common.json) {
      std::cout << Dump(ToJson(answer, false)) << std::endl;
    } else {
      std::cout << std::endl;
      PrintSummary(answer.finish);
    }
  }
  const grpc::Status status = conversation->Finish();
  return status.ok() ? kExitOk : Report(status, common);
}

}  // namespace gla
