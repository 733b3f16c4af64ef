// The vector kernel and the blocked one with AVX-512.
#include "math_avx512.h"

#include "blocked_attention.h"
#include "vector_products.h"
#include "vector_attention.h"

void sgl::run_task_avx512(const SglAttention& call, const Task& task, const States& states,
                           void* scratch) {
    run_any(call, task, states, scratch);
}

void sgl::run_blocked_avx512(const SglAttention& call, const Task& task, const States& states,
                             void* scratch) {
    run_blocked_floats(call, task, states, scratch);
}

void sgl::finish_avx512(const SglAttention& call, const Task& task, const States* parts, int count) {
    finish_any(call, task, parts, count);
}
