// Rows of a tensor packed for the products of tiles. Included once per instruction set, after simd.h.

GRZOO_INLINE int64_t vectors_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

// rows [count, width] -> [count, padded width], padding zero
inline void pack_rows(const float* from, int64_t from_row, int64_t count, int64_t width, float* to, int64_t to_row) {
    for (int64_t r = 0; r < count; ++r) {
        memcpy(to + r * to_row, from + r * from_row, width * sizeof(float));
        for (int64_t c = width; c < to_row; ++c) to[r * to_row + c] = 0.0f;
    }
}

// rows [count <= kTile, width] -> [width, kTile], padding zero
inline void pack_columns(const float* from, int64_t from_row, int64_t count, int64_t width, float* to) {
    int64_t padded = round_up(count, kLanes);
    for (int64_t c = 0; c < width; ++c)
        for (int64_t r = count; r < padded; ++r) to[c * kTile + r] = 0.0f;
    for (int64_t c = 0; c < width; c += kLanes) {   // a cache line of each row at a time
        int64_t end = std::min<int64_t>(width, c + kLanes);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t k = c; k < end; ++k) to[k * kTile + r] = from[r * from_row + k];
    }
}
