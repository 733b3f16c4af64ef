// The kernels of a build against double arithmetic, without Python: for processors that are emulated.
//
// Every call of the C interface that computes, at the level of sgl_cpu_isa(), in fp32 and bf16 (with K
// and V of fp8 too, rounded by a store) and with one and three threads. Prints a line for each and exits 1 when one is too far off.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "api.h"

namespace {

std::mt19937 random_bits(7);
int failures = 0;

float draw() { return std::normal_distribution<float>()(random_bits); }

// Numbers in one of two types, and what they are worth.
struct Numbers {
    int32_t dtype;
    std::vector<float> wide;
    std::vector<uint16_t> narrow;

    Numbers(int32_t type, size_t count, bool random = true) : dtype(type), wide(count), narrow(count) {
        for (size_t i = 0; random && i < count; ++i) set(i, draw());
    }
    void set(size_t i, float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        narrow[i] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
        wide[i] = value;
    }
    double at(size_t i) const {
        if (dtype == SGL_FLOAT32) return wide[i];
        const uint32_t bits = uint32_t{narrow[i]} << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    void* data() { return dtype == SGL_FLOAT32 ? static_cast<void*>(wide.data()) : narrow.data(); }
};

// Results come in the type of their inputs: bf16 has 8 bits of precision.
void compare(const char* what, const Numbers& found, const std::vector<double>& want) {
    double worst = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        const double error = std::fabs(found.at(i) - want[i]) / (1.0 + std::fabs(want[i]));
        worst = error > worst || error != error ? error : worst;
    }
    const bool good = worst <= (found.dtype == SGL_FLOAT32 ? 2e-5 : 1e-2);
    failures += !good;
    std::printf("%-18s %s %.1e %s\n", what, found.dtype == SGL_FLOAT32 ? "fp32" : "bf16", worst,
                good ? "ok" : "WRONG");
}

void check_linear(int32_t dtype, int32_t threads) {
    const int64_t outs = 37, width = 67;
    for (int64_t rows : {1, 5}) {
        Numbers x(dtype, rows * width), weight(dtype, outs * width), bias(dtype, outs);
        Numbers out(dtype, rows * outs, false);
        SglLinear call{x.data(), weight.data(), bias.data(), out.data(), width, width, outs, rows,
                       outs, width, dtype, sgl_cpu_isa(), threads};
        failures += sgl_linear(&call) != 0;
        std::vector<double> want(rows * outs);
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t n = 0; n < outs; ++n) {
                double sum = bias.at(n);
                for (int64_t d = 0; d < width; ++d)
                    sum += x.at(m * width + d) * weight.at(n * width + d);
                want[m * outs + n] = sum;
            }
        compare("linear", out, want);
    }
}

double fp8_at(int32_t dtype, uint8_t code) {
    const int bits = dtype == SGL_FP8_E4M3 ? 3 : 2, bias = dtype == SGL_FP8_E4M3 ? 7 : 15;
    const int power = (code & 127) >> bits, rest = code & ((1 << bits) - 1);
    const double fraction = std::ldexp(rest, -bits);
    const double size = power ? std::ldexp(1 + fraction, power - bias)
                              : std::ldexp(fraction, 1 - bias);
    return code & 128 ? -size : size;
}

