// The CPU backend has no kernels of its own for a decode step: those of kernels.h serve it.
#include "kernels/decode.h"

namespace gla {

const DecodeKernels* DecodeKernels::Get() { return nullptr; }

}  // namespace gla
