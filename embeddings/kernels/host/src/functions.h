// What works on plain arrays: distinct ids, sums by segment, rows by index. All give the same bits for any number of threads.
#pragma once
#include <stdint.h>

namespace grzoo {

// tables, unique_tables: both null, or both given. Returns the number of distinct pairs, in first-seen order.
int64_t unique(const int32_t* tables, const int64_t* ids, int64_t n, int32_t* unique_tables, int64_t* unique_ids,
               int64_t* inverse, int64_t* counts, int threads);

void segment_sum(const float* values, const int64_t* index, int64_t n, int64_t dim, int64_t segments, float* out,
                 bool accumulate, int threads);

// The sum of the squares of n * dim values, in float64.
double squared_norm(const float* values, int64_t n, int64_t dim, int threads);

void take_rows(const float* values, int64_t rows, const int64_t* index, int64_t n, int64_t dim, float* out, int threads);

// What `Backend.pool_rows` and `unpool_rows` define; weights may be null.
void pool_rows(const float* values, int64_t rows, const int64_t* index, int64_t n, const int64_t* offsets, int64_t bags,
               const float* weights, int64_t dim, float* out, int threads);
void unpool_rows(const float* grads, const int64_t* index, int64_t n, const int64_t* offsets, int64_t bags,
                 const float* weights, int64_t rows, int64_t dim, float* out, int threads);

// Throws InvalidArgument naming the first value outside [low, high).
void check_range(const int64_t* values, int64_t n, int64_t low, int64_t high, const char* what);

}  // namespace grzoo
