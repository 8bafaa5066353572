#include "common.h"
#include "functions.h"
#include "kernels.h"
#include "pool.h"

namespace grzoo {
namespace {

constexpr int64_t kFloatsWorthAThread = 1 << 16;
constexpr int64_t kColumns = 16;    // of a cache line

void check_offsets(const int64_t* offsets, int64_t bags, int64_t n) {
    bool grows = offsets[0] == 0 && offsets[bags] == n;
    for (int64_t b = 0; b < bags; ++b) grows = grows && offsets[b] <= offsets[b + 1];
    if (!grows) throw InvalidArgument("offsets of bags must grow from 0 to the " + std::to_string(n) + " rows");
}

}  // namespace

void pool_rows(const float* values, int64_t rows, const int64_t* index, int64_t n, const int64_t* offsets, int64_t bags,
               const float* weights, int64_t dim, float* out, int threads) {
    check_offsets(offsets, bags, n);
    check_range(index, n, 0, rows, "row");
    const int64_t per_bag = n / std::max<int64_t>(bags, 1) + 1;
    parallel_ranges(bags, threads, kFloatsWorthAThread / (dim * per_bag) + 1, [&](int64_t begin, int64_t end) {
        kernels().pool_rows(values, index, offsets, weights, begin, end, dim, out);
    });
}

void unpool_rows(const float* grads, const int64_t* index, int64_t n, const int64_t* offsets, int64_t bags,
                 const float* weights, int64_t rows, int64_t dim, float* out, int threads) {
    check_offsets(offsets, bags, n);
    check_range(index, n, 0, rows, "row");
    // each part some columns of all rows: the order of each sum is that of the ids
    const int64_t lines = (dim + kColumns - 1) / kColumns;
    const int parts = static_cast<int>(std::min<int64_t>(lines, parts_for(n, threads, kFloatsWorthAThread / (dim + 1) + 1)));
    parallel(parts, [&](int part) {
        const int64_t first = part_begin(lines, parts, part) * kColumns;
        const int64_t last = std::min(dim, part_begin(lines, parts, part + 1) * kColumns);
        kernels().unpool_rows(grads, index, offsets, weights, bags, dim, first, last, out);
    });
}

}  // namespace grzoo