// `named`: codes name values; `fp8`: they are E4M3, with one scale for each output.
void check_quantized(int32_t dtype, int32_t bits, bool named, int32_t threads, bool fp8 = false) {
    const int64_t outs = 19, width = 96, group = 32, groups = width / group;
    std::vector<uint8_t> codes(outs * width * bits / 8);
    for (auto& code : codes) code = static_cast<uint8_t>(random_bits());
    for (auto& code : codes)
        if (fp8 && (code & 127) == 127) code = 1;  // the smallest in place of what is no number
    const std::vector<float> floats(outs, 0.125f);
    std::vector<uint16_t> scales(outs * groups), mins(outs * groups);
    for (auto& scale : scales) scale = 0x3000;  // 2^-3 in fp16
    for (auto& least : mins) least = random_bits() % 2 ? 0xb800 : 0x3800;  // -1/2 or 1/2
    for (int64_t rows : {1, 9}) {
        Numbers x(dtype, rows * width), out(dtype, rows * outs, false);
        SglQuantized call{};
        call.x = x.data(), call.out = out.data(), call.codes = codes.data();
        call.scales = scales.data(), call.mins = mins.data();
        call.x_row = width, call.out_row = outs, call.code_row = width * bits / 8;
        call.scale_row = groups, call.rows = rows, call.out_features = outs;
        call.in_features = width, call.group = group, call.gain = 0.5f, call.bits = bits;
        call.dtype = dtype, call.isa = sgl_cpu_isa(), call.num_threads = threads;
        call.has_values = named;
        if (fp8) {
            call.is_fp8 = 1, call.scales = floats.data(), call.mins = nullptr;
            call.scale_row = 1, call.group = width;
        }
        for (int i = 0; i < 16; ++i) call.values[i] = static_cast<int8_t>(15 * i - 100);
        failures += sgl_quantized_linear(&call) != 0;
        std::vector<double> want(rows * outs);
        for (int64_t n = 0; n < outs; ++n)
            for (int64_t d = 0; d < width; ++d) {
                const uint8_t* row = codes.data() + n * call.code_row;
                double code = static_cast<int8_t>(row[bits == 8 ? d : 0]);
                if (bits == 4) {
                    const uint8_t both = row[d / 32 * 16 + d % 16];
                    code = d % 32 < 16 ? both & 15 : both >> 4;
                    if (named) code = 15 * code - 100;
                }
                if (fp8) code = fp8_at(SGL_FP8_E4M3, row[d]);
                const double least = fp8 ? 0.0 : mins[n * groups + d / group] == 0x3800 ? 0.5 : -0.5;
                const double weight = (code * 0.125 + least) * 0.5;
                for (int64_t m = 0; m < rows; ++m)
                    want[m * outs + n] += x.at(m * width + d) * weight;
            }
        compare(fp8 ? "fp8" : named ? "named" : bits == 4 ? "quantized 4" : "quantized 8", out, want);
    }
}

// Rounds to nearby codes, which `numbers` become. fp8 has 2 or 3 bits of fraction.
std::vector<uint8_t> round_rows(Numbers& numbers, int64_t rows, int32_t to, int32_t threads) {
    const int64_t width = static_cast<int64_t>(numbers.wide.size()) / rows;
    std::vector<uint8_t> codes(rows * width), others(rows * width);
    std::vector<int64_t> slots(rows);
    for (int64_t i = 0; i < rows; ++i) slots[i] = rows - 1 - i;
    const int64_t bytes = numbers.dtype == SGL_FLOAT32 ? 4 : 2;
    std::vector<uint8_t> turned(rows * width * bytes);
    for (int64_t i = 0; i < rows; ++i)
        std::memcpy(turned.data() + slots[i] * width * bytes,
                    static_cast<char*>(numbers.data()) + i * width * bytes, width * bytes);
    SglStore call{turned.data(), turned.data(), codes.data(), others.data(), slots.data(),
                  width * bytes, width * bytes, width, width, rows, width, width, 0, 0,
                  numbers.dtype, to, threads, 1.0f, 1.0f};
    failures += sgl_store(&call) != 0 || codes != others;
    for (size_t i = 0; i < codes.size(); ++i) {
        const double value = fp8_at(to, codes[i]), was = numbers.at(i);
        const double most = to == SGL_FP8_E4M3 ? 1 / 16.0 : 1 / 8.0;
        failures += std::fabs(value - was) > most * std::fabs(was) + 1e-3;
        numbers.set(i, static_cast<float>(value));
    }
    return codes;
}

