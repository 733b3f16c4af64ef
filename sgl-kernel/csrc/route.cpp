// Which experts a row of scores chooses, and with what weights. A few hundred comparisons a row: one
// thread.
#include <cmath>
#include <vector>

#include "api.h"
#include "input_rows.h"

namespace {

// Higher than any number where there is none.
inline float rank(float score) { return score == score ? score : INFINITY; }

// The highest not taken yet, the first of equals.
int64_t highest(const std::vector<float>& scores, const std::vector<char>& taken) {
    int64_t best = -1;
    for (int64_t e = 0; e < static_cast<int64_t>(scores.size()); ++e)
        if (!taken[e] && (best < 0 || rank(scores[e]) > rank(scores[best]))) best = e;
    return best;
}

void weigh(const SglRoute& call, const std::vector<float>& scores, const int64_t* experts,
           float* weights) {
    const int64_t chosen = call.chosen;
    if (call.kind == SGL_ROUTE_SIGMOID) {
        for (int64_t k = 0; k < chosen; ++k)
            weights[k] = static_cast<float>(1.0 / (1.0 + std::exp(-double{scores[experts[k]]})));
        return;
    }
    const double top = scores[experts[0]];
    double sum = 0.0;
    if (call.kind == SGL_ROUTE_CHOSEN)
        for (int64_t k = 0; k < chosen; ++k) sum += std::exp(scores[experts[k]] - top);
    else
        for (const float score : scores) sum += std::exp(score - top);
    for (int64_t k = 0; k < chosen; ++k)
        weights[k] = static_cast<float>(std::exp(scores[experts[k]] - top) / sum);
}

}  // namespace

extern "C" int32_t sgl_route(const SglRoute* arguments) {
    const SglRoute& call = *arguments;
    if (call.dtype < SGL_FLOAT32 || call.dtype > SGL_FLOAT16 || call.num_experts < 1) return -1;
    if (call.chosen < 1 || call.chosen > call.num_experts) return -1;
    if (call.kind < SGL_ROUTE_SOFTMAX || call.kind > SGL_ROUTE_SIGMOID) return -1;
    std::vector<float> scores(call.num_experts);
    const int64_t bytes = call.dtype == SGL_FLOAT32 ? 4 : 2;
    for (int64_t row = 0; row < call.rows; ++row) {
        const char* from = static_cast<const char*>(call.scores) + row * call.score_row * bytes;
        widen_rows(from, call.dtype, 0, 1, call.num_experts, scores.data());
        int64_t* experts = call.experts + row * call.chosen;
        std::vector<char> taken(call.num_experts);
        for (int64_t k = 0; k < call.chosen; ++k) {
            experts[k] = highest(scores, taken);
            taken[experts[k]] = 1;
        }
        weigh(call, scores, experts, call.weights + row * call.chosen);
    }
    return 0;
}
