// Products of rows, few or many: AVX2, FMA and F16C.
//
// Up to three rows and four outputs are multiplied at a time: twelve sums, the rows' vectors and one of
// the weight fill the sixteen registers. With many rows the first two read the weight as it lies, and
// leave it widened in the first cache for the others. Every sum goes along the inputs in one order,
// whatever the tile, so a row's answer is the same whatever stands beside it. That holds while the
// compiler leaves the order alone: CMakeLists.txt says so for this file.
#include <algorithm>
#include <cstring>
#include <utility>

#include "isa_avx2.h"
#include "linear.h"
#include "round_four.h"

#define SGL_INLINE __attribute__((always_inline))

namespace {

using F = Isa::F;

constexpr int kStep = 16;                 // inputs taken at a time
constexpr int kOuts = 4;                  // outputs of a tile; one row alone takes twice as many
constexpr int64_t kKeepRows = 7;          // from so many rows on the weight is kept widened
constexpr int64_t kCut = 768;             // inputs of a tile at most: 12 KiB of a widened weight
constexpr int64_t kRowBytes = 192 << 10;  // of rows multiplied in turn, which stay in the second cache
constexpr int64_t kMostRows = 66;         // of them, where they are not all
constexpr int64_t kChunk = 64;            // outputs that then pass before the next rows or inputs

int64_t padded(int64_t width) { return (width + kStep - 1) / kStep * kStep; }

// Calls work(0), work(1), ... with constants, so that what they number can stay in registers.
template <int... kAt, class Work>
SGL_INLINE inline void each(std::integer_sequence<int, kAt...>, const Work& work) {
    (work(std::integral_constant<int, kAt>()), ...);
}
template <int kCount, class Work>
SGL_INLINE inline void each(const Work& work) {
    each(std::make_integer_sequence<int, kCount>(), work);
}

// Sixteen inputs of an output, as two vectors. bf16 comes apart into even and odd ones, and rows are
// brought into that order.
template <int kHalf, class T>
inline F half_of(const T* weight) {
    return Isa::load(weight + kHalf * Isa::kLanes);
}

alignas(32) constexpr uint32_t kUpper[Isa::kLanes] = {
    0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
    0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};

template <int kHalf>
inline F half_of(const Bf16* weight) {
    const auto* pairs = reinterpret_cast<const __m256i*>(weight);
    if (kHalf == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(pairs), 16));
    // A tile leaves no register for the mask, nor for pairs that are read once for both halves; a
    // compiler that is free to choose keeps these and puts sums into memory.
    F upper;
    asm volatile("vmovaps %1, %0\n\tvandps %2, %0, %0" : "=x"(upper) : "m"(kUpper), "m"(*pairs));
    return upper;
}

