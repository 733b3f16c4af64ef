// A tape: the calls of one step, made one after another without going back to the caller.
#include <chrono>

#include "api.h"
#include "parallel.h"

namespace {

template <class Call>
int32_t make(int32_t (*function)(const Call*), const void* call) {
    return function(static_cast<const Call*>(call));
}

int32_t make_call(const SglStep& step) {
    switch (step.op) {
        case SGL_OP_ATTENTION: return make(sgl_attention, step.call);
        case SGL_OP_QKV: return make(sgl_qkv, step.call);
        case SGL_OP_LINEAR: return make(sgl_linear, step.call);
        case SGL_OP_QUANTIZED_LINEAR: return make(sgl_quantized_linear, step.call);
        case SGL_OP_DEQUANTIZE: return make(sgl_dequantize, step.call);
        case SGL_OP_NORM: return make(sgl_norm, step.call);
        case SGL_OP_GATE: return make(sgl_gate, step.call);
        case SGL_OP_ROTATE: return make(sgl_rotate, step.call);
        case SGL_OP_STORE: return make(sgl_store, step.call);
        case SGL_OP_GATHER: return make(sgl_gather, step.call);
        case SGL_OP_ANGLES: return make(sgl_angles, step.call);
        case SGL_OP_WIDEN: return make(sgl_widen, step.call);
        case SGL_OP_HIGHEST: return make(sgl_highest, step.call);
        case SGL_OP_SCALE: return make(sgl_scale, step.call);
        case SGL_OP_ROUTE: return make(sgl_route, step.call);
        case SGL_OP_EXPERTS: return make(sgl_experts, step.call);
    }
    return -1;
}

double now() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" int64_t sgl_run(const SglStep* steps, int64_t count, int32_t num_threads,
                           double* seconds) {
    const sgl::Team team(num_threads);
    for (int64_t i = 0; i < count; ++i) {
        const double began = seconds ? now() : 0.0;
        if (make_call(steps[i])) return i;
        if (seconds) seconds[i] = now() - began;
    }
    return count;
}
