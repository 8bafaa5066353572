#include "common.h"
#include "functions.h"
#include "pool.h"

namespace grzoo {
namespace {

constexpr int64_t kIdsAhead = 16;
// Sorting out and numbering cost what two threads gain, measured at 20,000 to 1.5M ids; three were not measured.
constexpr int kThreadsThatPay = 4;

struct Pairs {
    const int32_t* tables;
    const int64_t* ids;
    int32_t table(int64_t i) const { return tables ? tables[i] : 0; }
    uint64_t hash(int64_t i) const { return key_hash(table(i), ids[i]); }
    bool equal(int64_t i, int64_t j) const { return (ids[i] == ids[j]) & (!tables || tables[i] == tables[j]); }
};

// Open addressing from a pair to a number, doubled when half full. An entry is a few bits of the hash above the number
// plus one, 0 when empty: small words, so that the map stays in the near caches. The pairs are those of `known`.
template <typename Word, int kNumberBits>
class PairMap {
public:
    PairMap(Pairs known, int64_t expected) : known_(known) {
        while ((int64_t(1) << bits_) < expected * 2) ++bits_;
        entries_.assign(size_t(1) << bits_, 0);
    }

    GRZOO_INLINE void prefetch(uint64_t hash) const { grzoo::prefetch_write(&entries_[hash >> (64 - bits_)]); }

    // The number of the pair; `number` when it is new, which `added` then says. `known` must hold the pair at `number`
    // already. No branch on whether it is new: the processor would guess it wrong every third time.
    GRZOO_INLINE uint32_t find_or_add(uint64_t hash, uint32_t number, bool& added) {
        const Word mine = (static_cast<Word>(hash) & ~kNumber) | static_cast<Word>(number + Word(1));
        const size_t mask = (size_t(1) << bits_) - 1;
        Word* __restrict__ entries = entries_.data();
        for (size_t at = hash >> (64 - bits_);; at = (at + 1) & mask) {
            const Word entry = entries[at], chosen = entry | (mine & (Word(entry != 0) - 1));
            if ((chosen ^ mine) > kNumber) continue;
            const uint32_t found = static_cast<uint32_t>((chosen & kNumber) - 1);
            if (__builtin_expect(!known_.equal(found, number), 0)) continue;
            entries[at] = chosen;
            added = entry == 0;
            size_ += added;
            if (__builtin_expect(size_ * 2 > (int64_t(1) << bits_), 0)) grow();
            return found;
        }
    }

private:
    static constexpr Word kNumber = static_cast<Word>((uint64_t(1) << kNumberBits) - 1);

    __attribute__((noinline)) void grow() {
        std::vector<Word> old(size_t(2) << bits_, 0);
        old.swap(entries_);
        ++bits_;
        const size_t mask = (size_t(1) << bits_) - 1;
        for (Word entry : old) {
            if (!entry) continue;
            size_t at = known_.hash(static_cast<int64_t>((entry & kNumber) - 1)) >> (64 - bits_);
            while (entries_[at]) at = (at + 1) & mask;
            entries_[at] = entry;
        }
    }

    const Pairs known_;
    int bits_ = 4;
    int64_t size_ = 0;
    std::vector<Word> entries_;
};

using SmallMap = PairMap<uint32_t, 20>;
using LargeMap = PairMap<uint64_t, 32>;
bool is_small(int64_t n) { return n < (1 << 20) - 1; }

template <typename Map>
int64_t unique_serial(const Pairs pairs, int64_t n, int32_t* __restrict__ unique_tables, int64_t* __restrict__ unique_ids,
                      int64_t* __restrict__ inverse, int64_t* __restrict__ counts) {
    Map map({unique_tables, unique_ids}, n / 4);
    int64_t found = 0;
    uint64_t hashes[2 * kIdsAhead];
    for (int64_t i = 0; i < n && i < kIdsAhead; ++i) map.prefetch(hashes[i] = pairs.hash(i));
    for (int64_t i = 0; i < n; ++i) {
        if (i + kIdsAhead < n) map.prefetch(hashes[(i + kIdsAhead) % (2 * kIdsAhead)] = pairs.hash(i + kIdsAhead));
        unique_ids[found] = pairs.ids[i];
        if (unique_tables) unique_tables[found] = pairs.tables[i];
        counts[found] = 0;
        bool added;
        const uint32_t number = map.find_or_add(hashes[i % (2 * kIdsAhead)], static_cast<uint32_t>(found), added);
        found += added;
        ++counts[number];
        inverse[i] = number;
    }
    return found;
}

// Each thread owns the pairs of some hash values and finds their first positions; numbers then follow the positions.
template <typename Map>
int64_t unique_parallel(const Pairs& pairs, int64_t n, int32_t* unique_tables, int64_t* unique_ids, int64_t* inverse,
                        int64_t* counts, int parts) {
    std::vector<uint32_t> repeats(static_cast<size_t>(n), 0);      // at first positions: how often the pair occurs
    std::vector<uint32_t> number_of(static_cast<size_t>(n));
    std::vector<uint64_t> hashes(static_cast<size_t>(n));
    parallel_ranges(n, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) hashes[static_cast<size_t>(i)] = pairs.hash(i);
    });
    parallel(parts, [&](int part) {
        // by low bits of the hash: the maps use the high ones
        const uint64_t owners = static_cast<uint64_t>(parts), own = static_cast<uint64_t>(part);
        std::vector<uint32_t> mine(static_cast<size_t>(n) + 1);
        size_t count = 0;
        for (int64_t i = 0; i < n; ++i) {
            mine[count] = static_cast<uint32_t>(i);
            count += ((hashes[static_cast<size_t>(i)] & 0xFFFF) * owners) >> 16 == own;
        }
        Map map(pairs, n / parts / 4);
        for (size_t k = 0; k < count; ++k) {
            if (k + kIdsAhead < count) map.prefetch(hashes[mine[k + kIdsAhead]]);
            const uint32_t i = mine[k];
            bool added;
            const uint32_t first = map.find_or_add(hashes[i], i, added);
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
    const int parts = threads < kThreadsThatPay ? 1 : parts_for(n, std::min(threads, 64), 1 << 14);
    const auto run = [&](auto serial, auto parallel) {
        return parts == 1 ? serial(pairs, n, unique_tables, unique_ids, inverse, counts)
                          : parallel(pairs, n, unique_tables, unique_ids, inverse, counts, parts);
    };
    return is_small(n) ? run(unique_serial<SmallMap>, unique_parallel<SmallMap>) : run(unique_serial<LargeMap>, unique_parallel<LargeMap>);
}

}  // namespace grzoo
