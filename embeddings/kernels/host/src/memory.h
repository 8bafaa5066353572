// Pages straight from the operating system, counted against what the machine and the control group still have.
// The system gives a page when it is first touched: what was mapped and not touched is still to be taken from that.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace grzoo {

// Throws OutOfMemory where so many more bytes would leave the machine without its reserve, or exceed the limit.
void check_room(int64_t bytes);

// Zeroed memory, for which there should be room; OutOfMemory where the system refuses it.
void* map_pages(size_t bytes);
void unmap_pages(void* address, size_t bytes) noexcept;

// Asks for huge pages in the part of a range that whole ones fit into.
void use_huge_pages(void* address, size_t bytes) noexcept;

int64_t mapped_bytes() noexcept;
void set_memory_limit(int64_t bytes) noexcept;
void add_untouched(int64_t bytes) noexcept;    // to what is mapped and not touched; below zero: from it

}  // namespace grzoo
