// Turns the named weights of a source into device memory.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kernels.h"
#include "model/weight_source.h"

namespace gla {

class WeightLoader {
 public:
  // `act` is the activations' type: bfloat16 ones want bfloat16 weights.
  WeightLoader(Device& device, DType act, WeightSource& source)
      : device_(device), act_(act), source_(source) {}

  bool Lists(const std::string& name) const { return source_.Lists(name); }

  // Two names of one weight.
  absl::Status CheckSame(const std::string& a, const std::string& b,
                         const std::vector<int64_t>& shape);

  struct Block {
    std::string name;
    int64_t rows;  // in the source; 0: the block is absent
    // Each run of `head_rows` rows is stacked so many times, one for each query head that reads it.
    int repeats = 1;
    int64_t head_rows = 0;
  };
  // The blocks [rows, cols], stacked along the rows.
  absl::StatusOr<PackedWeight> Matrix(const std::vector<Block>& blocks, int64_t cols);
  // The same for y = x W^T, and its transpose for the gradient of x.
  struct Pair {
    PackedWeight forward, transposed;
  };
  absl::StatusOr<Pair> MatrixPair(const std::vector<Block>& blocks, int64_t cols);

  // The weights of `shape` (the same for all but the first dimension) one after another, float32.
  absl::StatusOr<DeviceBuffer> Floats(
      const std::vector<std::pair<std::string, std::vector<int64_t>>>& blocks);
  // As a matrix's block whose rows are of `shape` but for the first dimension; values in host
  // memory.
  absl::StatusOr<std::vector<float>> HostFloats(const Block& block,
                                                const std::vector<int64_t>& shape);
  absl::StatusOr<DeviceBuffer> Vector(const std::string& name, int64_t size) {
    return Floats({{name, {size}}});
  }

  // A table that rows are copied from; row-major, of the type in `*dtype` on return.
  absl::StatusOr<DeviceBuffer> Table(const std::string& name, int64_t rows, int64_t cols,
                                     DType* dtype);

  absl::StatusOr<DeviceBuffer> Upload(const std::string& name, const void* data, size_t bytes);
  absl::StatusOr<DeviceBuffer> Upload(const std::string& name, const std::vector<float>& values) {
    return Upload(name, values.data(), values.size() * sizeof(float));
  }

 private:
  // Blocks in host memory; `matrices` view `parts`.
  struct Stack {
    std::vector<HostWeight> parts;
    std::vector<HostMatrix> matrices;
    DType dtype;  // to pack as
  };
  absl::StatusOr<Stack> Read(const std::vector<Block>& blocks, int64_t cols);
  absl::StatusOr<PackedWeight> Pack(const std::string& name,
                                    const std::vector<HostMatrix>& matrices, DType dtype);
  absl::Status OutOfMemory(const std::string& name, size_t bytes) const;

  Device& device_;
  DType act_;
  WeightSource& source_;
};

}  // namespace gla
