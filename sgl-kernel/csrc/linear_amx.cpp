// Products of bfloat16 rows on AMX tiles.
//
// A tile of 16 outputs x 32 inputs is read where the weight lies, as the left side of a tile product.
// The right side are pairs of inputs of up to 16 rows, packed once per call. Sums come out as [output,
// row] and are turned around at the end. A row is a column of its own: it adds up along its inputs in the
// same way, whatever stands beside it.
//
// Where the packed inputs pass the second cache, they are taken in parts, and the sums of a range of
// outputs wait for the next part in memory.
//
// Legend: a block is 16 outputs, a group 16 rows or all where there are fewer, a step 32 inputs.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "linear.h"
#include "numbers.h"
#include "scratch.h"
#include "tiles.h"

namespace {

constexpr int64_t kLine = 64;              // bytes of 32 inputs, of a tile's row and of the cache's line
constexpr int64_t kStep = 32;              // inputs of a tile
constexpr int64_t kPartBytes = 512 << 10;  // of the packed inputs that are multiplied at a time
constexpr int64_t kPartOuts = 256;         // outputs whose sums wait

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

// Steps [begin, end) of all.
struct Part {
    int64_t begin, end;
};

// Lines of the weight that are asked for with a block's half of a step, in the order of their addresses:
// half of the rows of the next blocks. The processor's own fetching finds the others behind them, and
// asked for too they were slower.
class Ahead {
  public:
    // `bytes` of each row from `at` on, which stand `row` bytes apart; none where `at` is null.
    Ahead(const char* at, int64_t bytes, int64_t row)
        : at_(at), end_(at ? at + bytes : nullptr), row_(row), skip_(row - bytes) {}

    inline void ask() {
        if (!at_) return;
        for (int i = 0; i < kLines; ++i, at_ += kLine) _mm_prefetch(at_, _MM_HINT_T1);
        if (skip_ == 0 || at_ < end_) return;
        at_ += skip_;
        end_ += row_;
    }

