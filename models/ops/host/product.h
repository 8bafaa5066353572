// Products of small row-major tiles with register blocking. Included once per instruction set, after simd.h.

// c[r][0..8W) = init[r][..] (or 0) + sum over k of a[r * a_row + k * a_step] * b[k * b_row + ..], for R rows.
template <int R, int W>
GRZOO_INLINE void micro_product(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                                const float* init, float* c, int64_t c_row) {
    Floats total[R][W];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) total[r][w] = init ? load(init + r * c_row + w * kLanes) : splat(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
        Floats right[W];
        for (int w = 0; w < W; ++w) right[w] = load(b + k * b_row + w * kLanes);
        for (int r = 0; r < R; ++r) {
            Floats left = splat(a[r * a_row + k * a_step]);
            for (int w = 0; w < W; ++w) total[r][w] += left * right[w];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) store(c + r * c_row + w * kLanes, total[r][w]);
}

constexpr int kRowBlock = 12;   // a multiple of the rows of each register block below

// One column strip of W vectors, up to kRowBlock rows. 12 accumulators hide the latency of the multiply-add.
template <int W>
void strip_product(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                   const float* init, float* c, int64_t c_row) {
    constexpr int R = kRowBlock / W;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
        micro_product<R, W>(depth, a + r * a_row, a_row, a_step, b, b_row, init ? init + r * c_row : nullptr, c + r * c_row, c_row);
    for (; r + 2 <= rows; r += 2)
        micro_product<2, W>(depth, a + r * a_row, a_row, a_step, b, b_row, init ? init + r * c_row : nullptr, c + r * c_row, c_row);
    if (r < rows)
        micro_product<1, W>(depth, a + r * a_row, a_row, a_step, b, b_row, init ? init + r * c_row : nullptr, c + r * c_row, c_row);
}

// Which part of a product a causal mask leaves; `ahead` = first query of the tile - first key of the tile.
enum class Causal {
    kNone,
    kColumns,   // rows are queries, columns keys: columns up to the row
    kDepth,     // rows are queries, the depth runs over keys: depth up to the row
    kTail,      // rows are keys, the depth runs over queries: depth from the row on
};

struct Operand {
    const float* data;
    int64_t row, step;   // element (r, k) is data[r * row + k * step]
};

// c [rows, 8 * vectors] = init (null: 0) + a [rows, depth] b [depth, 8 * vectors].
template <Causal kCausal>
void tile_product(int64_t rows, int64_t vectors, int64_t depth, Operand a, const float* b, int64_t b_row, const float* init,
                  float* c, int64_t c_row, int64_t ahead) {
    for (int64_t r = 0; r < rows; r += kRowBlock) {
        int64_t count = std::min<int64_t>(kRowBlock, rows - r), first = 0, end = depth, width = vectors;
        if (kCausal == Causal::kColumns) width = std::min(vectors, (r + count + ahead + kLanes - 1) / kLanes);
        if (kCausal == Causal::kDepth) end = std::min(depth, r + count + ahead);
        if (kCausal == Causal::kTail) first = std::min(depth, std::max<int64_t>(0, r - ahead));
        const float* left = a.data + r * a.row + first * a.step;
        const float* right = b + first * b_row;
        const float* start = init ? init + r * c_row : nullptr;
        float* out = c + r * c_row;
        int64_t steps = end - first;
        for (int64_t w = 0; w < width;) {
            int64_t remaining = width - w, column = w * kLanes;
            const float* from = start ? start + column : nullptr;
            if (remaining == 4 || remaining == 7 || remaining == 8) {
                strip_product<4>(count, steps, left, a.row, a.step, right + column, b_row, from, out + column, c_row);
                w += 4;
            } else if (remaining >= 3) {
                strip_product<3>(count, steps, left, a.row, a.step, right + column, b_row, from, out + column, c_row);
                w += 3;
            } else if (remaining == 2) {
                strip_product<2>(count, steps, left, a.row, a.step, right + column, b_row, from, out + column, c_row);
                w += 2;
            } else {
                strip_product<1>(count, steps, left, a.row, a.step, right + column, b_row, from, out + column, c_row);
                w += 1;
            }
        }
    }
}
