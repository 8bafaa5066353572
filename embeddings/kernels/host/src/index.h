// From (table, id) to the number of a row. 256 segments of open addressing by the high bits of the hash, each with linear
// probing in the order of the hash. Every segment grows by itself, by half, at a size of its own: whatever the size of
// the table, one step copies few of them, and copying reads and writes in order. Deletion moves later keys back.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include <new>

#include "common.h"
#include "memory.h"

namespace grzoo {

class Index {
public:
    static constexpr int kSegments = 256;
    static constexpr uint32_t kAbsent = UINT32_MAX;

    struct Slot {
        int64_t id;
        int32_t table;
        uint32_t row;    // kAbsent: empty
    };

    Index() = default;
    Index(const Index&) = delete;
    Index& operator=(const Index&) = delete;
    ~Index() {
        for (Segment& segment : segments_) release(segment);
    }

    static int segment_of(uint64_t hash) { return static_cast<int>(hash >> 56); }

    GRZOO_INLINE void prefetch(uint64_t hash) const {
        const Segment& segment = segments_[segment_of(hash)];
        grzoo::prefetch(segment.slots + home(hash, segment.capacity));
    }

    uint32_t find(uint64_t hash, int32_t table, int64_t id) const {
        const Segment& segment = segments_[segment_of(hash)];
        if (segment.size == 0) return kAbsent;
        for (uint32_t at = home(hash, segment.capacity);; at = next(at, segment.capacity)) {
            const Slot& slot = segment.slots[at];
            if (slot.row == kAbsent) return kAbsent;
            if (slot.id == id && slot.table == table) return slot.row;
        }
    }

    // The bytes by which `reserve` would make every segment larger.
    int64_t growth(int64_t more) const {
        int64_t slots = 0;
        for (int number = 0; number < kSegments; ++number) slots += grown_to(number, more).capacity - int64_t(segments_[number].capacity);
        return slots * int64_t(sizeof(Slot));
    }

    // Room for `more` keys in a segment, or OutOfMemory with nothing changed.
    void reserve(int segment_number, int64_t more) {
        Segment& segment = segments_[segment_number];
        Segment grown = grown_to(segment_number, more);
        if (grown.capacity == segment.capacity) return;
        allocate(grown);
        for (uint32_t i = 0; i < segment.capacity; ++i) {
            const Slot& slot = segment.slots[i];
            if (slot.row != kAbsent) place(grown, key_hash(slot.table, slot.id), slot);
        }
        grown.size = segment.size;
        release(segment);
        segment = grown;
    }

    // Inserts a key into the room that was reserved; returns `row`, or the row of the key when it is there already.
    uint32_t insert(uint64_t hash, int32_t table, int64_t id, uint32_t row) {
        Segment& segment = segments_[segment_of(hash)];
        for (uint32_t at = home(hash, segment.capacity);; at = next(at, segment.capacity)) {
            Slot& slot = segment.slots[at];
            if (slot.row == kAbsent) {
                slot = {id, table, row};
                ++segment.size;
                return row;
            }
            if (slot.id == id && slot.table == table) return slot.row;
        }
    }

    // Returns the row that the key had, or kAbsent.
    uint32_t erase(uint64_t hash, int32_t table, int64_t id) {
        Segment& segment = segments_[segment_of(hash)];
        if (segment.size == 0) return kAbsent;
        const uint32_t capacity = segment.capacity;
        uint32_t hole = home(hash, capacity);
        for (;; hole = next(hole, capacity)) {
            const Slot& slot = segment.slots[hole];
            if (slot.row == kAbsent) return kAbsent;
            if (slot.id == id && slot.table == table) break;
        }
        const uint32_t row = segment.slots[hole].row;
        for (uint32_t at = next(hole, capacity); segment.slots[at].row != kAbsent; at = next(at, capacity)) {
            const Slot& slot = segment.slots[at];
            const uint32_t from = home(key_hash(slot.table, slot.id), capacity);
            // it may move to the hole unless its home lies behind the hole
            if (distance(from, at, capacity) < distance(hole, at, capacity)) continue;
            segment.slots[hole] = slot;
            hole = at;
        }
        segment.slots[hole].row = kAbsent;
        --segment.size;
        return row;
    }

    template <typename Visit>
    void for_each(Visit visit) const {
        for (const Segment& segment : segments_)
            for (uint32_t i = 0; i < segment.capacity; ++i)
                if (segment.slots[i].row != kAbsent) visit(segment.slots[i]);
    }

    int64_t bytes() const {
        int64_t total = sizeof(*this);
        for (const Segment& segment : segments_) total += int64_t(segment.capacity) * int64_t(sizeof(Slot));
        return total;
    }

private:
    static constexpr size_t kMapFrom = 1 << 16;

    struct Segment {
        Slot* slots = nullptr;
        uint32_t capacity = 0, size = 0;
        int generation = 0;    // how often it has grown
    };

    static uint32_t home(uint64_t hash, uint32_t capacity) {
        return static_cast<uint32_t>((((hash >> 24) & 0xFFFFFFFFull) * capacity) >> 32);
    }
    static uint32_t next(uint32_t at, uint32_t capacity) { return at + 1 == capacity ? 0 : at + 1; }
    static uint32_t distance(uint32_t from, uint32_t to, uint32_t capacity) { return to >= from ? to - from : to + capacity - from; }

    // 16 * 1.5^(generation + segment / 256): the segments take turns in growing.
    static int64_t capacity_of(int segment, int generation) {
        double capacity = 16;
        for (int i = 0; i < generation; ++i) capacity *= 1.5;
        return static_cast<int64_t>(capacity * __builtin_exp2(0.5849625007211562 * segment / kSegments));
    }

    static void place(Segment& segment, uint64_t hash, const Slot& slot) {
        uint32_t at = home(hash, segment.capacity);
        while (segment.slots[at].row != kAbsent) at = next(at, segment.capacity);
        segment.slots[at] = slot;
    }

    // A segment with room for `more` keys, to be allocated and filled; one of the present capacity where it has that.
    Segment grown_to(int number, int64_t more) const {
        const Segment& segment = segments_[number];
        const int64_t needed = segment.size + more;
        int64_t capacity = segment.capacity;
        int generation = segment.generation;
        while (needed * 4 > capacity * 3) capacity = capacity_of(number, generation++);
        if (capacity >= int64_t(kAbsent)) throw OutOfMemory("an embedding storage holds at most 2^32 - 2 rows");
        Segment grown;
        grown.capacity = static_cast<uint32_t>(capacity);
        grown.generation = generation;
        return grown;
    }

    static void allocate(Segment& segment) {
        const size_t bytes = sizeof(Slot) * segment.capacity;
        if (bytes >= kMapFrom) check_room(static_cast<int64_t>(bytes));
        segment.slots = static_cast<Slot*>(bytes < kMapFrom ? malloc(bytes) : map_pages(bytes));
        if (!segment.slots) throw std::bad_alloc();
        for (uint32_t i = 0; i < segment.capacity; ++i) segment.slots[i].row = kAbsent;
    }

    static void release(Segment& segment) {
        const size_t bytes = sizeof(Slot) * segment.capacity;
        bytes < kMapFrom ? free(segment.slots) : unmap_pages(segment.slots, bytes);
        segment.slots = nullptr;
    }

    Segment segments_[kSegments];
};

}  // namespace grzoo
