// The workspace of the forward operators, where the kernels take one.
#pragma once

#include <cstddef>

#include "kernels/kernels.h"

namespace gla::bench {

// Bytes that make the form fastest; 0: it has no use for any.
template <typename Args>
size_t ForwardWorkspaceBytes(Device& device, const Args& args, AttentionForm form) {
  if constexpr (requires { ChunkLinearAttentionBytes(device, args); }) {
    if (form == AttentionForm::kChunkwise) return ChunkLinearAttentionBytes(device, args);
  }
  return 0;
}

template <typename Args>
void SetForwardWorkspace(Args& args, void* workspace) {
  if constexpr (requires { args.workspace; }) args.workspace = workspace;
}

}  // namespace gla::bench
