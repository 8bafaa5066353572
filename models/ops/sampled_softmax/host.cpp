// Sampled softmax on the host: loss and gradients in one pass over the sampled rows, which stay in the caches of a core between
// logits and gradient. Nothing of size [tokens, negatives, width] exists.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include <atomic>
#include <new>
#include <type_traits>
#include <vector>

#include "host_types.h"
#define GRZOO_KERNEL "../sampled_softmax/host_kernel.h"
#include "../host/dispatch.h"
#include "../host/parallel.h"

namespace grzoo {
namespace {

constexpr int64_t kChunk = 64;              // tokens whose losses are summed before the sum of all
constexpr int64_t kRangeFloats = 1 << 16;   // of row sums: half the second-level cache of a core
constexpr int64_t kMaxScans = 4;            // of all indices by one thread

int64_t num_ranges(const Sampled& s, int threads) {
    int64_t wanted = (s.num_rows * s.padded / kRangeFloats + threads) / threads;
    return threads * std::max<int64_t>(1, std::min(wanted, kMaxScans));
}

}  // namespace
}  // namespace grzoo

using namespace grzoo;

extern "C" {

struct GrzooSampled {
    int64_t tokens, num_rows, width, negatives;
    const float *query, *rows;             // dense [tokens, width], [num_rows, width]
    const int64_t *positive, *negative;    // [tokens], [tokens, negatives]
    const uint8_t* accidental;             // [tokens, negatives]
    float *grad_query, *grad_rows;      
    double* loss;
    float inverse_temperature;
    int32_t threads, level, with_grads;
};

// 0: done, 1: out of memory, 2: an index out of range.
EXPORT int grzoo_sampled_softmax(const GrzooSampled* call) {
    try {
        const int64_t padded = (call->width + 7) / 8 * 8, count = 1 + call->negatives;
        const bool with_grads = call->with_grads != 0;
        const int level = std::min(call->level, instruction_set()), threads = std::max(1, call->threads);
        Buffer unit_rows(call->num_rows * padded), row_scale(call->num_rows), unit_query(call->tokens * padded);
        Buffer index(call->tokens * count), slope(with_grads ? call->tokens * count : 0);
        Buffer row_sums(with_grads ? call->num_rows * padded : 0);
        Sampled s{call->tokens, call->num_rows, call->width, padded, call->negatives, call->query, call->rows, call->positive,
                  call->negative, call->accidental, call->inverse_temperature, with_grads, unit_rows.data(), row_scale.data(),
                  unit_query.data(), reinterpret_cast<int32_t*>(index.data()), slope.data(), row_sums.data(), call->grad_query,
                  call->grad_rows};
        const int64_t scratch = padded + 3 * (count + 8), chunks = (call->tokens + kChunk - 1) / kChunk;
        parallel_tasks((call->num_rows + 255) / 256, threads, 0, [&](int64_t k, float*) {
            GRZOO_CALL(level, normalize_rows, s, k * 256, std::min(call->num_rows, (k + 1) * 256));
        });
        std::vector<double> losses(chunks, 0.0);
        std::atomic<bool> valid{true};
        bool complete = parallel_tasks(chunks, threads, scratch, [&](int64_t k, float* memory) {
            int64_t end = std::min(call->tokens, (k + 1) * kChunk);
            if (!GRZOO_CALL(level, token_losses, s, k * kChunk, end, memory, &losses[k])) valid = false;
        });
        if (!complete) return 1;
        if (!valid) return 2;
        *call->loss = 0.0;
        for (double loss : losses) *call->loss += loss;
        if (!with_grads) return 0;
        const int64_t ranges = num_ranges(s, threads);
        complete = parallel_tasks(ranges, threads, scratch, [&](int64_t k, float* memory) {
            GRZOO_CALL(level, sum_rows, s, k * call->num_rows / ranges, (k + 1) * call->num_rows / ranges, memory);
        });
        return complete ? 0 : 1;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
}
