// Products of bfloat16 rows on AMX tiles.
//
// A tile of 16 outputs x 32 inputs is read where the weight lies, as the left side of a tile product.
// The right side are pairs of inputs of up to 16 rows, packed once per call. Sums come out as [output,
// row] and are turned around at the end. A row is a column of its own: it adds up along its inputs in the
// same way, whatever stands beside it.
//
// Legend: a block is 16 outputs, a group 16 rows or all where there are fewer.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "linear.h"
#include "numbers.h"
#include "tiles.h"

namespace {

constexpr int64_t kLine = 64;  // bytes of 32 inputs, of a tile's row and of the cache's line
constexpr int64_t kStep = 32;  // inputs of a tile

int64_t columns_of(const SglLinear& call) { return std::min<int64_t>(call.rows, kTile); }
int64_t groups_of(const SglLinear& call) { return (call.rows + kTile - 1) / kTile; }
int64_t steps_of(const SglLinear& call) { return (call.in_features + kStep - 1) / kStep; }
// Of a group's packed inputs.
int64_t group_bytes(const SglLinear& call) { return steps_of(call) * kTile * columns_of(call) * 4; }

// Inputs [d, d + 32) of a row, zeros beyond the last.
inline __m512i load_inputs(const SglLinear& call, const char* row, int64_t d) {
    const int64_t left = call.in_features - d;
    if (left >= kStep) return _mm512_loadu_si512(row + d * 2);
    return _mm512_maskz_loadu_epi16((1u << left) - 1, row + d * 2);
}

// The tiles of a call: 0 to 3 are sums, by block and group, 4 and 5 weights, 6 and 7 inputs.
void configure(const SglLinear& call) {
    const auto outs = static_cast<uint8_t>(std::min<int64_t>(call.out_features, kTile));
    const auto bytes = static_cast<uint8_t>(columns_of(call) * 4);
    alignas(64) uint8_t config[64] = {1};  // palette 1: eight tiles of up to 16 rows of 64 bytes
    for (int i = 0; i < 8; ++i) {
        config[16 + 2 * i] = i == 4 || i == 5 ? static_cast<uint8_t>(kLine) : bytes;
        config[48 + i] = i < 6 ? outs : kTile;
    }
    finish_stores();
    _tile_loadconfig(config);
}

// Lines of the weight that are asked for with a block's part of a step, in the order of their addresses:
// half of the rows of the next blocks. The processor's own fetching finds the others behind them, and
// asked for too they were slower.
class Ahead {
  public:
    explicit Ahead(const char* at) : at_(at) {}

    inline void ask() {
        if (!at_) return;
        for (int i = 0; i < kLines; ++i, at_ += kLine) _mm_prefetch(at_, _MM_HINT_T1);
    }

  private:
    static constexpr int kLines = 8;
    const char* at_;
};

// Adds the products of 32 inputs, of one or two blocks and one or two groups.
template <int kBlocks, int kGroups, class Fetch>
inline void add_step(const char* weight, int64_t weight_row, const char* packed, int64_t group,
                     int64_t columns, const Fetch& fetch) {
    _tile_loadd(6, packed, columns);
    _tile_loadd(4, weight, weight_row);
    fetch();
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kGroups == 2) {
        _tile_loadd(7, packed + group, columns);
        _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kBlocks == 2) {
        _tile_loadd(5, weight + kTile * weight_row, weight_row);
        fetch();
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kGroups == 2) _tile_dpbf16ps(3, 5, 7);
    }
}

// The inputs beyond whole steps: nothing behind a weight's row may be read.
template <int kBlocks, int kGroups>
void add_rest(const SglLinear& call, const char* weight, const char* packed, int64_t columns) {
    const int64_t d = call.in_features / kStep * kStep, outs = std::min<int64_t>(call.out_features, kTile);
    alignas(64) char rest[kBlocks * kTile * kLine];
    for (int64_t i = 0; i < (kBlocks - 1) * kTile + outs; ++i)
        _mm512_store_si512(rest + i * kLine, load_inputs(call, weight + i * call.weight_row * 2, d));
    finish_stores();
    add_step<kBlocks, kGroups>(rest, kLine, packed, group_bytes(call), columns, [] {});
}

// Rounds the sums [16 outputs, rows] of a group, with their bias, to outputs [first, last) of `outs`;
// sums are those of the outputs from `out` on.
void finish(const SglLinear& call, const float* sums, int64_t group, int64_t out, int64_t first,
            int64_t last) {
    const auto some = static_cast<__mmask16>((1u << (last - out)) - (1u << (first - out)));
    __m512 bias = _mm512_setzero_ps();
    if (call.bias) {
        const Bf16* from = static_cast<const Bf16*>(call.bias) + out;
        const __m256i narrow = _mm256_maskz_loadu_epi16(some, from);
        bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
    }
    Bf16* to = static_cast<Bf16*>(call.out) + group * kTile * call.out_row + out;
    const auto store_row = [&](__m512i row) {
        const __m512 sum = _mm512_castsi512_ps(row) + bias;
        _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh(sum));
        to += call.out_row;
    };
    if (call.rows == 1) {
        store_row(_mm512_load_si512(sums));
        return;
    }
    __m512i rows[kTile];
    for (int i = 0; i < kTile; ++i) rows[i] = _mm512_load_si512(sums + i * kTile);
    transpose(rows);
    const int64_t count = std::min<int64_t>(kTile, call.rows - group * kTile);
    for (int64_t i = 0; i < count; ++i) store_row(rows[i]);
}

