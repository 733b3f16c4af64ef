// Work on single rows: plain C++.
#include "row_loops.h"

void sgl::norm_rows_generic(const SglNorm& call, int64_t first, int64_t last) {
    norm_any(call, first, last);
}

void sgl::gate_rows_generic(const SglGate& call, int64_t first, int64_t last) {
    gate_any(call, first, last);
}

void sgl::rotate_rows_generic(const SglRotate& call, int64_t first, int64_t last) {
    rotate_any(call, first, last);
}

void sgl::highest_rows_generic(const SglHighest& call, int64_t first, int64_t last) {
    highest_some(call, first, last);
}

void sgl::weigh_row_generic(const float* logits, int64_t width, float highest, float temperature,
                            float least, float* weights, float* sums, float* tops) {
    weigh_blocks(logits, width, highest, temperature, least, weights, sums, tops);
}
