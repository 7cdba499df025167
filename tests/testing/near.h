// How far two arrays are apart, in the measure of flash-linear-attention's own tests.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "gtest/gtest.h"

namespace gla {

// RMS of the difference over RMS of `want`; the difference itself where `want` is all zero.
template <typename A, typename B>
double RmsRatio(const A& got, const B& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = static_cast<double>(got[i]) - static_cast<double>(want[i]);
    difference += d * d;
    norm += static_cast<double>(want[i]) * static_cast<double>(want[i]);
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// EXPECT_TRUE(IsNear(got, want, 1e-4)). NaN is never near.
template <typename A, typename B>
::testing::AssertionResult IsNear(const A& got, const B& want, double tolerance) {
  if (got.size() != want.size()) {
    return ::testing::AssertionFailure()
           << "size: expected " << want.size() << ", got " << got.size();
  }
  const double ratio = RmsRatio(got, want);
  if (ratio <= tolerance) return ::testing::AssertionSuccess();
  size_t worst = 0;
  double largest = -1;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = std::abs(static_cast<double>(got[i]) - static_cast<double>(want[i]));
    if (!(d <= largest)) worst = i, largest = d;
    if (std::isnan(d)) break;
  }
  return ::testing::AssertionFailure()
         << "RMS ratio: expected at most " << tolerance << ", got " << ratio << "; worst at "
         << worst << ": expected " << want[worst] << ", got " << got[worst];
}

// The same bits, NaN included.
template <typename T>
::testing::AssertionResult IsSameBits(const std::vector<T>& got, const std::vector<T>& want) {
  if (got.size() != want.size()) {
    return ::testing::AssertionFailure()
           << "size: expected " << want.size() << ", got " << got.size();
  }
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0) {
      return ::testing::AssertionFailure()
             << "differs first at " << i << ": expected " << want[i] << ", got " << got[i];
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace gla
