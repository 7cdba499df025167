#include "model/tokenizer/metaspace.h"

#include "absl/strings/str_replace.h"
#include "model/tokenizer/json_steps.h"
#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to) {
  return absl::StrReplaceAll({text.data(), text.size()},
                             {{{from.data(), from.size()}, {to.data(), to.size()}}});
}

}  // namespace

std::string Metaspace::Replace(std::string_view piece, bool at_start) const {
  std::string text = ReplaceAll(piece, " ", replacement);
  const bool wanted = prepend == Prepend::kAlways || (prepend == Prepend::kFirst && at_start);
  if (wanted && !text.starts_with(replacement)) text.insert(0, replacement);
  return text;
}

std::string Metaspace::Restore(std::string_view token, bool at_start) const {
  return ReplaceAll(token, replacement, at_start && prepend != Prepend::kNever ? "" : " ");
}

Metaspace TakeMetaspace(ConfigReader& step) {
  Metaspace metaspace;
  metaspace.replacement = TakeText(step, "replacement", 1);
  size_t length = 0;
  if (!metaspace.replacement.empty()) NextCharacter(metaspace.replacement, &length);
  if (length != metaspace.replacement.size()) step.Fail("replacement", "one character");
  step.Take("str_rep");  // old files: the same character once more
  metaspace.split = step.Bool("split", true);
  const bool old_prepend = step.Bool("add_prefix_space", true);
  if (step.IsAbsentOrNull("prepend_scheme")) {
    metaspace.prepend = old_prepend ? Metaspace::Prepend::kAlways : Metaspace::Prepend::kNever;
    return metaspace;
  }
  const std::string scheme = TakeText(step, "prepend_scheme");
  if (scheme == "never") {
    metaspace.prepend = Metaspace::Prepend::kNever;
  } else if (scheme == "first") {
    metaspace.prepend = Metaspace::Prepend::kFirst;
  } else if (scheme != "always") {
    step.Fail("prepend_scheme", "always, first or never");
  }
  if (!old_prepend && metaspace.prepend != Metaspace::Prepend::kNever) {
    step.Fail("prepend_scheme", "never (add_prefix_space is false)");
  }
  return metaspace;
}

}  // namespace gla
