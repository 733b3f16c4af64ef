// Draws a token of each row from its softmax, after top_k, top_p and min_p. Nothing is sorted but what one
// bin of a histogram holds: weights are counted by the upper bits of their numbers, which ascend with them.
//
// Without top_k and top_p tokens stand in the order of their ids, and the draw goes through sums of
// blocks. With them they stand by weight, the highest first and the lowest id first of equals.
#include <algorithm>

#include "choose.h"
#include "numbers.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"

namespace {

constexpr int kBinShift = 20;             // bits of a weight that its bin forgets
constexpr int kBins = 1 + (0x3f800000 >> kBinShift);  // weights are at most 1
constexpr float kFirstCut = 0x1p-14f;     // weights that are looked at before all are
constexpr int64_t kWeightBlock = sgl::kWeightBlock;

struct Token {
    float weight;
    int32_t id;
};

struct Bin {
    double mass;
    int64_t count;
};

inline int bin_of(float weight) {
    return std::min(kBins - 1, static_cast<int>(to_bits(weight) >> kBinShift));
}

inline bool comes_first(const Token& a, const Token& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
}

// What the filters of a row ask of a token: its place, the mass before it, its weight.
struct Limits {
    int64_t count;
    double mass;
    float weight;

    bool let_pass(int64_t before, double mass_before, float w) const {
        return before < count && mass_before < mass && w >= weight;
    }
};

class Row {
  public:
    Row(const SglSample& call, int64_t i, char* memory)
        : call_(call), i_(i), blocks_((call.width + kWeightBlock - 1) / kWeightBlock) {
        weights_ = reinterpret_cast<float*>(memory);
        sums_ = weights_ + blocks_ * kWeightBlock;
        tops_ = sums_ + blocks_;
        tokens_ = reinterpret_cast<Token*>(tops_ + blocks_);
    }

    static int64_t bytes(int64_t width) {
        const int64_t blocks = (width + kWeightBlock - 1) / kWeightBlock;
        return blocks * (kWeightBlock * int64_t{4 + 2 * sizeof(Token)} + 8);
    }

    int64_t draw() {
        const int64_t row = call_.rows[i_], top_k = call_.top_k[i_];
        const double top_p = call_.top_p[i_];
        const bool by_count = top_k > 0 && top_k < call_.width, by_mass = top_p < 1.0;
        const float min_p = call_.min_p[i_];
        const sgl::WeighRow weigh = SGL_CHOOSE(call_.isa, sgl::weigh_row);
        weigh(call_.logits + row * call_.logit_row, call_.width, call_.highest[row],
              call_.temperature[i_], by_count || by_mass ? 0.0f : min_p, weights_, sums_, tops_);
        total_ = 0.0;
        for (int64_t b = 0; b < blocks_; ++b) total_ += sums_[b];
        if (!by_count && !by_mass) return draw_by_id();
        const Limits limits{by_count ? top_k : call_.width, by_mass ? top_p * total_ : total_ * 2,
                            min_p};
        if (!collect(kFirstCut, limits)) collect(0.0f, limits);
        return draw_by_weight(limits);
    }

  private:
    const SglSample& call_;
    const int64_t i_, blocks_;
    float *weights_, *sums_, *tops_;
    Token* tokens_;  // those that were collected, and behind them those of a bin
    int64_t count_ = 0;
    double total_ = 0.0;
    Bin bins_[kBins];
    int lowest_ = 0;

    int64_t draw_by_id() const {
        const double wanted = call_.u[i_] * total_;
        double before = 0.0;
        int64_t last = 0;
        for (int64_t b = 0; b < blocks_; ++b) {
            if (before + sums_[b] <= wanted && b + 1 < blocks_) {
                before += sums_[b];
                if (tops_[b] > 0.0f) last = b;
                continue;
            }
            if (tops_[b] <= 0.0f) continue;
            const float* w = weights_ + b * kWeightBlock;
            double sum = before;
            int64_t found = 0;
            for (int64_t d = 0; d < kWeightBlock; ++d) {
                if (w[d] <= 0.0f) continue;
                found = d;
                sum += w[d];
                if (sum > wanted) return b * kWeightBlock + d;
            }
            // Added up one by one they may come to less than their sum did.
            return b * kWeightBlock + found;
        }
        const float* w = weights_ + last * kWeightBlock;
        int64_t found = kWeightBlock - 1;
        while (found > 0 && w[found] <= 0.0f) --found;
        return last * kWeightBlock + found;
    }

