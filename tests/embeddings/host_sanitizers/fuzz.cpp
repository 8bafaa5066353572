// Drives the C interface with random calls, good and bad, against a std::map; meant to be built with a sanitizer:
//     fuzz SEED ROUNDS            one thread of control, kernels with 1..5 threads: AddressSanitizer, UBSan
//     fuzz SEED ROUNDS threads    several threads share storages, then fork: ThreadSanitizer
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <map>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "grzoo_host.h"

#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, grzoo_error()); \
            abort();                                                                            \
        }                                                                                       \
    } while (0)

namespace {

using Key = std::pair<int32_t, int64_t>;
std::vector<float> quantiles(65536, 0.5f);

GrzooStorage* make(int64_t dim, int bfloat16) {
    GrzooStorage* storage = nullptr;
    CHECK(grzoo_storage_new(dim, bfloat16, &storage) == GRZOO_OK);
    for (int32_t table = 0; table < 3; ++table)
        CHECK(grzoo_storage_initializer(storage, table, table, 7 + table, 0.25f, quantiles.data()) == GRZOO_OK);
    return storage;
}

struct Layout {
    int rule;
    std::vector<int64_t> widths;
};

Layout layout_of(int rule, int64_t dim) {
    if (rule == GRZOO_ROWWISE_ADAGRAD) return {rule, {1}};
    if (rule == GRZOO_ADAM || rule == GRZOO_ADAMW) return {rule, {dim, dim}};
    return {rule, {dim}};
}

void set_layout(GrzooStorage* storage, const Layout& layout) {
    std::vector<float> fills(layout.widths.size(), 0.1f);
    std::vector<int64_t> previous(layout.widths.size(), -1);
    CHECK(grzoo_storage_set_slots(storage, static_cast<int64_t>(layout.widths.size()), layout.widths.data(), fills.data(), previous.data()) ==
          GRZOO_OK);
}

class Fuzz {
public:
    Fuzz(uint64_t seed, int64_t dim) : random_(seed), dim_(dim), storage_(make(dim, static_cast<int>(seed % 2))) { relayout(); }
    ~Fuzz() { grzoo_storage_free(storage_); }

    void round() {
        switch (random_() % 9) {
            case 0: case 1: case 2: insert(); break;
            case 3: erase(); break;
            case 4: find_and_gather(); break;
            case 5: update(); break;
            case 6: functions(); break;
            case 7: bad_calls(); break;
            default: random_() % 10 ? state() : relayout();
        }
        CHECK(grzoo_storage_size(storage_) == static_cast<int64_t>(alive_.size()));
    }

private:
    int threads() { return 1 + static_cast<int>(random_() % 5); }
    int64_t size() { return static_cast<int64_t>(random_() % 5 ? random_() % 300 : random_() % 20000); }

    Key key() {
        const int64_t extremes[] = {0, -1, 1, INT64_MIN, INT64_MAX};
        int64_t id = random_() % 16 == 0 ? extremes[random_() % 5] : static_cast<int64_t>((random_() % 30000) << 40);
        return {static_cast<int32_t>(random_() % 3), id};
    }

    void draw(int64_t n, bool distinct) {
        tables_.clear();
        ids_.clear();
        std::set<Key> seen;
        for (int64_t i = 0; i < n; ++i) {
            const Key k = key();
            if (distinct && !seen.insert(k).second) continue;
            tables_.push_back(k.first);
            ids_.push_back(k.second);
        }
        handles_.assign(ids_.size(), -7);
    }

    int64_t count() const { return static_cast<int64_t>(ids_.size()); }

    void insert() {
        draw(size(), random_() % 4 != 0);
        int64_t inserted = -1;
        CHECK(grzoo_storage_find_or_insert(storage_, tables_.data(), ids_.data(), count(), handles_.data(), &inserted, threads()) == GRZOO_OK);
        int64_t added = 0;
        for (size_t i = 0; i < ids_.size(); ++i) {
            auto [where, is_new] = alive_.insert({{tables_[i], ids_[i]}, handles_[i]});
            added += is_new;
            CHECK(where->second == handles_[i]);
        }
        CHECK(added == inserted);
    }

