// `gla score` and `gla tokenize`.
#include <cmath>
#include <cstdio>
#include <iostream>

#include "client/command.h"
#include "client/terminal.h"

namespace gla {

int ScoreCommand(const std::vector<std::string>& arguments) {
  Common common;
  std::optional<std::string> file, ids_text, text;
  int64_t window = 2048;
  Args args;
  args.Add("file", &file, "score this file; -: standard input");
  args.Add("window", &window, "predicted tokens per window, each from an empty state");
  args.Add("ids", &ids_text, "score token ids, as 1,2,3");
  args.Add("text", &text, "score this text");
  AddCommon(&args, &common);
  std::vector<std::string> words;
  if (std::string error = args.Parse(arguments, &words); !error.empty()) return UsageError(error);
  if (common.help) {
    std::cout << "gla score: how likely a text is to the model\n" << args.Help();
    return kExitOk;
  }
  if (!words.empty()) return UsageError("score: unexpected \"" + words[0] + "\"");
  if (file.has_value() + ids_text.has_value() + text.has_value() != 1) {
    return UsageError("score: expected one of --file, --text, --ids");
  }
  if (window < 1) {
    return UsageError("--window: expected at least 1, got " + std::to_string(window));
  }
  Client client(common.target);
  Call* call = InterruptibleCall();
  const CallOptions options{common.timeout, call};

  std::string contents;
  std::vector<int32_t> ids;
  if (ids_text) {
    const auto parsed = ParseIds(*ids_text);
    if (!parsed) return UsageError("--ids: expected ids as 1,2,3, got \"" + *ids_text + "\"");
    ids = *parsed;
    window = static_cast<int64_t>(ids.size());
  } else {
    std::string error;
    if (text) contents = *text;
    if (file && !ReadFile(*file, &contents, &error)) return UsageError(error);
    v1::TokenizeRequest request;
    request.set_text(contents);
    request.set_omit_pieces(true);
    v1::TokenizeResponse response;
    if (grpc::Status status = client.Tokenize(request, &response, options); !status.ok()) {
      return Report(status, common);
    }
    ids.assign(response.token_ids().begin(), response.token_ids().end());
  }

  // Window i scores ids[w*i + 1 .. w*i + w] from an empty state that is fed ids[w*i ..].
  std::vector<float> logprobs;
  const int64_t count = static_cast<int64_t>(ids.size()) - 1;
  ProgressBar bar("score");
  for (int64_t begin = 0; begin < std::max<int64_t>(count, 1); begin += window) {
    const int64_t end = std::min(begin + window + 1, static_cast<int64_t>(ids.size()));
    v1::ScoreRequest request;
    request.mutable_token_ids()->mutable_ids()->Add(ids.begin() + begin, ids.begin() + end);
    v1::ScoreResponse response;
    if (grpc::Status status = client.Score(request, &response, options); !status.ok()) {
      bar.Clear();
      return Report(status, common);
    }
    logprobs.insert(logprobs.end(), response.logprobs().begin(), response.logprobs().end());
    bar.Update(static_cast<int64_t>(logprobs.size()), count);
  }
  bar.Clear();
  double nats = 0;
  for (const float logprob : logprobs) nats -= logprob;
  nlohmann::json json = {{"tokens", logprobs.size()},
                         {"nats_per_token", nats / static_cast<double>(logprobs.size())}};
  if (ids_text) {
    json["logprobs"] = logprobs;
    json["total_logprob"] = -nats;
  } else {
    json["bits_per_byte"] = nats / std::log(2.0) / static_cast<double>(contents.size());
  }
  if (common.json) {
    std::cout << Dump(json) << std::endl;
    return kExitOk;
  }
  std::printf("tokens          %zu\nnats per token  %.6f\nperplexity      %.4f\n", logprobs.size(),
              nats / static_cast<double>(logprobs.size()),
              std::exp(nats / static_cast<double>(logprobs.size())));
  if (!ids_text) std::printf("bits per byte   %.6f\n", json["bits_per_byte"].get<double>());
  return kExitOk;
}

int TokenizeCommand(const std::vector<std::string>& arguments) {
  Common common;
  std::optional<std::string> file, ids_text;
  bool no_special = false;
  Args args;
  args.Add("file", &file, "tokenize this file; -: standard input");
  args.Add("ids", &ids_text, "the other way: the text of token ids, as 1,2,3");
  args.Add("no-special", &no_special, "no begin and end tokens; with --ids: keep special tokens");
  AddCommon(&args, &common);
  std::vector<std::string> words;
  if (std::string error = args.Parse(arguments, &words); !error.empty()) return UsageError(error);
  if (common.help) {
    std::cout << "gla tokenize TEXT: the tokens of a text, or the text of tokens\n" << args.Help();
    return kExitOk;
  }
  if (words.size() > 1) return UsageError("tokenize: unexpected \"" + words[1] + "\"");
  if (static_cast<int>(words.size()) + file.has_value() + ids_text.has_value() != 1) {
    return UsageError("tokenize: expected one of TEXT, --file, --ids");
  }
  Client client(common.target);
  const CallOptions options{common.timeout, InterruptibleCall()};
  if (ids_text) {
    const auto ids = ParseIds(*ids_text);
    if (!ids) return UsageError("--ids: expected ids as 1,2,3, got \"" + *ids_text + "\"");
    v1::DetokenizeRequest request;
    request.mutable_token_ids()->Add(ids->begin(), ids->end());
    request.set_skip_special_tokens(!no_special);
    v1::DetokenizeResponse response;
    const grpc::Status status = client.Detokenize(request, &response, options);
    if (!status.ok()) return Report(status, common);
    std::cout << (common.json ? Dump({{"text", response.text()}}) : response.text()) << std::endl;
    return kExitOk;
  }
  std::string text, error;
  if (!words.empty()) text = words[0];
  if (file && !ReadFile(*file, &text, &error)) return UsageError(error);
  v1::TokenizeRequest request;
  request.set_text(text);
  request.set_add_special_tokens(!no_special);
  v1::TokenizeResponse response;
  const grpc::Status status = client.Tokenize(request, &response, options);
  if (!status.ok()) return Report(status, common);
  if (common.json) {
    nlohmann::json pieces = nlohmann::json::array();
    for (const std::string& piece : response.pieces()) pieces.push_back(piece);
    std::vector<int32_t> ids(response.token_ids().begin(), response.token_ids().end());
    std::cout << Dump({{"token_ids", ids}, {"pieces", pieces}}) << std::endl;
    return kExitOk;
  }
  for (int i = 0; i < response.token_ids_size(); ++i) {
    std::cout << response.token_ids(i) << "\t" << response.pieces(i) << "\n";
  }
  std::cout << std::flush;
  return kExitOk;
}

}  // namespace gla
