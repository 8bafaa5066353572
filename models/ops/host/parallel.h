// Scratch memory and loops over tasks.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <new>

namespace grzoo {

// Floats on a cache line boundary, not initialised.
class Buffer {
public:
    explicit Buffer(int64_t floats) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, std::max<int64_t>(floats, 16) * sizeof(float))) throw std::bad_alloc();
        data_ = static_cast<float*>(memory);
    }
    ~Buffer() { free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    float* data() { return data_; }

private:
    float* data_;
};

// body(task, scratch) for each task of [0, count) in turn, on up to `threads` threads of OpenMP, each with its own scratch.
// The body must not throw. False when memory runs out: then some tasks are not done.
template <typename F>
bool parallel_tasks(int64_t count, int threads, int64_t scratch_floats, F&& body) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> complete{true};
    int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
    (void)team;   // without OpenMP
#pragma omp parallel num_threads(team) if (team > 1)
    {
        try {
            Buffer scratch(scratch_floats);
            for (int64_t task = next++; task < count; task = next++) body(task, scratch.data());
        } catch (const std::bad_alloc&) {
            complete = false;
        }
    }
    return complete;
}

}  // namespace grzoo
