// Tensors of reference files as host vectors, and the measures they are compared by.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/checkpoint.h"

namespace gla {

// The values of a tensor of this dtype and rank; `shape` receives its shape when not null.
template <typename T>
absl::StatusOr<std::vector<T>> ReadTensor(const Checkpoint& file, const std::string& name,
                                          size_t rank, std::vector<int64_t>* shape = nullptr) {
  const char* dtype = std::is_same_v<T, float> ? "F32" : "I32";
  const TensorView* tensor = file.Find(name);
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, ": not found"));
  }
  if (tensor->dtype_name != dtype || tensor->shape.size() != rank) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, ": expected ", dtype, " of rank ", rank, ", found ",
                     tensor->dtype_name, " [", absl::StrJoin(tensor->shape, ", "), "]"));
  }
  if (shape != nullptr) *shape = tensor->shape;
  std::vector<T> values(tensor->bytes / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), tensor->data, tensor->bytes);
  return values;
}

inline double MaxAbsDifference(const std::vector<float>& got, const std::vector<float>& expected) {
  double max = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(static_cast<double>(got[i]) - expected[i]);
    if (!(difference <= max)) max = difference;  // NaN stays
    if (std::isnan(max)) return max;
  }
  return max;
}

// RMS(got - expected) / RMS(expected)
inline double RmsRatio(const std::vector<float>& got, const std::vector<float>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = static_cast<double>(got[i]) - expected[i];
    difference += d * d;
    norm += static_cast<double>(expected[i]) * expected[i];
  }
  if (difference == 0) return 0;
  return norm == 0 ? std::numeric_limits<double>::infinity() : std::sqrt(difference / norm);
}

}  // namespace gla
