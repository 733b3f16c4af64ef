// What the kernels on AMX tiles share: eight tiles of 16 rows of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "transpose.h"

namespace {

constexpr int kTile = 16;  // rows of a tile, and dwords of a row

// Tile loads don't tell the compiler that they read memory: stores before them must be done.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// Gives this thread its tiles, until end_tiles(): a state of 8 KiB that the system must not have to
// save any longer than they are used.
inline void begin_tiles() {
    alignas(64) uint8_t config[64] = {1};  // palette 1: eight tiles of up to 16 rows of 64 bytes
    for (int i = 0; i < 8; ++i) {
        config[16 + 2 * i] = 64;
        config[48 + i] = kTile;
    }
    finish_stores();
    _tile_loadconfig(config);
}

inline void end_tiles() { _tile_release(); }

}  // namespace
