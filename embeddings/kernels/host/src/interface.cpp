// The C interface: turns exceptions into statuses and holds the lock of a storage during a call.
#include "grzoo_host.h"

#include <stdio.h>

#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "common.h"
#include "functions.h"
#include "kernels.h"
#include "memory.h"
#include "storage.h"

struct GrzooStorage {
    std::mutex mutex;                          // every call holds it
    std::unique_ptr<grzoo::Storage> table;     // null once closed
};

namespace {

thread_local char message[512];    // no string: it may have to say that there is no memory

int fail(int status, const char* what) {
    snprintf(message, sizeof message, "%s", what);
    return status;
}

template <typename F>
int guarded(F&& body) {
    try {
        body();
        return GRZOO_OK;
    } catch (const grzoo::InvalidArgument& error) {
        return fail(GRZOO_INVALID, error.what());
    } catch (const grzoo::OutOfMemory& error) {
        return fail(GRZOO_MEMORY, error.what());
    } catch (const std::bad_alloc&) {
        return fail(GRZOO_MEMORY, "the system refused memory for the work of an embedding operation");
    } catch (const std::exception& error) {
        return fail(GRZOO_INTERNAL, error.what());
    }
}

template <typename F>
int locked(GrzooStorage* storage, F&& body) {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(storage->mutex);
        if (!storage->table) throw std::runtime_error("this embedding table was closed");
        body(*storage->table);
    });
}

}  // namespace

