#include "storage.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "functions.h"
#include "pool.h"

namespace grzoo {
namespace {

constexpr int64_t kIdsPerThread = 1 << 11;          // ids that are worth a thread
constexpr int64_t kKeysAhead = 16;
constexpr int64_t kCorrections = 1 << 14;    // steps with a stored bias correction; later ones are computed

Correction correction_of(const UpdateRule& rule, int64_t step) {
    return {1 - pow(rule.beta1_exact, double(step)), static_cast<float>(sqrt(1 - pow(rule.beta2_exact, double(step))))};
}

// Room for one float32 row of each part, where rows are bfloat16.
std::vector<float> scratch_rows(const RowsView& view, int parts) {
    return std::vector<float>(view.bfloat16 ? static_cast<size_t>(view.dim * parts) : 0);
}

int slots_needed(int rule, const UpdateRule& update) {
    if (rule == GRZOO_SGD) return update.momentum != 0 ? 1 : 0;
    return rule == GRZOO_ADAM || rule == GRZOO_ADAMW ? 2 : 1;
}

}  // namespace

Storage::Storage(int64_t dim, bool bfloat16) : rows_(dim, bfloat16) {
    for (int64_t column = 0; column < dim; ++column)
        column_words_.push_back(0x9E3779B97F4A7C15ull + mix64(static_cast<uint64_t>(column) + 0x632BE59BD9B4E019ull));
}

void Storage::set_initializer(int32_t table, const InitLaw& law) {
    if (table != static_cast<int32_t>(laws_.size())) throw InvalidArgument("initial laws are given in the order of the tables");
    laws_.push_back(law);
}

const SlotPlace& Storage::slot(int64_t number) const {
    if (number < 0 || number >= static_cast<int64_t>(rows_.slots().size())) throw InvalidArgument("no slot " + std::to_string(number));
    return rows_.slots()[static_cast<size_t>(number)];
}

void Storage::check_handles(const int64_t* handles, int64_t n, int64_t low) const {
    check_range(handles, n, low, rows_.used(), "handle");
}

void Storage::check_tables(const int32_t* tables, int64_t n) const {
    const uint32_t known = static_cast<uint32_t>(laws_.size());
    uint32_t outside = 0;
    for (int64_t i = 0; i < n; ++i) outside |= static_cast<uint32_t>(tables[i]) >= known;
    if (!outside) return;
    for (int64_t i = 0; i < n; ++i)
        if (tables[i] < 0 || tables[i] >= static_cast<int64_t>(laws_.size()))
            throw InvalidArgument("table " + std::to_string(tables[i]) + " at position " + std::to_string(i) + " is not one of the " +
                                  std::to_string(laws_.size()) + " of this storage");
}

void Storage::find(const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles, int threads) const {
    check_tables(tables, n);
    parallel_ranges(n, threads, kIdsPerThread, [&](int64_t begin, int64_t end) {
        uint64_t hashes[2 * kKeysAhead];
        for (int64_t i = begin; i < end && i < begin + kKeysAhead; ++i)
            index_.prefetch(hashes[i % (2 * kKeysAhead)] = key_hash(tables[i], ids[i]));
        for (int64_t i = begin; i < end; ++i) {
            if (i + kKeysAhead < end) index_.prefetch(hashes[(i + kKeysAhead) % (2 * kKeysAhead)] = key_hash(tables[i + kKeysAhead], ids[i + kKeysAhead]));
            const uint32_t row = index_.find(hashes[i % (2 * kKeysAhead)], tables[i], ids[i]);
            handles[i] = row == Index::kAbsent ? -1 : int64_t(row);
        }
    });
}

int64_t Storage::find_or_insert(const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles, int threads) {
    return find_or_insert(tables, ids, n, handles, threads, true);
}

int64_t Storage::find_or_insert(const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles, int threads,
                                bool initialize) {
    find(tables, ids, n, handles, threads);
    std::vector<int64_t> missing;
    for (int64_t i = 0; i < n; ++i)
        if (handles[i] < 0) missing.push_back(i);
    if (missing.empty()) return 0;
    const int64_t before = size_;
    insert_missing(tables, ids, missing, handles, threads, initialize);
    return size_ - before;
}

void Storage::insert_missing(const int32_t* tables, const int64_t* ids, std::vector<int64_t>& missing, int64_t* handles,
                             int threads, bool initialize) {
    const int64_t n = static_cast<int64_t>(missing.size());
    std::vector<uint64_t> hashes(missing.size());
    std::vector<int64_t> per_segment(Index::kSegments, 0);
    for (size_t k = 0; k < missing.size(); ++k) {
        hashes[k] = key_hash(tables[missing[k]], ids[missing[k]]);
        ++per_segment[static_cast<size_t>(Index::segment_of(hashes[k]))];
    }
    for (int segment = 0; segment < Index::kSegments; ++segment)
        if (per_segment[static_cast<size_t>(segment)]) index_.reserve(segment, per_segment[static_cast<size_t>(segment)]);
    const int parts = parts_for(n, threads, kIdsPerThread / 8);
    std::vector<float> scratch = scratch_rows(rows_.view(), parts);    // this and all above may throw, what follows not
    rows_.reserve(n);
    for (size_t k = 0; k < missing.size(); ++k) {
        if (k + kKeysAhead < missing.size()) index_.prefetch(hashes[k + kKeysAhead]);
        const int64_t i = missing[k];
        const uint32_t row = rows_.next(), held = index_.insert(hashes[k], tables[i], ids[i], row);
        handles[i] = held;
        if (held == row) {
            rows_.take();
            ++size_;
        } else {    // the pair came before in this call
            missing[k] = -1;
        }
    }
    if (!initialize) return;
    const RowsView view = rows_.view();
    parallel(parts, [&](int part) {
        for (int64_t k = part_begin(n, parts, part); k < part_begin(n, parts, part + 1); ++k) {
            const int64_t i = missing[static_cast<size_t>(k)];
            if (i < 0) continue;
            float* row = view.bfloat16 ? scratch.data() + part * view.dim : view.record(handles[i]);
            kernels().initial(laws_[static_cast<size_t>(tables[i])], ids[i], column_words_.data(), view.dim, row);
            if (view.bfloat16) kernels().store(view, handles[i], row);
            rows_.fill_state(handles[i]);
        }
    });
}

void Storage::reserve(int64_t more) {
    if (more <= 0) return;
    // keys fall into the segments at random: the mean and four standard deviations
    const double mean = static_cast<double>(more) / Index::kSegments;
    const int64_t per_segment = static_cast<int64_t>(mean + 4 * sqrt(mean));
    check_room(rows_.growth(more) + index_.growth(per_segment));
    rows_.reserve(more);
    rows_.count_untouched();    // nobody writes to them now, as after an insertion
    for (int segment = 0; segment < Index::kSegments; ++segment) index_.reserve(segment, per_segment);
}

void Storage::insert_blank(const int32_t* tables, const int64_t* ids, int64_t n, int64_t* handles, int threads) {
    check_tables(tables, n);
    std::vector<int64_t> all(static_cast<size_t>(n));
    std::iota(all.begin(), all.end(), int64_t(0));
    insert_missing(tables, ids, all, handles, threads, false);
}

void Storage::write(const int32_t* tables, const int64_t* ids, int64_t n, const float* values, const float* const* slots,
                    const int32_t* steps, int threads) {
    std::vector<int64_t> handles(static_cast<size_t>(n));
    find_or_insert(tables, ids, n, handles.data(), threads, false);
    const RowsView view = rows_.view();
    parallel_ranges(n, threads, kIdsPerThread / 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = handles[static_cast<size_t>(i)];
            kernels().store(view, row, values + i * view.dim);
            view.step(row)[0] = steps[i];
            for (size_t k = 0; k < rows_.slots().size(); ++k) {
                const SlotPlace& slot = rows_.slots()[k];
                memcpy(slot.of(view, row), slots[k] + i * slot.width, sizeof(float) * static_cast<size_t>(slot.width));
            }
        }
    });
}

