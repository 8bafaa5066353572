#include "rows.h"

#include <string.h>

#include <algorithm>
#include <utility>

#include "common.h"
#include "memory.h"

namespace grzoo {
namespace {

constexpr int64_t kChunkBytes = 4 << 20;    // at least; a chunk is what the longest pause of growth has to clear
constexpr int64_t kMaxRows = int64_t(UINT32_MAX) - 1;

}  // namespace

Rows::Rows(int64_t dim, bool bfloat16) {
    view_.dim = dim;
    view_.bfloat16 = bfloat16;
    view_.step_offset = view_.row_floats();
    view_.record_floats = view_.row_floats() + 1;
    // by the embedding alone: the layout of the state may change later, the handles may not
    while ((int64_t(sizeof(float)) * view_.row_floats() << view_.shift) < kChunkBytes && view_.shift < 20) ++view_.shift;
}

Rows::~Rows() {
    drop_chunks();
    add_untouched(-untouched_);
}

void Rows::drop_chunks() {
    for (float* record : records_) unmap_pages(record, record_bytes());
    records_.clear();
}

int64_t Rows::bytes() const {
    return static_cast<int64_t>(records_.size() * record_bytes() + free_.capacity() * sizeof(uint32_t));
}

void Rows::add_chunks(int64_t count) {
    check_room(count * static_cast<int64_t>(record_bytes()));    // of all: each alone would always fit
    const size_t wanted = records_.size() + static_cast<size_t>(count);
    if (wanted > records_.capacity()) records_.reserve(std::max(wanted, 2 * records_.size() + 8));
    view_.records = records_.data();    // before mapping, which may throw: the old array is gone
    while (records_.size() < wanted) records_.push_back(static_cast<float*>(map_pages(record_bytes())));
}

void Rows::count_untouched() {
    const int64_t begun = (used_ + (int64_t(1) << view_.shift) - 1) >> view_.shift;
    const int64_t bytes = (static_cast<int64_t>(records_.size()) - begun) * static_cast<int64_t>(record_bytes());
    if (bytes == untouched_) return;
    add_untouched(bytes - untouched_);
    untouched_ = bytes;
}

int64_t Rows::missing_chunks(int64_t more) const {
    const int64_t needed = used_ + more - static_cast<int64_t>(free_.size());
    if (needed > kMaxRows) throw OutOfMemory("an embedding storage holds at most 2^32 - 2 rows");
    const int64_t chunks = (needed + (int64_t(1) << view_.shift) - 1) >> view_.shift;
    return std::max<int64_t>(chunks - static_cast<int64_t>(records_.size()), 0);
}

int64_t Rows::growth(int64_t more) const { return missing_chunks(more) * static_cast<int64_t>(record_bytes()); }

void Rows::reserve(int64_t more) {
    count_untouched();    // less, since rows were taken out of what was reserved
    if (const int64_t missing = missing_chunks(more)) add_chunks(missing);
}

uint32_t Rows::take() {
    const uint32_t row = next();
    free_.empty() ? void(++used_) : free_.pop_back();
    return row;
}

void Rows::expect_back(int64_t rows) {
    const size_t wanted = free_.size() + static_cast<size_t>(rows);
    if (wanted > free_.capacity()) free_.reserve(std::max(wanted, 2 * free_.capacity()));
}

void Rows::fill_state(int64_t row) const {
    view_.step(row)[0] = 0;
    for (const SlotPlace& slot : slots_) {
        float* values = slot.of(view_, row);
        for (int64_t j = 0; j < slot.width; ++j) values[j] = slot.fill;
    }
}

void Rows::set_slots(const std::vector<NewSlot>& wanted) {
    Rows changed(view_.dim, view_.bfloat16);
    bool same = wanted.size() == slots_.size();
    int64_t wide_end = view_.row_floats(), narrow = 0;
    for (const NewSlot& slot : wanted) slot.width == 1 ? ++narrow : wide_end += slot.width;
    changed.view_.step_offset = wide_end;
    changed.view_.record_floats = wide_end + 1 + narrow;
    int64_t wide_at = view_.row_floats(), narrow_at = wide_end + 1;
    for (const NewSlot& slot : wanted) {
        int64_t& at = slot.width == 1 ? narrow_at : wide_at;
        same = same && slot.previous == static_cast<int64_t>(changed.slots_.size());
        changed.slots_.push_back({at, slot.width, slot.fill});
        at += slot.width;
    }
    if (!same) {
        changed.add_chunks(static_cast<int64_t>(records_.size()));
        for (int64_t row = 0; row < used_; ++row) changed.copy_row(*this, row, wanted);
        std::swap(view_, changed.view_);
        records_.swap(changed.records_);
        count_untouched();
    }
    slots_.swap(changed.slots_);
}

void Rows::copy_row(const Rows& from, int64_t row, const std::vector<NewSlot>& wanted) const {
    memcpy(view_.record(row), from.view_.record(row), sizeof(float) * static_cast<size_t>(view_.row_floats()));
    fill_state(row);
    view_.step(row)[0] = from.view_.step(row)[0];
    for (size_t k = 0; k < wanted.size(); ++k)
        if (wanted[k].previous >= 0)
            memcpy(slots_[k].of(view_, row), from.slots_[static_cast<size_t>(wanted[k].previous)].of(from.view_, row),
                   sizeof(float) * static_cast<size_t>(slots_[k].width));
}

}  // namespace grzoo
