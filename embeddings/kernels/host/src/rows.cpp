#include "rows.h"

#include <string.h>

#include <utility>

#include "common.h"
#include "memory.h"

namespace grzoo {
namespace {

constexpr int64_t kChunkBytes = 4 << 20;    // at least; a chunk is what the longest pause of growth has to clear
constexpr int kMetaShift = 19;              // 2 MiB of steps alone: huge pages, or every update misses the TLB
constexpr int64_t kMaxRows = int64_t(UINT32_MAX) - 1;

}  // namespace

Rows::Rows(int64_t dim, bool bfloat16) {
    view_.dim = dim;
    view_.bfloat16 = bfloat16;
    view_.record_floats = view_.row_floats();
    view_.meta_words = 1;
    view_.meta_shift = kMetaShift;
    // by the embedding alone: the layout of the state may change later, the handles may not
    while ((int64_t(sizeof(float)) * view_.record_floats << view_.shift) < kChunkBytes && view_.shift < 20) ++view_.shift;
}

Rows::~Rows() { drop_chunks(); }

void Rows::drop_chunks() {
    for (float* record : records_) unmap_pages(record, record_bytes());
    for (int32_t* meta : metas_) unmap_pages(meta, meta_bytes());
    records_.clear();
    metas_.clear();
}

int64_t Rows::bytes() const {
    return static_cast<int64_t>(records_.size() * record_bytes() + metas_.size() * meta_bytes() + free_.capacity() * sizeof(uint32_t));
}

void Rows::add_chunk() {
    if (records_.size() == records_.capacity()) records_.reserve(2 * records_.size() + 8);
    view_.records = records_.data();    // before mapping, which may throw: the old array is gone
    records_.push_back(static_cast<float*>(map_pages(record_bytes())));
}

void Rows::add_meta_chunk() {
    if (metas_.size() == metas_.capacity()) metas_.reserve(2 * metas_.size() + 8);
    view_.metas = metas_.data();
    metas_.push_back(static_cast<int32_t*>(map_pages(meta_bytes())));
}

void Rows::reserve(int64_t more) {
    const int64_t needed = used_ + more - static_cast<int64_t>(free_.size());
    if (needed > kMaxRows) throw OutOfMemory("an embedding storage holds at most 2^32 - 2 rows");
    while (static_cast<int64_t>(records_.size()) << view_.shift < needed) add_chunk();
    while (static_cast<int64_t>(metas_.size()) << view_.meta_shift < needed) add_meta_chunk();
}

uint32_t Rows::take() {
    if (free_.empty()) return static_cast<uint32_t>(used_++);
    const uint32_t row = free_.back();
    free_.pop_back();
    return row;
}

void Rows::fill_state(int64_t row) const {
    view_.meta(row)[0] = 0;
    for (const SlotPlace& slot : slots_) {
        float* values = slot.of(view_, row);
        for (int64_t j = 0; j < slot.width; ++j) values[j] = slot.fill;
    }
}

void Rows::set_slots(const std::vector<NewSlot>& wanted) {
    Rows changed(view_.dim, view_.bfloat16);
    bool same = wanted.size() == slots_.size();
    for (const NewSlot& slot : wanted) {
        int64_t& end = slot.width == 1 ? changed.view_.meta_words : changed.view_.record_floats;
        same = same && slot.previous == static_cast<int64_t>(changed.slots_.size());
        changed.slots_.push_back({slot.width == 1, end, slot.width, slot.fill});
        end += slot.width;
    }
    if (!same) {
        while (changed.records_.size() < records_.size()) changed.add_chunk();
        while (changed.metas_.size() < metas_.size()) changed.add_meta_chunk();
        for (int64_t row = 0; row < used_; ++row) changed.copy_row(*this, row, wanted);
        std::swap(view_, changed.view_);
        records_.swap(changed.records_);
        metas_.swap(changed.metas_);
    }
    slots_.swap(changed.slots_);
}

void Rows::copy_row(const Rows& from, int64_t row, const std::vector<NewSlot>& wanted) const {
    memcpy(view_.record(row), from.view_.record(row), sizeof(float) * static_cast<size_t>(view_.row_floats()));
    fill_state(row);
    view_.meta(row)[0] = from.view_.meta(row)[0];
    for (size_t k = 0; k < wanted.size(); ++k)
        if (wanted[k].previous >= 0)
            memcpy(slots_[k].of(view_, row), from.slots_[static_cast<size_t>(wanted[k].previous)].of(from.view_, row),
                   sizeof(float) * static_cast<size_t>(slots_[k].width));
}

}  // namespace grzoo
