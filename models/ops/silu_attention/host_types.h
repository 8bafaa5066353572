// What the instruction-set independent part of the silu attention hands to the kernels.
#pragma once
#include <stdint.h>

#include "../host/tiles.h"

namespace grzoo {

// Times as ranks among the key times of the sequence: query i sees key j if rank[j] < end[i] and (rank[j] >= begin[i] or rank[j] < 0).
struct Ranks {
    const int32_t *begin, *end;   // [T]
    const int32_t* rank;          // [T + kTile]; -1: seen whatever the distance
};

struct SiluAttention {
    int64_t heads, key_width, value_width;
    float scale;
    View query, key, value, grad_out;
    const float* inverse;                              // [T], 1 / divisor
    Ranks ranks;
    float *out, *grad_query, *grad_key, *grad_value;   // [T, heads, width]
};

// A range of one sequence: queries [begin, end) forward, keys [begin, end) backward; multiples of kTile or the length.
struct SiluUnit {
    int64_t token, length, begin, end;
    float* query_partial;   // backward, begin > 0: [length, heads, key_width], else null
};

int64_t silu_forward_scratch(const SiluAttention& shape, const SiluUnit& unit);
int64_t silu_backward_scratch(const SiluAttention& shape, const SiluUnit& unit);

}  // namespace grzoo
