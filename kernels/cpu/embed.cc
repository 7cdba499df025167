// y[t] = table[tokens[t]], as float32, and which tokens those are.
#include <algorithm>

#include "kernels/cpu/common.h"
#include "kernels/kernels.h"

namespace gla {

void Embed(Device& device, const EmbedArgs& a) {
  const size_t dim = a.dim;
  WithStoredType(a.table_dtype, [&]<typename T>() {
    const T* table = static_cast<const T*>(a.table);
    ParallelFor(device, a.rows, a.dim * kCopyNs, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T* from = table + static_cast<size_t>(a.tokens[t]) * dim;
        for (size_t i = 0; i < dim; ++i) a.y[t * dim + i] = ToFloat(from[i]);
      }
    });
  });
}

void ResolveTokens(Device&, const ResolveTokensArgs& a) {
  for (int t = 0; t < a.rows; ++t) {
    if (a.tokens[t] < 0) a.tokens[t] = std::max(a.sampled[~a.tokens[t]], 0);
  }
}

}  // namespace gla