int64_t Storage::erase(const int32_t* tables, const int64_t* ids, int64_t n) {
    check_tables(tables, n);
    rows_.expect_back(std::min(n, size_));
    int64_t erased = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (i + kKeysAhead < n) index_.prefetch(key_hash(tables[i + kKeysAhead], ids[i + kKeysAhead]));
        const uint32_t row = index_.erase(key_hash(tables[i], ids[i]), tables[i], ids[i]);
        if (row == Index::kAbsent) continue;
        rows_.give_back(row);
        ++erased;
    }
    size_ -= erased;
    return erased;
}

void Storage::gather(const int64_t* handles, int64_t n, float* out, int threads) const {
    check_handles(handles, n, -1);
    const RowsView view = rows_.view();
    parallel_ranges(n, threads, kIdsPerThread, [&](int64_t begin, int64_t end) { kernels().gather(view, handles, begin, end, out); });
}

void Storage::gather_slot(int64_t number, const int64_t* handles, int64_t n, float* out, int threads) const {
    check_handles(handles, n, 0);
    const SlotPlace& place = slot(number);
    const RowsView view = rows_.view();
    parallel_ranges(n, threads, kIdsPerThread, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            if (i + kKeysAhead < end) {
                const float* ahead = place.of(view, handles[i + kKeysAhead]);
                for (int64_t j = 0; j < place.width; j += 16) prefetch(ahead + j);
            }
            memcpy(out + i * place.width, place.of(view, handles[i]), sizeof(float) * static_cast<size_t>(place.width));
        }
    });
}

void Storage::scatter(const int64_t* handles, int64_t n, const float* values, int threads) const {
    check_handles(handles, n, 0);
    const RowsView view = rows_.view();
    parallel_ranges(n, threads, kIdsPerThread / 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels().store(view, handles[i], values + i * view.dim);
    });
}

