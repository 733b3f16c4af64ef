// A task's blocks of keys one after the other, for the kernels that read K and V where they lie: the rows
// of the present block, and those of the next, which memory is asked for meanwhile.
#pragma once

#include <algorithm>
#include <utility>

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
        find(task.lo, next_);
    }
    BlockRows(BlockRows&&) = delete;

    // Goes on to the next block; false when there is none.
    bool step() {
        if (next_->count == 0) return false;
        std::swap(block_, next_);
        lo_ = end_;
        end_ += block_->count;
        find(end_, next_);
        return true;
    }

    // The keys [begin, end) of the block that the query at `position` sees.
    int begin(int64_t position) const { return clip(sgl::first_seen(call_, position) - lo_); }
    int end(int64_t position) const { return clip(position + 1 - lo_); }

    // Lists the rows of kv head g. Returns whether memory is still to be asked for the next ones.
    bool list(int g) {
        if (sgl::wide_bytes(call_)) {
            widen_block<T>(call_, g, *block_, next_, wide_, keys, values);
            return false;
        }
        const T* k = static_cast<const T*>(call_.k) + g * call_.k_head;
        const T* v = static_cast<const T*>(call_.v) + g * call_.v_head;
        point(*block_, k, v, keys, values);
        point(next_->count ? *next_ : *block_, k, v, next_keys, next_values);
        return true;
    }

  private:
    const SglAttention& call_;
    const sgl::Task& task_;
    void* wide_;
    int64_t lo_ = 0, end_;
    sgl::KeyBlock blocks_[2];
    sgl::KeyBlock *block_ = blocks_, *next_ = blocks_ + 1;

    void point(const sgl::KeyBlock& block, const T* k, const T* v, const T** to_keys,
               const T** to_values) const {
        const int64_t k_slot = call_.k_slot, v_slot = call_.v_slot;
        if (block.contiguous && block.count == sgl::kKeys) {  // without a product for each
            k += block.slots[0] * k_slot;
            v += block.slots[0] * v_slot;
            for (int n = 0; n < sgl::kKeys; ++n, k += k_slot, v += v_slot) {
                to_keys[n] = k;
                to_values[n] = v;
            }
            return;
        }
        for (int n = 0; n < sgl::kKeys; ++n) {
            to_keys[n] = k + block.slots[n] * k_slot;
            to_values[n] = v + block.slots[n] * v_slot;
        }
    }

    void find(int64_t lo, sgl::KeyBlock* found) const {
        found->count = 0;
        if (lo < task_.hi) found->find(call_, task_.table, lo, sgl::block_end(lo, task_.hi));
    }

    int clip(int64_t n) const { return static_cast<int>(std::clamp<int64_t>(n, 0, block_->count)); }
};

}  // namespace
