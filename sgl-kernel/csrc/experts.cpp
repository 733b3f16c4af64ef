// Mixtures of experts for a few rows: what the rows chose is sorted by expert, and two rounds of tasks
// read each chosen expert's matrices once. A task of the first round is a range of one expert's gates
// and ups, one of the second a range of the outputs over all experts, which it adds up for itself. The
// products are those of linear.cpp and quantized.cpp.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "choices.h"
#include "choose.h"
#include "input_rows.h"
#include "linear.h"
#include "parallel.h"
#include "quantized.h"
#include "rows.h"
#include "scratch.h"

namespace {

constexpr int64_t kTasksPerThread = 8;      // so that threads end together
constexpr int64_t kTaskInputs = 32 << 10;   // inputs of all outputs; fewer are not worth a task
constexpr int64_t kOutsAtOnce = 24;         // ranges are multiples of it, as the products like them
constexpr int64_t kTileOutsAtOnce = 96;     // the same where some are taken by tiles
constexpr int64_t kLine = 64;

int64_t size_of(int32_t dtype) { return dtype == SGL_FLOAT32 ? 4 : 2; }

// Memory on a line, not written before it is used.
class Room {
  public:
    char* take(int64_t bytes) {
        whole_.reset(new char[bytes + kLine]);
        return whole_.get() + -reinterpret_cast<uintptr_t>(whole_.get()) % kLine;
    }

  private:
    std::unique_ptr<char[]> whole_;
};

bool has_dots(const SglExperts& call) {
    return call.isa >= SGL_AVX512_BF16 && call.isa <= SGL_AMX;
}

// An expert's part of a matrix of codes, without its inputs and outputs.
SglQuantized quantized(const SglExperts& call, const SglExpertMatrix& matrix, int64_t inputs,
                       int64_t output) {
    SglQuantized q{};
    q.codes = static_cast<const char*>(matrix.weight) + output * matrix.row;
    q.is_fp8 = matrix.is_fp8;
    q.scales =
        static_cast<const char*>(matrix.scales) + output * matrix.scale_row * scale_bytes(q);
    if (matrix.mins) q.mins = static_cast<const Fp16*>(matrix.mins) + output * matrix.scale_row;
    q.code_row = matrix.row;
    q.scale_row = matrix.scale_row;
    q.in_features = inputs;
    q.group = matrix.group;
    q.gain = matrix.gain;
    q.bits = matrix.bits;
    q.dtype = SGL_FLOAT32;
    q.isa = call.isa;
    q.num_threads = 1;
    q.round_inputs = call.round_inputs;
    q.has_values = matrix.has_values;
    std::memcpy(q.values, matrix.values, sizeof q.values);
    return q;
}

// Whether a matrix of E4M3 is multiplied by dot instructions, which give what numbers give: `dtype`.
bool has_fp8_dots(const SglExperts& call, const SglExpertMatrix& matrix) {
    if (!matrix.is_fp8 || !call.gate.is_fp8 != !call.up.is_fp8) return false;
    SglQuantized one = quantized(call, matrix, call.hidden, 0);
    one.dtype = call.dtype;
    return sgl::has_fp8_dots(one);
}

// Input rows in the form in which a matrix multiplies them.
class Inputs {
  public:
    // `rows` are `count` rows of `width` elements of `dtype`, `stride` apart, which must live on.
    Inputs(const SglExperts& call, const SglExpertMatrix& matrix, int64_t width, const void* rows,
           int32_t dtype, int64_t stride, int64_t count)
        : width_(width) {
        const bool rounded = matrix.bits && call.round_inputs;
        by_dots_ = dtype == SGL_BFLOAT16 &&
                   (matrix.bits ? has_fp8_dots(call, matrix) : has_dots(call));
        data_ = static_cast<const char*>(rows);
        row_bytes_ = stride * size_of(dtype);
#if defined(__x86_64__)
        if (!matrix.bits && call.isa == SGL_AVX2) {
            widen_avx2(call, dtype, stride, count);
            return;
        }
#endif
        if (by_dots_ || (dtype == SGL_FLOAT32 && stride == width && !rounded)) {
            // as they are
        } else if (rounded) {
            round(call, matrix, dtype, stride, count);
        } else {
            float* wide = reinterpret_cast<float*>(room_.take(count * width * 4));
            widen_rows(rows, dtype, stride, count, width, wide);
            data_ = reinterpret_cast<const char*>(wide);
            row_bytes_ = width * 4;
        }
        if (matrix.bits && matrix.mins && !call.round_inputs) sum_groups(matrix.group, count);
    }