// `kv_dtype` is `dtype` or an fp8.
void check_attention(int32_t dtype, int32_t kv_dtype, int64_t rows, int32_t threads) {
    const int64_t heads = 4, kv_heads = 2, dim = 32, page = 16, keys = 70, row = heads * dim;
    std::vector<int32_t> pages = {3, 1, 6, 2, 5};
    const int64_t slots = 8 * page, slot = kv_heads * dim;
    Numbers q(dtype, rows * row), k(dtype, slots * slot), v(dtype, slots * slot);
    Numbers out(dtype, rows * row, false);
    std::vector<uint8_t> k_codes, v_codes;
    if (kv_dtype != dtype) {
        k_codes = round_rows(k, slots, kv_dtype, threads);
        v_codes = round_rows(v, slots, kv_dtype, threads);
    }
    const int64_t zero = 0, position = keys - rows, table = reinterpret_cast<int64_t>(pages.data());
    SglAttention call{};
    call.q = q.data(), call.k = k.data(), call.v = v.data(), call.out = out.data();
    if (kv_dtype != dtype) call.k = k_codes.data(), call.v = v_codes.data();
    call.q_row = call.out_row = row, call.q_head = call.out_head = dim;
    call.k_slot = call.v_slot = slot, call.k_head = call.v_head = dim;
    call.num_blocks = 1, call.block_row = &zero, call.block_rows = &rows;
    call.block_position = &position, call.block_table = &zero, call.pages = &table;
    call.first_position = &zero, call.page_size = page;
    call.num_kv_heads = kv_heads, call.heads_per_group = heads / kv_heads, call.head_dim = dim;
    call.dtype = dtype, call.kv_dtype = kv_dtype, call.isa = sgl_cpu_isa();
    call.num_threads = threads, call.scale = 0.2f;
    failures += sgl_attention(&call) != 0;
    std::vector<double> want(rows * row);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t h = 0; h < heads; ++h) {
            double total = 0;
            for (int64_t p = 0; p <= position + m; ++p) {
                const int64_t at = (pages[p / page] * page + p % page) * slot + h / 2 * dim;
                double score = 0;
                for (int64_t d = 0; d < dim; ++d)
                    score += q.at(m * row + h * dim + d) * k.at(at + d);
                const double weight = std::exp(0.2 * score);
                total += weight;
                for (int64_t d = 0; d < dim; ++d)
                    want[m * row + h * dim + d] += weight * v.at(at + d);
            }
            for (int64_t d = 0; d < dim; ++d) want[m * row + h * dim + d] /= total;
        }
    if (kv_dtype == dtype)
        compare(rows == 1 ? "attention decode" : "attention extend", out, want);
    else
        compare(rows == 1 ? "decode over fp8" : "extend over fp8", out, want);
}

