#include <string.h>

#include <algorithm>
#include <vector>

#include "common.h"
#include "functions.h"
#include "kernels.h"
#include "pool.h"

namespace grzoo {
namespace {

constexpr int64_t kFloatsPerThread = 1 << 16;     // floats that are worth a thread

int parts_of(int64_t n, int64_t dim, int threads) { return parts_for(n, threads, kFloatsPerThread / (dim + 1) + 1); }

// The first segment of each part, so that all parts have about as many elements; parts + 1 values.
std::vector<int64_t> split_segments(const std::vector<int64_t>& offsets, int parts) {
    const int64_t segments = static_cast<int64_t>(offsets.size()) - 1, n = offsets.back();
    std::vector<int64_t> borders{0};
    for (int part = 1; part < parts; ++part) {
        const auto border = std::lower_bound(offsets.begin(), offsets.end(), part_begin(n, parts, part)) - offsets.begin();
        borders.push_back(std::max(borders.back(), std::min<int64_t>(border, segments)));
    }
    borders.push_back(segments);
    return borders;
}

}  // namespace

void check_range(const int64_t* values, int64_t n, int64_t low, int64_t high, const char* what) {
    const uint64_t base = static_cast<uint64_t>(low), width = static_cast<uint64_t>(high) - base;
    uint64_t outside = 0;
    for (int64_t i = 0; i < n; ++i) outside |= static_cast<uint64_t>(values[i]) - base >= width;
    if (!outside) return;
    for (int64_t i = 0; i < n; ++i)
        if (values[i] < low || values[i] >= high)
            throw InvalidArgument(std::string(what) + " " + std::to_string(values[i]) + " at position " + std::to_string(i) +
                                  " is outside [" + std::to_string(low) + ", " + std::to_string(high) + ")");
}

void segment_sum(const float* values, const int64_t* index, int64_t n, int64_t dim, int64_t segments, float* out,
                 bool accumulate, int threads) {
    check_range(index, n, 0, segments, "segment");
    if (n >= int64_t(UINT32_MAX)) throw InvalidArgument("segment_sum takes at most 2^32 - 2 values");
    std::vector<uint8_t> seen(static_cast<size_t>(segments), accumulate ? 1 : 0);
    const int parts = parts_of(n, dim, threads);
    const auto fill_unseen = [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s)
            if (!seen[static_cast<size_t>(s)]) memset(out + s * dim, 0, sizeof(float) * static_cast<size_t>(dim));
    };
    if (parts == 1) {
        kernels().add_rows(values, index, nullptr, n, dim, out, seen.data());
        fill_unseen(0, segments);
        return;
    }
    std::vector<int64_t> offsets(static_cast<size_t>(segments) + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++offsets[static_cast<size_t>(index[i]) + 1];
    for (size_t s = 0; s < static_cast<size_t>(segments); ++s) offsets[s + 1] += offsets[s];
    const std::vector<int64_t> borders = split_segments(offsets, parts);
    std::vector<uint32_t> positions(static_cast<size_t>(n));    // of each part's segments, in the order of the values
    parallel(parts, [&](int part) {
        const int64_t begin = borders[static_cast<size_t>(part)], end = borders[static_cast<size_t>(part) + 1];
        uint32_t* mine = positions.data() + offsets[static_cast<size_t>(begin)];
        int64_t count = 0;
        const int64_t total = offsets[static_cast<size_t>(end)] - offsets[static_cast<size_t>(begin)];
        for (int64_t i = 0; count < total; ++i)
            if (index[i] >= begin && index[i] < end) mine[count++] = static_cast<uint32_t>(i);
        kernels().add_rows(values, index, mine, count, dim, out, seen.data());
        fill_unseen(begin, end);
    });
}

void take_rows(const float* values, int64_t rows, const int64_t* index, int64_t n, int64_t dim, float* out, int threads) {
    check_range(index, n, 0, rows, "row");
    parallel_ranges(n, threads, kFloatsPerThread / (dim + 1) + 1,
                    [&](int64_t begin, int64_t end) { kernels().take_rows(values, index, begin, end, dim, out); });
}

}  // namespace grzoo
