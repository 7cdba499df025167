// Which instruction sets the CPU kernels are compiled for: a plain baseline, AVX2, AVX-512 (and
// what other architectures have). Each more costs a compilation of every kernel, so the ones
// between are left out. Included before Highway, by every file that uses it.
#pragma once

// (HWY_AVX3 - 1: every later AVX-512 variant, of whichever version of Highway.)
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | (HWY_AVX3 - 1))
