// Silu attention of packed sequences under a visibility mask on the host:
//   out_i = 1 / n_i * sum over j seen by i, and i itself, of silu(scale q_i . k_j) v_j.
// Units (ranges of one sequence, chosen by the lengths alone) run in any order on any number of threads; partial query gradients are
// added afterwards in the order of the units, so the result does not depend on the threads.
#include <stdint.h>

#include <new>
#include <numeric>
#include <vector>

#include "host_types.h"
#define GRZOO_KERNEL "../silu_attention/host_kernel.h"
#include "../host/dispatch.h"
#include "../host/parallel.h"

namespace grzoo {
namespace {

constexpr int64_t kUnitLength = 10 * kTile;   // a sequence of this length or less is one unit
constexpr int64_t kMaxUnits = 4;              // of one sequence: bounds the partial query gradients to three times the query

std::vector<SiluUnit> plan_units(const int64_t* cu_seq_lens, int64_t num_sequences) {
    std::vector<SiluUnit> units;
    for (int64_t sequence = 0; sequence < num_sequences; ++sequence) {
        int64_t start = cu_seq_lens[sequence], length = cu_seq_lens[sequence + 1] - start;
        int64_t parts = std::min(kMaxUnits, (length + kUnitLength - 1) / kUnitLength);
        int64_t size = parts ? round_up((length + parts - 1) / parts, kTile) : kTile;
        for (int64_t begin = 0; begin < length; begin += size)
            units.push_back(SiluUnit{start, length, begin, std::min(length, begin + size), nullptr});
    }
    return units;
}

// Times of tokens [start, end) -> ranks: a key time is before a query time where its rank is below `last`.
void rank_times(const int64_t* query_times, const int64_t* key_times, int64_t start, int64_t end, int64_t max_distance, int64_t always,
                int32_t* begin, int32_t* last, int32_t* rank) {
    std::vector<int64_t> sorted(key_times + start, key_times + end);
    std::sort(sorted.begin(), sorted.end());
    auto below = [&](int64_t time) {
        return static_cast<int32_t>(std::lower_bound(sorted.begin(), sorted.end(), time) - sorted.begin());
    };
    for (int64_t t = start; t < end; ++t) {
        rank[t] = key_times[t] == always ? -1 : below(key_times[t]);
        last[t] = below(query_times[t]);
        begin[t] = max_distance >= 0 && query_times[t] >= INT64_MIN + max_distance ? below(query_times[t] - max_distance) : 0;
    }
}

// Calls body(unit, scratch) for each unit, the largest first. False when memory runs out.
template <typename F>
bool run_units(const std::vector<SiluUnit>& units, int threads, int64_t scratch_floats, F&& body) {
    std::vector<size_t> order(units.size());
    std::iota(order.begin(), order.end(), size_t(0));
    auto area = [&](size_t k) { return (units[k].end - units[k].begin) * units[k].length; };
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return area(a) > area(b); });
    return parallel_tasks(static_cast<int64_t>(units.size()), threads, scratch_floats,
                          [&](int64_t k, float* scratch) { body(units[order[k]], scratch); });
}

}  // namespace

int64_t silu_forward_scratch(const SiluAttention& shape, const SiluUnit& unit) {
    int64_t values = round_up(shape.value_width, 8);
    return shape.heads * (round_up(unit.length, kTile) * shape.key_width + (unit.length + kTile) * values) + kTile * kTile + 64;
}

int64_t silu_backward_scratch(const SiluAttention& shape, const SiluUnit& unit) {
    int64_t keys = round_up(shape.key_width, 8), values = round_up(shape.value_width, 8);
    return shape.heads * (unit.length * (2 * keys + values) + kTile * (3 * keys + 2 * values)) + 2 * kTile * kTile + 64;
}

}  // namespace grzoo

using namespace grzoo;

extern "C" {

// A tensor [T, heads, width]: pointer, strides of token and head in elements.
struct GrzooSiluView {
    const float* data;
    int64_t token, head;
};

struct GrzooSiluAttention {
    int64_t num_sequences, heads, key_width, value_width, max_distance, always;   // max_distance -1: none
    const int64_t* cu_seq_lens;                                                   // [num_sequences + 1]
    const int64_t *query_times, *key_times;                                       // [T]
    const float* inverse;                                                         // [T]
    GrzooSiluView query, key, value, grad_out;
    float *out, *grad_query, *grad_key, *grad_value;   // dense
    float scale;
    int32_t threads, level;   // level: highest instruction set to use
};

// 0: done, 1: out of memory.
EXPORT int grzoo_silu_attention(const GrzooSiluAttention* call, int backward) {
    try {
        std::vector<SiluUnit> units = plan_units(call->cu_seq_lens, call->num_sequences);
        const int64_t tokens = call->num_sequences > 0 ? call->cu_seq_lens[call->num_sequences] : 0;
        std::vector<int32_t> begin(tokens), end(tokens), rank(tokens + kTile, 0);
        bool complete = parallel_tasks(call->num_sequences, call->threads, 0, [&](int64_t k, float*) {
            rank_times(call->query_times, call->key_times, call->cu_seq_lens[k], call->cu_seq_lens[k + 1], call->max_distance,
                       call->always, begin.data(), end.data(), rank.data());
        });
        if (!complete) return 1;
        auto view = [](const GrzooSiluView& from) { return View{from.data, from.token, from.head}; };
        SiluAttention shape{call->heads, call->key_width, call->value_width, call->scale, view(call->query), view(call->key),
                            view(call->value), view(call->grad_out), call->inverse, Ranks{begin.data(), end.data(), rank.data()},
                            call->out, call->grad_query, call->grad_key, call->grad_value};
        int64_t scratch = 0, partial_floats = 0;
        const int64_t width = call->heads * call->key_width;
        for (const SiluUnit& unit : units) {
            scratch = std::max(scratch, backward ? silu_backward_scratch(shape, unit) : silu_forward_scratch(shape, unit));
            partial_floats += unit.begin ? unit.length * width : 0;
        }
        const int level = std::min(call->level, instruction_set());
        if (!backward)
            return run_units(units, call->threads, scratch,
                             [&](const SiluUnit& unit, float* memory) { GRZOO_CALL(level, silu_forward_unit, shape, unit, memory); })
                       ? 0
                       : 1;
        Buffer partials(partial_floats);
        float* next = partials.data();
        for (SiluUnit& unit : units)
            if (unit.begin) unit.query_partial = next, next += unit.length * width;
        if (!run_units(units, call->threads, scratch,
                       [&](const SiluUnit& unit, float* memory) { GRZOO_CALL(level, silu_backward_unit, shape, unit, memory); }))
            return 1;
        for (const SiluUnit& unit : units)
            for (int64_t k = 0; unit.query_partial && k < unit.length * width; ++k)
                call->grad_query[unit.token * width + k] += unit.query_partial[k];
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
}
