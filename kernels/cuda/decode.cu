// The CUDA backend's kernels of a decode step.
#include "kernels/cuda/decode_entry.h"

namespace gla {
namespace {

class CudaDecodeKernels : public DecodeKernels {
 public:
  bool Serves(const DecodeProductArgs& args) const override { return ServesDecodeProduct(args); }
  bool Serves(const DecodeAttentionArgs& args) const override {
    return ServesDecodeAttention(args);
  }
  void Embed(Device& device, const DecodeEmbedArgs& args) const override {
    DecodeEmbed(device, args);
  }
  void Product(Device& device, const DecodeProductArgs& args) const override {
    DecodeProduct(device, args);
  }
  void Attention(Device& device, const DecodeAttentionArgs& args) const override {
    DecodeAttention(device, args);
  }
};

}  // namespace

const DecodeKernels* DecodeKernels::Get() {
  static const CudaDecodeKernels kernels;
  return &kernels;
}

}  // namespace gla
