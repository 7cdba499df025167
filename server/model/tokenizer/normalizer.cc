#include "model/tokenizer/normalizer.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/uchar.h>

#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/tokenizer/json_steps.h"
#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

using Form = const icu::Normalizer2* (*)(UErrorCode&);

Form FormOf(std::string_view type) {
  if (type == "NFC") return icu::Normalizer2::getNFCInstance;
  if (type == "NFD") return icu::Normalizer2::getNFDInstance;
  if (type == "NFKC") return icu::Normalizer2::getNFKCInstance;
  if (type == "NFKD") return icu::Normalizer2::getNFKDInstance;
  return nullptr;
}

absl::StatusOr<std::string> NormalizeTo(const icu::Normalizer2* form, const std::string& text) {
  UErrorCode error = U_ZERO_ERROR;
  std::string out;
  icu::StringByteSink<std::string> sink(&out);
  form->normalizeUTF8(0, icu::StringPiece(text.data(), static_cast<int32_t>(text.size())), sink,
                      nullptr, error);
  if (U_FAILURE(error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("text: cannot be normalized: ", u_errorName(error)));
  }
  return out;
}

// Character by character, without regard to what stands beside it.
std::string Lowercase(const std::string& text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const char32_t c = NextCharacter(text, &at);
    if (c == 0x130) {
      out += "i\xCC\x87";  // the only character whose lower case is two
    } else {
      AppendCharacter(u_tolower(c), &out);
    }
  }
  return out;
}

absl::StatusOr<std::string> Replace(const Regex& pattern, const std::string& content,
                                    const std::string& text, WorkBudget& budget) {
  GLA_ASSIGN_OR_RETURN(const std::vector<Range> matches, pattern.FindAll(text, budget));
  std::string out;
  size_t done = 0;
  for (const Range& match : matches) {
    out.append(text, done, match.begin - done);
    out.append(content);
    done = match.end;
  }
  return out.append(text, done);
}

}  // namespace

absl::StatusOr<Normalizer> Normalizer::Parse(const nlohmann::json& value) {
  Normalizer normalizer;
  std::vector<Step>& steps = normalizer.steps_;
  const auto parse = [&steps](const std::string& type, ConfigReader& step) -> absl::Status {
    if (Form form = FormOf(type); form != nullptr) {
      UErrorCode error = U_ZERO_ERROR;
      const icu::Normalizer2* instance = form(error);
      if (U_FAILURE(error)) return absl::InternalError(u_errorName(error));
      steps.push_back(
          [instance](std::string text, WorkBudget&) { return NormalizeTo(instance, text); });
    } else if (type == "Lowercase") {
      steps.push_back([](std::string text, WorkBudget&) { return Lowercase(text); });
    } else if (type == "Prepend") {
      const std::string prefix = TakeText(step, "prepend");
      steps.push_back(
          [prefix](std::string text, WorkBudget&) { return text.empty() ? text : prefix + text; });
    } else if (type == "Replace") {
      GLA_ASSIGN_OR_RETURN(Regex pattern, TakePattern(step, "pattern"));
      const std::string content = TakeText(step, "content");
      auto shared = std::make_shared<const Regex>(std::move(pattern));  // a function is copied
      steps.push_back([shared, content](std::string text, WorkBudget& budget) {
        return Replace(*shared, content, text, budget);
      });
    } else {
      return UnknownStep("Sequence, NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace");
    }
    return absl::OkStatus();
  };
  GLA_RETURN_IF_ERROR(ForEachStep(value, "normalizer", "normalizers", parse));
  return normalizer;
}

absl::StatusOr<std::string> Normalizer::Apply(std::string_view text, WorkBudget& budget) const {
  std::string out(text);
  for (const Step& step : steps_) {
    GLA_ASSIGN_OR_RETURN(out, step(std::move(out), budget));
    GLA_RETURN_IF_ERROR(CheckGrowth(out.size(), text.size()));
  }
  return out;
}

}  // namespace gla
