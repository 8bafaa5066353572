// Keyed dropout on the host: the mask is computed where it is needed, forward and backward, and never stored.
#include <stdint.h>

#include <algorithm>
#include <new>
#include <vector>

#include "../host/parallel.h"

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull, kSalt = 0x632BE59BD9B4E019ull;
constexpr int64_t kRows = 512;   // of a task

inline uint64_t mix_upper_bits(uint64_t z) {   // mix64 without its last step, which leaves the upper 24 bits alone
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    return (z ^ (z >> 27)) * 0x94D049BB133111EBull;
}

uint64_t mix64(uint64_t z) {
    z = mix_upper_bits(z);
    return z ^ (z >> 31);
}

}  // namespace

// out[t][c] = fold(row_keys[t], c) >> 40 >= threshold ? x[t][c] * scale : 0; dense [rows, columns]. 1: out of memory.
extern "C" __attribute__((visibility("default"))) int grzoo_keyed_dropout(const float* x, const int64_t* row_keys, int64_t rows,
                                                                          int64_t columns, uint64_t threshold, float scale,
                                                                          float* out, int32_t threads) {
    try {
        std::vector<uint64_t> addends(columns);
        for (int64_t c = 0; c < columns; ++c) addends[c] = mix64(static_cast<uint64_t>(c) + kSalt) + kGolden;
        const uint64_t* addend = addends.data();
        const uint64_t least = threshold << 40;
        return grzoo::parallel_tasks((rows + kRows - 1) / kRows, threads, 0, [=](int64_t task, float*) {
                   for (int64_t t = task * kRows; t < std::min(rows, (task + 1) * kRows); ++t) {
                       const uint64_t key = static_cast<uint64_t>(row_keys[t]);
                       const float* from = x + t * columns;
                       float* to = out + t * columns;
                       for (int64_t c = 0; c < columns; ++c) {
                           float kept = from[c] * scale;
                           to[c] = mix_upper_bits(key + addend[c]) >= least ? kept : 0.0f;
                       }
                   }
               })
                   ? 0
                   : 1;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
