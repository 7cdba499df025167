// finite[t]: is every value of row t finite?
#include <cmath>

#include "kernels/cpu/common.h"
#include "kernels/kernels.h"

namespace gla {

void FiniteRows(Device& device, const FiniteRowsArgs& a) {
  ParallelFor(device, a.rows, a.dim * kCopyNs, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* row = a.x + t * a.dim;
      bool finite = true;  // without a way out of the loop, so that it runs in vectors
      for (int i = 0; i < a.dim; ++i) finite &= std::isfinite(row[i]);
      a.finite[t] = finite ? 1 : 0;
    }
  });
}

}  // namespace gla
