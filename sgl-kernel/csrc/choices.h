// What rows chose of a mixture's experts, sorted by expert.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "api.h"

namespace {

// Rows [first, first + count) of the sorted choices, all of one expert.
struct Segment {
    int64_t expert, first, count;
};

// What was chosen, by ascending expert, and in the order of the rows within one.
struct Choices {
    std::vector<int64_t> row;
    std::vector<float> weight;
    std::vector<Segment> segments;
    int64_t longest = 0;

    // False when there is no such expert.
    bool take(const SglExperts& call) {
        const int64_t count = call.rows * call.chosen;
        std::vector<int64_t> next(call.num_experts + 1);
        for (int64_t i = 0; i < count; ++i) {
            if (call.experts[i] < 0 || call.experts[i] >= call.num_experts) return false;
            ++next[call.experts[i] + 1];
        }
        for (int64_t e = 0; e < call.num_experts; ++e) {
            if (next[e + 1]) segments.push_back({e, next[e], next[e + 1]});
            longest = std::max(longest, next[e + 1]);
            next[e + 1] += next[e];
        }
        row.resize(count);
        weight.resize(count);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = next[call.experts[i]]++;
            row[at] = i / call.chosen;
            weight[at] = call.weights[i];
        }
        return true;
    }
};

}  // namespace
