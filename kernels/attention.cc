#include "kernels/attention.h"

namespace gla {
const char* NameOf(AttentionOp op) {
  constexpr const char* kNames[] = {"linear_attention", "simple_gla", "retention", "gla"};
  return kNames[static_cast<int>(op)];
}
}  // namespace gla
