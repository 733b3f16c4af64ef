// The vector kernel with AVX-512.
#include "isa_avx512.h"
#include "vector_attention.h"

void sgl::run_task_avx512(const SglAttention& call, const Task& task, const States& states,
                           void*) {
    run_any(call, task, states);
}

void sgl::finish_avx512(const SglAttention& call, const Task& task, const States* parts, int count) {
    finish_any(call, task, parts, count);
}
