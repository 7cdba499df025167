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

// Unicode's white space. PCRE2's own \s takes U+180E too, which is none since Unicode 6.3.
constexpr std::string_view kSpaces =
    "\\x{9}-\\x{D}\\x{20}\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}"
    "\\x{205F}\\x{3000}";

absl::Status PatternError(std::string_view pattern, std::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat("pattern ", QuoteForMessage(pattern), ": ", std::string(what)));
}

// The pattern as PCRE2 has to read it, or an error for what the two dialects read differently.
absl::StatusOr<std::string> Translate(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const std::string_view rest = pattern.substr(i);
    const char c = pattern[i];
    if (c == '\\') {
      const char escaped = rest.size() > 1 ? rest[1] : '\0';
      if (escaped == 's') {
        out += in_class ? std::string(kSpaces) : absl::StrCat("[", std::string(kSpaces), "]");
      } else if (escaped == 'S' && !in_class) {
        absl::StrAppend(&out, "[^", std::string(kSpaces), "]");
      } else if (std::string_view("CEGHKNQRXZghkyYzO").find(escaped) != std::string_view::npos) {
        return PatternError(pattern,
                            absl::StrCat("\\", std::string(1, escaped), " is not supported"));
      } else {
        // \p{..} and \x{..} are one thing with what is in the braces.
        const bool takes_braces = std::string_view("pPx").find(escaped) != std::string_view::npos;
        const size_t brace = takes_braces && rest.size() > 2 && rest[2] == '{' ? rest.find('}') : 1;
        if (brace == rest.npos) return PatternError(pattern, "expected \"}\"");
        out.append(rest.substr(0, brace + 1));
        i += brace - 1;
      }
      ++i;
      continue;
    }
    if (in_class && c == '[' && !rest.starts_with("[:")) {
      return PatternError(pattern, "a set inside a set is not supported");
    }
    if (in_class && rest.starts_with("&&")) {
      return PatternError(pattern, "an intersection of sets is not supported");
    }
    if (!in_class && rest.starts_with("}+")) {
      return PatternError(pattern, "\"}+\" is not supported");
    }
    if (in_class && rest.starts_with("[:")) {
      const size_t end = rest.find(":]");
      if (end == rest.npos) return PatternError(pattern, "expected \":]\" after \"[:\"");
      out.append(rest.substr(0, end + 2));
      i += end + 1;
      continue;
    }
    out.push_back(c);
    if (!in_class && c == '[') {
      in_class = true;
      // A ']' that comes first stands for itself.
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out.push_back(pattern[++i]);
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') out.push_back(pattern[++i]);
    } else if (c == ']') {
      in_class = false;
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
