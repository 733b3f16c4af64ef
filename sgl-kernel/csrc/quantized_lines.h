// How inputs that are rounded to bytes lie.
#pragma once

#include <cstdint>

#include "quantized.h"

namespace {

constexpr int kBlock = 32, kBlocks = 4;  // codes of a block, blocks at a time

// 128 inputs of a row are so many lines of 64 bytes, in the order in which four blocks of codes come:
// bytes of the first 16 inputs of each block, of the others, scales. A lane is 4 bytes. For codes + 128
// -128 times the sum of each lane follows; for minima its sum times its scale. Where a block has one
// scale, both halves' lanes are summed together.
struct Lines {
    int scales;
    bool offsets, minima;

    constexpr int count() const { return 3 + scales * (offsets + minima); }
    constexpr int offset(int which) const { return 3 + which; }
    constexpr int sum(int which) const { return 3 + scales * offsets + which; }
};

Lines lines_of(const SglQuantized& call) {
    return {call.group == 16 ? 2 : 1, call.bits == 8, call.mins != nullptr};
}

int64_t parts_of(const SglQuantized& call) {
    return (call.in_features / kBlock + kBlocks - 1) / kBlocks;
}

}  // namespace
