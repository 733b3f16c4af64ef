// The C interface: what the Python wrappers pass, on pointers and strides alone.
//
// Strides count elements. All offsets are 64-bit: slot times stride passes 2^32. Nothing is kept
// between calls except the parallel-for that the caller installs once.
#pragma once

#include <cstdint>

#define SGL_API __attribute__((visibility("default")))

extern "C" {

// Those of a byte are for K and V alone. E4M3 has no infinities, and NaN where all bits are set. A head's
// row of INT8 is its signed bytes, then the float32 that they are multiples of.
enum SglDtype : int32_t {
    SGL_FLOAT32 = 0,
    SGL_BFLOAT16 = 1,
    SGL_FLOAT16 = 2,
    SGL_FP8_E4M3 = 3,
    SGL_FP8_E5M2 = 4,
    SGL_INT8 = 5
};

// Levels of instructions, each including the ones before it on its architecture. AVX512_BF16 has the
// dot products of bfloat16 and of bytes (VNNI).
enum SglIsa : int32_t {
    SGL_GENERIC = 0,
    SGL_AVX2 = 1,
    SGL_AVX512 = 2,
    SGL_AVX512_BF16 = 3,
    SGL_AMX = 4,
    SGL_NEON = 5
};

// Attention of packed query rows over the slots of block tables.
//
// A block is a range of consecutive queries of one request. The query at position p sees positions
// [first(p), p], where first(p) is 0, or p - window + 1, or the begin of p's chunk.
struct SglAttention {
    const void* q;       // [rows, heads, head_dim] in `dtype`
    const void* k;       // [slots, kv_heads, head_dim] in `kv_dtype`
    const void* v;       // [slots, kv_heads, head_dim] in `kv_dtype`
    void* out;           // [rows, heads, head_dim] in `dtype`
    float* lse;          // [rows, heads] natural log of the softmax's denominator, or null
    const float* sinks;  // [heads] a score that every query sees beside its keys, or null
    int64_t q_row, q_head, k_slot, k_head, v_slot, v_head, out_row, out_head;
    int64_t num_blocks;
    const int64_t* block_row;       // [blocks] first row of q
    const int64_t* block_rows;      // [blocks] queries
    const int64_t* block_position;  // [blocks] position of the first query
    const int64_t* block_table;     // [blocks] which of the tables
    const int64_t* pages;           // [tables] address of the int32 page ids
    const int64_t* first_position;  // [tables] position of the first page's first slot
    int64_t page_size;
    int64_t window;  // 0: none
    int64_t chunk;   // 0: none
    int32_t num_kv_heads, heads_per_group, head_dim;
    int32_t dtype;
    int32_t kv_dtype;  // `dtype` or one of a byte; of INT8 the planes' strides count bytes
    int32_t isa;  // at most what sgl_cpu_isa() answers
    int32_t num_threads;
    float scale, logit_cap;  // cap 0: none
};

// A few rows times a weight [out_features, in_features] transposed, plus a bias: all of one dtype,
// summed in fp32 and rounded once. Elements of a row are contiguous.
struct SglLinear {
    const void* x;       // [rows, in_features]
    const void* weight;  // [out_features, in_features]
    const void* bias;    // [out_features], or null
    void* out;           // [rows, out_features]
    int64_t x_row, weight_row, out_row;
    int64_t rows, out_features, in_features;
    int32_t dtype;
    int32_t isa;  // at most what sgl_cpu_isa() answers
    int32_t num_threads;
};

// A quantised weight [out_features, in_features], and what is done with it. Weight (n, k) is
// (code * scale + min) * gain, with a scale and a min for each group of inputs. A code of 4 bits may
// name one of 16 values, which takes its place then. One of 8 bits may be a number of fp8.
struct SglQuantized {
    const void* x;       // [rows, in_features] in `dtype`; not read by sgl_dequantize
    const void* bias;    // [out_features] in `dtype`, or null
    void* out;           // [rows, out_features] in `dtype`; of sgl_dequantize the weight itself
    const void* codes;   // [out_features] rows: of each 32 inputs 16 bytes with input i in the low
                         // half and i + 16 in the high half of byte i, or 32 signed bytes or E4M3
    const void* scales;  // [out_features, in_features / group] fp16; of E4M3 fp32, the last group
                         // may be less than a whole one
    const void* mins;    // the same, or null where all are 0
    const int64_t* ids;  // of sgl_dequantize: out row i is that of output ids[i]; null: of output i
    int64_t x_row, out_row, code_row, scale_row;  // code_row in bytes; mins have scales' stride
    int64_t rows, out_features, in_features;  // sgl_dequantize gives `rows` rows with `ids`
    int64_t group;  // 32, or 16 of signed bytes; of E4M3 any multiple of 32
    float gain;
    int32_t bits;  // 4 or 8
    int32_t dtype;
    int32_t isa;  // at most what sgl_cpu_isa() answers
    int32_t num_threads;
    int32_t round_inputs;  // to bytes, with a scale for each 32: AVX2 to AMX only
    int32_t round_weight;  // to bfloat16, before the gain: AMX and a `dtype` of bfloat16 only
    int32_t has_values;    // codes of 4 bits name `values`; 0: a code is its own value
    int8_t values[16];     // -127 to 127
    int32_t is_fp8;        // codes of 8 bits are E4M3: no mins, inputs can't be rounded; 0: signed bytes
};

// (x + residual) / sqrt(mean of squares + eps) * (offset + weight), row by row, in fp32 and rounded
// once. Elements of a row are contiguous.
struct SglNorm {
    const void* x;          // [rows, width] in `x_dtype`
    const float* residual;  // [rows, width], or null: none is added
    float* total;           // [rows, width] receives x + residual; may be null without `residual`
    const void* weight;     // [width] in `dtype`
    void* out;              // [rows, width] in `dtype`
    int64_t x_row, residual_row, total_row, out_row;
    int64_t group, x_group;  // row r of x begins at (r / group) * x_group + (r % group) * x_row
    int64_t rows, width;
    float eps, offset;
    int32_t x_dtype, dtype;
    int32_t isa;  // at most what sgl_cpu_isa() answers
    int32_t num_threads;
};

// SILU: silu(gate) * up. GELU_TANH: gelu(gate) * up by its approximation with tanh. CLAMPED:
// (up + 1) * gate * sigmoid(alpha * gate), with gate at most `limit` and up within +-limit.
enum SglGateKind : int32_t { SGL_GATE_SILU = 0, SGL_GATE_GELU_TANH = 1, SGL_GATE_CLAMPED = 2 };

// A gate of each row, in fp32 and rounded once. A row of x holds its gates, then its ups.
struct SglGate {
    const void* x;  // [rows, 2 width]
    void* out;      // [rows, width]
    int64_t x_row, out_row;
    int64_t rows, width;
    int32_t dtype;
    int32_t isa;  // at most what sgl_cpu_isa() answers
    int32_t num_threads;
    int32_t kind;        // of SglGateKind
    float alpha, limit;  // of CLAMPED
};

// Heads turned by the angles of their row: pairs of dimensions d and d + head_dim / 2, or 2 d and
// 2 d + 1 when `interleaved`. out[d] = x[d] cos[d] + x[partner of d] sin[d], in fp32 and rounded once:
// the sine of a pair's first dimension comes negated. Elements of a row are contiguous.
struct SglRotate {
    const void* x;     // [rows, width], width = heads * head_dim
    const float* cos;  // [rows, head_dim]
    const float* sin;  // [rows, head_dim]
    void* out;         // [rows, width]
    int64_t x_row, angle_row, out_row;
    int64_t rows, width, head_dim;
    int32_t interleaved;
    int32_t dtype;
    int32_t isa;  // at most what sgl_cpu_isa() answers
    int32_t num_threads;
};

// Rows of K and of V into slots of their planes: as bytes, or rounded to planes of fp8, to the nearest,
// ties to even; what is beyond the largest finite number becomes that number, NaN stays NaN. Before, each
// number is multiplied by its side's factor. To INT8 each head is rounded to multiples of its largest over
// 127; with a NaN all of it is NaN. A row, and a slot of each plane, is contiguous; strides count bytes here.
struct SglStore {
    const void* k;         // [rows]
    const void* v;         // [rows]
    void* k_plane;         // slot 0, of `k_bytes` as every slot
    void* v_plane;         // slot 0, of `v_bytes` as every slot
    const int64_t* slots;  // [rows] distinct
    int64_t k_row, v_row, k_slot, v_slot;
    int64_t rows, k_bytes, v_bytes;
    int64_t k_dim, v_dim;  // numbers of a head, of INT8 alone
    int32_t x_dtype;       // of k and v, where they are rounded
    int32_t plane_dtype;   // of a byte, that rows are rounded to; -1: they are copied
    int32_t num_threads;
    float k_factor, v_factor;  // of rows that are rounded to fp8
};

// Rows of a table by their number, as bytes: out[i] = table[ids[i]]. Strides count bytes.
struct SglGather {
    const void* table;
    void* out;           // [rows] of `bytes`
    const int64_t* ids;  // [rows] in the table
    int64_t table_row, out_row;
    int64_t rows, bytes;
};

// Cosines and sines of positions times frequencies, taken in double: what SglRotate reads. Pair i is
// dimensions i and half + i, or 2 i and 2 i + 1 when `interleaved`; the sine of the first is negated.
struct SglAngles {
    const int64_t* positions;   // [rows]
    const double* frequencies;  // [half] radians for each position
    float* cos;                 // [rows, 2 half]
    float* sin;                 // [rows, 2 half]
    int64_t rows, half;
    double scaling;  // of cosines and sines
    int32_t interleaved;
};

// Rows as floats.
struct SglWiden {
    const void* x;  // [rows, width] in `dtype`
    float* out;     // [rows, width] contiguous
    int64_t x_row;
    int64_t rows, width;
    int32_t dtype;
    int32_t num_threads;
};

// The highest of each row and the first place where it stands. A NaN makes the row's highest NaN and
// its place 0.
struct SglHighest {
    const float* x;  // [rows, width]
    float* highest;  // [rows]
    int64_t* place;  // [rows]
    int64_t x_row;
    int64_t rows, width;
    int32_t isa;  // at most what sgl_cpu_isa() answers
    int32_t num_threads;
};

// A token of each of some rows, drawn from the softmax of its logits over its temperature after the
// filters: the `top_k` most likely (0 or less: all), the most likely up to the one that brings their sum
// to `top_p` (1: all), those of at least `min_p` times the highest. `u` in [0, 1) picks it: from tokens by
// id where there is neither top_k nor top_p, else from the most likely on (the lowest id of equals).
struct SglSample {
    const float* logits;       // [*, width]; -infinity is never drawn
    const float* highest;      // [*]: of each row of logits, finite
    int64_t* tokens;           // [*], written for these rows only
    const int64_t* rows;       // [count]
    const float* temperature;  // [count], above 0
    const double* u;           // [count]
    const int64_t* top_k;      // [count]
    const double* top_p;       // [count]
    const float* min_p;        // [count]
    int64_t logit_row;
    int64_t count, width;
    int32_t isa;  // at most what sgl_cpu_isa() answers
    int32_t num_threads;
};

// Rows times a factor, in fp32 and rounded once: `factor`, or with positions that of a row's own,
// 1 + attn_scale * ln(1 + floor((position + 1) / floor_scale)), taken in double.
struct SglScale {
    const void* x;             // [rows, width] in `dtype`
    void* out;                 // [rows, width] in `dtype`
    const int64_t* positions;  // [rows], or null
    int64_t x_row, out_row;
    int64_t rows, width;
    double attn_scale, floor_scale;
    float factor;
    int32_t dtype;
    int32_t num_threads;
};

// SOFTMAX: the shares of the chosen among all experts. CHOSEN: their softmax alone, which adds up to
// 1. SIGMOID: each chosen one's own sigmoid.
enum SglRouteKind : int32_t { SGL_ROUTE_SOFTMAX = 0, SGL_ROUTE_CHOSEN = 1, SGL_ROUTE_SIGMOID = 2 };

// The highest scores of each row, the highest first (the first place of equals), and their weights. NaN
// is higher than any number.
struct SglRoute {
    const void* scores;  // [rows, experts] in `dtype`
    int64_t* experts;    // [rows, chosen]
    float* weights;      // [rows, chosen]
    int64_t score_row;
    int64_t rows, num_experts, chosen;
    int32_t dtype;
    int32_t kind;  // of SglRouteKind
};

// One matrix of every expert, [experts, outputs, inputs]: numbers, or quantised as in SglQuantized.
struct SglExpertMatrix {
    const void* weight;   // numbers in the call's `dtype`, or codes
    const void* scales;   // of codes
    const void* mins;     // the same, or null where all are 0
    const void* bias;     // of expert 0 [outputs] in the call's `dtype`, or null
    int64_t row;          // from an output's numbers to the next one's; of codes in bytes
    int64_t scale_row;
    int64_t expert;       // from an expert's first output to the next one's, in outputs
    int64_t bias_expert;  // the same of the biases
    int64_t group;        // of codes
    float gain;           // of codes
    int32_t bits;         // of a code, 4 or 8; 0: numbers
    int32_t has_values;   // of codes, as in SglQuantized
    int8_t values[16];
    int32_t is_fp8;       // of codes, as in SglQuantized
};

// A mixture of experts: each row through its chosen ones, down(gate(gate x, up x)), times their weights
// (or its input times them), added up by ascending expert in fp32 and rounded once. Gates and ups are
// both numbers or both codes. Between the matrices numbers are rounded to `dtype`, codes give fp32, but for
// E4M3 where dot instructions of bf16 multiply it.
struct SglExperts {
    const void* x;           // [rows, hidden] in `dtype`
    const void* added;       // [rows, hidden] in `dtype`: joins the sum, or null
    void* out;               // [rows, hidden] in `out_dtype`
    const int64_t* experts;  // [rows, chosen], those of a row distinct
    const float* weights;    // [rows, chosen]
    SglExpertMatrix gate, up, down;
    int64_t x_row, added_row, out_row;
    int64_t rows, chosen, num_experts, hidden, width;
    int32_t dtype;
    int32_t out_dtype;     // `dtype` or fp32
    int32_t kind;          // of SglGateKind
    float alpha, limit;    // of its CLAMPED
    int32_t scale_inputs;  // weights multiply what an expert gets, not what it gives
    int32_t isa;           // at most what sgl_cpu_isa() answers
    int32_t num_threads;
    int32_t round_inputs;  // of codes, as in SglQuantized
};

// A projection to queries, keys and values in one call: a product whose columns are heads of q, then of
// k, then of v; up to two rotations of heads of q and k, each after a norm of them or not; and a store.
// The calls are as if made one after the other, but that nothing is written to the out of a norm.
struct SglQkv {
    const void* product;         // SglLinear or SglQuantized, by `product_op`
    const SglNorm* norms[2];     // of what rotates[i] turns, or null
    const SglRotate* rotates[2]; // or null
    const SglStore* store;       // its k: of a rotation's result, or of the product's; its v: the latter
    int64_t columns[2];          // of the product, that rotates[i] begins with
    int64_t k_columns, v_columns;
    int64_t head_dim, v_dim;     // of heads of q and k, and of v
    int64_t product_op;
};

enum SglOp : int32_t {
    SGL_OP_ATTENTION = 0,
    SGL_OP_QKV = 15,
    SGL_OP_LINEAR = 1,
    SGL_OP_QUANTIZED_LINEAR = 2,
    SGL_OP_DEQUANTIZE = 3,
    SGL_OP_NORM = 4,
    SGL_OP_GATE = 5,
    SGL_OP_ROTATE = 6,
    SGL_OP_STORE = 7,
    SGL_OP_GATHER = 8,
    SGL_OP_ANGLES = 9,
    SGL_OP_WIDEN = 10,
    SGL_OP_HIGHEST = 11,
    SGL_OP_SCALE = 12,
    SGL_OP_ROUTE = 13,
    SGL_OP_EXPERTS = 14
};

// A call of a tape: the function of `op` with the structure that it takes.
struct SglStep {
    const void* call;
    int64_t op;
};

// The best level that this processor and this build have. Asks the system for AMX's registers.
SGL_API int32_t sgl_cpu_isa();

// Takes libgomp's GOMP_parallel, so that kernels run on the threads that PyTorch uses already.
// Null: threads are started and joined in each call.
SGL_API void sgl_set_parallel(void* gomp_parallel);

// 0, or -1 when the arguments are not served (see attention.cpp).
SGL_API int32_t sgl_attention(const SglAttention* call);

// 0, or -1 when the arguments are not served (see qkv.cpp).
SGL_API int32_t sgl_qkv(const SglQkv* call);

// 0, or -1 when the arguments are not served (see linear.cpp).
SGL_API int32_t sgl_linear(const SglLinear* call);

// 0, or -1 when the arguments are not served (see quantized.cpp). The first gives x times the weight
// transposed plus the bias, summed in fp32 and rounded once.
SGL_API int32_t sgl_quantized_linear(const SglQuantized* call);
SGL_API int32_t sgl_dequantize(const SglQuantized* call);

// 0, or -1 when the arguments are not served (see rows.cpp).
SGL_API int32_t sgl_norm(const SglNorm* call);
SGL_API int32_t sgl_gate(const SglGate* call);
SGL_API int32_t sgl_rotate(const SglRotate* call);
SGL_API int32_t sgl_store(const SglStore* call);
SGL_API int32_t sgl_gather(const SglGather* call);
SGL_API int32_t sgl_angles(const SglAngles* call);
SGL_API int32_t sgl_widen(const SglWiden* call);
SGL_API int32_t sgl_highest(const SglHighest* call);
SGL_API int32_t sgl_scale(const SglScale* call);
SGL_API int32_t sgl_sample(const SglSample* call);

// 0, or -1 when the arguments are not served (see route.cpp).
SGL_API int32_t sgl_route(const SglRoute* call);

// 0, or -1 when the arguments are not served (see experts.cpp): an expert that is none too.
SGL_API int32_t sgl_experts(const SglExperts* call);

// Makes the calls of a tape in order, on threads that do not sleep from one to the next. The number of
// calls made: `count`, or the index of one that is not served. `seconds` [count] receives what each
// took, unless null.
SGL_API int64_t sgl_run(const SglStep* steps, int64_t count, int32_t num_threads, double* seconds);

// Sum of `bytes` bytes (a multiple of 64) as 32-bit words: the ceiling that reading is compared to.
SGL_API uint32_t sgl_read_sum(const void* data, int64_t bytes, int32_t num_threads);
}