void check_rows(int32_t dtype, int32_t threads) {
    const int64_t rows = 3, width = 38;
    Numbers x(dtype, rows * 2 * width), weight(dtype, width), out(dtype, rows * width, false);
    std::vector<double> want(rows * width);
    SglNorm norm{};
    norm.x = x.data(), norm.weight = weight.data(), norm.out = out.data();
    norm.x_row = 2 * width, norm.out_row = width, norm.group = rows, norm.rows = rows;
    norm.width = width, norm.eps = 1e-5f, norm.x_dtype = norm.dtype = dtype;
    norm.isa = sgl_cpu_isa(), norm.num_threads = threads;
    failures += sgl_norm(&norm) != 0;
    for (int64_t m = 0; m < rows; ++m) {
        double squares = 0;
        for (int64_t d = 0; d < width; ++d) squares += std::pow(x.at(2 * m * width + d), 2);
        for (int64_t d = 0; d < width; ++d)
            want[m * width + d] =
                x.at(2 * m * width + d) * weight.at(d) / std::sqrt(squares / width + 1e-5);
    }
    compare("norm", out, want);
    SglGate gate{x.data(), out.data(), 2 * width, width, rows, width, dtype, sgl_cpu_isa(), threads};
    failures += sgl_gate(&gate) != 0;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t d = 0; d < width; ++d) {
            const double g = x.at(2 * m * width + d);
            want[m * width + d] = g / (1 + std::exp(-g)) * x.at((2 * m + 1) * width + d);
        }
    compare("silu and mul", out, want);
    gate.kind = SGL_GATE_CLAMPED, gate.alpha = 1.7f, gate.limit = 0.8f;
    failures += sgl_gate(&gate) != 0;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t d = 0; d < width; ++d) {
            const double g = std::fmin(x.at(2 * m * width + d), gate.limit);
            const double u = x.at((2 * m + 1) * width + d), l = gate.limit;
            want[m * width + d] =
                (std::fmin(std::fmax(u, -l), l) + 1) * g / (1 + std::exp(-gate.alpha * g));
        }
    compare("clamped gate", out, want);
    const std::vector<int64_t> positions{0, 30, 9999999};
    SglScale scale{x.data(), out.data(), positions.data(), 2 * width, width, rows, width,
                   0.3,      16.0,       0.0f,             dtype,     threads};
    failures += sgl_scale(&scale) != 0;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t d = 0; d < width; ++d)
            want[m * width + d] = x.at(2 * m * width + d) *
                                  (1 + 0.3 * std::log1p(std::floor((positions[m] + 1) / 16.0)));
    compare("scale", out, want);
}

// A matrix [experts, outs, inputs] of numbers, and what it gives.
struct Matrix {
    int64_t outs, inputs;
    Numbers weight;

    Matrix(int32_t dtype, int64_t experts, int64_t outs, int64_t inputs)
        : outs(outs), inputs(inputs), weight(dtype, experts * outs * inputs) {}
    SglExpertMatrix fields() {
        SglExpertMatrix matrix{};
        matrix.weight = weight.data(), matrix.row = inputs, matrix.expert = outs;
        return matrix;
    }
    double give(int64_t expert, int64_t out, const double* x) const {
        double sum = 0;
        for (int64_t k = 0; k < inputs; ++k)
            sum += weight.at((expert * outs + out) * inputs + k) * x[k];
        return sum;
    }
};

void check_experts(int32_t dtype, int32_t threads) {
    const int64_t rows = 4, experts = 5, chosen = 2, hidden = 40, width = 24;
    Numbers scores(dtype, rows * experts), x(dtype, rows * hidden), out(dtype, rows * hidden, false);
    std::vector<int64_t> places(rows * chosen);
    std::vector<float> weights(rows * chosen);
    SglRoute route{scores.data(), places.data(), weights.data(), experts, rows,
                   experts,       chosen,        dtype,          SGL_ROUTE_SOFTMAX};
    failures += sgl_route(&route) != 0;
    Matrix gate(dtype, experts, width, hidden), up(dtype, experts, width, hidden);
    Matrix down(dtype, experts, hidden, width);
    SglExperts call{};
    call.x = x.data(), call.out = out.data(), call.experts = places.data();
    call.weights = weights.data(), call.gate = gate.fields(), call.up = up.fields();
    call.down = down.fields(), call.x_row = call.out_row = call.hidden = hidden;
    call.rows = rows, call.chosen = chosen, call.num_experts = experts, call.width = width;
    call.dtype = call.out_dtype = dtype, call.isa = sgl_cpu_isa(), call.num_threads = threads;
    failures += sgl_experts(&call) != 0;
    std::vector<double> want(rows * hidden), row(hidden), opened(width);
    for (int64_t m = 0; m < rows; ++m) {
        double sum = 0;
        for (int64_t e = 0; e < experts; ++e) sum += std::exp(scores.at(m * experts + e));
        for (int64_t d = 0; d < hidden; ++d) row[d] = x.at(m * hidden + d);
        for (int64_t k = 0; k < chosen; ++k) {
            const int64_t e = places[m * chosen + k];
            const double share = std::exp(scores.at(m * experts + e)) / sum;
            for (int64_t i = 0; i < width; ++i) {
                const double g = gate.give(e, i, row.data());
                opened[i] = g / (1 + std::exp(-g)) * up.give(e, i, row.data());
            }
            for (int64_t d = 0; d < hidden; ++d)
                want[m * hidden + d] += share * down.give(e, d, opened.data());
        }
    }
    // Two roundings between the matrices: errors count beside the largest, not each beside its own.
    double largest = 0;
    for (const double one : want) largest = std::fmax(largest, std::fabs(one));
    for (size_t i = 0; i < want.size(); ++i) {
        out.set(i, static_cast<float>(out.at(i) / largest));
        want[i] /= largest;
    }
    compare("experts", out, want);
}

