// y[r] = x[rows[r]].
#include <cstring>

#include "kernels/cpu/common.h"
#include "kernels/kernels.h"

namespace gla {

void GatherRows(Device& device, const GatherRowsArgs& a) {
  const size_t dim = a.dim;
  ParallelFor(device, a.num_rows, a.dim * kCopyNs, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::memcpy(a.y + r * dim, a.x + static_cast<size_t>(a.rows[r]) * dim, dim * sizeof(float));
    }
  });
}

}  // namespace gla