    // Copies of the rows that `which` names, in its order.
    void pick(const std::vector<int64_t>& which) {
        Room room;
        char* to = room.take(which.size() * row_bytes_);
        std::vector<float> sums(which.size() * groups_);
        for (size_t i = 0; i < which.size(); ++i) {
            std::memcpy(to + i * row_bytes_, row(which[i]), row_bytes_);
            std::copy_n(sums_.begin() + which[i] * groups_, groups_, sums.begin() + i * groups_);
        }
        room_ = std::move(room);
        sums_ = std::move(sums);
        data_ = to;
    }

    const char* row(int64_t i) const { return data_ + i * row_bytes_; }
    const float* sums(int64_t i) const { return sums_.data() + i * groups_; }
    int64_t row_bytes() const { return row_bytes_; }
    int64_t width() const { return width_; }
    // Whether they are bfloat16 for dot instructions; else they are floats, or bytes.
    bool by_dots() const { return by_dots_; }

  private:
    bool by_dots_;
    int64_t width_, row_bytes_, groups_ = 0;
    const char* data_;
    Room room_;
    std::vector<float> sums_;

    void round(const SglExperts& call, const SglExpertMatrix& matrix, int32_t dtype, int64_t stride,
               int64_t count) {
        SglQuantized one = quantized(call, matrix, width_, 0);
        one.rows = 1;
        const sgl::RoundedProduct& product = *sgl::rounded_product(call.isa);
        const char* from = data_;
        const int64_t from_bytes = row_bytes_, bytes = product.bytes(one);
        char* to = room_.take(count * bytes);
        const int64_t rows = std::max<int64_t>(1, kTaskInputs / width_);
        sgl::for_each_index((count + rows - 1) / rows, call.num_threads, [&] {
            return [&, wide = std::vector<float>(width_)](int64_t i) mutable {
                for (int64_t r = i * rows; r < std::min(count, (i + 1) * rows); ++r) {
                    widen_rows(from + r * from_bytes, dtype, stride, 1, width_, wide.data());
                    product.round(one, wide.data(), to + r * bytes);
                }
            };
        });
        data_ = to;
        row_bytes_ = bytes;
    }

#if defined(__x86_64__)
    void widen_avx2(const SglExperts& call, int32_t dtype, int64_t stride, int64_t count) {
        SglLinear l{};
        l.x = data_;
        l.x_row = stride;
        l.in_features = width_;
        l.dtype = call.dtype;
        const int64_t row = sgl::wide_row_avx2(width_);
        auto* to = reinterpret_cast<float*>(room_.take(count * row * 4));
        const int64_t rows = std::max<int64_t>(1, kTaskInputs / width_);
        sgl::for_each_index((count + rows - 1) / rows, call.num_threads, [&] {
            return [&](int64_t i) {
                const int64_t last = std::min(count, (i + 1) * rows);
                sgl::widen_rows_avx2(l, dtype, i * rows, last, to);
            };
        });
        data_ = reinterpret_cast<const char*>(to);
        row_bytes_ = row * 4;
    }
#endif

    void sum_groups(int64_t group, int64_t count) {
        groups_ = width_ / group;
        sums_.assign(count * groups_, 0.0f);
        for (int64_t i = 0; i < count; ++i) {
            const float* x = reinterpret_cast<const float*>(row(i));
            for (int64_t d = 0; d < width_; ++d) sums_[i * groups_ + d / group] += x[d];
        }
    }
};

// Outputs of one expert for rows of inputs: into `out`, rows `out_row` apart, in the type in which the
// matrix gives them.
struct Product {
    const SglExperts& call;
    const SglExpertMatrix& matrix;
    const Inputs& inputs;

