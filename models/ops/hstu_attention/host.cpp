// HSTU attention of packed sequences on the host: out_i = sum over j <= i of silu(q_i . k_j + rab_ij) v_j * scale.
// Units (ranges of one sequence, chosen by the lengths alone) run in any order on any number of threads; what they share is
// summed afterwards in their order, so the result does not depend on the threads.
#include <math.h>
#include <stdint.h>

#include <new>
#include <numeric>
#include <vector>

#include "host_types.h"
#define GRZOO_KERNEL "../hstu_attention/host_kernel.h"
#include "../host/dispatch.h"
#include "../host/parallel.h"

namespace grzoo {
namespace {

constexpr int64_t kUnitLength = 480;   // a sequence of this length or less is one unit
constexpr int64_t kMaxUnits = 8;       // of one sequence: bounds the partial query gradients to 3.5 times the query

// Cuts [0, length) at multiples of kTile into parts of about equal area of the causal triangle.
std::vector<int64_t> cuts(int64_t length, bool backward) {
    int64_t parts = std::min(kMaxUnits, (length + kUnitLength - 1) / kUnitLength);
    std::vector<int64_t> result{0};
    for (int64_t part = 1; part < parts; ++part) {
        double share = double(part) / parts;
        double at = backward ? 1.0 - sqrt(1.0 - share) : sqrt(share);
        int64_t cut = int64_t(at * length / kTile + 0.5) * kTile;
        if (cut > result.back() && cut < length) result.push_back(cut);
    }
    result.push_back(length);
    return result;
}

std::vector<Unit> plan_units(const int64_t* cu_seq_lens, int64_t num_sequences, bool backward) {
    std::vector<Unit> units;
    for (int64_t sequence = 0; sequence < num_sequences; ++sequence) {
        int64_t start = cu_seq_lens[sequence], length = cu_seq_lens[sequence + 1] - start;
        if (length <= 0) continue;
        std::vector<int64_t> at = cuts(length, backward);
        for (size_t part = 0; part + 1 < at.size(); ++part)
            units.push_back(Unit{start, length, at[part], at[part + 1], nullptr, nullptr, nullptr});
    }
    return units;
}

double area(const Unit& unit, bool backward) {
    double begin = backward ? unit.length - unit.end : unit.begin, end = backward ? unit.length - unit.begin : unit.end;
    return end * end - begin * begin;
}

// Calls body(unit, scratch) for each unit, the largest first. False when memory runs out.
template <typename F>
bool run_units(const std::vector<Unit>& units, int threads, bool backward, int64_t scratch_floats, F&& body) {
    std::vector<size_t> order(units.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return area(units[a], backward) > area(units[b], backward); });
    return parallel_tasks(static_cast<int64_t>(units.size()), threads, scratch_floats,
                          [&](int64_t k, float* scratch) { body(units[order[k]], scratch); });
}

// position_partial of each unit summed in order: entry max_length - 1 - distance.
void add_position_partials(const std::vector<Unit>& units, int64_t max_length, float* grad) {
    std::vector<double> total(max_length, 0.0);
    for (const Unit& unit : units)
        for (int64_t distance = 0; distance < unit.length; ++distance) total[distance] += unit.position_partial[distance];
    for (int64_t distance = 0; distance < max_length; ++distance) grad[max_length - 1 - distance] = static_cast<float>(total[distance]);
    for (int64_t k = max_length; k < 2 * max_length - 1; ++k) grad[k] = 0.0f;
}

void add_time_partials(const std::vector<Unit>& units, int64_t num_buckets, float* grad) {
    for (int64_t bucket = 0; bucket < num_buckets; ++bucket) {
        double total = 0.0;
        for (const Unit& unit : units) total += unit.time_partial[bucket];
        grad[bucket] = static_cast<float>(total);
    }
}

void add_query_partials(const std::vector<Unit>& units, int64_t width, float* grad_query) {
    for (const Unit& unit : units) {
        if (!unit.query_partial) continue;
        float* to = grad_query + (unit.token + unit.begin) * width;
        for (int64_t k = 0; k < (unit.length - unit.begin) * width; ++k) to[k] += unit.query_partial[k];
    }
}

void fill_cells(TimeBuckets& table) {
    const uint64_t* thresholds = table.thresholds;
    const uint64_t* end = thresholds + table.num_buckets - 1;
    for (int cell = 0; cell < kCells; ++cell) {
        uint64_t unit = uint64_t(4 + cell % 4) << (cell / 4), next = uint64_t(5 + cell % 4) << (cell / 4);   // 4 * bounds of the cell
        uint64_t low = (unit + 3) / 4, high = (next + 3) / 4;
        const uint64_t* above = std::upper_bound(thresholds, end, low);
        table.cells[2 * cell] = static_cast<int32_t>(above - thresholds);
        table.cells[2 * cell + 1] = above < end && *above < high ? static_cast<int32_t>(*above) : INT32_MAX;
    }
}

}  // namespace

