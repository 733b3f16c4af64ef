// Products of bfloat16 rows with a quantised weight on AMX tiles: its codes become bfloat16 once for all
// rows, scale and minimum included, in memory that stays in the caches.
//
// 16 outputs are the rows of a tile, a block of 32 inputs its columns, so a block's numbers are stored
// as they come out of a vector. The inputs of 16 rows stand across it, packed once for all outputs. The
// order of a block's inputs is that in which codes are taken apart.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "isa_avx512.h"
#include "numbers.h"
#include "quantized.h"
#include "scratch.h"
#include "tiles.h"

namespace {

constexpr int64_t kBlock = 32;             // codes taken at a time: a row of a tile
constexpr int64_t kTileBytes = kTile * 64;
constexpr int64_t kOuts = 2 * kTile;       // outputs at a time
constexpr int64_t kStepBytes = 2 * kTileBytes;  // a block of them as numbers
constexpr int64_t kLag = 4;                // blocks from a number's store to its use
constexpr int64_t kRing = 2 * kLag;
constexpr float kUnit = 0x1p8f;            // of Isa::e4m3

// The bits that the bytes of a line take, of the 8 bytes of codes that are in its place: a word takes
// one code twice, from 2 bits before it on.
struct Shifts {
    alignas(64) uint8_t of[64];
    constexpr Shifts() : of() {
        for (int i = 0; i < 64; ++i)
            of[i] = static_cast<uint8_t>((4 * (i / 16 * 4 + i % 8 / 2) + 62) % 64);
    }
};
constexpr Shifts kShifts;

// Codes of kOuts outputs, with what belongs to them. `values`: of the 16 codes of 4 bits.
struct Source {
    const char* codes;
    const char* scales;
    const Fp16* mins;
    int64_t code_row, scale_row, group;
    __m512 values;
};

inline __m512 values_of(const SglQuantized& call) {
    if (code_of(call) != Code::kNamed)
        return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(call.values));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values));
}

// Turns blocks of kOuts outputs into bfloat16, one after the other.
template <Code kCode, int kScales, bool kMins>
class Numbers {
  public:
    Numbers(const Source& from, int64_t blocks) : from_(from), blocks_(blocks) {}

    // Writes block `b` of each output into a line of `to`. Blocks come in ascending order.
    void write(int64_t b, char* to) {
        const int64_t at = b % kWidened;
        if (at == 0) widen_scales(b);
        const char* codes = from_.codes + b * kBlock * bits_of(kCode) / 8;
#pragma GCC unroll 4
        for (int64_t n = 0; n < kOuts; ++n, codes += from_.code_row, to += 64) {
            const float* scale = scale_[n] + at * kScales;
            const float* least = kMins ? least_[n] + at * kScales : nullptr;
            if (kCode == Code::kFp8)
                multiply_fp8(codes, scale, to);
            else if (kCode == Code::kByte)
                multiply(codes, scale, least, to);
            else
                look_up(codes, from_.values, scale, least, to);
        }
    }

  private:
    static constexpr int64_t kWidened = 16 / kScales;  // blocks whose scales are floats at a time
    const Source from_;
    const int64_t blocks_;
    alignas(64) float scale_[kOuts][16];
    alignas(64) float least_[kMins ? kOuts : 1][16];

    void widen_scales(int64_t b) {
        if (kCode == Code::kFp8) {
            spread_scales(b);
            return;
        }
        const int64_t count = std::min(kWidened, blocks_ - b) * kScales;
        const auto* scales = reinterpret_cast<const Fp16*>(from_.scales);
        const __mmask16 some = (1u << count) - 1;
        for (int64_t n = 0; n < kOuts; ++n) {
            const int64_t at = n * from_.scale_row + b * kScales;
            _mm512_store_ps(scale_[n], widen(some, scales + at));
            if (kMins) _mm512_store_ps(least_[n], widen(some, from_.mins + at));
        }
    }

    // Those of E4M3, each for the blocks of its group.
    void spread_scales(int64_t b) {
        const auto* scales = reinterpret_cast<const float*>(from_.scales);
        for (int64_t i = 0; i < std::min(kWidened, blocks_ - b); ++i) {
            const int64_t group = (b + i) * kBlock / from_.group;
            for (int64_t n = 0; n < kOuts; ++n)
                scale_[n][i] = scales[n * from_.scale_row + group] * kUnit;
        }
    }

