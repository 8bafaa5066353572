// The pass of the full softmax between its products: one reading and one writing of the logits.
#include <math.h>
#include <stdint.h>

#define GRZOO_KERNEL "../full_softmax/host_kernel.h"
#include "../host/dispatch.h"
#include "../host/parallel.h"

using namespace grzoo;

extern "C" {

// logits [rows, columns] -> exp(logits - largest of the row); largest and total: [rows].
// 0: done, 1: out of memory.
EXPORT int grzoo_exponentiate(float* logits, int64_t rows, int64_t columns, float* largest, float* total, int threads, int level) {
    level = std::min(level, instruction_set());
    bool complete = parallel_tasks(rows, threads, 0, [&](int64_t row, float*) {
        GRZOO_CALL(level, exponentiate, logits, columns, row, row + 1, largest, total);
    });
    return complete ? 0 : 1;
}
}