extern "C" {

const char* grzoo_error(void) { return message; }
const char* grzoo_isa(void) { return grzoo::kernels().name; }

int grzoo_set_isa(const char* name) {
    return guarded([&] {
        if (!grzoo::choose_kernels(name)) throw grzoo::InvalidArgument(std::string("this processor or build has no ") + name);
    });
}

void grzoo_set_memory_limit(int64_t bytes) { grzoo::set_memory_limit(bytes); }
int64_t grzoo_mapped_bytes(void) { return grzoo::mapped_bytes(); }
void grzoo_use_huge_pages(void* address, int64_t bytes) { grzoo::use_huge_pages(address, static_cast<size_t>(bytes)); }

int grzoo_unique(const int32_t* tables, const int64_t* ids, int64_t n, int32_t* unique_tables, int64_t* unique_ids,
                 int64_t* inverse, int64_t* counts, int64_t* num_unique, int threads) {
    return guarded([&] { *num_unique = grzoo::unique(tables, ids, n, unique_tables, unique_ids, inverse, counts, threads); });
}

int grzoo_segment_sum(const float* values, const int64_t* index, int64_t n, int64_t dim, int64_t segments, float* out,
                      int accumulate, int threads) {
    return guarded([&] { grzoo::segment_sum(values, index, n, dim, segments, out, accumulate != 0, threads); });
}

int grzoo_squared_norm(const float* values, int64_t n, int64_t dim, double* out, int threads) {
    return guarded([&] { *out = grzoo::squared_norm(values, n, dim, threads); });
}

int grzoo_take_rows(const float* values, int64_t rows, const int64_t* index, int64_t n, int64_t dim, float* out, int threads) {
    return guarded([&] { grzoo::take_rows(values, rows, index, n, dim, out, threads); });
}

int grzoo_pool_rows(const float* values, int64_t rows, const int64_t* index, int64_t n, const int64_t* offsets, int64_t bags,
                    const float* weights, int64_t dim, float* out, int threads) {
    return guarded([&] { grzoo::pool_rows(values, rows, index, n, offsets, bags, weights, dim, out, threads); });
}

int grzoo_unpool_rows(const float* grads, const int64_t* index, int64_t n, const int64_t* offsets, int64_t bags,
                      const float* weights, int64_t rows, int64_t dim, float* out, int threads) {
    return guarded([&] { grzoo::unpool_rows(grads, index, n, offsets, bags, weights, rows, dim, out, threads); });
}

int grzoo_storage_new(int64_t dim, int bfloat16, GrzooStorage** out) {
    return guarded([&] {
        if (dim <= 0) throw grzoo::InvalidArgument("the width of a row is " + std::to_string(dim) + ": it must be positive");
        auto made = std::make_unique<GrzooStorage>();
        made->table = std::make_unique<grzoo::Storage>(dim, bfloat16 != 0);
        *out = made.release();
    });
}

void grzoo_storage_close(GrzooStorage* storage) {
    std::lock_guard<std::mutex> lock(storage->mutex);
    storage->table.reset();
}

void grzoo_storage_free(GrzooStorage* storage) { delete storage; }

int grzoo_storage_initializer(GrzooStorage* storage, int32_t table, int kind, int64_t key, float value, const float* quantiles) {
    return locked(storage, [&](grzoo::Storage& rows) {
        if (kind < GRZOO_CONSTANT || kind > GRZOO_QUANTILE || (kind == GRZOO_QUANTILE && !quantiles))
            throw grzoo::InvalidArgument("no initial law of kind " + std::to_string(kind));
        rows.set_initializer(table, {kind, static_cast<uint64_t>(key), value, quantiles});
    });
}

int grzoo_storage_set_slots(GrzooStorage* storage, int64_t count, const int64_t* widths, const float* fills, const int64_t* previous) {
    return locked(storage, [&](grzoo::Storage& table) {
        std::vector<grzoo::Rows::NewSlot> slots;
        for (int64_t k = 0; k < count; ++k) {
            if (previous[k] >= 0 && table.slot(previous[k]).width != widths[k])
                throw grzoo::InvalidArgument("a slot that keeps its values keeps its width");
            slots.push_back({widths[k], fills[k], previous[k]});
        }
        table.set_slots(slots);
    });
}

int grzoo_storage_find(GrzooStorage* storage, const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles, int threads) {
    return locked(storage, [&](grzoo::Storage& table) { table.find(tables, ids, n, handles, threads); });
}

int grzoo_storage_find_or_insert(GrzooStorage* storage, const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles,
                                 int64_t* inserted, int threads) {
    return locked(storage, [&](grzoo::Storage& table) { *inserted = table.find_or_insert(tables, ids, n, handles, threads); });
}

int grzoo_storage_gather(GrzooStorage* storage, const int64_t* handles, int64_t n, float* out, int threads) {
    return locked(storage, [&](grzoo::Storage& table) { table.gather(handles, n, out, threads); });
}

int grzoo_storage_gather_slot(GrzooStorage* storage, int64_t slot, const int64_t* handles, int64_t n, float* out,
                              int threads) {
    return locked(storage, [&](grzoo::Storage& table) { table.gather_slot(slot, handles, n, out, threads); });
}

int grzoo_storage_scatter_slot(GrzooStorage* storage, int64_t slot, const int64_t* handles, int64_t n, const float* values,
                               int threads) {
    return locked(storage, [&](grzoo::Storage& table) { table.scatter_slot(slot, handles, n, values, threads); });
}

int grzoo_storage_scatter(GrzooStorage* storage, const int64_t* handles, int64_t n, const float* rows, int threads) {
    return locked(storage, [&](grzoo::Storage& table) { table.scatter(handles, n, rows, threads); });
}

int grzoo_storage_gather_step(GrzooStorage* storage, const int64_t* handles, int64_t n, int32_t* out) {
    return locked(storage, [&](grzoo::Storage& table) {
        table.check_handles(handles, n, 0);
        for (int64_t i = 0; i < n; ++i) out[i] = table.rows().view().step(handles[i])[0];
    });
}

int grzoo_storage_scatter_step(GrzooStorage* storage, const int64_t* handles, int64_t n, const int32_t* steps) {
    return locked(storage, [&](grzoo::Storage& table) {
        table.check_handles(handles, n, 0);
        for (int64_t i = 0; i < n; ++i) table.rows().view().step(handles[i])[0] = steps[i];
    });
}

int grzoo_storage_erase(GrzooStorage* storage, const int32_t* tables, const int64_t* ids, int64_t n, int64_t* erased) {
    return locked(storage, [&](grzoo::Storage& table) { *erased = table.erase(tables, ids, n); });
}

int grzoo_storage_update(GrzooStorage* storage, int rule, const int64_t* slots, const int64_t* handles, int64_t n,
                         const float* grads, const int64_t* keys, const GrzooHyper* hyper, int threads) {
    return locked(storage, [&](grzoo::Storage& table) { table.update(rule, slots, handles, n, grads, keys, *hyper, threads); });
}

int grzoo_storage_keys(GrzooStorage* storage, int32_t* tables, int64_t* ids, int64_t* handles) {
    return locked(storage, [&](grzoo::Storage& table) { table.keys(tables, ids, handles); });
}

int grzoo_storage_sorted_keys(GrzooStorage* storage, int32_t table, int64_t* ids, int64_t* handles, int64_t* count) {
    return locked(storage, [&](grzoo::Storage& rows) { *count = rows.sorted_keys(table, ids, handles); });
}

int grzoo_storage_reserve(GrzooStorage* storage, int64_t more) {
    return locked(storage, [&](grzoo::Storage& table) { table.reserve(more); });
}

int grzoo_storage_insert_blank(GrzooStorage* storage, const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles,
                               int threads) {
    return locked(storage, [&](grzoo::Storage& table) { table.insert_blank(tables, ids, n, handles, threads); });
}

int grzoo_storage_write(GrzooStorage* storage, const int32_t* tables, const int64_t* ids, int64_t n, const float* rows,
                        const float* const* slots, const int32_t* steps, int threads) {
    return locked(storage, [&](grzoo::Storage& table) { table.write(tables, ids, n, rows, slots, steps, threads); });
}

int64_t grzoo_storage_size(GrzooStorage* storage) {
    std::lock_guard<std::mutex> lock(storage->mutex);
    return storage->table ? storage->table->size() : -1;
}

int64_t grzoo_storage_bytes(GrzooStorage* storage) {
    std::lock_guard<std::mutex> lock(storage->mutex);
    return storage->table ? storage->table->bytes() : -1;
}

}  // extern "C"