// Outputs [first, last) of one group or two, of blocks that begin with output `out`.
template <int kBlocks, int kGroups>
void multiply(const SglLinear& call, const char* packed, int64_t group, int64_t out, int64_t first,
              int64_t last, Ahead* ahead) {
    const int64_t weight_row = call.weight_row * 2, columns = columns_of(call) * 4;
    const int64_t group_size = group_bytes(call), step = kTile * columns;
    const char* weight = static_cast<const char*>(call.weight) + out * weight_row;
    packed += group * group_size;
    _tile_zero(0);
    if constexpr (kGroups == 2) _tile_zero(1);
    if constexpr (kBlocks == 2) _tile_zero(2);
    if constexpr (kBlocks == 2 && kGroups == 2) _tile_zero(3);
    for (int64_t steps = call.in_features / kStep; steps; --steps, weight += kLine, packed += step)
        add_step<kBlocks, kGroups>(weight, weight_row, packed, group_size, columns, [&] {
            ahead->ask();
        });
    if (call.in_features % kStep)
        add_rest<kBlocks, kGroups>(call, weight - call.in_features / kStep * kLine, packed, columns);
    alignas(64) float sums[4][kTile * kTile];
    const int64_t stride = call.rows == 1 ? 4 : kLine;
    _tile_stored(0, sums[0], stride);
    if constexpr (kGroups == 2) _tile_stored(1, sums[1], stride);
    if constexpr (kBlocks == 2) _tile_stored(2, sums[2], stride);
    if constexpr (kBlocks == 2 && kGroups == 2) _tile_stored(3, sums[3], stride);
    finish_stores();
    for (int b = 0; b < kBlocks; ++b)
        for (int g = 0; g < kGroups; ++g)
            finish(call, sums[b * 2 + g], group + g, out + b * kTile, b ? out + kTile : first,
                   std::min(last, out + (b + 1) * kTile));
}

// Outputs [first, last) of all rows, of the blocks that begin with `out`.
template <int kBlocks>
void multiply_blocks(const SglLinear& call, const char* packed, int64_t out, int64_t first,
                     int64_t last) {
    const int64_t next = out + kBlocks * kTile, groups = groups_of(call);
    // Where several threads share the outputs out, those behind the range are another's.
    const bool wanted = next < (call.num_threads == 1 ? call.out_features : last);
    const char* weight = static_cast<const char*>(call.weight);
    Ahead ahead(wanted ? weight + next * call.weight_row * 2 : nullptr);
    int64_t group = 0;
    for (; group + 2 <= groups; group += 2)
        multiply<kBlocks, 2>(call, packed, group, out, first, last, &ahead);
    if (group < groups) multiply<kBlocks, 1>(call, packed, group, out, first, last, &ahead);
}

}  // namespace

int64_t sgl::packed_bytes(const SglLinear& call) {
    if (call.rows == 1 && call.in_features % kStep == 0) return 0;
    return groups_of(call) * group_bytes(call);
}

const char* sgl::pack_rows(const SglLinear& call, char* room) {
    const auto* x = static_cast<const char*>(call.x);
    if (!packed_bytes(call)) return x;
    char* to = room;
    const int64_t columns = columns_of(call);
    const auto all = static_cast<__mmask16>((1u << columns) - 1);
    for (int64_t first = 0; first < call.rows; first += kTile)
        for (int64_t d = 0; d < call.in_features; d += kStep) {
            __m512i rows[kTile];
            for (int64_t i = 0; i < kTile; ++i)
                rows[i] = first + i < call.rows
                              ? load_inputs(call, x + (first + i) * call.x_row * 2, d)
                              : _mm512_setzero_si512();
            transpose(rows);
            for (int i = 0; i < kTile; ++i, to += columns * 4)
                _mm512_mask_storeu_epi32(to, all, rows[i]);
        }
    return room;
}

void sgl::linear_tiles(const SglLinear& call, const char* packed, int64_t first, int64_t last) {
    configure(call);
    for (int64_t out = first; out < last;) {
        if (last - out >= 2 * kTile) {
            multiply_blocks<2>(call, packed, out, out, last);
            out += 2 * kTile;
            continue;
        }
        // The last block may begin in the one before it, and leaves the outputs that are there.
        const int64_t begin = std::max<int64_t>(0, std::min(out, last - kTile));
        multiply_blocks<1>(call, packed, begin, out, last);
        out = begin + kTile;
    }
    end_tiles();
}