  private:
    static constexpr int kLines = 8;
    const char *at_, *end_;
    int64_t row_, skip_;
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
    const int64_t d = call.in_features / kStep * kStep;
    const int64_t outs = std::min<int64_t>(call.out_features, kTile);
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

// A tile's sums, and those that wait in memory: [blocks, groups, 16, 16].
using Sums = float[kTile * kTile];

template <int kBlocks, int kGroups>
void load_sums(const Sums* sums, int64_t groups, int64_t stride) {
    finish_stores();
    _tile_loadd(0, sums[0], stride);
    if constexpr (kGroups == 2) _tile_loadd(1, sums[1], stride);
    if constexpr (kBlocks == 2) _tile_loadd(2, sums[groups], stride);
    if constexpr (kBlocks == 2 && kGroups == 2) _tile_loadd(3, sums[groups + 1], stride);
}

template <int kBlocks, int kGroups>
void store_sums(Sums* sums, int64_t groups, int64_t stride) {
    _tile_stored(0, sums[0], stride);
    if constexpr (kGroups == 2) _tile_stored(1, sums[1], stride);
    if constexpr (kBlocks == 2) _tile_stored(2, sums[groups], stride);
    if constexpr (kBlocks == 2 && kGroups == 2) _tile_stored(3, sums[groups + 1], stride);
    finish_stores();
}

// Blocks that begin with output `out`, of which [first, last) are wanted.
struct Outs {
    int64_t out, first, last;
};

// A part of the products of one group or two. `sums` are the group's, those of the next block `groups`
// further.
template <int kBlocks, int kGroups>
void multiply(const SglLinear& call, const char* packed, int64_t group, const Outs& outs,
              const Part& part, Sums* sums, int64_t groups, Ahead* ahead) {
    const int64_t weight_row = call.weight_row * 2, columns = columns_of(call) * 4;
    const int64_t group_size = group_bytes(call), step = kTile * columns;
    const int64_t stride = call.rows == 1 ? 4 : kLine;
    const char* weight = static_cast<const char*>(call.weight) + outs.out * weight_row;
    packed += group * group_size + part.begin * step;
    if (part.begin) {
        load_sums<kBlocks, kGroups>(sums, groups, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    const int64_t whole = std::min(part.end, call.in_features / kStep);
    for (int64_t i = part.begin; i < whole; ++i, packed += step)
        add_step<kBlocks, kGroups>(weight + i * kLine, weight_row, packed, group_size, columns,
                                   [&] { ahead->ask(); });
    if (whole < part.end) add_rest<kBlocks, kGroups>(call, weight, packed, columns);
    store_sums<kBlocks, kGroups>(sums, groups, stride);
    if (part.end < steps_of(call)) return;
    for (int b = 0; b < kBlocks; ++b)
        for (int g = 0; g < kGroups; ++g) {
            const int64_t out = outs.out + b * kTile;
            finish(call, sums[b * groups + g], group + g, out, std::max(out, outs.first),
                   std::min(outs.last, out + kTile));
        }
}

// The same of all groups; all sums of a group's blocks are used at once where nothing waits.
template <int kBlocks>
void multiply_rows(const SglLinear& call, const char* packed, const Outs& outs, const Part& part,
                   Sums* waiting, Ahead* ahead) {
    const int64_t groups = groups_of(call);
    alignas(64) Sums at_once[4];
    for (int64_t group = 0; group < groups; group += 2) {
        // With the first groups half of the next rows are asked for, which is what reads best.
        if (group) *ahead = Ahead(nullptr, 0, 0);
        Sums* sums = waiting ? waiting + group : at_once;
        const int64_t apart = waiting ? groups : 2;
        if (group + 1 < groups)
            multiply<kBlocks, 2>(call, packed, group, outs, part, sums, apart, ahead);
        else
            multiply<kBlocks, 1>(call, packed, group, outs, part, sums, apart, ahead);
    }
}

// Part of the products of outputs [first, last) of all rows.
void multiply_part(const SglLinear& call, const char* packed, int64_t first, int64_t last,
                   const Part& part, Sums* waiting) {
    const int64_t weight_row = call.weight_row * 2, groups = groups_of(call);
    const char* weight = static_cast<const char*>(call.weight) + part.begin * kLine;
    // Where several threads share the outputs out, those behind the range are another's.
    const int64_t mine = call.num_threads == 1 ? call.out_features : last;
    const int64_t bytes = std::min(part.end * kLine, call.in_features * 2) - part.begin * kLine;
    for (int64_t out = first; out < last;) {
        const int64_t next = out + 2 * kTile;
        Ahead ahead(next < mine ? weight + next * weight_row : nullptr, bytes, weight_row);
        if (next <= last) {
            multiply_rows<2>(call, packed, {out, out, last}, part, waiting, &ahead);
            out = next;
            if (waiting) waiting += 2 * groups;
            continue;
        }
        // The last block may begin in the one before it, and leaves the outputs that are there.
        const int64_t begin = std::max<int64_t>(0, std::min(out, last - kTile));
        multiply_rows<1>(call, packed, {begin, out, last}, part, waiting, &ahead);
        out = begin + kTile;
        if (waiting) waiting += groups;
    }
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
    thread_local sgl::Scratch room;
    const int64_t steps = steps_of(call), groups = groups_of(call);
    const int64_t parts = (groups * group_bytes(call) + kPartBytes - 1) / kPartBytes;
    configure(call);
    if (parts <= 1) {
        multiply_part(call, packed, first, last, {0, steps}, nullptr);
        end_tiles();
        return;
    }
    const int64_t blocks = std::min(last - first, kPartOuts) / kTile + 1;
    auto* waiting = reinterpret_cast<Sums*>(room.take(blocks * groups * sizeof(Sums)));
    for (int64_t out = first; out < last; out += kPartOuts)
        for (int64_t i = 0; i < parts; ++i)
            multiply_part(call, packed, out, std::min(last, out + kPartOuts),
                          {steps * i / parts, steps * (i + 1) / parts}, waiting);
    end_tiles();
}
