// Reads memory as fast as a plain loop can: what bandwidth figures of kernels are compared with.
#include <atomic>

#include "api.h"
#include "parallel.h"

extern "C" uint32_t sgl_read_sum(const void* data, int64_t bytes, int32_t num_threads) {
    constexpr int64_t piece = int64_t{1} << 18;
    std::atomic<uint32_t> total{0};
    const auto* words = static_cast<const uint32_t*>(data);
    const int64_t count = bytes / 4;
    sgl::for_each_index((count + piece - 1) / piece, num_threads, [&] {
        return [&](int64_t i) {
            const int64_t end = (i + 1) * piece < count ? (i + 1) * piece : count;
            uint32_t sum = 0;
            for (int64_t n = i * piece; n < end; ++n) sum += words[n];
            total += sum;
        };
    });
    return total;
}
