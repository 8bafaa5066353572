#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace grzoo {
namespace {

class Pool {
public:
    void run(int parts, PartFunction function, void* context) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (static_cast<int>(threads_.size()) < parts - 1) start_thread();
        function_ = function;
        context_ = context;
        parts_ = parts;
        pending_ = parts - 1;
        next_ = 1;
        lock.unlock();
        wake_.notify_all();
        function(context, 0);
        lock.lock();
        while (next_ < parts_) {   // threads that have not woken yet: their parts are done here
            int part = next_++;
            lock.unlock();
            function(context, part);
            lock.lock();
            --pending_;
        }
        done_.wait(lock, [this] { return pending_ == 0; });
        parts_ = 0;
    }

    std::mutex busy;   // one parallel region at a time

private:
    void start_thread() {
        threads_.emplace_back([this] { work(); });
        threads_.back().detach();   // never joined: they sleep until the process ends
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return next_ < parts_; });
            int part = next_++;
            PartFunction function = function_;
            void* context = context_;
            lock.unlock();
            function(context, part);
            lock.lock();
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    PartFunction function_ = nullptr;
    void* context_ = nullptr;
    int parts_ = 0, next_ = 0, pending_ = 0;
};

std::atomic<Pool*> current{nullptr};
std::mutex creation;

// A forked child has none of its parent's threads and cannot trust its locks: it leaves that pool alone and makes its own.
void forget_pool_in_child() {
    current = nullptr;
    new (&creation) std::mutex();
}

Pool& pool() {
    Pool* found = current.load(std::memory_order_acquire);
    if (found) return *found;
    std::lock_guard<std::mutex> lock(creation);
    found = current.load(std::memory_order_acquire);
    if (!found) {
        static bool registered = false;
        if (!registered) {
            pthread_atfork(nullptr, nullptr, forget_pool_in_child);
            registered = true;
        }
        found = new Pool();   // never freed: its threads may outlive static destruction
        current.store(found, std::memory_order_release);
    }
    return *found;
}

}  // namespace

void run_parts(int parts, PartFunction function, void* context) {
    Pool& shared = pool();
    std::unique_lock<std::mutex> region(shared.busy, std::try_to_lock);
    if (!region.owns_lock()) {
        for (int part = 0; part < parts; ++part) function(context, part);
        return;
    }
    shared.run(parts, function, context);
}

}  // namespace grzoo
