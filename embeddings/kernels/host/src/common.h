// Shared by all sources: the keyed generator, errors, prefetch.
#pragma once
#include <stdint.h>

#include <stdexcept>
#include <string>

namespace grzoo {

struct InvalidArgument : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct OutOfMemory : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The hash of the index. Not the hash of ownership: a rank owns a range of that one, which would leave slots empty.
inline uint64_t key_hash(int32_t table, int64_t id) {
    return mix64(static_cast<uint64_t>(id) + 0xA24BAED4963EE407ull * (static_cast<uint64_t>(static_cast<uint32_t>(table)) + 1));
}

// As `bucket` in embeddings/hashing.py: who owns an id, and the order of files.
constexpr int kBuckets = 1 << 16;
inline uint32_t bucket_of(int64_t id) { return static_cast<uint32_t>(mix64(static_cast<uint64_t>(id) + 0x5851F42D4C957F2Dull) >> 48); }

// Forced inline, as everything that only prefetches: gcc takes a call of such a function for one without effect.
#define GRZOO_INLINE inline __attribute__((always_inline))
GRZOO_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }
GRZOO_INLINE void prefetch_write(const void* address) { __builtin_prefetch(address, 1, 3); }

}  // namespace grzoo
