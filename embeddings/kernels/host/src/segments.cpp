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
constexpr int64_t kSampled = 16;                  // one value in so many says how to split the segments
constexpr int64_t kSorted = 1 << 12;               // values that are sorted out at a time
constexpr int64_t kBlock = 1 << 13;               // floats whose squares are summed together

int parts_of(int64_t n, int64_t dim, int threads) { return parts_for(n, threads, kFloatsPerThread / (dim + 1) + 1); }

// The first segment of each part, so that all parts have about as many of the values; parts + 1 numbers.
std::vector<int64_t> split_segments(const int64_t* index, int64_t n, int64_t segments, int parts) {
    std::vector<int64_t> sample;
    for (int64_t i = 0; i < n; i += kSampled) sample.push_back(index[i]);
    std::sort(sample.begin(), sample.end());
    std::vector<int64_t> borders{0};
    for (int part = 1; part < parts; ++part)
        borders.push_back(sample[static_cast<size_t>(part_begin(static_cast<int64_t>(sample.size()), parts, part))]);
    borders.push_back(segments);
    return borders;
}

void fill_unseen(const uint8_t* seen, int64_t begin, int64_t end, int64_t dim, float* out) {
    for (int64_t s = begin; s < end; ++s)
        if (!seen[s]) memset(out + s * dim, 0, sizeof(float) * static_cast<size_t>(dim));
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
    const int parts = parts_of(n, dim, threads);
    std::vector<uint8_t> seen(static_cast<size_t>(segments), accumulate ? 1 : 0);
    if (parts == 1) {
        kernels().add_rows(values, index, nullptr, n, dim, out, seen.data());
        fill_unseen(seen.data(), 0, segments, dim, out);
        return;
    }
    // Whole segments to a part. Columns would need no sorting out, but then what one core fetches ahead is what the
    // other one writes.
    const std::vector<int64_t> borders = split_segments(index, n, segments, parts);
    parallel(parts, [&](int part) {
        const int64_t begin = borders[static_cast<size_t>(part)], end = borders[static_cast<size_t>(part) + 1];
        uint32_t mine[kSorted + 1];
        for (int64_t from = 0; from < n; from += kSorted) {
            int64_t count = 0;
            for (int64_t i = from; i < std::min(n, from + kSorted); ++i) {
                mine[count] = static_cast<uint32_t>(i);
                count += (index[i] >= begin) & (index[i] < end);
            }
            kernels().add_rows(values, index, mine, count, dim, out, seen.data());
        }
        fill_unseen(seen.data(), begin, end, dim, out);
    });
}

double squared_norm(const float* values, int64_t n, int64_t dim, int threads) {
    const int64_t rows = kBlock / (dim + 1) + 1, blocks = (n + rows - 1) / rows;    // whatever the number of threads
    std::vector<double> sums(static_cast<size_t>(blocks));
    parallel_ranges(blocks, threads, 4, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
            sums[static_cast<size_t>(b)] = kernels().squares(values, b * rows, std::min(n, (b + 1) * rows), dim);
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
}

void take_rows(const float* values, int64_t rows, const int64_t* index, int64_t n, int64_t dim, float* out, int threads) {
    check_range(index, n, 0, rows, "row");
    parallel_ranges(n, threads, kFloatsPerThread / (dim + 1) + 1,
                    [&](int64_t begin, int64_t end) { kernels().take_rows(values, index, begin, end, dim, out); });
}

}  // namespace grzoo
