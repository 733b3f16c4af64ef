// The vector kernel with AVX2, FMA and F16C.
#include "isa_avx2.h"
#include "vector_attention.h"

void sgl::run_task_avx2(const SglAttention& call, const Task& task, const States& states,
                           void*) {
    run_any(call, task, states);
}

void sgl::finish_avx2(const SglAttention& call, const Task& task, const States* parts, int count) {
    finish_any(call, task, parts, count);
}