    static __m512 widen(__mmask16 some, const Fp16* from) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from));
    }

    static __m512 scaled(__m512 code, const float* scale, const float* least) {
        const __m512 s = _mm512_set1_ps(*scale);
        return kMins ? _mm512_fmadd_ps(code, s, _mm512_set1_ps(*least)) : _mm512_mul_ps(code, s);
    }

    // Of 4 bits: a table holds what the 16 codes are worth, and a line looks its words up byte by byte,
    // each the upper half of a float. A quarter has the codes of 2 bytes of each half of the block.
    static void look_up(const char* codes, __m512 values, const float* scale, const float* least,
                        char* to) {
        const __m512i table = rounded(scaled(values, scale, least));
        const __m512i both = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        // Codes from their third bit on, with others' bits about them.
        const __m512i fields = _mm512_multishift_epi64_epi8(
            _mm512_load_si512(kShifts.of), both);
        const __m512i places = _mm512_ternarylogic_epi32(fields, _mm512_set1_epi8(0x3c),
                                                         _mm512_set1_epi16(0x0302), 0xea);
        _mm512_store_si512(to, _mm512_permutexvar_epi8(places, table));
    }

    // To the nearest bfloat16, ties away from 0, in the upper halves.
    static __m512i rounded(__m512 x) {
        return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    }

    static void multiply(const char* codes, const float* scale, const float* least, char* to) {
        __m512 half[2];
        for (int i = 0; i < 2; ++i) {
            const __m128i bytes =
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + i);
            const int s = i * (kScales - 1);
            half[i] = scaled(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale + s,
                             kMins ? least + s : nullptr);
        }
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
    }

    static void multiply_fp8(const char* codes, const float* scale, char* to) {
        __m512 half[2];
        Isa::e4m3(reinterpret_cast<const uint8_t*>(codes), half);
        const __m512 s = _mm512_set1_ps(*scale);
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(half[1] * s, half[0] * s));
    }
};

