// Products of rounded inputs by dot products of bytes, which this processor may lack, with an
// instruction that is written out: bit for bit those by pairs of bytes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "quantized_bytes.h"

namespace {

// What VPDPBUSD is specified to do: 8 times four unsigned bytes by signed ones, without saturation.
struct WrittenDots {
    static __m256i add(__m256i sum, __m256i codes, __m256i x) {
        int32_t sums[8];
        uint8_t unsigned_bytes[32];
        int8_t signed_bytes[32];
        std::memcpy(sums, &sum, 32);
        std::memcpy(unsigned_bytes, &codes, 32);
        std::memcpy(signed_bytes, &x, 32);
        for (int i = 0; i < 32; ++i) sums[i / 4] += unsigned_bytes[i] * signed_bytes[i];
        std::memcpy(&sum, sums, 32);
        return sum;
    }
};

// Codes of all values, -128 among them.
struct Problem {
    std::vector<uint8_t> codes;
    std::vector<Fp16> scales, mins;
    std::vector<float> x, out;
    std::vector<char> rounded;
    SglQuantized call = {};

    Problem(int64_t rows, int64_t outs, int64_t width, int32_t bits, int64_t group, bool minima,
            int32_t most)
        : codes(outs * width * bits / 8), scales(outs * width / group), mins(scales.size()),
          x(rows * width), out(rows * outs) {
        for (auto& code : codes) code = static_cast<uint8_t>(std::rand() >> 4);
        for (auto& scale : scales) store(1.0f / (1 + std::rand() % 50), &scale);
        for (auto& least : mins) store(static_cast<float>(std::rand() % 9 - 4), &least);
        for (auto& value : x) value = static_cast<float>(std::rand() % 2001 - 1000);
        call.codes = codes.data();
        call.scales = scales.data();
        call.mins = minima ? mins.data() : nullptr;
        call.code_row = width * bits / 8;
        call.scale_row = width / group;
        call.rows = rows;
        call.out_features = call.out_row = outs;
        call.in_features = width;
        call.group = group;
        call.gain = 0.5f;
        call.bits = bits;
        call.has_values = most != 0;
        for (int i = 0; i < 16 && most; ++i)
            call.values[i] = static_cast<int8_t>(i == 3 ? most : std::rand() % (2 * most + 1) - most);
        rounded.resize(sgl::rounded_bytes_in_parts(call));
        sgl::round_inputs_in_parts(call, x.data(), rounded.data());
    }

    template <class Sums>
    std::vector<float> product() {
        std::fill(out.begin(), out.end(), -1.0f);
        call.out = out.data();
        multiply_bytes<Sums>(call, rounded.data(), 0, call.out_features);
        return out;
    }
};

// `most`: the largest of the values that codes name, 0: none are named.
int compare(int32_t bits, int64_t group, bool minima, int32_t most = 0) {
    int differ = 0;
    for (int64_t rows : {1, 2, 3, 4, 5, 6, 8, 17}) {
        Problem problem(rows, 7, 288, bits, group, minima, most);
        const auto dots = problem.product<DotSums<WrittenDots>>();
        const auto pairs = problem.product<PairSums>();
        differ += std::memcmp(dots.data(), pairs.data(), dots.size() * 4) != 0;
    }
    return differ;
}

}  // namespace

int main() {
    int differ = 0;
    for (bool minima : {false, true})
        differ += compare(4, 32, minima) + compare(4, 32, minima, 16) + compare(4, 32, minima, 127) +
                  compare(8, 32, minima) + compare(8, 16, minima);
    std::printf("%d of 80 products differ\n", differ);
    return differ != 0;
}
