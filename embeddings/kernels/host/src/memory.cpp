#include "memory.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>

#include "common.h"

namespace grzoo {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kUnknown = INT64_MAX;
std::atomic<int64_t> mapped{0};
std::atomic<int64_t> untouched{0};
std::atomic<int64_t> limit{0};

int64_t read_number(const char* path) {
    FILE* file = fopen(path, "r");
    if (!file) return kUnknown;
    long long value = 0;
    int64_t result = fscanf(file, "%lld", &value) == 1 ? value : kUnknown;   // "max" of a cgroup is no number
    fclose(file);
    return result;
}

int64_t read_field(const char* path, const char* name) {
    FILE* file = fopen(path, "r");
    if (!file) return kUnknown;
    char line[256];
    int64_t result = kUnknown;
    while (fgets(line, sizeof line, file)) {
        long long value = 0;
        if (strncmp(line, name, strlen(name)) == 0 && sscanf(line + strlen(name), "%lld", &value) == 1) {
            result = value;
            break;
        }
    }
    fclose(file);
    return result;
}

int64_t group_available(const char* limit_path, const char* usage_path, const char* stat_path, const char* cache) {
    int64_t max = read_number(limit_path), used = read_number(usage_path);
    if (max == kUnknown || used == kUnknown || max >= (int64_t(1) << 60)) return kUnknown;
    int64_t reclaimable = read_field(stat_path, cache);
    return max - used + (reclaimable == kUnknown ? 0 : reclaimable);
}

int64_t available_memory() {
    int64_t kilobytes = read_field("/proc/meminfo", "MemAvailable:");
    int64_t available = kilobytes == kUnknown ? kUnknown : kilobytes * 1024;
    available = std::min(available, group_available("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current",
                                                    "/sys/fs/cgroup/memory.stat", "inactive_file"));
    return std::min(available, group_available("/sys/fs/cgroup/memory/memory.limit_in_bytes",
                                               "/sys/fs/cgroup/memory/memory.usage_in_bytes",
                                               "/sys/fs/cgroup/memory/memory.stat", "total_inactive_file"));
}

int64_t reserve_of_machine() {
    int64_t kilobytes = read_field("/proc/meminfo", "MemTotal:");
    int64_t total = kilobytes == kUnknown ? 0 : kilobytes * 1024;
    return std::min<int64_t>(std::max<int64_t>(total / 50, 64 << 20), 2ll << 30);
}

std::string megabytes(int64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

}  // namespace

void check_room(int64_t bytes) {
    int64_t cap = limit.load();
    if (cap > 0 && mapped.load() + bytes > cap)
        throw OutOfMemory("embedding storage needs " + megabytes(bytes) + " more, but holds " + megabytes(mapped.load()) +
                          " of its limit of " + megabytes(cap) + ": raise the limit or evict rows");
    static const int64_t reserve = reserve_of_machine();
    // Asking the kernel costs tens of microseconds: small requests are covered by the reserve.
    static std::atomic<int64_t> unchecked{0};
    if (unchecked.fetch_add(bytes) + bytes < (16 << 20)) return;
    unchecked = 0;
    int64_t available = available_memory();
    if (available != kUnknown) available -= untouched.load();
    if (available != kUnknown && bytes + reserve > available)
        throw OutOfMemory("embedding storage needs " + megabytes(bytes) + " more, but this machine has " +
                          megabytes(std::max<int64_t>(available, 0)) + " left, of which " + megabytes(reserve) +
                          " are kept free: evict rows, use more ranks or a machine with more memory");
}

void* map_pages(size_t bytes) {
    bool huge = bytes >= kHugePage;
    size_t padded = huge ? bytes + kHugePage : bytes;
    void* raw = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED)
        throw OutOfMemory("the system refused " + megabytes(static_cast<int64_t>(bytes)) + " more for embedding storage");
    char* address = static_cast<char*>(raw);
    if (huge) {   // aligned to a huge page: fewer faults, and random rows need few entries of the TLB
        size_t page = kHugePage;
        char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(address) + page - 1) / page * page);
        size_t head = static_cast<size_t>(aligned - address);
        size_t end = (bytes + 4095) / 4096 * 4096;
        if (head) munmap(address, head);
        if (head + end < padded) munmap(aligned + end, padded - head - end);
        address = aligned;
        use_huge_pages(address, end);
    }
    mapped += static_cast<int64_t>(bytes);
    return address;
}

void unmap_pages(void* address, size_t bytes) noexcept {
    if (!address) return;
    munmap(address, bytes);
    mapped -= static_cast<int64_t>(bytes);
}

void use_huge_pages(void* address, size_t bytes) noexcept {
    const uintptr_t page = kHugePage, begin = (reinterpret_cast<uintptr_t>(address) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + bytes) / page * page;
#ifdef MADV_HUGEPAGE
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

int64_t mapped_bytes() noexcept { return mapped.load(); }
void set_memory_limit(int64_t bytes) noexcept { limit = bytes; }
void add_untouched(int64_t bytes) noexcept { untouched += bytes; }

}  // namespace grzoo
