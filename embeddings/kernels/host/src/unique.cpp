#include "common.h"
#include "functions.h"
#include "pool.h"

namespace grzoo {
namespace {

constexpr uint32_t kNone = UINT32_MAX;
constexpr int64_t kIdsAhead = 16;

struct Pairs {
    const int32_t* tables;
    const int64_t* ids;
    int32_t table(int64_t i) const { return tables ? tables[i] : 0; }
    uint64_t hash(int64_t i) const { return key_hash(table(i), ids[i]); }
};

// Open addressing from a pair to a number, that doubles when half full: sized by what is distinct, not by n, and eight
// bytes an entry, so that it stays in the near caches. The pairs themselves are those of `known`, by number.
class PairMap {
public:
    PairMap(Pairs known, int64_t expected) : known_(known) {
        while ((int64_t(1) << bits_) < expected * 2) ++bits_;
        entries_.assign(size_t(1) << bits_, Entry{0, kNone});
    }

    GRZOO_INLINE void prefetch(uint64_t hash) const { grzoo::prefetch_write(&entries_[hash >> (64 - bits_)]); }

    // The number of the pair; `number` when it is new, which `added` then says.
    uint32_t find_or_add(uint64_t hash, int32_t table, int64_t id, uint32_t number, bool& added) {
        const uint32_t tag = static_cast<uint32_t>(hash);
        const size_t mask = (size_t(1) << bits_) - 1;
        for (size_t at = hash >> (64 - bits_);; at = (at + 1) & mask) {
            const Entry entry = entries_[at];
            added = entry.number == kNone;
            if (added) {
                entries_[at] = {tag, number};
                if (++size_ * 2 > (int64_t(1) << bits_)) grow();
                return number;
            }
            if (entry.tag == tag && known_.ids[entry.number] == id && known_.table(entry.number) == table) return entry.number;
        }
    }

private:
    struct Entry {
        uint32_t tag, number;
    };

    void grow() {
        std::vector<Entry> old(size_t(2) << bits_, Entry{0, kNone});
        old.swap(entries_);
        ++bits_;
        const size_t mask = (size_t(1) << bits_) - 1;
        for (const Entry& entry : old) {
            if (entry.number == kNone) continue;
            size_t at = known_.hash(entry.number) >> (64 - bits_);
            while (entries_[at].number != kNone) at = (at + 1) & mask;
            entries_[at] = entry;
        }
    }

    Pairs known_;
    int bits_ = 4;
    int64_t size_ = 0;
    std::vector<Entry> entries_;
};

int64_t unique_serial(const Pairs& pairs, int64_t n, int32_t* unique_tables, int64_t* unique_ids, int64_t* inverse,
                      int64_t* counts) {
    PairMap map({unique_tables, unique_ids}, n / 8);
    int64_t found = 0;
    uint64_t hashes[2 * kIdsAhead];
    for (int64_t i = 0; i < n && i < kIdsAhead; ++i) map.prefetch(hashes[i] = pairs.hash(i));
    for (int64_t i = 0; i < n; ++i) {
        if (i + kIdsAhead < n) map.prefetch(hashes[(i + kIdsAhead) % (2 * kIdsAhead)] = pairs.hash(i + kIdsAhead));
        // written before it is known to be new: the map reads it there when it grows
        unique_ids[found] = pairs.ids[i];
        if (unique_tables) unique_tables[found] = pairs.tables[i];
        bool added;
        const uint32_t number = map.find_or_add(hashes[i % (2 * kIdsAhead)], pairs.table(i), pairs.ids[i],
                                                static_cast<uint32_t>(found), added);
        if (added) counts[found++] = 0;
        ++counts[number];
        inverse[i] = number;
    }
    return found;
}

// Each thread owns the pairs of some hash values and finds their first positions; numbers then follow the positions.
int64_t unique_parallel(const Pairs& pairs, int64_t n, int32_t* unique_tables, int64_t* unique_ids, int64_t* inverse,
                        int64_t* counts, int parts) {
    std::vector<uint32_t> repeats(static_cast<size_t>(n), 0);      // at first positions: how often the pair occurs
    std::vector<uint32_t> number_of(static_cast<size_t>(n));
    std::vector<uint16_t> owner(static_cast<size_t>(n));
    parallel_ranges(n, parts, 1, [&](int64_t begin, int64_t end) {
        // by low bits of the hash: the maps use the high ones
        for (int64_t i = begin; i < end; ++i)
            owner[static_cast<size_t>(i)] = static_cast<uint16_t>(((pairs.hash(i) & 0xFFFFFFFFull) * static_cast<uint64_t>(parts)) >> 32);
    });
    parallel(parts, [&](int part) {
        PairMap map(pairs, n / parts / 8);
        std::vector<uint32_t> mine;
        mine.reserve(static_cast<size_t>(n / parts + n / 8 + 16));
        for (int64_t i = 0; i < n; ++i)
            if (owner[static_cast<size_t>(i)] == part) mine.push_back(static_cast<uint32_t>(i));
        for (size_t k = 0; k < mine.size(); ++k) {
            if (k + kIdsAhead < mine.size()) map.prefetch(pairs.hash(mine[k + kIdsAhead]));
            const uint32_t i = mine[k];
            bool added;
            const uint32_t first = map.find_or_add(pairs.hash(i), pairs.table(i), pairs.ids[i], i, added);
            ++repeats[first];
            inverse[i] = first;
        }
    });
    std::vector<int64_t> begin_of(static_cast<size_t>(parts) + 1, 0);
    parallel(parts, [&](int part) {
        int64_t firsts = 0;
        for (int64_t i = part_begin(n, parts, part); i < part_begin(n, parts, part + 1); ++i)
            firsts += repeats[static_cast<size_t>(i)] != 0;
        begin_of[static_cast<size_t>(part) + 1] = firsts;
    });
    for (int part = 0; part < parts; ++part) begin_of[static_cast<size_t>(part) + 1] += begin_of[static_cast<size_t>(part)];
    parallel(parts, [&](int part) {
        int64_t next = begin_of[static_cast<size_t>(part)];
        for (int64_t i = part_begin(n, parts, part); i < part_begin(n, parts, part + 1); ++i) {
            const uint32_t occurrences = repeats[static_cast<size_t>(i)];
            if (!occurrences) continue;
            number_of[static_cast<size_t>(i)] = static_cast<uint32_t>(next);
            unique_ids[next] = pairs.ids[i];
            if (unique_tables) unique_tables[next] = pairs.tables[i];
            counts[next++] = occurrences;
        }
    });
    parallel_ranges(n, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) inverse[i] = number_of[static_cast<size_t>(inverse[i])];
    });
    return begin_of.back();
}

}  // namespace

int64_t unique(const int32_t* tables, const int64_t* ids, int64_t n, int32_t* unique_tables, int64_t* unique_ids,
               int64_t* inverse, int64_t* counts, int threads) {
    if (n >= int64_t(UINT32_MAX)) throw InvalidArgument("unique takes at most 2^32 - 2 ids");
    const Pairs pairs{tables, ids};
    const int parts = parts_for(n, std::min(threads, 64), 1 << 14);
    if (parts == 1) return unique_serial(pairs, n, unique_tables, unique_ids, inverse, counts);
    return unique_parallel(pairs, n, unique_tables, unique_ids, inverse, counts, parts);
}

}  // namespace grzoo
