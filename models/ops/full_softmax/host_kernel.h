// Softmax of rows without its division. Included once per instruction set, after simd.h.

GRZOO_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float largest_of(const float* row, int64_t columns) {
    Floats best[4];
    for (Floats& x : best) x = splat(-INFINITY);
    int64_t c = 0;
    for (; c + 4 * kLanes <= columns; c += 4 * kLanes)
        for (int k = 0; k < 4; ++k) best[k] = larger(load(row + c + k * kLanes), best[k]);
    Floats all = larger(larger(best[0], best[1]), larger(best[2], best[3]));
    float result = -INFINITY;
    for (int lane = 0; lane < kLanes; ++lane) result = std::max(result, all[lane]);
    for (; c < columns; ++c) result = std::max(result, row[c]);
    return result;
}

// x -> exp(x - largest) in place, for the rows [begin, end) of logits [.., columns]; the sum of each row. A NaN makes its row's sum NaN.
void exponentiate(float* logits, int64_t columns, int64_t begin, int64_t end, float* largest, float* total) {
    for (int64_t r = begin; r < end; ++r) {
        float* row = logits + r * columns;
        const float most = largest[r] = largest_of(row, columns);
        Floats sums[4];
        for (Floats& x : sums) x = splat(0.0f);
        int64_t c = 0;
        for (; c + 4 * kLanes <= columns; c += 4 * kLanes)
            for (int k = 0; k < 4; ++k) {
                Floats y = exponential(load(row + c + k * kLanes) - splat(most));
                store(row + c + k * kLanes, y);
                sums[k] += y;
            }
        for (int64_t rest = columns - c; rest > 0; rest -= kLanes, c += kLanes) {
            float last[kLanes] = {};
            size_t bytes = std::min<int64_t>(rest, kLanes) * sizeof(float);
            memcpy(last, row + c, bytes);
            Floats y = exponential(load(last) - splat(most));
            y = select(iota() < splat(static_cast<int32_t>(std::min<int64_t>(rest, kLanes))), y, splat(0.0f));
            store(last, y);
            memcpy(row + c, last, bytes);
            sums[0] += y;
        }
        total[r] = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}
