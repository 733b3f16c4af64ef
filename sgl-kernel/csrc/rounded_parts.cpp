// Inputs rounded to bytes for vectors of 32 bytes, see rounded_parts.h: AVX2.
#include "rounded_parts.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace {

inline __m256 absolute(__m256 x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

inline float largest_of(__m256 x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

// 32 inputs as bytes; their scale, NaN where one of them is not finite.
inline float round_block(const float* x, __m256i& bytes) {
    __m256 value[4], top = _mm256_setzero_ps(), lost = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
        value[i] = _mm256_loadu_ps(x + 8 * i);
        top = _mm256_max_ps(top, absolute(value[i]));
        // NaN is no less than anything: the comparison finds it where the maximum may not.
        lost = _mm256_or_ps(lost, _mm256_cmp_ps(absolute(value[i]),
                                                _mm256_set1_ps(__builtin_inff()), _CMP_NLT_UQ));
    }
    const float largest = largest_of(top);
    const bool finite = !_mm256_movemask_ps(lost);
    bytes = _mm256_setzero_si256();
    if (!finite) return __builtin_nanf("");
    if (!(largest > 1e-36f)) return 0.0f;
    const __m256 inverse = _mm256_set1_ps(127.0f / largest);
    __m256i whole[4];
    for (int i = 0; i < 4; ++i) whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(value[i], inverse));
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]),
                                              _mm256_packs_epi32(whole[2], whole[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    bytes = _mm256_permutevar8x32_epi32(packed, order);
    return largest / 127.0f;
}

// What the bytes of each half add up to.
inline void sum_halves(__m256i bytes, int32_t (&sum)[2]) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    const __m256i eights = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0x4e));
    const __m256i all = _mm256_add_epi32(eights, _mm256_shuffle_epi32(eights, 0xb1));
    sum[0] = _mm256_extract_epi32(all, 0);
    sum[1] = _mm256_extract_epi32(all, 4);
}

// What takes the shift of small values away, of the inputs of a step: see Part.
inline __m256i shift_of(const char* inputs) {
    __m256i pairs = _mm256_setzero_si256();
    for (int i = 0; i < 2; ++i) {
        const auto* from = reinterpret_cast<const __m256i*>(inputs + 32 * i);
        const __m256i some = _mm256_maddubs_epi16(_mm256_set1_epi8(kShift), _mm256_loadu_si256(from));
        pairs = _mm256_sub_epi16(pairs, some);
    }
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// Rounds up to Part::kBlocks blocks.
template <int kScales>
inline void round_part(const float* x, int64_t blocks, bool minima, bool small, char* to) {
    using P = Part<kScales>;
    std::memset(to, 0, P::bytes(minima, small));
    float* scales = reinterpret_cast<float*>(to + P::kScaleAt);
    float* sums = reinterpret_cast<float*>(to + P::kSumAt);
    for (int64_t b = 0; b < blocks; ++b) {
        __m256i bytes;
        const float scale = round_block(x + b * kBlock, bytes);
        __m128i halves[2] = {_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)};
        for (int i = 0; i < 2; ++i)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + P::half(b, i)), halves[i]);
        for (int s = 0; s < kScales; ++s) scales[scale_place(b * kScales + s)] = scale;
        if (!minima) continue;
        int32_t sum[2];
        sum_halves(bytes, sum);
        if (kScales == 1) sum[0] += sum[1];
        for (int s = 0; s < kScales; ++s) sums[b * kScales + s] = sum[s] * scale;
    }
    auto* shift = reinterpret_cast<__m256i*>(to + P::shift_at(minima));
    for (int step = 0; step < kSteps && small; ++step)
        _mm256_storeu_si256(shift + step, shift_of(to + 64 * step));
}

template <int kScales>
void round_rows(const SglQuantized& call, const float* x, char* to) {
    using P = Part<kScales>;
    const int64_t blocks = call.in_features / kBlock;
    const bool minima = call.mins != nullptr, small = kind_of(call) == Code::kSmall;
    const int64_t bytes = P::bytes(minima, small);
    for (int64_t row = 0; row < call.rows; ++row, x += call.in_features)
        for (int64_t first = 0; first < blocks; first += P::kBlocks, to += bytes)
            round_part<kScales>(x + first * kBlock, std::min<int64_t>(P::kBlocks, blocks - first),
                                minima, small, to);
}

}  // namespace

int64_t sgl::rounded_bytes_in_parts(const SglQuantized& call) {
    return call.rows * row_bytes(call);
}

void sgl::round_inputs_in_parts(const SglQuantized& call, const float* x, char* to) {
    if (call.group == 16)
        round_rows<2>(call, x, to);
    else
        round_rows<1>(call, x, to);
}