// Many draws of one row, without filters and of the 5 most likely: against sums in double.
void check_sample(int32_t threads) {
    const int64_t width = 131, count = 200;
    Numbers logits(SGL_FLOAT32, width);
    std::vector<int64_t> order(width), tokens(count), rows(count), top_k(count);
    float highest = logits.wide[0];
    for (const float one : logits.wide) highest = std::fmax(highest, one);
    std::iota(rows.begin(), rows.end(), int64_t{0});
    std::vector<float> tops(count, highest), heat(count, 0.8f), none(count, 0.0f);
    std::vector<double> u(count), all(count, 1.0);
    for (int64_t i = 0; i < count; ++i) u[i] = (i + 0.5) / count;
    bool good = true;
    for (const int64_t chosen : {width, int64_t{5}}) {
        std::fill(top_k.begin(), top_k.end(), chosen);
        SglSample call{logits.wide.data(), tops.data(), tokens.data(), rows.data(), heat.data(),
                       u.data(), top_k.data(), all.data(), none.data(), 0, count, width,
                       sgl_cpu_isa(), threads};
        failures += sgl_sample(&call) != 0;
        const auto weight = [&](int64_t id) { return std::exp((logits.wide[id] - highest) / 0.8); };
        std::iota(order.begin(), order.end(), int64_t{0});
        if (chosen < width)
            std::sort(order.begin(), order.end(),
                      [&](int64_t a, int64_t b) { return logits.wide[a] > logits.wide[b]; });
        double mass = 0;
        for (int64_t i = 0; i < chosen; ++i) mass += weight(order[i]);
        for (int64_t i = 0; i < count; ++i) {
            double before = 0;
            int64_t place = 0;
            while (place < chosen && order[place] != tokens[i]) before += weight(order[place++]);
            const double end = place < chosen ? before + weight(order[place]) : -1, at = u[i] * mass;
            good &= at >= before - 1e-5 * mass && at < end + 1e-5 * mass;
        }
    }
    failures += !good;
    std::printf("sample %s\n", good ? "ok" : "WRONG");
}

}  // namespace

int main() {
    std::printf("level %d\n", sgl_cpu_isa());
    for (int32_t threads : {1, 3}) check_sample(threads);
    for (int32_t dtype : {SGL_FLOAT32, SGL_BFLOAT16})
        for (int32_t threads : {1, 3}) {
            check_linear(dtype, threads);
            check_quantized(dtype, 4, false, threads);
            check_quantized(dtype, 4, true, threads);
            check_quantized(dtype, 8, false, threads);
            check_quantized(dtype, 8, false, threads, true);
            for (int32_t kv_dtype : {dtype, int32_t{SGL_FP8_E4M3}, int32_t{SGL_FP8_E5M2}}) {
                check_attention(dtype, kv_dtype, 1, threads);
                check_attention(dtype, kv_dtype, 23, threads);
            }
            check_rows(dtype, threads);
            check_experts(dtype, threads);
        }
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
