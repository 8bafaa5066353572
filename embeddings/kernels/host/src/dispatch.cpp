// Which of the compiled instruction sets the kernels run with.
#include <string.h>

#include <atomic>

#include "kernels.h"

namespace grzoo {

namespace baseline {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels* widest() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        return &avx512::table;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::table;
#endif
    return &baseline::table;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* found = chosen.load(std::memory_order_acquire);
    if (!found) chosen.store(found = widest(), std::memory_order_release);
    return *found;
}

bool choose_kernels(const char* name) {
    const Kernels* best = widest();
    const Kernels* available[] = {
        &baseline::table,
#if defined(__x86_64__)
        best != &baseline::table ? &avx2::table : nullptr,
        best == &avx512::table ? &avx512::table : nullptr,
#endif
    };
    for (const Kernels* candidate : available) {
        if (!candidate || strcmp(candidate->name, name) != 0) continue;
        chosen.store(candidate, std::memory_order_release);
        return true;
    }
    return false;
}

}  // namespace grzoo
