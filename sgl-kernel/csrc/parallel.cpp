// Threads of the process's OpenMP runtime: a second pool would fight PyTorch's for the cores,
// because the workers of both spin a while after each call. GOMP_parallel is libgomp's stable entry
// for a parallel region; it returns when all threads have.
#include "parallel.h"

#include <thread>
#include <vector>

#include "api.h"

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

}  // namespace

extern "C" void sgl_set_parallel(void* function) {
    gomp_parallel = reinterpret_cast<GompParallel>(function);
}

namespace sgl {

void run_on_threads(int num_threads, void (*body)(void*), void* context) {
    if (num_threads <= 1) {
        body(context);
        return;
    }
    if (GompParallel parallel = gomp_parallel.load()) {
        parallel(body, context, static_cast<unsigned>(num_threads), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int i = 1; i < num_threads; ++i) others.emplace_back(body, context);
    body(context);
    for (auto& thread : others) thread.join();
}

}  // namespace sgl
