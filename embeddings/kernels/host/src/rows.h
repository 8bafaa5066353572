// Rows and their state, in chunks that never move; freed rows are used again, the last freed first.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "kernels.h"

namespace grzoo {

class Rows {
public:
    Rows(int64_t dim, bool bfloat16);
    Rows(const Rows&) = delete;
    Rows& operator=(const Rows&) = delete;
    ~Rows();

    const RowsView& view() const { return view_; }
    const std::vector<SlotPlace>& slots() const { return slots_; }
    int64_t used() const { return used_; }     // rows that were ever handed out: valid handles are below
    int64_t bytes() const;

    int64_t growth(int64_t more) const;        // the bytes of the chunks that `reserve` would add
    void reserve(int64_t more);                // room for `more` rows, or OutOfMemory with nothing changed
    void count_untouched();                    // tells memory.h of the chunks of which no row was handed out yet
    uint32_t next() const { return free_.empty() ? static_cast<uint32_t>(used_) : free_.back(); }    // what take returns
    uint32_t take();                           // one row out of that room
    void expect_back(int64_t rows);            // makes room to note them; before, give_back may throw
    void give_back(uint32_t row) { free_.push_back(row); }
    void fill_state(int64_t row) const;        // step 0 and the fill value in every slot

    struct NewSlot {
        int64_t width;
        float fill;
        int64_t previous;                      // of the present slots, or -1
    };
    void set_slots(const std::vector<NewSlot>& slots);

private:
    void add_chunks(int64_t count);
    void drop_chunks();
    int64_t missing_chunks(int64_t more) const;
    void copy_row(const Rows& from, int64_t row, const std::vector<NewSlot>& wanted) const;
    size_t record_bytes() const { return sizeof(float) * static_cast<size_t>(view_.record_floats << view_.shift); }

    RowsView view_{};
    std::vector<SlotPlace> slots_;
    std::vector<float*> records_;
    std::vector<uint32_t> free_;
    int64_t used_ = 0;
    int64_t untouched_ = 0;                    // bytes that this has added to those of all
};

}  // namespace grzoo