    void operator()(const Segment& rows, int64_t input, int64_t first, int64_t last, void* out,
                    int64_t out_row) const {
        if (has_fp8_dots(call, matrix))
            by_fp8_dots(rows, input, first, last, out, out_row);
        else if (matrix.bits)
            by_codes(rows, input, first, last, static_cast<float*>(out), out_row);
        else
            by_numbers(rows, input, first, last, out, out_row);
    }

    const char* bias(int64_t expert, int64_t first) const {
        if (!matrix.bias) return nullptr;
        return static_cast<const char*>(matrix.bias) +
               (expert * matrix.bias_expert + first) * size_of(call.dtype);
    }

    void by_numbers(const Segment& rows, int64_t input, int64_t first, int64_t last, void* out,
                    int64_t out_row) const {
        const int64_t bytes = size_of(call.dtype), output = rows.expert * matrix.expert + first;
        SglLinear l{};
        l.x = inputs.row(input);
        l.weight = static_cast<const char*>(matrix.weight) + output * matrix.row * bytes;
        l.bias = bias(rows.expert, first);
        l.out = out;
        l.x_row = inputs.row_bytes() / (inputs.by_dots() ? 2 : 4);
        l.weight_row = matrix.row;
        l.out_row = out_row;
        l.rows = rows.count;
        l.out_features = last - first;
        l.in_features = inputs.width();
        l.dtype = call.dtype;
        l.isa = call.isa;
        l.num_threads = 1;
#if defined(__x86_64__)
        if (inputs.by_dots() && call.isa == SGL_AMX) {
            thread_local sgl::Scratch room;
            const char* packed = sgl::pack_rows(l, room.take(sgl::packed_bytes(l)));
            sgl::linear_tiles(l, packed, 0, l.out_features);
            return;
        }
        if (inputs.by_dots()) {
            sgl::linear_dots(l, 0, l.out_features);
            return;
        }
#endif
        SGL_CHOOSE(call.isa, sgl::linear)
        (l, static_cast<const float*>(l.x), l.x_row, 0, l.out_features);
    }

    void by_fp8_dots(const Segment& rows, int64_t input, int64_t first, int64_t last, void* out,
                     int64_t out_row) const {
        SglQuantized q =
            quantized(call, matrix, inputs.width(), rows.expert * matrix.expert + first);
        q.x = inputs.row(input);
        q.x_row = inputs.row_bytes() / 2;
        q.bias = bias(rows.expert, first);
        q.out = out;
        q.out_row = out_row;
        q.rows = rows.count;
        q.out_features = last - first;
        q.dtype = call.dtype;
        sgl::multiply_fp8_dots(q, 0, q.out_features);
    }