void Storage::scatter_slot(int64_t number, const int64_t* handles, int64_t n, const float* values, int threads) const {
    check_handles(handles, n, 0);
    const SlotPlace& place = slot(number);
    const RowsView view = rows_.view();
    parallel_ranges(n, threads, kIdsPerThread / 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            memcpy(place.of(view, handles[i]), values + i * place.width, sizeof(float) * static_cast<size_t>(place.width));
    });
}

void Storage::refresh_corrections(const GrzooHyper& hyper) {
    if (corrections_beta1_ == hyper.beta1 && corrections_beta2_ == hyper.beta2) return;
    UpdateRule rule{};
    rule.beta1_exact = hyper.beta1;
    rule.beta2_exact = hyper.beta2;
    corrections_.resize(kCorrections);
    for (int64_t step = 0; step < kCorrections; ++step) corrections_[static_cast<size_t>(step)] = correction_of(rule, step);
    corrections_beta1_ = hyper.beta1;
    corrections_beta2_ = hyper.beta2;
}

UpdateRule Storage::make_rule(int rule, const int64_t* slots, const GrzooHyper& hyper) {
    if (rule < GRZOO_SGD || rule > GRZOO_ADAMW) throw InvalidArgument("no update rule " + std::to_string(rule));
    UpdateRule update{};
    update.lr = static_cast<float>(hyper.lr);
    update.momentum = static_cast<float>(hyper.momentum);
    update.weight_decay = static_cast<float>(hyper.weight_decay);
    update.decay_factor = static_cast<float>(1 - hyper.lr * hyper.weight_decay);
    update.beta2 = static_cast<float>(hyper.beta2);
    update.eps = static_cast<float>(hyper.eps);
    update.first_weight = static_cast<float>(1 - hyper.beta1);
    update.second_weight = static_cast<float>(1 - hyper.beta2);
    update.lr_exact = hyper.lr;
    update.beta1_exact = hyper.beta1;
    update.beta2_exact = hyper.beta2;
    update.correction_of = correction_of;
    update.has_global = hyper.step > 0;
    for (int k = 0; k < slots_needed(rule, update); ++k) {
        update.slots[k] = slot(slots[k]);
        if (update.slots[k].width != (rule == GRZOO_ROWWISE_ADAGRAD ? 1 : rows_.view().dim))
            throw InvalidArgument("a slot of this rule has width " + std::to_string(update.slots[k].width));
    }
    if (rule != GRZOO_ADAM && rule != GRZOO_ADAMW) return update;
    if (update.has_global) {
        update.global = {1 - pow(hyper.beta1, hyper.step), static_cast<float>(sqrt(1 - pow(hyper.beta2, hyper.step)))};
    } else {
        refresh_corrections(hyper);
        update.corrections = corrections_.data();
        update.correction_count = kCorrections;
    }
    return update;
}

void Storage::update(int rule, const int64_t* slots, const int64_t* handles, int64_t n, const float* grads,
                     const int64_t* keys, const GrzooHyper& hyper, int threads) {
    UpdateRule update = make_rule(rule, slots, hyper);
    update.keys = keys;
    update.column_words = column_words_.data();
    check_handles(handles, n, 0);
    const RowsView view = rows_.view();
    const int parts = parts_for(n, threads, kIdsPerThread / 4);
    std::vector<float> scratch = scratch_rows(view, parts);
    parallel(parts, [&](int part) {
        UpdateRule mine = update;
        if (view.bfloat16) mine.scratch = scratch.data() + part * view.dim;
        kernels().update[rule](view, mine, handles, grads, part_begin(n, parts, part), part_begin(n, parts, part + 1));
    });
}

void Storage::keys(int32_t* tables, int64_t* ids, int64_t* handles) const {
    int64_t n = 0;
    index_.for_each([&](const Index::Slot& slot) {
        tables[n] = slot.table;
        ids[n] = slot.id;
        handles[n++] = slot.row;
    });
}

int64_t Storage::sorted_keys(int32_t table, int64_t* ids, int64_t* handles) const {
    std::vector<int64_t> ends(kBuckets + 1, 0);
    index_.for_each([&](const Index::Slot& slot) {
        if (slot.table == table) ++ends[bucket_of(slot.id) + 1];
    });
    for (size_t b = 0; b < kBuckets; ++b) ends[b + 1] += ends[b];    // ends[b]: where bucket b begins, so far
    index_.for_each([&](const Index::Slot& slot) {
        if (slot.table != table) return;
        const int64_t at = ends[bucket_of(slot.id)]++;
        ids[at] = slot.id;
        handles[at] = slot.row;
    });
    std::vector<std::pair<int64_t, int64_t>> keys;    // of one bucket
    int64_t begin = 0;
    for (size_t b = 0; b < kBuckets; begin = ends[b++]) {
        keys.clear();
        for (int64_t i = begin; i < ends[b]; ++i) keys.emplace_back(ids[i], handles[i]);
        std::sort(keys.begin(), keys.end());
        for (size_t k = 0; k < keys.size(); ++k) {
            ids[begin + static_cast<int64_t>(k)] = keys[k].first;
            handles[begin + static_cast<int64_t>(k)] = keys[k].second;
        }
    }
    return begin;
}

}  // namespace grzoo
