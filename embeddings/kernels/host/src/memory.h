// Pages straight from the operating system, counted against what the machine and the control group still have.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace grzoo {

// Zeroed memory. Throws OutOfMemory, before anything is mapped, where the machine would be left without its reserve.
void* map_pages(size_t bytes);
void unmap_pages(void* address, size_t bytes) noexcept;

// Asks for huge pages in the part of a range that whole ones fit into.
void use_huge_pages(void* address, size_t bytes) noexcept;

int64_t mapped_bytes() noexcept;
void set_memory_limit(int64_t bytes) noexcept;

}  // namespace grzoo