    void erase() {
        draw(size(), false);
        int64_t erased = -1, expected = 0;
        CHECK(grzoo_storage_erase(storage_, tables_.data(), ids_.data(), count(), &erased) == GRZOO_OK);
        for (size_t i = 0; i < ids_.size(); ++i) expected += static_cast<int64_t>(alive_.erase({tables_[i], ids_[i]}));
        CHECK(erased == expected);
    }

    void find_and_gather() {
        draw(size(), false);
        CHECK(grzoo_storage_find(storage_, tables_.data(), ids_.data(), count(), handles_.data(), threads()) == GRZOO_OK);
        for (size_t i = 0; i < ids_.size(); ++i) {
            auto where = alive_.find({tables_[i], ids_[i]});
            CHECK(handles_[i] == (where == alive_.end() ? -1 : where->second));
        }
        std::vector<float> rows(ids_.size() * static_cast<size_t>(dim_), NAN);
        CHECK(grzoo_storage_gather(storage_, handles_.data(), count(), rows.data(), threads()) == GRZOO_OK);
        for (float value : rows) CHECK(!std::isnan(value));
    }

    // handles_ of some rows, distinct
    void pick() {
        handles_.clear();
        for (const auto& [k, handle] : alive_)
            if (random_() % 3 == 0) handles_.push_back(handle);
    }

    void update() {
        pick();
        std::vector<float> grads(handles_.size() * static_cast<size_t>(dim_), 0.5f);
        const GrzooHyper hyper{0.1, 0.9, 0.9, 0.999, 1e-8, 0.01, random_() % 2 ? 0.0 : 3.0};
        const int64_t slots[2] = {0, 1};
        CHECK(grzoo_storage_update(storage_, layout_.rule, slots, handles_.data(), static_cast<int64_t>(handles_.size()), grads.data(),
                                   random_() % 2 ? handles_.data() : nullptr, &hyper, threads()) == GRZOO_OK);
    }

    void state() {
        pick();
        const int64_t n = static_cast<int64_t>(handles_.size());
        for (size_t k = 0; k < layout_.widths.size(); ++k) {
            std::vector<float> values(handles_.size() * static_cast<size_t>(layout_.widths[k]));
            CHECK(grzoo_storage_gather_slot(storage_, static_cast<int64_t>(k), handles_.data(), n, values.data(), 2) == GRZOO_OK);
            CHECK(grzoo_storage_scatter_slot(storage_, static_cast<int64_t>(k), handles_.data(), n, values.data(), 2) == GRZOO_OK);
        }
        std::vector<int32_t> steps(handles_.size());
        CHECK(grzoo_storage_gather_step(storage_, handles_.data(), n, steps.data()) == GRZOO_OK);
        CHECK(grzoo_storage_scatter_step(storage_, handles_.data(), n, steps.data()) == GRZOO_OK);
        std::vector<float> rows(handles_.size() * static_cast<size_t>(dim_), 1.f);
        CHECK(grzoo_storage_scatter(storage_, handles_.data(), n, rows.data(), threads()) == GRZOO_OK);
        const size_t total = alive_.size();
        std::vector<int32_t> tables(total);
        std::vector<int64_t> ids(total), handles(total);
        CHECK(grzoo_storage_keys(storage_, tables.data(), ids.data(), handles.data()) == GRZOO_OK);
        for (size_t i = 0; i < total; ++i) CHECK(alive_.at({tables[i], ids[i]}) == handles[i]);
    }

    void relayout() {
        layout_ = layout_of(static_cast<int>(random_() % 5), dim_);
        set_layout(storage_, layout_);
    }