    void by_codes(const Segment& rows, int64_t input, int64_t first, int64_t last, float* out,
                  int64_t out_row) const {
        SglQuantized q =
            quantized(call, matrix, inputs.width(), rows.expert * matrix.expert + first);
        q.out = out;
        q.out_row = out_row;
        q.rows = rows.count;
        q.out_features = last - first;
        if (call.round_inputs)
            sgl::rounded_product(call.isa)->multiply(q, inputs.row(input), 0, q.out_features);
        else
            SGL_CHOOSE(call.isa, sgl::multiply_quantized)
        (q, reinterpret_cast<const float*>(inputs.row(input)), inputs.sums(input), 0,
         q.out_features);
        if (!matrix.bias) return;
        std::vector<float> wide(q.out_features);
        widen_rows(bias(rows.expert, first), call.dtype, 0, 1, q.out_features, wide.data());
        for (int64_t m = 0; m < rows.count; ++m)
            for (int64_t n = 0; n < q.out_features; ++n) out[m * out_row + n] += wide[n];
    }
};

int32_t type_given(const SglExperts& call, const SglExpertMatrix& matrix) {
    return matrix.bits && !has_fp8_dots(call, matrix) ? SGL_FLOAT32 : call.dtype;
}

// How many outputs are a task, when `all` of them are shared out and each takes `inputs`.
int64_t outs_of_a_task(const SglExperts& call, int64_t all, int64_t inputs) {
    const int64_t least = kTaskInputs / inputs + 1;
    const int64_t fair = all / (kTasksPerThread * call.num_threads) + 1;
    const int64_t at_once = call.isa == SGL_AMX ? kTileOutsAtOnce : kOutsAtOnce;
    return (std::max(least, fair) + at_once - 1) / at_once * at_once;
}

// Each choice's row times its weight, rounded as the row is.
template <class T>
void scale_rows(const SglExperts& call, const Choices& choices, char* to) {
    for (size_t i = 0; i < choices.row.size(); ++i) {
        const T* x = static_cast<const T*>(call.x) + choices.row[i] * call.x_row;
        T* out = reinterpret_cast<T*>(to) + i * call.hidden;
        for (int64_t d = 0; d < call.hidden; ++d) store(to_float(x[d]) * choices.weight[i], out + d);
    }
}

// The first round: gate(gate x, up x) of every choice [choices, width], in the type that gates have.
void open_gates(const SglExperts& call, const Choices& choices, char* opened) {
    const int64_t width = call.width, count = static_cast<int64_t>(choices.row.size());
    const int32_t type = type_given(call, call.gate);
    const int64_t bytes = size_of(type);
    Room room;
    const void* x = call.x;
    int64_t x_row = call.x_row;
    if (call.scale_inputs) {
        char* scaled = room.take(count * call.hidden * size_of(call.dtype));
        if (call.dtype == SGL_FLOAT32) scale_rows<float>(call, choices, scaled);
        if (call.dtype == SGL_BFLOAT16) scale_rows<Bf16>(call, choices, scaled);
        if (call.dtype == SGL_FLOAT16) scale_rows<Fp16>(call, choices, scaled);
        x = scaled;
        x_row = call.hidden;
    }
    const int64_t rows = call.scale_inputs ? count : call.rows;
    Inputs gate_inputs(call, call.gate, call.hidden, x, call.dtype, x_row, rows);
    const bool same = call.gate.bits == call.up.bits && call.gate.group == call.up.group &&
                      !call.gate.mins == !call.up.mins && !call.gate.is_fp8 == !call.up.is_fp8 &&
                      !call.gate.has_values == !call.up.has_values &&
                      !std::memcmp(call.gate.values, call.up.values, sizeof call.up.values);
    std::unique_ptr<Inputs> others;
    if (!same) others.reset(new Inputs(call, call.up, call.hidden, x, call.dtype, x_row, rows));
    // One row of an expert is read where it is; several must stand together.
    const bool picked = !call.scale_inputs && choices.longest > 1;
    if (picked) gate_inputs.pick(choices.row);
    if (picked && others) others->pick(choices.row);
    const Product gate{call, call.gate, gate_inputs};
    const Product up{call, call.up, others ? *others : gate_inputs};
    const int64_t segments = static_cast<int64_t>(choices.segments.size());
    const int64_t outs = outs_of_a_task(call, segments * width, 2 * call.hidden);
    const int64_t ranges = (width + outs - 1) / outs;
    sgl::for_each_index(segments * ranges, call.num_threads, [&] {
        return [&, both = std::vector<char>(choices.longest * 2 * outs * bytes)](int64_t i) mutable {
            const Segment& rows = choices.segments[i / ranges];
            const int64_t first = i % ranges * outs, last = std::min(width, first + outs);
            const int64_t some = last - first;
            const int64_t input =
                call.scale_inputs || picked ? rows.first : choices.row[rows.first];
            gate(rows, input, first, last, both.data(), 2 * some);
            up(rows, input, first, last, both.data() + some * bytes, 2 * some);
            SglGate open{};
            open.x = both.data();
            open.out = opened + (rows.first * width + first) * bytes;
            open.x_row = 2 * some;
            open.out_row = width;
            open.width = some;
            open.dtype = type;
            open.kind = call.kind;
            open.alpha = call.alpha;
            open.limit = call.limit;
            SGL_CHOOSE(call.isa, sgl::gate_rows)(open, 0, rows.count);
        };
    });
}

template <class T>
void finish_row(const float* sum, const float* added, int64_t count, void* out, int64_t at) {
    T* to = static_cast<T*>(out) + at;
    for (int64_t n = 0; n < count; ++n) store(sum[n] + (added ? added[n] : 0.0f), to + n);
}

// Outputs [first, last) of all rows from their sums.
void finish(const SglExperts& call, const float* sums, int64_t first, int64_t last) {
    const int64_t count = last - first;
    std::vector<float> added(call.added ? count : 0);
    for (int64_t row = 0; row < call.rows; ++row) {
        if (call.added)
            widen_rows(static_cast<const char*>(call.added) +
                           (row * call.added_row + first) * size_of(call.dtype),
                       call.dtype, 0, 1, count, added.data());
        const float* more = call.added ? added.data() : nullptr;
        const float* sum = sums + row * count;
        const int64_t at = row * call.out_row + first;
        if (call.out_dtype == SGL_FLOAT32) finish_row<float>(sum, more, count, call.out, at);
        if (call.out_dtype == SGL_BFLOAT16) finish_row<Bf16>(sum, more, count, call.out, at);
        if (call.out_dtype == SGL_FLOAT16) finish_row<Fp16>(sum, more, count, call.out, at);
    }
}

// The second round: what the experts give, added up for each row.
void add_up(const SglExperts& call, const Choices& choices, const char* opened) {
    const int64_t count = static_cast<int64_t>(choices.row.size());
    const int32_t type = type_given(call, call.down);
    const Inputs inputs(call, call.down, call.width, opened, type_given(call, call.gate),
                        call.width, count);
    const Product down{call, call.down, inputs};
    const int64_t segments = static_cast<int64_t>(choices.segments.size());
    const int64_t outs = outs_of_a_task(call, call.hidden, segments * call.width);
    sgl::for_each_index((call.hidden + outs - 1) / outs, call.num_threads, [&] {
        return [&, sums = std::vector<float>(call.rows * outs),
                given = std::vector<char>(choices.longest * outs * size_of(type)),
                wide = std::vector<float>(outs)](int64_t i) mutable {
            const int64_t first = i * outs, last = std::min(call.hidden, first + outs);
            const int64_t some = last - first;
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (const Segment& rows : choices.segments) {
                down(rows, rows.first, first, last, given.data(), some);
                for (int64_t m = 0; m < rows.count; ++m) {
                    const int64_t choice = rows.first + m;
                    const float weight = call.scale_inputs ? 1.0f : choices.weight[choice];
                    widen_rows(given.data() + m * some * size_of(type), type, 0, 1, some,
                               wide.data());
                    float* sum = sums.data() + choices.row[choice] * some;
                    for (int64_t n = 0; n < some; ++n) sum[n] += wide[n] * weight;
                }
            }
            finish(call, sums.data(), first, last);
        };
    });
}

bool is_served(const SglExperts& call, const SglExpertMatrix& matrix, int64_t inputs) {
    if (!matrix.weight) return false;
    if (!matrix.bits) return true;
    return is_layout(quantized(call, matrix, inputs, 0)) && inputs % 32 == 0 && matrix.scales &&
           (!call.round_inputs || sgl::rounded_product(call.isa));
}

}  // namespace

extern "C" int32_t sgl_experts(const SglExperts* arguments) {
    const SglExperts& call = *arguments;
    if (call.dtype < SGL_FLOAT32 || call.dtype > SGL_FLOAT16 || call.num_threads < 1) return -1;
    if (call.out_dtype != call.dtype && call.out_dtype != SGL_FLOAT32) return -1;
    if (call.rows < 1 || call.chosen < 1 || call.num_experts < 1) return -1;
    if (call.hidden < 1 || call.width < 1 || !call.gate.bits != !call.up.bits) return -1;
    if (call.kind < SGL_GATE_SILU || call.kind > SGL_GATE_CLAMPED) return -1;
    if (!is_served(call, call.gate, call.hidden) || !is_served(call, call.up, call.hidden) ||
        !is_served(call, call.down, call.width))
        return -1;
    Choices choices;
    if (!choices.take(call)) return -1;
    Room room;
    const int64_t count = call.rows * call.chosen * call.width;
    char* opened = room.take(count * size_of(type_given(call, call.gate)));
    open_gates(call, choices, opened);
    add_up(call, choices, opened);
    return 0;
}
