// Where a model's weights come from: a checkpoint, or a random generator for benches and tests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/kernels.h"
#include "model/checkpoint.h"

namespace gla {

// One weight in host memory: a view into a mapped file, or values of its own.
struct HostWeight {
  HostMatrix matrix;                // [shape[0], product of the rest]; a vector is one row
  std::vector<uint16_t> generated;  // what `matrix` views when it is no part of a file
};

class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // Whether the source has a list of names with this one in it.
  virtual bool Lists(const std::string& name) const = 0;
  // The weight of exactly this shape, or an error that names it, what was expected and found.
  virtual absl::StatusOr<HostWeight> Get(const std::string& name,
                                         absl::Span<const int64_t> shape) = 0;
};

class CheckpointSource : public WeightSource {
 public:
  explicit CheckpointSource(Checkpoint& checkpoint) : checkpoint_(checkpoint) {}
  bool Lists(const std::string& name) const override { return checkpoint_.Find(name) != nullptr; }
  absl::StatusOr<HostWeight> Get(const std::string& name, absl::Span<const int64_t> shape) override;

 private:
  Checkpoint& checkpoint_;
};

// bfloat16 values that depend on the seed, the name and the index alone: matrices uniform with
// variance 1 / columns, vectors of scale near 1, biases near 0. Makes whatever is asked for.
class RandomWeightSource : public WeightSource {
 public:
  explicit RandomWeightSource(uint64_t seed) : seed_(seed) {}
  bool Lists(const std::string&) const override { return false; }
  absl::StatusOr<HostWeight> Get(const std::string& name, absl::Span<const int64_t> shape) override;

 private:
  uint64_t seed_;
};

// The values as `dtype` (float32 or bfloat16, rounded to nearest even), row-major.
std::vector<uint8_t> ConvertWeight(const HostMatrix& matrix, DType dtype);

}  // namespace gla
