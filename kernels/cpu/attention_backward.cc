#include <cstdlib>

#include "kernels/kernels.h"

namespace gla {
size_t LinearAttentionBackwardBytes(Device&, const LinearAttentionBackwardArgs&, AttentionForm) {
  std::abort();
}
void RecurrentLinearAttentionBackward(Device&, const LinearAttentionBackwardArgs&) { std::abort(); }
void ChunkLinearAttentionBackward(Device&, const LinearAttentionBackwardArgs&) { std::abort(); }
}  // namespace gla