    void functions() {
        const int64_t n = random_() % 4 ? size() : 40000;
        draw(n, false);
        const bool with_tables = random_() % 2;
        std::vector<int32_t> unique_tables(ids_.size());
        std::vector<int64_t> unique_ids(ids_.size()), inverse(ids_.size()), counts(ids_.size());
        int64_t found = -1;
        CHECK(grzoo_unique(with_tables ? tables_.data() : nullptr, ids_.data(), n, with_tables ? unique_tables.data() : nullptr,
                           unique_ids.data(), inverse.data(), counts.data(), &found, threads()) == GRZOO_OK);
        int64_t next = 0;
        for (size_t i = 0; i < ids_.size(); ++i) {
            CHECK(inverse[i] <= next && unique_ids[static_cast<size_t>(inverse[i])] == ids_[i]);
            if (with_tables) CHECK(unique_tables[static_cast<size_t>(inverse[i])] == tables_[i]);
            next += inverse[i] == next;
        }
        CHECK(next == found);
        std::vector<float> values(static_cast<size_t>(n * dim_), 1.f), sums(static_cast<size_t>(found * dim_), 0.f);
        const int accumulate = static_cast<int>(random_() % 2);
        CHECK(grzoo_segment_sum(values.data(), inverse.data(), n, dim_, found, sums.data(), accumulate, threads()) == GRZOO_OK);
        for (int64_t s = 0; s < found; ++s) CHECK(sums[static_cast<size_t>(s * dim_)] == float(counts[static_cast<size_t>(s)]));
        double norm = -1, expected = 0;
        CHECK(grzoo_squared_norm(sums.data(), found, dim_, &norm, threads()) == GRZOO_OK);
        for (float sum : sums) expected += double(sum) * double(sum);
        CHECK(norm == expected);    // whole numbers: exact in any order
        grzoo_use_huge_pages(values.data(), static_cast<int64_t>(values.size() * sizeof(float)));
        std::vector<float> taken(static_cast<size_t>(n * dim_));
        CHECK(grzoo_take_rows(sums.data(), found, inverse.data(), n, dim_, taken.data(), threads()) == GRZOO_OK);
        pool(sums, found, inverse);
    }

    // Bags of 0 to 3 rows, the rest in the last one; then the sum over the bags is that over the rows.
    void pool(const std::vector<float>& values, int64_t rows, const std::vector<int64_t>& index) {
        const int64_t n = static_cast<int64_t>(index.size());
        std::vector<int64_t> offsets{0};
        while (offsets.size() < 50 && offsets.back() + 3 <= n) offsets.push_back(offsets.back() + static_cast<int64_t>(random_() % 4));
        offsets.push_back(n);
        const int64_t bags = static_cast<int64_t>(offsets.size()) - 1;
        const std::vector<float> ones(index.size(), 1.f);
        const float* weights = random_() % 2 ? ones.data() : nullptr;
        std::vector<float> pooled(static_cast<size_t>(bags * dim_)), back(static_cast<size_t>(rows * dim_), 0.f);
        CHECK(grzoo_pool_rows(values.data(), rows, index.data(), n, offsets.data(), bags, weights, dim_, pooled.data(), threads()) == GRZOO_OK);
        double expected = 0, sum = 0;
        for (int64_t row : index) expected += values[static_cast<size_t>(row * dim_)];
        for (int64_t b = 0; b < bags; ++b) sum += pooled[static_cast<size_t>(b * dim_)];
        CHECK(sum == expected);
        CHECK(grzoo_unpool_rows(pooled.data(), index.data(), n, offsets.data(), bags, weights, rows, dim_, back.data(), threads()) == GRZOO_OK);
        offsets.back() += 1;
        CHECK(grzoo_pool_rows(values.data(), rows, index.data(), n, offsets.data(), bags, weights, dim_, pooled.data(), 1) == GRZOO_INVALID);
    }

