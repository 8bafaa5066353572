// What the kernels share with the rest. No standard library here, and every function inlined by force: of one that is
// not, the linker could keep the copy for a wide instruction set for all.
#pragma once
#include <stdint.h>

// Also for what only prefetches: gcc takes a call of such a function for one without effect and drops it.
#define GRZOO_INLINE inline __attribute__((always_inline))

namespace grzoo {

GRZOO_INLINE uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

}  // namespace grzoo
