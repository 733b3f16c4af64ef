// Products of rounded inputs with a quantised weight, by dot products of bytes without AVX-512: AVX-VNNI.
#include "quantized_bytes.h"

namespace {

struct VexDots {
    static __m256i add(__m256i sum, __m256i codes, __m256i x) {
        return _mm256_dpbusd_avx_epi32(sum, codes, x);
    }
};

}  // namespace

const sgl::RoundedProduct sgl::rounded_vex{rounded_bytes_in_parts, round_inputs_in_parts,
                                           multiply_bytes<DotSums<VexDots>>};
