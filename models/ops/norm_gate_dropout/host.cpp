// LayerNorm (without weight and bias), gate and keyed dropout of a row in one pass; nothing but the inputs is kept for the
// backward pass, which normalises again and draws the mask again.
#include <stdint.h>

#include <new>
#include <vector>

namespace grzoo {
namespace {

inline uint64_t mix_upper_bits(uint64_t z) {   // mix64 without its last step, which leaves the upper 24 bits alone
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    return (z ^ (z >> 27)) * 0x94D049BB133111EBull;
}

struct NormGate {
    int64_t columns, x_stride, gate_stride, grad_stride;   // strides: floats from row to row
    const float *x, *gate, *grad;
    const int64_t* row_keys;     // null: no dropout
    const uint64_t* addends;     // of the columns
    uint64_t least;              // kept from here on
    float kept, eps;
    float *out, *dgate;          // dense [rows, columns]; out: y forward, dx backward
};

}  // namespace
}  // namespace grzoo

#define GRZOO_KERNEL "../norm_gate_dropout/host_kernel.h"
#include "../host/dispatch.h"
#include "../host/parallel.h"

using namespace grzoo;

extern "C" {

struct GrzooNormGate {
    int64_t rows, columns, x_stride, gate_stride, grad_stride;
    const float *x, *gate, *grad;     // grad: null forward
    const int64_t* row_keys;
    float *out, *dgate;
    uint64_t threshold;               // dropped below, of 2^24
    float kept, eps;
    int32_t threads, level;
};

// 0: done, 1: out of memory.
EXPORT int grzoo_norm_gate_dropout(const GrzooNormGate* call) {
    constexpr int64_t kRows = 256, kScratchRows = 3;
    constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
    try {
        std::vector<uint64_t> addends(call->columns);
        for (int64_t c = 0; c < call->columns; ++c) {
            const uint64_t mixed = mix_upper_bits(static_cast<uint64_t>(c) + 0x632BE59BD9B4E019ull);
            addends[c] = (mixed ^ (mixed >> 31)) + kGolden;
        }
        const NormGate s{call->columns, call->x_stride, call->gate_stride, call->grad_stride, call->x, call->gate, call->grad,
                         call->row_keys, addends.data(), call->threshold << 40, call->kept, call->eps, call->out, call->dgate};
        const int level = std::min(call->level, instruction_set());
        const int64_t padded = (call->columns + 7) / 8 * 8;
        const int64_t tasks = (call->rows + kRows - 1) / kRows;
        const bool done = parallel_tasks(tasks, call->threads, kScratchRows * padded, [&](int64_t task, float* scratch) {
            std::fill(scratch, scratch + kScratchRows * padded, 0.0f);   // the lanes beyond a row are never written
            const int64_t first = task * kRows, end = std::min(call->rows, first + kRows);
            if (call->grad == nullptr)
                GRZOO_CALL(level, forward_rows, s, first, end, scratch);
            else
                GRZOO_CALL(level, backward_rows, s, first, end, scratch);
        });
        return done ? 0 : 1;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
}
