#include "model/tokenizer/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstdint>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/strict_json.h"

namespace gla {
namespace {

constexpr size_t kMaxPattern = 8192;
constexpr uint32_t kMaxHeapKilobytes = 64 * 1024;
// Steps per byte of text that published patterns take: 15 on the hardest texts.
constexpr uint64_t kStepsPerByte = 100;
constexpr uint64_t kMinSteps = 1'000'000;

// Sets that the dialect means by \s and \w: Unicode's white space (PCRE2's own \s takes U+180E
// too), and words with marks (which PCRE2's own \w leaves out).
constexpr std::string_view kSpace =
    "\\x{9}-\\x{D}\\x{20}\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}"
    "\\x{205F}\\x{3000}";
constexpr std::string_view kWord = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}";

absl::Status PatternError(std::string_view pattern, std::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat("pattern ", QuoteForMessage(pattern), ": ", std::string(what)));
}

// What stands for `escape`, a backslash and a character: text, or nothing when both dialects read
// it the same way. `in_set`: inside of [].
std::string EscapeForPcre(char escape, bool in_set) {
  const auto set = [](std::string_view open, std::string_view members) {
    return absl::StrCat(std::string(open), std::string(members), "]");
  };
  switch (escape) {
    case 's':
      return in_set ? std::string(kSpace) : set("[", kSpace);
    case 'w':
      return in_set ? std::string(kWord) : set("[", kWord);
    case 'S':
      return set("[^", kSpace);
    case 'W':
      return set("[^", kWord);
    case 'b': {  // in a set, a backspace
      const std::string word = set("[", kWord);
      return in_set
                 ? ""
                 : absl::StrCat("(?:(?<=", word, ")(?!", word, ")|(?<!", word, ")(?=", word, "))");
    }
    default:
      return "";
  }
}

// The pattern as PCRE2 has to read it, or an error for what the two dialects read differently.
absl::StatusOr<std::string> Translate(std::string_view pattern) {
  std::string out;
  bool in_set = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const std::string_view rest = pattern.substr(i);
    const char c = pattern[i];
    if (c == '\\' && rest.size() > 1) {
      const char escape = rest[1];
      const bool has_braces = rest.size() > 2 && rest[2] == '{';
      ++i;
      if (std::string_view("BCEGHKNOQRVXYZghkvyz").find(escape) != std::string_view::npos ||
          (in_set && (escape == 'S' || escape == 'W'))) {
        return PatternError(
            pattern, absl::StrCat("\\", std::string(1, escape), in_set ? " in a set is" : " is",
                                  " not supported"));
      }
      if (std::string_view("pPx").find(escape) != std::string_view::npos && has_braces) {
        const size_t end = rest.find('}');
        if (end == rest.npos) return PatternError(pattern, "expected \"}\"");
        std::string_view name = rest.substr(3, end - 3);
        absl::StrAppend(&out, "\\", std::string(1, escape), "{");
        if (name.starts_with('^')) {
          out.push_back('^');
          name.remove_prefix(1);
        }
        // Longer names than a category's are scripts; by itself PCRE2 takes their extensions too.
        if (escape != 'x' && name.size() > 2) out += "sc:";
        absl::StrAppend(&out, std::string(name), "}");
        i += end - 1;
        continue;
      }
      const std::string replacement = EscapeForPcre(escape, in_set);
      out += replacement.empty() ? std::string(rest.substr(0, 2)) : replacement;
      continue;
    }
    if (in_set && c == '[') return PatternError(pattern, "a set inside a set is not supported");
    if (in_set && rest.starts_with("&&")) {
      return PatternError(pattern, "an intersection of sets is not supported");
    }
    if (!in_set && rest.starts_with("}+")) {
      return PatternError(pattern, "\"}+\" is not supported");
    }
    out.push_back(c);
    if (!in_set && c == '[') {
      in_set = true;
      // A ']' that comes first stands for itself.
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out.push_back(pattern[++i]);
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') out.push_back(pattern[++i]);
    } else if (c == ']') {
      in_set = false;
    }
  }
  return out;
}

struct Freed {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
  void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
};

