// How inputs that are rounded to bytes lie.
#pragma once

#include <cstdint>

#include "quantized.h"

namespace {

constexpr int kBlock = 32, kBlocks = 4;  // codes of a block, blocks at a time

// 128 inputs of a row are so many lines of 64 bytes, in the order in which four blocks of codes come:
// bytes of the first 16 inputs of each block, of the others, scales. A lane is 4 bytes. For signed codes,
// which come with 128 added, -128 times the sum of each lane follows; for minima its sum times its scale.
// Where a block has one scale, both halves' lanes are summed together.
struct Lines {
    int scales;
    bool offsets, minima;

    constexpr int count() const { return 3 + scales * (offsets + minima); }
    constexpr int offset(int which) const { return 3 + which; }
    constexpr int sum(int which) const { return 3 + scales * offsets + which; }
};

constexpr bool is_signed(Code code) { return code != Code::kHalf; }

Lines lines_of(const SglQuantized& call) {
    return {call.group == 16 ? 2 : 1, is_signed(code_of(call)), call.mins != nullptr};
}

int64_t parts_of(const SglQuantized& call) {
    return (call.in_features / kBlock + kBlocks - 1) / kBlocks;
}

}  // namespace
