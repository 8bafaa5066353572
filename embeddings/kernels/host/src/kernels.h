// The loops over floats, compiled once per instruction set. No standard library here: an inline function of it, compiled
// for a wide instruction set, could be the copy that the linker keeps for all.
#pragma once
#include <stdint.h>

namespace grzoo {

// Where the rows are. Record of row h: [embedding | wide slots | step | narrow slots], words of 4 bytes; an embedding of
// bfloat16 in half as many. All of a row is in one place: finding the page of a random row costs more than its bytes.
struct RowsView {
    float* const* records;
    int shift;                 // rows of a chunk: 2^shift
    int64_t dim, record_floats, step_offset;
    bool bfloat16;

    int64_t row_floats() const { return bfloat16 ? (dim + 1) / 2 : dim; }
    float* record(int64_t h) const { return records[h >> shift] + (h & ((int64_t(1) << shift) - 1)) * record_floats; }
    int32_t* step(int64_t h) const { return reinterpret_cast<int32_t*>(record(h) + step_offset); }
};

struct SlotPlace {
    int64_t offset, width;
    float fill;

    float* of(const RowsView& rows, int64_t h) const { return rows.record(h) + offset; }
};

struct InitLaw {
    int kind;
    uint64_t key;
    float value;
    const float* quantiles;
};

struct Correction {            // of Adam, for one value of the step: 1 - beta1^t, sqrt(1 - beta2^t)
    double first;
    float root;
};

struct UpdateRule {
    float lr, momentum, weight_decay, decay_factor, beta2, eps, first_weight, second_weight;
    double lr_exact, beta1_exact, beta2_exact;
    const Correction* corrections;      // of steps 0 .. correction_count - 1
    int64_t correction_count;
    Correction global;                  // used when has_global
    bool has_global;
    Correction (*correction_of)(const UpdateRule&, int64_t step);
    SlotPlace slots[2];
    // of bfloat16 rows: keys of the rows in a call (null: round to the nearest), words of the columns, room for a row
    const int64_t* keys;
    const uint64_t* column_words;
    float* scratch;
};

struct Kernels {
    const char* name;
    // out[i] = row of handles[i], zeros for -1
    void (*gather)(const RowsView&, const int64_t* handles, int64_t begin, int64_t end, float* out);
    // out[i] = values[index[i]]
    void (*take_rows)(const float* values, const int64_t* index, int64_t begin, int64_t end, int64_t dim, float* out);
    // out[index[p]] += values[p] for p = positions[k] (or k itself when null), in this order; seen[s] == 0: out[s] is written first
    void (*add_rows)(const float* values, const int64_t* index, const uint32_t* positions, int64_t count, int64_t dim,
                     float* out, uint8_t* seen);
    // the sum of the squares of values[begin * dim .. end * dim)
    double (*squares)(const float* values, int64_t begin, int64_t end, int64_t dim);
    // row[c] for the columns; column_words[c] = 0x9E3779B97F4A7C15 + mix64(c + 0x632BE59BD9B4E019)
    void (*initial)(const InitLaw&, int64_t id, const uint64_t* column_words, int64_t dim, float* row);
    // row of a handle = row, to the nearest bfloat16 where rows are that
    void (*store)(const RowsView&, int64_t handle, const float* row);
    void (*update[5])(const RowsView&, const UpdateRule&, const int64_t* handles, const float* grads, int64_t begin,
                      int64_t end);
    // out[b] = sum of weights[i] * values[index[i]] over offsets[b] <= i < offsets[b + 1], in this order; weights may be null
    void (*pool_rows)(const float* values, const int64_t* index, const int64_t* offsets, const float* weights, int64_t begin,
                      int64_t end, int64_t dim, float* out);
    // columns [first, last) of out[index[i]] += weights[i] * grads[b] for the i of all bags b, in this order
    void (*unpool_rows)(const float* grads, const int64_t* index, const int64_t* offsets, const float* weights, int64_t bags,
                        int64_t dim, int64_t first, int64_t last, float* out);
};

const Kernels& kernels();                 // of the widest instruction set that runs here
bool choose_kernels(const char* name);    // false when it is not compiled in or does not run here

}  // namespace grzoo
