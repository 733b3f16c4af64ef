// Products of rounded inputs with a quantised weight, by pairs of products of bytes: AVX2.
#include "quantized_bytes.h"

const sgl::RoundedProduct sgl::rounded_pairs{rounded_bytes_in_parts, round_inputs_in_parts,
                                             multiply_bytes<PairSums>};
