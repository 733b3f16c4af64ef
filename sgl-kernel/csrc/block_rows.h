// A task's blocks of keys one after the other, for the kernels that read K and V where they lie: the rows
// of the present block, and those of the next, which memory is asked for meanwhile.
#pragma once

#include "attention.h"
#include "wide_rows.h"

namespace {

template <class T>
class BlockRows {
  public:
    const T* keys[sgl::kKeys];  // those beyond the block's last repeat its first
    const T* values[sgl::kKeys];
    const T* next_keys[sgl::kKeys];
    const T* next_values[sgl::kKeys];

    // `wide` is memory of widened rows, where planes are of a byte.
    BlockRows(const SglAttention& call, const sgl::Task& task, void* wide)
        : call_(call), task_(task), wide_(wide), end_(task.lo) {
        find(task.lo, &next_);
    }

    // Goes on to the next block; false when there is none.
    bool step() {
        if (next_.count == 0) return false;
        block_ = next_;
        lo_ = end_;
        end_ += block_.count;
        find(end_, &next_);
        return true;
    }

    // The keys [begin, end) of the block that the query at `position` sees.
    int begin(int64_t position) const { return clip(sgl::first_seen(call_, position) - lo_); }
    int end(int64_t position) const { return clip(position + 1 - lo_); }

    // Lists the rows of kv head g. Returns whether memory is still to be asked for the next ones.
    bool list(int g) {
        if (sgl::wide_bytes(call_)) {
            widen_block<T>(call_, g, block_, &next_, wide_, keys, values);
            return false;
        }
        const T* k = static_cast<const T*>(call_.k) + g * call_.k_head;
        const T* v = static_cast<const T*>(call_.v) + g * call_.v_head;
        for (int n = 0; n < sgl::kKeys; ++n) {
            keys[n] = k + block_.slots[n] * call_.k_slot;
            values[n] = v + block_.slots[n] * call_.v_slot;
            next_keys[n] = next_.count ? k + next_.slots[n] * call_.k_slot : keys[0];
            next_values[n] = next_.count ? v + next_.slots[n] * call_.v_slot : values[0];
        }
        return true;
    }

  private:
    const SglAttention& call_;
    const sgl::Task& task_;
    void* wide_;
    int64_t lo_ = 0, end_;
    sgl::KeyBlock block_, next_;

    void find(int64_t lo, sgl::KeyBlock* found) const {
        found->count = 0;
        if (lo < task_.hi) found->find(call_, task_.table, lo, sgl::block_end(lo, task_.hi));
    }

    int clip(int64_t n) const { return static_cast<int>(std::clamp<int64_t>(n, 0, block_.count)); }
};

}  // namespace