// Four vectors' sums of their lanes.
inline __m128 sums_of(F a, F b, F c, F d) {
    const F first = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const F second = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const F all = _mm256_add_ps(_mm256_shuffle_ps(first, second, 0x44),
                                _mm256_shuffle_ps(first, second, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// Whole steps of the inputs of some outputs, whose rows lie `row` apart.
template <class T>
struct Slab {
    const T* weight;
    int64_t row, length;
    const T* ahead = nullptr;  // what is asked for meanwhile: a line of each output for a line of this
    int64_t ahead_row = 0, ahead_step = 1;
};

// Products of kRows rows with a weight as it lies. kKeep: it stays behind in `wide`.
template <class T, int kRows, int kWide, bool kKeep>
SGL_INLINE inline void multiply_direct(const Slab<T>& slab, const float* x, int64_t x_row,
                                       float* wide, F (&total)[kRows][kWide]) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const T* weight = slab.weight;
    const int64_t row = slab.row, length = slab.length;
    for (int64_t d = 0; d < length; d += kStep, weight += kStep) {
        if (d % kLine == 0 && slab.ahead)
            each<kWide>([&](auto n) SGL_INLINE {
                const T* next = slab.ahead + n * slab.ahead_row + d * slab.ahead_step;
                _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
            });
        each<2>([&](auto half) SGL_INLINE {
            F value[kRows];
            each<kRows>([&](auto m) SGL_INLINE {
                value[m] = Isa::load(x + m * x_row + d + half * Isa::kLanes);
            });
            each<kWide>([&](auto n) SGL_INLINE {
                const F part = half_of<half>(weight + n * row);
                if (kKeep)
                    _mm256_store_ps(wide + d * kWide + (half * kWide + n) * Isa::kLanes, part);
                each<kRows>([&](auto m) SGL_INLINE {
                    total[m][n] = _mm256_fmadd_ps(value[m], part, total[m][n]);
                });
            });
        });
    }
}

// The same with what was kept.
template <int kRows>
SGL_INLINE inline void multiply_kept(const float* wide, int64_t length, const float* x,
                                     int64_t x_row, F (&total)[kRows][kOuts]) {
    for (int64_t d = 0; d < length; d += Isa::kLanes, wide += kOuts * Isa::kLanes) {
        F value[kRows];
        each<kRows>([&](auto m) SGL_INLINE { value[m] = Isa::load(x + m * x_row + d); });
        each<kOuts>([&](auto n) SGL_INLINE {
            const F part = _mm256_load_ps(wide + n * Isa::kLanes);
            each<kRows>([&](auto m) SGL_INLINE {
                total[m][n] = _mm256_fmadd_ps(value[m], part, total[m][n]);
            });
        });
    }
}

// Where the sums of a slab go: to those of the inputs before, or rounded into the answer.
template <class T>
struct Ends {
    const SglLinear& call;
    float* sums;             // [rows, kChunk] over the inputs before
    int64_t row, out, last;  // the first row and output, and where the outputs end
    int64_t column;          // of `out` in `sums`
    bool begins, finishes;   // the first inputs; the last

    void put(__m128 sum, int64_t m, int64_t n) const {
        float* kept = sums + m * kChunk + column + n;
        if (!begins) sum = _mm_add_ps(sum, _mm_loadu_ps(kept));
        if (!finishes) {
            _mm_storeu_ps(kept, sum);
            return;
        }
        const int64_t at = out + n, count = std::min<int64_t>(kOuts, last - at);
        if (call.bias) {
            const T* bias = static_cast<const T*>(call.bias) + at;
            float four[kOuts] = {};
            for (int64_t i = 0; i < count; ++i) four[i] = to_float(bias[i]);
            sum = _mm_add_ps(sum, _mm_loadu_ps(four));
        }
        T* to = static_cast<T*>(call.out) + (row + m) * call.out_row + at;
        if (count == kOuts) {
            round_four(sum, to);
            return;
        }
        T four[kOuts];
        round_four(sum, four);
        std::memcpy(to, four, count * sizeof(T));
    }

    template <int kRows, int kWide>
    SGL_INLINE void put_all(const F (&total)[kRows][kWide], int64_t first) const {
        constexpr int kFours = kWide / kOuts;
        __m128 sum[kRows * kFours];
        each<kRows * kFours>([&](auto i) SGL_INLINE {
            const auto& four = total[i / kFours];
            constexpr int n = i % kFours * kOuts;
            sum[i] = sums_of(four[n], four[n + 1], four[n + 2], four[n + 3]);
        });
        if (begins && finishes && !call.bias && out + kWide <= last) {  // nothing but to store
            T* to = static_cast<T*>(call.out) + (row + first) * call.out_row + out;
            each<kRows * kFours>([&](auto i) SGL_INLINE {
                round_four(sum[i], to + i / kFours * call.out_row + i % kFours * kOuts);
            });
            return;
        }
        for (int i = 0; i < kRows * kFours; ++i)
            put(sum[i], first + i / kFours, i % kFours * kOuts);
    }
};

// Tiles are functions of their own: inlined side by side they would lack registers.
template <class T, int kRows, int kWide, bool kKeep>
__attribute__((noinline)) void direct_tile(const Slab<T>& slab, const float* x, int64_t x_row,
                                           int64_t m, float* wide, const Ends<T>& ends) {
    F total[kRows][kWide] = {};
    multiply_direct<T, kRows, kWide, kKeep>(slab, x + m * x_row, x_row, wide, total);
    ends.put_all(total, m);
}

template <class T, int kRows>
__attribute__((noinline)) void kept_tile(const float* wide, int64_t length, const float* x,
                                         int64_t x_row, int64_t m, const Ends<T>& ends) {
    F total[kRows][kOuts] = {};
    multiply_kept<kRows>(wide, length, x + m * x_row, x_row, total);
    ends.put_all(total, m);
}

// How many of `left` rows are taken next: by threes, and by twos what would leave one alone.
int64_t rows_next(int64_t left) { return left >= 5 || left == 3 ? 3 : left >= 2 ? 2 : 1; }

template <class T>
void multiply_slab(const Slab<T>& slab, const float* x, int64_t x_row, int64_t rows, float* wide,
                   const Ends<T>& ends) {
    if (rows < kKeepRows) {
        for (int64_t m = 0, some; m < rows; m += some) {
            some = rows_next(rows - m);
            if (some == 3) direct_tile<T, 3, kOuts, false>(slab, x, x_row, m, wide, ends);
            if (some == 2) direct_tile<T, 2, kOuts, false>(slab, x, x_row, m, wide, ends);
            if (some == 1) direct_tile<T, 1, kOuts, false>(slab, x, x_row, m, wide, ends);
        }
        return;
    }
    direct_tile<T, 2, kOuts, true>(slab, x, x_row, 0, wide, ends);
    for (int64_t m = 2, some; m < rows; m += some) {
        some = rows_next(rows - m);
        if (some == 3) kept_tile<T, 3>(wide, slab.length, x, x_row, m, ends);
        if (some == 2) kept_tile<T, 2>(wide, slab.length, x, x_row, m, ends);
    }
}

// Outputs of all rows, up to `last`.
template <class T>
class Product {
  public:
    Product(const SglLinear& call, const float* x, int64_t x_row, int64_t last)
        : call_(call), x_(x), x_row_(x_row), last_(last) {
        const int64_t steps = padded(call.in_features) / kStep, most = kCut / kStep;
        const int64_t cuts = (steps + most - 1) / most;
        cut_ = (steps + cuts - 1) / cuts * kStep;
    }

    void run(int64_t first) {
        const int64_t row_bytes = padded(call_.in_features) * int64_t{sizeof(float)};
        int64_t out = first;
        if (call_.rows * row_bytes <= kRowBytes) {
            for (; call_.rows == 1 && out + 2 * kOuts <= last_; out += 2 * kOuts) {
                chunk_ = 2 * kOuts;
                take_one_row(out);
            }
            chunk_ = kOuts;
            for (; out < last_; out += kOuts) take(out, 0, call_.rows);
            return;
        }
        chunk_ = kChunk;
        const int64_t blocks = (call_.rows + kMostRows - 1) / kMostRows;
        const int64_t rows = (call_.rows + blocks - 1) / blocks;
        for (; out < last_; out += kChunk)
            for (int64_t row = 0; row < call_.rows; row += rows)
                take(out, row, std::min(rows, call_.rows - row));
    }

  private:
    const SglLinear& call_;
    const float* const x_;
    const int64_t x_row_, last_;
    int64_t cut_, chunk_ = kOuts;  // inputs of a slab; outputs that pass before the next inputs
    alignas(64) float wide_[kOuts * kCut];
    alignas(64) T copy_[2 * kOuts * kCut];
    float sums_[kMostRows * kChunk];

    Ends<T> ends(int64_t row, int64_t out, int64_t column, int64_t from) {
        return {call_, sums_, row, out, last_, column, !from, from + cut_ >= call_.in_features};
    }

    void take_one_row(int64_t out) {
        for (int64_t from = 0; from < call_.in_features; from += cut_)
            direct_tile<T, 1, 2 * kOuts, false>(slab_of<2 * kOuts>(out, from, out + chunk_),
                                                x_ + from, x_row_, 0, wide_, ends(0, out, 0, from));
    }

    // `rows` rows from `row` on with the outputs of a chunk.
    void take(int64_t out, int64_t row, int64_t rows) {
        const float* x = x_ + row * x_row_;
        for (int64_t from = 0; from < call_.in_features; from += cut_)
            for (int64_t n = out; n < std::min(out + chunk_, last_); n += kOuts)
                multiply_slab(slab_of<kOuts>(n, from, out + chunk_), x + from, x_row_, rows, wide_,
                              ends(row, n, n - out, from));
    }

    // kWide outputs from `out` on, with the inputs from `from` on, in a chunk that ends at `end`. One
    // with part of a step, or with fewer outputs, is copied and filled up with zeros.
    template <int kWide>
    Slab<T> slab_of(int64_t out, int64_t from, int64_t end) {
        const int64_t row = call_.weight_row, length = std::min(cut_, call_.in_features - from);
        Slab<T> slab{weight(out) + from, row, padded(length)};
        aim<kWide>(slab, out, from, end);
        const int64_t outs = std::min<int64_t>(kWide, last_ - out);
        if (outs == kWide && slab.length == length) return slab;
        std::memset(copy_, 0, kWide * cut_ * sizeof(T));
        for (int64_t n = 0; n < outs; ++n)
            std::memcpy(copy_ + n * cut_, slab.weight + n * row, length * sizeof(T));
        slab.weight = copy_;
        slab.row = cut_;
        return slab;
    }

    // What follows on a slab is asked for: where outputs are whole in it and lie without gaps, in the
    // order of the addresses, which reads fastest, else output by output.
    template <int kWide>
    void aim(Slab<T>& slab, int64_t out, int64_t from, int64_t end) const {
        int64_t next = out + kWide, at = from;
        if (call_.weight_row == call_.in_features && cut_ >= call_.in_features) {
            slab.ahead_row = 64 / sizeof(T);
            slab.ahead_step = kWide;
        } else if (sizeof(T) == 4) {
            return;  // the processor's own fetching follows such rows, and was slower with more
        } else {
            slab.ahead_row = call_.weight_row;
            if (next >= end) {
                next = end - chunk_;
                at += cut_;
            }
            if (at >= call_.in_features) {
                next = end;
                at = 0;
            }
        }
        if (next + kWide <= call_.out_features) slab.ahead = weight(next) + at;
    }

    const T* weight(int64_t out) const {
        return static_cast<const T*>(call_.weight) + out * call_.weight_row;
    }
};

// Sixteen inputs of a row, in the order of a weight of type T.
template <class T>
void widen_step(const T* x, float* to) {
    _mm256_storeu_ps(to, half_of<0>(x));
    _mm256_storeu_ps(to + Isa::kLanes, half_of<1>(x));
}
void widen_apart(const float* x, float* to) {
    const F first = Isa::load(x), second = Isa::load(x + Isa::kLanes);
    for (int odd = 0; odd < 2; ++odd) {
        const F four = odd ? _mm256_shuffle_ps(first, second, 0xdd) : _mm256_shuffle_ps(first, second, 0x88);
        const __m256d both = _mm256_permute4x64_pd(_mm256_castps_pd(four), 0xd8);
        _mm256_storeu_ps(to + odd * Isa::kLanes, _mm256_castpd_ps(both));
    }
}

template <class X, class Step>
void widen_rows_by(const SglLinear& call, int64_t first, int64_t last, float* to, const Step& step) {
    const int64_t width = call.in_features, row = sgl::wide_row_avx2(width);
    for (int64_t m = first; m < last; ++m) {
        const X* x = static_cast<const X*>(call.x) + m * call.x_row;
        for (int64_t d = 0; d < width; d += kStep) {
            X rest[kStep] = {};
            const bool whole = width - d >= kStep;
            if (!whole) std::memcpy(rest, x + d, (width - d) * sizeof(X));
            step(whole ? x + d : rest, to + m * row + d);
        }
    }
}

}  // namespace

// Rows that lay a multiple of 4 KiB apart would want the same lines of the first cache.
int64_t sgl::wide_row_avx2(int64_t in_features) {
    const int64_t row = padded(in_features);
    return row % 256 ? row : row + kStep;
}

void sgl::widen_rows_avx2(const SglLinear& call, int32_t x_dtype, int64_t first, int64_t last,
                          float* to) {
    if (x_dtype == SGL_FLOAT32 && call.dtype == SGL_BFLOAT16)
        widen_rows_by<float>(call, first, last, to, widen_apart);
    else if (x_dtype == SGL_FLOAT32)
        widen_rows_by<float>(call, first, last, to, widen_step<float>);
    else if (x_dtype == SGL_BFLOAT16)
        widen_rows_by<Bf16>(call, first, last, to, widen_step<Bf16>);
    else
        widen_rows_by<Fp16>(call, first, last, to, widen_step<Fp16>);
}

void sgl::linear_avx2(const SglLinear& call, const float* x, int64_t x_row, int64_t first,
                      int64_t last) {
    if (call.dtype == SGL_FLOAT32) Product<float>(call, x, x_row, last).run(first);
    if (call.dtype == SGL_BFLOAT16) Product<Bf16>(call, x, x_row, last).run(first);
    if (call.dtype == SGL_FLOAT16) Product<Fp16>(call, x, x_row, last).run(first);
}
