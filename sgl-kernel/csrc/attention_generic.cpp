// The vector kernel in plain C++.
#include "isa_generic.h"
#include "vector_products.h"
#include "vector_attention.h"

void sgl::run_task_generic(const SglAttention& call, const Task& task, const States& states,
                           void* scratch) {
    run_any(call, task, states, scratch);
}

void sgl::finish_generic(const SglAttention& call, const Task& task, const States* parts, int count) {
    finish_any(call, task, parts, count);
}