// Counts the work: PCRE2 reports before every item of the pattern, and the distance to the last
// report is what the item between walked over. (Its own limit counts items but not distance, and
// starts again at every character.)
struct Meter {
  WorkBudget& budget;
  size_t last;
};
int Count(pcre2_callout_block* block, void* data) {
  Meter* meter = static_cast<Meter*>(data);
  const size_t at = block->current_position;
  const uint64_t steps = 1 + (at > meter->last ? at - meter->last : meter->last - at);
  meter->last = at;
  uint64_t& left = meter->budget.steps_left;
  if (steps > left) return PCRE2_ERROR_CALLOUT;
  left -= steps;
  return 0;
}

std::string MessageOf(int error) {
  PCRE2_UCHAR buffer[256] = {};
  pcre2_get_error_message(error, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

size_t NextBegin(std::string_view text, size_t at) {
  do {
    ++at;
  } while (at < text.size() && (text[at] & 0xC0) == 0x80);
  return at;
}

}  // namespace

std::vector<Range> FindLiteral(std::string_view text, std::string_view literal) {
  std::vector<Range> ranges;
  for (size_t at = text.find(literal); at != text.npos; at = text.find(literal, at)) {
    ranges.push_back({at, at + literal.size()});
    at += literal.size();
  }
  return ranges;
}

WorkBudget::WorkBudget(size_t text_bytes) : steps_left(kMinSteps + kStepsPerByte * text_bytes) {}

struct Regex::Impl {
  std::string literal;                      // if not empty, what is looked for
  std::unique_ptr<pcre2_code, Freed> code;  // else this
};

Regex::Regex(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

Regex Regex::Literal(std::string_view text) {
  auto impl = std::make_unique<Impl>();
  impl->literal = text;
  return Regex(std::move(impl));
}

absl::StatusOr<Regex> Regex::Compile(std::string_view pattern) {
  if (pattern.empty() || pattern.size() > kMaxPattern) {
    return absl::InvalidArgumentError(
        absl::StrCat("pattern: expected 1 to ", kMaxPattern, " bytes, got ", pattern.size()));
  }
  GLA_ASSIGN_OR_RETURN(const std::string translated, Translate(pattern));
  const std::unique_ptr<pcre2_compile_context, Freed> context(
      pcre2_compile_context_create(nullptr));
  if (context == nullptr) abort();
  pcre2_set_parens_nest_limit(context.get(), 50);
  int error;
  size_t at;
  auto impl = std::make_unique<Impl>();
  impl->code.reset(pcre2_compile(
      reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | PCRE2_AUTO_CALLOUT,
      &error, &at, context.get()));
  if (impl->code == nullptr) return PatternError(pattern, MessageOf(error));
  return Regex(std::move(impl));
}

absl::StatusOr<std::vector<Range>> Regex::FindAll(std::string_view text, WorkBudget& budget) const {
  if (!impl_->literal.empty()) return FindLiteral(text, impl_->literal);
  const pcre2_code* code = impl_->code.get();
  const std::unique_ptr<pcre2_match_data, Freed> data(
      pcre2_match_data_create_from_pattern(code, nullptr));
  const std::unique_ptr<pcre2_match_context, Freed> context(pcre2_match_context_create(nullptr));
  if (data == nullptr || context == nullptr) abort();
  Meter meter{budget, 0};
  pcre2_set_callout(context.get(), Count, &meter);
  pcre2_set_match_limit(context.get(), UINT32_MAX);
  pcre2_set_depth_limit(context.get(), UINT32_MAX);
  pcre2_set_heap_limit(context.get(), kMaxHeapKilobytes);

  std::vector<Range> ranges;
  for (size_t at = 0; at <= text.size();) {
    meter.last = at;
    const int result = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                   PCRE2_NO_UTF_CHECK, data.get(), context.get());
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("text: too hard for the tokenizer's pattern (", MessageOf(result), ")"));
    }
    const PCRE2_SIZE* found = pcre2_get_ovector_pointer(data.get());
    const Range range{found[0], found[1]};
    const bool is_empty = range.begin >= range.end;  // \K could put the begin behind the end
    if (is_empty && !ranges.empty() && ranges.back().end == range.end) {
      at = NextBegin(text, at);
      continue;
    }
    ranges.push_back(range);
    at = range.end;
  }
  return ranges;
}

}  // namespace gla
