// One physical table: index, rows and the laws of initial values.
#pragma once
#include <stdint.h>

#include <vector>

#include "grzoo_host.h"
#include "index.h"
#include "rows.h"

namespace grzoo {

class Storage {
public:
    Storage(int64_t dim, bool bfloat16);

    void set_initializer(int32_t table, const InitLaw& law);
    void set_slots(const std::vector<Rows::NewSlot>& slots) { rows_.set_slots(slots); }
    void find(const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles, int threads) const;
    int64_t find_or_insert(const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles, int threads);
    void reserve(int64_t more);
    // Inserts pairs that have no row; row and state hold nothing of use until they are scattered.
    void insert_blank(const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles, int threads);
    // Inserts or overwrites rows with all of their state; slots[k] is that of slot k.
    void write(const int32_t* tables, const int64_t* ids, int64_t n, const float* values, const float* const* slots,
               const int32_t* steps, int threads);
    int64_t erase(const int32_t* tables, const int64_t* ids, int64_t n);
    void gather(const int64_t* handles, int64_t n, float* out, int threads) const;
    void update(int rule, const int64_t* slots, const int64_t* handles, int64_t n, const float* grads,
                const int64_t* keys, const GrzooHyper& hyper, int threads);
    void gather_slot(int64_t slot, const int64_t* handles, int64_t n, float* out, int threads) const;
    // Handles are distinct: new pages, which a loader touches first here, come to all threads.
    void scatter(const int64_t* handles, int64_t n, const float* values, int threads) const;
    void scatter_slot(int64_t slot, const int64_t* handles, int64_t n, const float* values, int threads) const;
    void keys(int32_t* tables, int64_t* ids, int64_t* handles) const;
    // Ids and rows of one logical table by (bucket, id); returns how many. The outputs have room for size().
    int64_t sorted_keys(int32_t table, int64_t* ids, int64_t* handles) const;

    const Rows& rows() const { return rows_; }
    const SlotPlace& slot(int64_t number) const;
    void check_handles(const int64_t* handles, int64_t n, int64_t low) const;
    int64_t size() const { return size_; }
    int64_t bytes() const { return index_.bytes() + rows_.bytes(); }

private:
    void check_tables(const int32_t* tables, int64_t n) const;
    void insert_missing(const int32_t* tables, const int64_t* ids, std::vector<int64_t>& missing, int64_t* handles,
                        int threads, bool initialize);
    int64_t find_or_insert(const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles, int threads, bool initialize);
    UpdateRule make_rule(int rule, const int64_t* slots, const GrzooHyper& hyper);
    void refresh_corrections(const GrzooHyper& hyper);

    Index index_;
    Rows rows_;
    int64_t size_ = 0;
    std::vector<InitLaw> laws_;
    std::vector<uint64_t> column_words_;
    std::vector<Correction> corrections_;
    double corrections_beta1_ = -1, corrections_beta2_ = -1;
};

}  // namespace grzoo
