// Shared by all sources but the kernels: hashes of ids, errors, prefetch.
#pragma once
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "bits.h"

namespace grzoo {

struct InvalidArgument : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct OutOfMemory : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The hash of the index. Not the hash of ownership: a rank owns a range of that one, which would leave slots empty.
inline uint64_t key_hash(int32_t table, int64_t id) {
    return mix64(static_cast<uint64_t>(id) + 0xA24BAED4963EE407ull * (static_cast<uint64_t>(static_cast<uint32_t>(table)) + 1));
}

// As `bucket` in embeddings/hashing.py: who owns an id, and the order of files.
constexpr int kBuckets = 1 << 16;
inline uint32_t bucket_of(int64_t id) { return static_cast<uint32_t>(mix64(static_cast<uint64_t>(id) + 0x5851F42D4C957F2Dull) >> 48); }

GRZOO_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }
GRZOO_INLINE void prefetch_write(const void* address) { __builtin_prefetch(address, 1, 3); }

}  // namespace grzoo