// Adds a block to the sums of one or two tiles of rows: in tiles 0 and 1, and 2 and 3.
template <int kTiles>
inline void add_block(const char* numbers, const char* x, int64_t next_tile) {
    _tile_loadd(6, x, 64);
    _tile_loadd(4, numbers, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, numbers + kTileBytes, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (kTiles == 1) return;
    _tile_loadd(7, x + next_tile, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// The sums [kOuts, 16 rows] of the rows from `row` on, to `outs` outputs from `out` on.
void finish_tile(const SglQuantized& call, const float* sums, int64_t row, int64_t out,
                 int64_t outs) {
    const int64_t rows = std::min<int64_t>(kTile, call.rows - row);
    const __m512 gain = _mm512_set1_ps(call.gain);
    for (int64_t n = 0; n < outs; n += kTile, sums += kTile * kTile) {
        const int64_t some = std::min<int64_t>(kTile, outs - n);
        const __mmask16 which = (1u << some) - 1;
        __m512 bias = _mm512_setzero_ps();
        if (call.bias) {
            const __m256i bits =
                _mm256_maskz_loadu_epi16(which, static_cast<const Bf16*>(call.bias) + out + n);
            bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        }
        __m512i lanes[kTile];
        for (int i = 0; i < kTile; ++i) lanes[i] = _mm512_load_si512(sums + i * kTile);
        transpose(lanes);
        Bf16* to = static_cast<Bf16*>(call.out) + row * call.out_row + out + n;
        for (int64_t m = 0; m < rows; ++m, to += call.out_row) {
            const __m512 sum = _mm512_fmadd_ps(_mm512_castsi512_ps(lanes[m]), gain, bias);
            _mm256_mask_storeu_epi16(to, which, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

// Stores the sums of one or two tiles of rows and writes what they give.
template <int kTiles>
void finish(const SglQuantized& call, int64_t row, int64_t out, int64_t outs) {
    alignas(64) float sums[4 * kTile * kTile];
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (kTiles == 2) {
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
    }
    finish_stores();
    finish_tile(call, sums, row, out, outs);
    if (kTiles == 2) finish_tile(call, sums + 512, row + kTile, out, outs);
}

// `outs` outputs from `out` on, of all rows.
template <Code kCode, int kScales, bool kMins>
class Group {
  public:
    Group(const SglQuantized& call, const Source& from, const char* x, char* room, int64_t out,
          int64_t outs)
        : call_(call), blocks_(call.in_features / kBlock), numbers_(from, blocks_), from_(from),
          x_(x), room_(room), out_(out), outs_(outs) {}

    void run() {
        const int64_t tiles = (call_.rows + kTile - 1) / kTile;
        if (tiles == 1)
            multiply_first<1>();
        else
            multiply_first<2>();
        for (int64_t t = 2; t < tiles; t += 2)
            if (t + 1 < tiles)
                multiply_next<2>(t);
            else
                multiply_next<1>(t);
    }

  private:
    const SglQuantized& call_;
    const int64_t blocks_;
    Numbers<kCode, kScales, kMins> numbers_;
    const Source from_;
    const char* x_;
    char* room_;
    const int64_t out_, outs_;

    // Numbers are made, and some blocks later used, by when they are where tiles are loaded from.
    template <int kTiles>
    void multiply_first() {
        const int64_t ring = call_.rows > 2 * kTile ? blocks_ : kRing;
        const int64_t next_tile = blocks_ * kTileBytes;
        const char* ahead = from_.codes + kOuts * from_.code_row;
        const int64_t ahead_bytes = kOuts * kBlock * bits_of(kCode) / 8;
        int64_t made = 0, used = 0;
        zero_sums();
        for (int64_t b = 0; b < blocks_ + kLag; ++b) {
            if (b < blocks_) {
                for (int64_t i = 0; i < ahead_bytes; i += 64)
                    _mm_prefetch(ahead + b * ahead_bytes + i, _MM_HINT_T1);
                numbers_.write(b, room_ + made * kStepBytes);
                made = made + 1 == ring ? 0 : made + 1;
            }
            finish_stores();
            if (b < kLag) continue;
            add_block<kTiles>(room_ + used * kStepBytes, x_ + (b - kLag) * kTileBytes, next_tile);
            used = used + 1 == ring ? 0 : used + 1;
        }
        finish<kTiles>(call_, 0, out_, outs_);
    }

    template <int kTiles>
    void multiply_next(int64_t tile) {
        const int64_t next_tile = blocks_ * kTileBytes;
        const char* x = x_ + tile * next_tile;
        zero_sums();
        for (int64_t b = 0; b < blocks_; ++b)
            add_block<kTiles>(room_ + b * kStepBytes, x + b * kTileBytes, next_tile);
        finish<kTiles>(call_, tile * kTile, out_, outs_);
    }
};

// The codes of fewer than kOuts outputs, with zeros behind them.
Source padded(const SglQuantized& call, const Source& from, int64_t outs, char* room) {
    const int64_t code_bytes = call.in_features * call.bits / 8;
    const int64_t scales = (call.in_features + call.group - 1) / call.group;
    const int64_t size = scale_bytes(call), row = scales * size;
    std::memset(room, 0, kOuts * (code_bytes + 2 * row));
    char *codes = room, *first = room + kOuts * code_bytes, *second = first + kOuts * row;
    for (int64_t n = 0; n < outs; ++n) {
        std::memcpy(codes + n * code_bytes, from.codes + n * from.code_row, code_bytes);
        std::memcpy(first + n * row, from.scales + n * from.scale_row * size, row);
        if (from.mins) std::memcpy(second + n * row, from.mins + n * from.scale_row, row);
    }
    return {codes, first, reinterpret_cast<const Fp16*>(second), code_bytes, scales, from.group,
            from.values};
}

template <Code kCode, int kScales, bool kMins>
void multiply_range(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    thread_local sgl::Scratch for_numbers, for_codes;
    const int64_t blocks = call.in_features / kBlock;
    char* room = for_numbers.take(std::max(blocks, kRing) * kStepBytes);
    const __m512 values = values_of(call);
    for (int64_t out = first; out < last; out += kOuts) {
        const int64_t outs = std::min(kOuts, last - out), at = out * call.scale_row;
        Source from{static_cast<const char*>(call.codes) + out * call.code_row,
                    static_cast<const char*>(call.scales) + at * scale_bytes(call),
                    kMins ? static_cast<const Fp16*>(call.mins) + at : nullptr, call.code_row,
                    call.scale_row, call.group, values};
        if (outs < kOuts)
            from = padded(call, from, outs, for_codes.take(kOuts * call.in_features * 2));
        Group<kCode, kScales, kMins>(call, from, x, room, out, outs).run();
    }
}

template <Code kCode, int kScales>
void multiply_layout(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    if (call.mins)
        multiply_range<kCode, kScales, true>(call, x, first, last);
    else
        multiply_range<kCode, kScales, false>(call, x, first, last);
}

// Where the words of a line come from: see Numbers.
inline __m512i order_of(int32_t bits) {
    alignas(64) uint16_t order[kBlock];
    for (int i = 0; i < kBlock; ++i) {
        const int code = i / 8 * 4 + i % 4, byte = i % 8 / 4 * 8 + code / 2;
        order[i] = static_cast<uint16_t>(bits == 8 ? i : byte + code % 2 * 16);
    }
    return _mm512_load_si512(order);
}

}  // namespace

int64_t sgl::packed_bytes(const SglQuantized& call) {
    return (call.rows + kTile - 1) / kTile * kTile * call.in_features * 2;
}

void sgl::pack_inputs(const SglQuantized& call, int64_t tile, char* to) {
    const int64_t row = tile * kTile, rows = std::min<int64_t>(kTile, call.rows - row);
    const auto* x = static_cast<const Bf16*>(call.x) + row * call.x_row;
    const __m512i order = order_of(call.bits);
    to += tile * kTile * call.in_features * 2;
    for (int64_t d = 0; d < call.in_features; d += kBlock, to += kTileBytes) {
        __m512i lines[kTile];
        for (int64_t m = 0; m < kTile; ++m)
            lines[m] = m < rows ? _mm512_permutexvar_epi16(
                                      order, _mm512_loadu_si512(x + m * call.x_row + d))
                                : _mm512_setzero_si512();
        transpose(lines);
        for (int m = 0; m < kTile; ++m) _mm512_store_si512(to + m * 64, lines[m]);
    }
}

void sgl::multiply_packed(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    begin_tiles();
    const Code code = code_of(call);
    if (call.bits == 4) multiply_layout<Code::kNamed, 1>(call, x, first, last);
    if (code == Code::kFp8) multiply_range<Code::kFp8, 1, false>(call, x, first, last);
    if (code == Code::kByte && call.group == 32)
        multiply_layout<Code::kByte, 1>(call, x, first, last);
    if (code == Code::kByte && call.group == 16)
        multiply_layout<Code::kByte, 2>(call, x, first, last);
    end_tiles();
}
