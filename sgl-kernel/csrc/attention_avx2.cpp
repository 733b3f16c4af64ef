// The vector kernel and the blocked one with AVX2, FMA and F16C.
#include "math_avx2.h"

#include "blocked_attention.h"
#include "products_avx2.h"
#include "vector_attention.h"

void sgl::run_task_avx2(const SglAttention& call, const Task& task, const States& states,
                           void* scratch) {
    run_any(call, task, states, scratch);
}

void sgl::run_blocked_avx2(const SglAttention& call, const Task& task, const States& states,
                             void* scratch) {
    run_blocked_floats(call, task, states, scratch);
}

void sgl::finish_avx2(const SglAttention& call, const Task& task, const States* parts, int count) {
    finish_any(call, task, parts, count);
}