    void bad_calls() {
        const int64_t beyond = INT64_MAX, below = -2, one = 1;
        const int32_t table = 3;
        int64_t handle = 0;
        std::vector<float> row(static_cast<size_t>(dim_), 0.f);
        CHECK(grzoo_storage_gather(storage_, &beyond, 1, row.data(), 1) == GRZOO_INVALID);
        CHECK(grzoo_storage_gather(storage_, &below, 1, row.data(), 1) == GRZOO_INVALID);
        CHECK(grzoo_storage_scatter(storage_, &below, 1, row.data(), 1) == GRZOO_INVALID);
        CHECK(grzoo_storage_find(storage_, &table, &one, 1, &handle, 1) == GRZOO_INVALID);
        CHECK(grzoo_storage_gather_slot(storage_, 99, &handle, 0, row.data(), 1) == GRZOO_INVALID);
        CHECK(grzoo_segment_sum(row.data(), &one, 1, dim_, 1, row.data(), 0, 1) == GRZOO_INVALID);
        grzoo_set_memory_limit(1);
        draw(20000, true);
        int64_t inserted = 0;
        const int status = grzoo_storage_find_or_insert(storage_, tables_.data(), ids_.data(), count(), handles_.data(), &inserted, 2);
        grzoo_set_memory_limit(0);
        CHECK(status == GRZOO_MEMORY || status == GRZOO_OK);
        if (status == GRZOO_OK)
            for (size_t i = 0; i < ids_.size(); ++i) alive_.insert({{tables_[i], ids_[i]}, handles_[i]});
    }

    std::mt19937_64 random_;
    int64_t dim_;
    GrzooStorage* storage_;
    Layout layout_{};
    std::map<Key, int64_t> alive_;
    std::vector<int32_t> tables_;
    std::vector<int64_t> ids_, handles_;
};

// Several threads insert, find and update in one storage, each in its own ids; the pool is shared by all.
void share(uint64_t seed, int rounds) {
    GrzooStorage* storage = make(8, 1);
    set_layout(storage, layout_of(GRZOO_ADAM, 8));
    std::vector<std::thread> workers;
    for (int worker = 0; worker < 4; ++worker)
        workers.emplace_back([=] {
            std::mt19937_64 random(seed + static_cast<uint64_t>(worker));
            const int64_t n = 6000;
            std::vector<int32_t> tables(static_cast<size_t>(n), 1);
            std::vector<int64_t> ids(static_cast<size_t>(n)), handles(static_cast<size_t>(n));
            std::vector<float> rows(static_cast<size_t>(n * 8));
            const GrzooHyper hyper{0.1, 0.9, 0.9, 0.999, 1e-8, 0, 0};
            const int64_t slots[2] = {0, 1};
            for (int round = 0; round < rounds; ++round) {
                for (int64_t i = 0; i < n; ++i) ids[static_cast<size_t>(i)] = (i * 4 + worker) * 977 + round % 3;
                int64_t count = 0;
                CHECK(grzoo_storage_find_or_insert(storage, tables.data(), ids.data(), n, handles.data(), &count, 3) == GRZOO_OK);
                CHECK(grzoo_storage_gather(storage, handles.data(), n, rows.data(), 3) == GRZOO_OK);
                CHECK(grzoo_storage_update(storage, GRZOO_ADAM, slots, handles.data(), n, rows.data(), ids.data(), &hyper, 3) == GRZOO_OK);
                if (random() % 2) CHECK(grzoo_storage_erase(storage, tables.data(), ids.data(), n, &count) == GRZOO_OK);
            }
        });
    for (std::thread& worker : workers) worker.join();
    grzoo_storage_free(storage);
}

// A child of fork has none of the pool's threads and must make its own.
void fork_and_run(uint64_t seed) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        Fuzz fuzz(seed, 16);
        for (int round = 0; round < 20; ++round) fuzz.round();
        _exit(0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc >= 3);
    const uint64_t seed = strtoull(argv[1], nullptr, 10);
    const int rounds = atoi(argv[2]);
    const bool threads = argc > 3 && strcmp(argv[3], "threads") == 0;
    const int64_t dims[] = {1, 5, 16, 64};
    for (const char* isa : {"baseline", "avx2", "avx512"}) {
        if (grzoo_set_isa(isa) != GRZOO_OK) continue;
        for (int64_t dim : dims) {
            Fuzz fuzz(seed + static_cast<uint64_t>(dim), dim);
            for (int round = 0; round < rounds; ++round) fuzz.round();
        }
    }
    if (threads) share(seed, rounds / 10 + 3);
    if (!threads) fork_and_run(seed);    // ThreadSanitizer does not follow a fork of a process with threads
    CHECK(grzoo_mapped_bytes() == 0);
    printf("ok\n");
    return 0;
}
