// Early return on an error, for functions that return absl::Status or absl::StatusOr.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define GLA_CONCAT_INNER(a, b) a##b
#define GLA_CONCAT(a, b) GLA_CONCAT_INNER(a, b)

#define GLA_RETURN_IF_ERROR(expr)                                              \
  do {                                                                         \
    if (absl::Status gla_status = (expr); !gla_status.ok()) return gla_status; \
  } while (false)

// GLA_ASSIGN_OR_RETURN(auto x, F()): x is the value of F(), or the enclosing function returns its
// error.
#define GLA_ASSIGN_OR_RETURN(lhs, expr) \
  GLA_ASSIGN_OR_RETURN_INNER(GLA_CONCAT(gla_statusor_, __LINE__), lhs, expr)
#define GLA_ASSIGN_OR_RETURN_INNER(tmp, lhs, expr) \
  auto tmp = (expr);                               \
  if (!tmp.ok()) return tmp.status();              \
  lhs = std::move(tmp).value()
