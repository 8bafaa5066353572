// What the instruction-set independent part of the HSTU attention hands to the kernels.
#pragma once
#include <stdint.h>

#include "../host/tiles.h"

namespace grzoo {

constexpr int kMaxBuckets = 160;     // 146 are reachable with 64-bit times
constexpr int kCells = 128;          // of the bucket table: exponent and two bits of the mantissa

// Buckets of time differences by integer thresholds: bucket(x) = number of thresholds <= x.
struct TimeBuckets {
    int num_buckets = 0;
    uint64_t thresholds[kMaxBuckets];   // [num_buckets - 1]
    int32_t cells[2 * kCells];          // pairs: bucket at the start of the cell, threshold inside it (or the largest int)
};

struct Attention {
    int64_t heads, key_width, value_width, max_length;
    float scale;
    View query, key, value, grad_out;
    const float* position;        // [max_length + kTile + 8], entry max_length - 1 + d for keys d <= 0 places after the query
    const float* time;            // [num_buckets] or null
    const int64_t *timestamps, *target_timestamps;
    const TimeBuckets* buckets;
    float *out, *grad_query, *grad_key, *grad_value;   // [T, heads, width]
};

// A range of one sequence: queries [begin, end) forward, keys [begin, end) backward; multiples of kTile or the length.
struct Unit {
    int64_t token, length, begin, end;
    float* query_partial;      // backward, begin > 0: [length - begin, heads, key_width], else null
    float* position_partial;   // [length] by distance, or null
    float* time_partial;       // [num_buckets], or null
};

// Floats of scratch that a thread needs for a unit.
int64_t forward_scratch(const Attention& shape, const Unit& unit);
int64_t backward_scratch(const Attention& shape, const Unit& unit);

}  // namespace grzoo
