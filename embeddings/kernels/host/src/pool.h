// A small pool of threads that survives fork: a child starts its own on first use.
#pragma once
#include <stdint.h>

#include <algorithm>

namespace grzoo {

using PartFunction = void (*)(void* context, int part);

// Calls function(context, 0 .. parts - 1), part 0 in the calling thread; returns when all are done. One region runs at
// a time: a second caller does its parts alone, as does one that gets no threads. It throws only what a part has thrown,
// when all have ended.
void run_parts(int parts, PartFunction function, void* context);

template <typename F>
void parallel(int parts, F&& body) {
    if (parts <= 1) {
        body(0);
        return;
    }
    run_parts(parts, [](void* context, int part) { (*static_cast<std::remove_reference_t<F>*>(context))(part); }, &body);
}

// Threads worth starting for n elements of some work, when each should get `grain` at least.
inline int parts_for(int64_t n, int threads, int64_t grain) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(grain, 1))));
}

inline int64_t part_begin(int64_t n, int parts, int part) { return n / parts * part + std::min<int64_t>(n % parts, part); }

// body(begin, end) over contiguous ranges of [0, n).
template <typename F>
void parallel_ranges(int64_t n, int threads, int64_t grain, F&& body) {
    int parts = parts_for(n, threads, grain);
    parallel(parts, [&](int part) { body(part_begin(n, parts, part), part_begin(n, parts, part + 1)); });
}

}  // namespace grzoo
