// How an attention layer says that something does not fit.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/attention.h"

namespace gla {

// Keeps the first thing that does not fit; what is asked after it is not looked at.
class LayerChecker {
 public:
  explicit LayerChecker(AttentionOp op) : op_(op) {}
  const absl::Status& status() const { return status_; }

  template <typename Expected, typename Found>
  void Expect(bool fits, const std::string& what, const Expected& expected, const Found& found) {
    if (!status_.ok() || fits) return;
    status_ = absl::InvalidArgumentError(
        absl::StrCat(NameOf(op_), " layer: ", what, ": expected ", expected, ", found ", found));
  }
  void ExpectEqual(const std::string& what, int64_t expected, int64_t found) {
    Expect(expected == found, what, expected, found);
  }
  void ExpectSize(const std::string& what, int64_t most, int64_t found) {
    Expect(1 <= found && found <= most, what, absl::StrCat("1 to ", most), found);
  }
  // An option that some layers do not have.
  void ExpectOffUnless(bool has_it, const std::string& what, bool found) {
    Expect(has_it || !found, what, "false", "true");
  }

 private:
  AttentionOp op_;
  absl::Status status_;
};

}  // namespace gla
