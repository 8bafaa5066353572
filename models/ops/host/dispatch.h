// One kernel source for several instruction sets: a file that names itself in GRZOO_KERNEL is included in a namespace each.
//   #define GRZOO_KERNEL "kernel.h"
//   #include "dispatch.h"
// gives baseline::f and, on x86-64, avx2::f for each function f of the file; GRZOO_CALL(f) picks by the processor at run time.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define GRZOO_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define GRZOO_LAMBDA
#else
#define GRZOO_LAMBDA __attribute__((always_inline))
#endif
#define EXPORT __attribute__((visibility("default")))

namespace grzoo {
namespace baseline {
#include "simd.h"
#include "product.h"
#include "pack.h"
#include GRZOO_KERNEL
}  // namespace baseline

#if defined(__x86_64__)
#define GRZOO_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "simd.h"
#include "product.h"
#include "pack.h"
#include GRZOO_KERNEL
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef GRZOO_AVX2
#endif

// 0: what every processor of this kind has; 1: AVX2 and FMA.
inline int instruction_set() {
#if defined(__x86_64__)
    static const int found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return found;
#else
    return 0;
#endif
}

#if defined(__x86_64__)
#define GRZOO_CALL(level, function, ...) ((level) > 0 ? avx2::function(__VA_ARGS__) : baseline::function(__VA_ARGS__))
#else
#define GRZOO_CALL(level, function, ...) baseline::function(__VA_ARGS__)
#endif

}  // namespace grzoo
