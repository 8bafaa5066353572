#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

namespace grzoo {
namespace {

// Between two regions of a step lie some microseconds: a thread that looks for work that long before it sleeps is there
// at once, where waking it would cost as much as its part.
constexpr int kLooks = 4000;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// What is left of a region, in one word: a thread that takes a part by compare-and-swap knows that the region runs, and
// that its function stays in place until the part is done.
struct Ticket {
    uint64_t word;
    int next() const { return static_cast<int>(word & 0xFFFF); }
    int parts() const { return static_cast<int>(word >> 16 & 0xFFFF); }
    bool open() const { return next() < parts(); }
};

class Pool {
public:
    void run(int parts, PartFunction function, void* context) {
        while (threads_ < parts - 1 && start_thread()) {}
        function_ = function;
        context_ = context;
        pending_ = parts - 1;
        ++region_;
        ticket_ = region_ << 32 | static_cast<uint64_t>(parts) << 16 | 1;
        if (asleep_ > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        do_part(0);
        while (take_part()) {}    // of threads that have not come yet, or could not be started
        wait_for_others();
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    std::mutex busy;   // one parallel region at a time

private:
    void wait_for_others() {
        for (int look = 0; pending_ > 0 && look < kLooks; ++look) pause();
        if (pending_ == 0) return;
        std::unique_lock<std::mutex> lock(mutex_);
        waits_ = true;
        done_.wait(lock, [this] { return pending_ == 0; });
        waits_ = false;
    }

    // Whether the system gave one more thread. Without it others do its parts, the next region asks again.
    bool start_thread() {
        try {
            std::thread([this] { work(); }).detach();   // never joined: they sleep until the process ends
        } catch (const std::exception&) {
            return false;
        }
        ++threads_;
        return true;
    }

    // A part that throws ends alone: the others still use what is on the caller's stack.
    void do_part(int part) noexcept {
        try {
            function_(context_, part);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
    }

    bool take_part() {
        uint64_t seen = ticket_;
        while (Ticket{seen}.open()) {
            if (!ticket_.compare_exchange_weak(seen, seen + 1)) continue;
            do_part(Ticket{seen}.next());
            if (--pending_ == 0 && waits_) {
                std::lock_guard<std::mutex> lock(mutex_);
                done_.notify_one();
            }
            return true;
        }
        return false;
    }

    void work() {
        while (true) {
            for (int look = 0; look < kLooks; ++look) take_part() ? void(look = 0) : pause();
            std::unique_lock<std::mutex> lock(mutex_);
            ++asleep_;
            wake_.wait(lock, [this] { return Ticket{ticket_}.open(); });
            --asleep_;
        }
    }

    // All atomics are sequentially consistent: who goes to sleep says so and looks again; who has work offers it and
    // then looks for sleepers. One of the two sees the other.
    std::atomic<uint64_t> ticket_{0};
    std::atomic<int> pending_{0}, asleep_{0};
    std::atomic<bool> waits_{false};
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    int threads_ = 0;
    std::exception_ptr failure_;    // the first one of a region, rethrown when all its parts have ended
    PartFunction function_ = nullptr;
    void* context_ = nullptr;
    uint64_t region_ = 0;
};

std::atomic<Pool*> current{nullptr};
std::mutex creation;

// A forked child has none of its parent's threads and cannot trust its locks: it leaves that pool alone and makes its own.
void forget_pool_in_child() {
    current = nullptr;
    new (&creation) std::mutex();
}

// Null where there is no memory for one.
Pool* pool() {
    Pool* found = current.load(std::memory_order_acquire);
    if (found) return found;
    std::lock_guard<std::mutex> lock(creation);
    found = current.load(std::memory_order_acquire);
    if (!found) {
        static bool registered = false;
        if (!registered) {
            pthread_atfork(nullptr, nullptr, forget_pool_in_child);
            registered = true;
        }
        found = new (std::nothrow) Pool();   // never freed: its threads may outlive static destruction
        current.store(found, std::memory_order_release);
    }
    return found;
}

}  // namespace

void run_parts(int parts, PartFunction function, void* context) {
    Pool* shared = pool();
    std::unique_lock<std::mutex> region;
    if (shared) region = std::unique_lock<std::mutex>(shared->busy, std::try_to_lock);
    if (!region.owns_lock()) {
        for (int part = 0; part < parts; ++part) function(context, part);
        return;
    }
    shared->run(parts, function, context);
}

}  // namespace grzoo
