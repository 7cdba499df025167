// Central finite differences in double: the judge of every gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <vector>

namespace gla {

// The gradient of loss(x), each element of x by itself. `loss` sees x changed and then restored.
inline std::vector<double> FiniteDifferences(std::vector<double>& x,
                                             const std::function<double()>& loss) {
  std::vector<double> gradient(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double value = x[i], step = 1e-5 * std::max(1.0, std::abs(value));
    x[i] = value + step;
    const double above = loss();
    x[i] = value - step;
    const double below = loss();
    x[i] = value;
    gradient[i] = (above - below) / (2 * step);
  }
  return gradient;
}

inline double InnerProduct(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace gla
