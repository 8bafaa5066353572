// The plain C interface of the host backend. Pointers are to contiguous memory of the caller; a call returns 0, or a
// status below after which grzoo_error() holds the message of this thread. Nothing is changed by a call that fails but
// what it was to fill.
#pragma once
#include <stdint.h>

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

enum { GRZOO_OK = 0, GRZOO_INVALID = 1, GRZOO_MEMORY = 2, GRZOO_INTERNAL = 3 };    // the last one also after close
enum { GRZOO_CONSTANT = 0, GRZOO_UNIFORM = 1, GRZOO_QUANTILE = 2 };
enum { GRZOO_SGD = 0, GRZOO_ADAGRAD = 1, GRZOO_ROWWISE_ADAGRAD = 2, GRZOO_ADAM = 3, GRZOO_ADAMW = 4 };

typedef struct GrzooStorage GrzooStorage;

typedef struct GrzooHyper {
    double lr, momentum, beta1, beta2, eps, weight_decay;
    double step;   // > 0: Adam's bias correction of this step for all rows; 0: of each row's own step
} GrzooHyper;

const char* grzoo_error(void);
const char* grzoo_isa(void);                       // "avx512", "avx2" or "baseline": what the kernels run with
int grzoo_set_isa(const char* name);               // for tests; GRZOO_INVALID where the processor lacks it
void grzoo_set_memory_limit(int64_t bytes);        // on what the storages of this process map; 0: the machine's memory alone
int64_t grzoo_mapped_bytes(void);
void grzoo_use_huge_pages(void* address, int64_t bytes);   // for what of this memory is not in use yet; a wish, no more

// tables and unique_tables may be null: then ids alone are compared. The outputs have room for n.
int grzoo_unique(const int32_t* tables, const int64_t* ids, int64_t n, int32_t* unique_tables, int64_t* unique_ids,
                 int64_t* inverse, int64_t* counts, int64_t* num_unique, int threads);
// accumulate != 0: the sums start from what out holds
int grzoo_segment_sum(const float* values, const int64_t* index, int64_t n, int64_t dim, int64_t segments, float* out,
                      int accumulate, int threads);
int grzoo_squared_norm(const float* values, int64_t n, int64_t dim, double* out, int threads);
int grzoo_take_rows(const float* values, int64_t rows, const int64_t* index, int64_t n, int64_t dim, float* out,
                    int threads);
// bags b of rows offsets[b] .. offsets[b + 1]; weights may be null; out of the second has `rows` rows and is added to
int grzoo_pool_rows(const float* values, int64_t rows, const int64_t* index, int64_t n, const int64_t* offsets, int64_t bags,
                    const float* weights, int64_t dim, float* out, int threads);
int grzoo_unpool_rows(const float* grads, const int64_t* index, int64_t n, const int64_t* offsets, int64_t bags,
                      const float* weights, int64_t rows, int64_t dim, float* out, int threads);

// bfloat16 != 0: rows are that, state and all that is given and returned is float32
int grzoo_storage_new(int64_t dim, int bfloat16, GrzooStorage** out);
void grzoo_storage_close(GrzooStorage* storage);   // frees the rows when the call that runs has ended; calls then fail
void grzoo_storage_free(GrzooStorage* storage);    // when nobody will call any more
// value: the float32 factor of the law; quantiles: 65,536 floats that outlive the storage, or null
int grzoo_storage_initializer(GrzooStorage* storage, int32_t table, int kind, int64_t key, float value,
                              const float* quantiles);
// previous[k]: which of the present slots becomes slot k, or -1 for a new one, which gets its fill value
int grzoo_storage_set_slots(GrzooStorage* storage, int64_t count, const int64_t* widths, const float* fills,
                            const int64_t* previous);
int grzoo_storage_find(GrzooStorage* storage, const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles,
                       int threads);
int grzoo_storage_find_or_insert(GrzooStorage* storage, const int32_t* tables, const int64_t* ids, int64_t n,
                                 int64_t* handles, int64_t* inserted, int threads);
int grzoo_storage_gather(GrzooStorage* storage, const int64_t* handles, int64_t n, float* out, int threads);
int grzoo_storage_gather_slot(GrzooStorage* storage, int64_t slot, const int64_t* handles, int64_t n, float* out, int threads);
int grzoo_storage_scatter(GrzooStorage* storage, const int64_t* handles, int64_t n, const float* rows, int threads);
int grzoo_storage_scatter_slot(GrzooStorage* storage, int64_t slot, const int64_t* handles, int64_t n,
                               const float* values, int threads);
int grzoo_storage_gather_step(GrzooStorage* storage, const int64_t* handles, int64_t n, int32_t* out);
int grzoo_storage_scatter_step(GrzooStorage* storage, const int64_t* handles, int64_t n, const int32_t* steps);
int grzoo_storage_erase(GrzooStorage* storage, const int32_t* tables, const int64_t* ids, int64_t n, int64_t* erased);
// keys: of the rows, for the stochastic rounding of bfloat16; null: to the nearest
int grzoo_storage_update(GrzooStorage* storage, int rule, const int64_t* slots, const int64_t* handles, int64_t n,
                         const float* grads, const int64_t* keys, const GrzooHyper* hyper, int threads);
int grzoo_storage_keys(GrzooStorage* storage, int32_t* tables, int64_t* ids, int64_t* handles);
// ids and handles of one logical table by (bucket, id); room for grzoo_storage_size
int grzoo_storage_sorted_keys(GrzooStorage* storage, int32_t table, int64_t* ids, int64_t* handles, int64_t* count);
int grzoo_storage_reserve(GrzooStorage* storage, int64_t more);
// rows for pairs that have none, to be filled by the scatter functions
int grzoo_storage_insert_blank(GrzooStorage* storage, const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles,
                               int threads);
// inserts or overwrites rows with all of their state: slots[k] are the values of slot k
int grzoo_storage_write(GrzooStorage* storage, const int32_t* tables, const int64_t* ids, int64_t n, const float* rows,
                        const float* const* slots, const int32_t* steps, int threads);
int64_t grzoo_storage_size(GrzooStorage* storage);     // -1 after close
int64_t grzoo_storage_bytes(GrzooStorage* storage);    // -1 after close

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
