// A product and what follows it head by head: norms, rotations, and K and V into their slots.
//
// Whoever computes the last outputs of a head goes on with that head, whose numbers are still in the
// cache. Threads meet once, not after each part, and the numbers are those of the calls made one by one.
#include <algorithm>
#include <atomic>
#include <new>

#include "after.h"
#include "choose.h"
#include "rows.h"
#include "scratch.h"

namespace {

// What a product, of either kind, writes.
struct Product {
    char* out;
    int64_t out_row, rows, columns;
    int32_t dtype;

    template <class Call>
    static Product of(const void* call) {
        const auto& one = *static_cast<const Call*>(call);
        return {static_cast<char*>(one.out), one.out_row, one.rows, one.out_features, one.dtype};
    }
    int64_t bytes() const { return dtype == SGL_FLOAT32 ? 4 : 2; }  // of a number
};

class Heads final : public sgl::After {
  public:
    Heads(const SglQkv& call, const Product& product)
        : call_(call), product_(product), size_(product.bytes()),
          values_(product.columns - call.v_columns) {
        thread_local sgl::Scratch for_counts;
        const int64_t count = values_ / call.head_dim + call.v_columns / call.v_dim;
        char* memory = for_counts.take(count * int64_t{sizeof(Count)});
        missing_ = reinterpret_cast<Count*>(memory);
        for (int64_t i = 0; i < count; ++i)
            new (missing_ + i) Count(static_cast<int32_t>(head(i).width));
    }

    void done(int64_t first, int64_t last) override {
        for (int64_t at = first; at < last;) {
            const int64_t i = index(at);
            const Head one = head(i);
            const int64_t end = std::min(last, one.column + one.width);
            const auto count = static_cast<int32_t>(end - at);
            if (missing_[i].fetch_sub(count, std::memory_order_acq_rel) == count) finish(one);
            at = end;
        }
    }

  private:
    using Count = std::atomic<int32_t>;
    struct Head {
        int64_t column, width;
    };

    const SglQkv& call_;
    const Product& product_;
    const int64_t size_, values_;  // bytes of a number; the first column of V
    Count* missing_;

    int64_t index(int64_t column) const {
        if (column < values_) return column / call_.head_dim;
        return values_ / call_.head_dim + (column - values_) / call_.v_dim;
    }
    Head head(int64_t i) const {
        const int64_t turned = values_ / call_.head_dim;
        if (i < turned) return {i * call_.head_dim, call_.head_dim};
        return {values_ + (i - turned) * call_.v_dim, call_.v_dim};
    }

    void finish(const Head& one) const {
        const char* place = product_.out + one.column * size_;
        for (int i = 0; i < 2; ++i) {
            const SglRotate* rotate = call_.rotates[i];
            if (!rotate) continue;
            const int64_t column = one.column - call_.columns[i];
            if (column < 0 || column >= rotate->width) continue;
            place = turn(call_.norms[i], *rotate, place, column);
            break;
        }
        const SglStore& store = *call_.store;
        const int64_t key = place - static_cast<const char*>(store.k);
        const int64_t value = place - static_cast<const char*>(store.v);
        if (key >= 0 && key < call_.k_columns * size_)
            sgl::store_columns(store, false, key / size_, one.width, size_);
        if (value >= 0 && value < call_.v_columns * size_)
            sgl::store_columns(store, true, value / size_, one.width, size_);
    }

    // Normalises and turns the head at `from`, into its columns of the rotation's result.
    const char* turn(const SglNorm* norm, const SglRotate& whole, const char* from,
                     int64_t column) const {
        SglRotate rotate = whole;
        rotate.x = from;
        rotate.x_row = product_.out_row;
        rotate.out = static_cast<char*>(whole.out) + column * size_;
        rotate.width = call_.head_dim;
        if (norm) {
            SglNorm one = *norm;
            one.x = from;
            one.group = 1;
            one.x_group = product_.out_row;
            one.out = rotate.out;
            one.out_row = whole.out_row;
            one.rows = product_.rows;
            SGL_CHOOSE(one.isa, sgl::norm_rows)(one, 0, one.rows);
            rotate.x = rotate.out;
            rotate.x_row = whole.out_row;
        }
        SGL_CHOOSE(rotate.isa, sgl::rotate_rows)(rotate, 0, product_.rows);
        return static_cast<const char*>(rotate.out);
    }
};

}  // namespace

extern "C" int32_t sgl_qkv(const SglQkv* arguments) {
    const SglQkv& call = *arguments;
    if (call.head_dim < 1 || call.v_dim < 1 || call.v_columns % call.v_dim) return -1;
    const bool plain = call.product_op == SGL_OP_LINEAR;
    if (!plain && call.product_op != SGL_OP_QUANTIZED_LINEAR) return -1;
    const Product product = plain ? Product::of<SglLinear>(call.product)
                                  : Product::of<SglQuantized>(call.product);
    if (call.v_columns > product.columns) return -1;
    if ((product.columns - call.v_columns) % call.head_dim) return -1;
    Heads heads(call, product);
    if (plain) return sgl::linear_then(*static_cast<const SglLinear*>(call.product), &heads);
    return sgl::quantized_linear_then(*static_cast<const SglQuantized*>(call.product), &heads);
}
