// y[t] = table[tokens[t]], as float32.
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

}  // namespace gla
