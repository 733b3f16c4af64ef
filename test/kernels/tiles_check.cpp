// Products with codes on AMX tiles, which this processor may lack, with the tiles' instructions written
// out: compared with double arithmetic over the same rounded weight.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

alignas(64) char tiles[8][1024];  // 16 rows of 64 bytes each

void load(int tile, const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i)
        std::memcpy(tiles[tile] + 64 * i, static_cast<const char*>(from) + stride * i, 64);
}

void store(int tile, void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i)
        std::memcpy(static_cast<char*>(to) + stride * i, tiles[tile] + 64 * i, 64);
}

float upper(const char* at) {
    uint16_t half;
    std::memcpy(&half, at, 2);
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// What TDPBF16PS is specified to do, but for denormal numbers: pairs of `a`'s rows with `b`'s columns.
void multiply(int sums, int a, int b) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float sum;
            std::memcpy(&sum, tiles[sums] + 64 * m + 4 * n, 4);
            for (int i = 0; i < 32; ++i)
                sum += upper(tiles[a] + 64 * m + 2 * i) *
                       upper(tiles[b] + 64 * (i / 2) + 4 * n + 2 * (i % 2));
            std::memcpy(tiles[sums] + 64 * m + 4 * n, &sum, 4);
        }
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(tile) std::memset(tiles[tile], 0, 1024)
#define _tile_loadd(tile, from, stride) load(tile, from, stride)
#define _tile_stored(tile, to, stride) store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) multiply(sums, a, b)
#include "quantized_amx.cpp"

namespace {

// To the nearest bfloat16: of 4 bits ties away from 0, of 8 to even.
double rounded(float value, int32_t bits) {
    uint32_t whole;
    std::memcpy(&whole, &value, 4);
    whole += bits == 4 ? 0x8000 : 0x7fff + (whole >> 16 & 1);
    whole &= 0xffff0000u;
    std::memcpy(&value, &whole, 4);
    return value;
}

double code_at(const SglQuantized& call, int64_t out, int64_t d) {
    const auto* row = static_cast<const uint8_t*>(call.codes) + out * call.code_row;
    if (call.is_fp8) return to_float(E4m3{row[d]});
    if (call.bits == 8) return static_cast<int8_t>(row[d]);
    const uint8_t both = row[d / 32 * 16 + d % 16];
    const int code = d % 32 < 16 ? both & 15 : both >> 4;
    return call.has_values ? call.values[code] : code;
}

// Outputs further from double arithmetic than bfloat16 rounds.
int compare(int64_t rows, int32_t bits, int64_t group, bool minima, bool named, bool fp8 = false) {
    const int64_t outs = 37, width = 352, scale_row = (width + group - 1) / group;
    std::vector<float> floats(outs * scale_row);
    std::vector<uint8_t> codes(outs * width * bits / 8);
    std::vector<Fp16> scales(outs * scale_row), mins(outs * scale_row);
    std::vector<Bf16> x(rows * width), out(rows * outs);
    for (auto& code : codes) code = static_cast<uint8_t>(std::rand() >> 4);
    for (auto& scale : scales) store(1.0f / (1 + std::rand() % 50), &scale);
    for (auto& code : codes)
        if (fp8 && (code & 127) == 127) code = 1;
    for (size_t i = 0; i < floats.size(); ++i) floats[i] = to_float(scales[i]);
    for (auto& least : mins) store(static_cast<float>(std::rand() % 9 - 4), &least);
    for (auto& value : x) store(static_cast<float>(std::rand() % 201 - 100), &value);
    SglQuantized call{};
    call.x = x.data(), call.out = out.data(), call.codes = codes.data();
    call.is_fp8 = fp8;
    call.scales = fp8 ? static_cast<void*>(floats.data()) : scales.data(), call.mins = minima ? mins.data() : nullptr;
    call.x_row = call.in_features = width, call.out_row = call.out_features = outs;
    call.code_row = width * bits / 8, call.scale_row = scale_row, call.rows = rows;
    call.group = group, call.gain = 0.5f, call.bits = bits, call.has_values = named;
    call.dtype = SGL_BFLOAT16;
    for (int i = 0; i < 16; ++i) call.values[i] = static_cast<int8_t>(i * i - 120);
    sgl::Scratch room;
    char* packed = room.take(sgl::packed_bytes(call));
    for (int64_t tile = 0; tile < (rows + 15) / 16; ++tile) sgl::pack_inputs(call, tile, packed);
    sgl::multiply_packed(call, packed, 0, outs);
    int far = 0;
    for (int64_t n = 0; n < outs; ++n)
        for (int64_t m = 0; m < rows; ++m) {
            double want = 0, terms = 0;
            for (int64_t d = 0; d < width; ++d) {
                const int64_t at = n * scale_row + d / group;
                const double weight =
                    rounded(static_cast<float>(code_at(call, n, d) * to_float(scales[at]) +
                                               (minima ? to_float(mins[at]) : 0.0f)),
                            bits);
                const double term = to_float(x[m * width + d]) * weight * 0.5;
                want += term, terms += std::fabs(term);
            }
            const double error = std::fabs(to_float(out[m * outs + n]) - want);
            far += !(error <= 0.004 * std::fabs(want) + 1e-6 * terms);
        }
    return far;
}

}  // namespace

int main() {
    int far = 0, count = 0;
    for (int64_t rows : {1, 17, 50})
        for (bool minima : {false, true}) {
            far += compare(rows, 4, 32, minima, false) + compare(rows, 4, 32, minima, true);
            far += compare(rows, 8, 32, minima, false) + compare(rows, 8, 16, minima, false);
            count += 4;
        }
    for (int64_t rows : {1, 17, 50})
        for (int64_t group : {32, 128, 352}) {
            far += compare(rows, 8, group, false, false, true);
            count += 1;
        }
    std::printf("%d outputs of %d products are far\n", far, count);
    return far != 0;
}
