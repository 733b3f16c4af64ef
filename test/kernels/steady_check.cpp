// Counts what the kernels allocate in steps like the ones before: nothing, after the first.
//
// The allocation functions of this program are those that the library finds, too.
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "api.h"

namespace {

thread_local long allocations = 0;  // of this thread

}  // namespace

void* operator new(size_t bytes) {
    ++allocations;
    if (void* memory = std::malloc(bytes)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

extern "C" void* aligned_alloc(size_t line, size_t bytes) {
    ++allocations;
    void* memory = nullptr;
    return posix_memalign(&memory, line, bytes) ? nullptr : memory;
}

namespace {

constexpr int kDim = 64, kGroups = 2, kPerGroup = 3, kPage = 16, kPages = 40;

// Requests of 600 positions over the same pages, each with `rows` queries at its end.
struct Problem {
    std::vector<float> plane, q, out;
    std::vector<int32_t> ids;
    std::vector<int64_t> row, rows, position, table, pages, first;
    SglAttention call = {};

    Problem(int requests, int count, int32_t kv_dtype, int threads)
        : plane(kPages * kPage * kGroups * kDim, 0.5f),
          q(requests * count * kGroups * kPerGroup * kDim, 0.25f), out(q.size()) {
        for (int i = 0; i < kPages; ++i) ids.push_back(kPages - 1 - i);
        for (int i = 0; i < requests; ++i) {
            row.push_back(i * count);
            rows.push_back(count);
            position.push_back(600 - count);
            table.push_back(i);
            pages.push_back(reinterpret_cast<int64_t>(ids.data()));
            first.push_back(0);
        }
        call.q = q.data();
        call.k = call.v = plane.data();
        call.out = out.data();
        call.q_row = call.out_row = kGroups * kPerGroup * kDim;
        call.q_head = call.k_head = call.v_head = call.out_head = kDim;
        call.k_slot = call.v_slot = kGroups * kDim;
        call.num_blocks = requests;
        call.block_row = row.data();
        call.block_rows = rows.data();
        call.block_position = position.data();
        call.block_table = table.data();
        call.pages = pages.data();
        call.first_position = first.data();
        call.page_size = kPage;
        call.num_kv_heads = kGroups;
        call.heads_per_group = kPerGroup;
        call.head_dim = kDim;
        call.dtype = SGL_FLOAT32;
        call.kv_dtype = kv_dtype;
        call.isa = sgl_cpu_isa();
        call.num_threads = threads;
        call.scale = 0.125f;
    }
};

long made_by(const std::vector<SglStep>& steps, int threads) {
    const long before = allocations;
    const auto count = static_cast<int64_t>(steps.size());
    if (sgl_run(steps.data(), count, threads, nullptr) != count) std::abort();
    return allocations - before;
}

}  // namespace

int main() {
    int failures = 0;
    for (int threads = 1; threads <= 2; ++threads) {
        Problem decode(8, 1, SGL_FLOAT32, threads), prompt(2, 40, SGL_FLOAT32, threads);
        Problem bytes(3, 1, SGL_FP8_E5M2, threads), alone(1, 1, SGL_FLOAT32, threads);
        std::vector<SglStep> steps;
        for (Problem* one : {&decode, &prompt, &bytes, &alone})
            steps.push_back({&one->call, SGL_OP_ATTENTION});
        const long first = made_by(steps, threads);
        long later = 0;
        for (int i = 0; i < 5; ++i) later += made_by(steps, threads);
        std::printf("%d threads: %ld allocations, then %ld\n", threads, first, later);
        failures += later != 0 || (threads == 1 && first == 0);
    }
    return failures;
}