    // Takes all tokens of at least `cut`, into the bins too. False when the limits may reach further.
    bool collect(float cut, const Limits& limits) {
        lowest_ = bin_of(cut);
        for (int b = lowest_; b < kBins; ++b) bins_[b] = {0.0, 0};
        count_ = 0;
        double mass = 0.0;
        for (int64_t block = 0; block < blocks_; ++block) {
            if (tops_[block] < cut || tops_[block] <= 0.0f) continue;
            const int64_t first = block * kWeightBlock;
            for (int64_t d = first; d < first + kWeightBlock; ++d) {
                const float w = weights_[d];
                if (w < cut || w <= 0.0f) continue;
                tokens_[count_++] = {w, static_cast<int32_t>(d)};
                Bin& bin = bins_[bin_of(w)];
                bin.mass += w;
                ++bin.count;
                mass += w;
            }
        }
        return count_ >= limits.count || mass >= limits.mass || limits.weight >= cut;
    }

    // The tokens of a bin, the highest first.
    Token* sorted(int bin) const {
        Token *to = tokens_ + count_, *end = to;
        for (int64_t i = 0; i < count_; ++i)
            if (bin_of(tokens_[i].weight) == bin) *end++ = tokens_[i];
        std::sort(to, end, comes_first);
        return to;
    }

    int64_t draw_by_weight(const Limits& limits) const {
        // First how far the filters reach: whole bins, and so many tokens of the last.
        int64_t count = 0, of_last = 0;
        double mass = 0.0;
        int last = kBins - 1;
        for (int b = kBins - 1; b >= lowest_; --b) {
            const Bin& bin = bins_[b];
            if (!bin.count) continue;
            const float least = from_bits(static_cast<uint32_t>(b) << kBinShift);
            last = b;
            of_last = bin.count;
            if (count + bin.count <= limits.count && mass + bin.mass < limits.mass &&
                least >= limits.weight) {
                count += bin.count;
                mass += bin.mass;
                continue;
            }
            const Token* of_bin = sorted(b);
            for (of_last = 0; of_last < bin.count; ++of_last, ++count) {
                if (!limits.let_pass(count, mass, of_bin[of_last].weight)) break;
                mass += of_bin[of_last].weight;
            }
            if (of_last < bin.count) break;
        }
        return nth(call_.u[i_] * mass, last, of_last);
    }

    // The first token at which the sum of the weights exceeds `wanted`, of those down to token
    // `of_last` of bin `last`.
    int64_t nth(double wanted, int last, int64_t of_last) const {
        double before = 0.0;
        int64_t found = 0;
        for (int b = kBins - 1; b >= last; --b) {
            const Bin& bin = bins_[b];
            const int64_t count = b == last ? of_last : bin.count;
            if (!count) continue;
            const bool ends = b == last || before + bin.mass > wanted;
            if (!ends && below_holds(b, last, of_last)) {
                before += bin.mass;
                continue;
            }
            const Token* of_bin = sorted(b);
            for (int64_t i = 0; i < count; ++i) {
                found = of_bin[i].id;
                before += of_bin[i].weight;
                if (before > wanted) return found;
            }
            if (ends) return found;
        }
        return found;
    }

    // Whether a bin below b has a token that passes.
    bool below_holds(int b, int last, int64_t of_last) const {
        for (int below = b - 1; below > last; --below)
            if (bins_[below].count) return true;
        return b > last && of_last > 0;
    }
};

}  // namespace

extern "C" int32_t sgl_sample(const SglSample* arguments) {
    const SglSample& call = *arguments;
    if (call.num_threads < 1 || call.width < 1 || call.width > INT32_MAX) return -1;
    sgl::for_each_index(call.count, call.num_threads, [&] {
        return [&](int64_t i) {
            thread_local sgl::Scratch room;
            Row row(call, i, room.take(Row::bytes(call.width)));
            call.tokens[call.rows[i]] = row.draw();
        };
    });
    return 0;
}
