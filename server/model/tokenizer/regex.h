// Regular expressions of tokenizer files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace gla {

// A half-open range of bytes.
struct Range {
  size_t begin, end;
};

// Where `literal`, not empty, stands in the text, from left to right without overlap.
std::vector<Range> FindLiteral(std::string_view text, std::string_view literal);

// What the patterns of a tokenizer may do for one text, all of them together.
struct WorkBudget {
  explicit WorkBudget(size_t text_bytes);
  uint64_t steps_left;
};

// A pattern in the dialect that tokenizer files are written in (Oniguruma's), as far as PCRE2 reads
// it the same way; what it reads differently is refused. Const; any thread may use it.
class Regex {
 public:
  static absl::StatusOr<Regex> Compile(std::string_view pattern);
  // Finds this very text, not empty.
  static Regex Literal(std::string_view text);
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  // The matches from left to right; they do not overlap and none is empty right behind another.
  // InvalidArgument when the budget is used up. REQUIRES: text is valid UTF-8.
  absl::StatusOr<std::vector<Range>> FindAll(std::string_view text, WorkBudget& budget) const;

 private:
  struct Impl;
  explicit Regex(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace gla
