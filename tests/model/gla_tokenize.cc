// Runs a folder's tokenizer on texts, so that others can be compared with it.
//
//   gla-tokenize DIR < requests > answers
//
// One JSON object a line. {"text": BASE64, "add_special": bool, "parse_special": bool} is answered
// with {"ids": [..], "decoded": BASE64, "seconds": S}; {"ids": [..], "skip_special": bool} with
// {"decoded": BASE64}; and {} with what the tokenizer says of itself. Errors are {"error":
// MESSAGE}. Decoding is done token by token as well, and both ways must give the same.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/escaping.h"
#include "model/tokenizer.h"

namespace {

using nlohmann::json;

std::string Streamed(const gla::Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                     bool skip_special) {
  gla::StreamDecoder decoder(tokenizer, /*at_start=*/true, skip_special);
  std::string text;
  for (const int32_t id : ids) text += decoder.Add(id);
  return text + decoder.Finish();
}

json Error(const absl::Status& status) { return {{"error", std::string(status.message())}}; }

json Decoded(const gla::Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip_special) {
  const absl::StatusOr<std::string> text = tokenizer.Decode(ids, skip_special);
  if (!text.ok()) return Error(text.status());
  if (Streamed(tokenizer, ids, skip_special) != *text) return {{"error", "streamed differently"}};
  return {{"decoded", absl::Base64Escape(*text)}};
}

json Answer(const gla::Tokenizer& tokenizer, const json& request) {
  const bool skip_special = request.value("skip_special", false);
  if (request.contains("ids")) {
    return Decoded(tokenizer, request["ids"].get<std::vector<int32_t>>(), skip_special);
  }
  if (!request.contains("text")) {
    return {{"vocab_size", tokenizer.vocab_size()},
            {"bos", tokenizer.bos_token_id()},
            {"eos", tokenizer.eos_token_id()},
            {"adds_bos", tokenizer.adds_bos()},
            {"adds_eos", tokenizer.adds_eos()}};
  }
  std::string text;
  if (!absl::Base64Unescape(request["text"].get<std::string>(), &text)) {
    return {{"error", "text: expected base64"}};
  }
  const auto start = std::chrono::steady_clock::now();
  const absl::StatusOr<std::vector<int32_t>> ids = tokenizer.Encode(
      text, request.value("add_special", false), request.value("parse_special", true));
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  if (!ids.ok()) return Error(ids.status());
  json answer = Decoded(tokenizer, *ids, skip_special);
  answer["ids"] = *ids;
  answer["seconds"] = time.count();
  return answer;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s DIR < requests > answers\n", argv[0]);
    return 2;
  }
  const auto tokenizer = gla::Tokenizer::Load(argv[1]);
  if (!tokenizer.ok()) {
    fprintf(stderr, "%s\n", std::string(tokenizer.status().message()).c_str());
    return 1;
  }
  std::ios::sync_with_stdio(false);
  std::string line;
  while (std::getline(std::cin, line)) {
    const json request = json::parse(line, nullptr, /*allow_exceptions=*/false);
    const json answer =
        request.is_object() ? Answer(**tokenizer, request) : json{{"error", "expected an object"}};
    std::cout << answer.dump() << "\n" << std::flush;
  }
  return 0;
}