int64_t forward_scratch(const Attention& shape, const Unit& unit) {
    int64_t values = round_up(shape.value_width, 8), end = round_up(unit.end, kTile);
    return shape.heads * (end * shape.key_width + unit.end * values + kTile * values) + 3 * kTile * kTile + 2 * round_up(unit.length, kTile) + 64;
}

int64_t backward_scratch(const Attention& shape, const Unit& unit) {
    int64_t keys = round_up(shape.key_width, 8), values = round_up(shape.value_width, 8), queries = unit.length - unit.begin;
    int64_t num_buckets = shape.time ? shape.buckets->num_buckets : 0;
    int64_t rows = queries * (2 * keys + values), tile = kTile * (3 * keys + 2 * values);
    int64_t sums = 8 * (round_up(unit.length, 8) + 16 + num_buckets);
    return shape.heads * (rows + tile) + 5 * kTile * kTile + 2 * round_up(unit.length, kTile) + sums + 64;
}

}  // namespace grzoo

using namespace grzoo;

extern "C" {

// A tensor [T, heads, width]: pointer, strides of token and head in elements.
struct GrzooView {
    const float* data;
    int64_t token, head;
};

struct GrzooAttention {
    int64_t num_sequences, heads, key_width, value_width, max_length, num_buckets;
    const int64_t* cu_seq_lens;                        // [num_sequences + 1]
    const int64_t *timestamps, *target_timestamps;     // [T], null without a time table
    const uint64_t* thresholds;                        // [num_buckets - 1], rising
    const float *position_table, *time_table;          // [2 max_length - 1], [num_buckets] or null
    GrzooView query, key, value, grad_out;
    float *out, *grad_query, *grad_key, *grad_value;   // dense
    float *grad_position, *grad_time;                  // null where not wanted
    float scale;
    int32_t threads, level;                            // level: highest instruction set to use
};

// 0: done, 1: out of memory, 2: a length or a number of buckets out of range.
EXPORT int grzoo_hstu_attention(const GrzooAttention* call, int backward) {
    try {
        std::vector<Unit> units = plan_units(call->cu_seq_lens, call->num_sequences, backward);
        TimeBuckets buckets;
        if (call->time_table) {
            if (call->num_buckets < 1 || call->num_buckets > kMaxBuckets) return 2;
            buckets.num_buckets = static_cast<int>(call->num_buckets);
            std::copy(call->thresholds, call->thresholds + call->num_buckets - 1, buckets.thresholds);
            fill_cells(buckets);
        }
        std::vector<float> position(call->max_length + kTile + 8, 0.0f);
        std::copy(call->position_table, call->position_table + call->max_length, position.begin());
        auto view = [](const GrzooView& from) { return View{from.data, from.token, from.head}; };
        Attention shape{call->heads, call->key_width, call->value_width, call->max_length, call->scale, view(call->query),
                        view(call->key), view(call->value), view(call->grad_out), position.data(), call->time_table, call->timestamps,
                        call->target_timestamps, &buckets, call->out, call->grad_query, call->grad_key, call->grad_value};
        int64_t scratch = 0, partial_floats = 0;
        const int64_t width = call->heads * call->key_width;
        for (const Unit& unit : units) {
            if (unit.length > call->max_length) return 2;
            scratch = std::max(scratch, backward ? backward_scratch(shape, unit) : forward_scratch(shape, unit));
            partial_floats += (unit.begin ? (unit.length - unit.begin) * width : 0) + unit.length + call->num_buckets;
        }
        const int level = std::min(call->level, instruction_set());
        if (!backward)
            return run_units(units, call->threads, false, scratch,
                             [&](const Unit& unit, float* memory) { GRZOO_CALL(level, forward_unit, shape, unit, memory); })
                       ? 0
                       : 1;
        Buffer partials(partial_floats);
        float* next = partials.data();
        for (Unit& unit : units) {
            if (unit.begin) unit.query_partial = next, next += (unit.length - unit.begin) * width;
            if (call->grad_position) unit.position_partial = next, next += unit.length;
            if (call->grad_time && call->time_table) unit.time_partial = next, next += call->num_buckets;
        }
        if (!run_units(units, call->threads, true, scratch,
                       [&](const Unit& unit, float* memory) { GRZOO_CALL(level, backward_unit, shape, unit, memory); }))
            return 1;
        add_query_partials(units, width, call->grad_query);
        if (call->grad_position) add_position_partials(units, call->max_length, call->grad_position);
        if (call->grad_time && call->time_table) add_time_partials(units, call->num_buckets, call->grad_time);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}


}
