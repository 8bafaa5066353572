// What the attentions share: the size of a tile, and views of packed tokens.
#pragma once
#include <stdint.h>

namespace grzoo {

constexpr int64_t kTile = 48;   // queries and keys of a tile

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// [T, heads, width] with its strides in elements; the last dimension is dense.
struct View {
    const float* data;
    int64_t token, head;
    const float* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

}  // namespace grzoo
