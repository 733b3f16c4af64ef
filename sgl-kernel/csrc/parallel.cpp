// Threads of single calls, and the team of a tape.
//
// A single call between PyTorch's own runs on the threads of the process's OpenMP runtime: a second
// pool would fight PyTorch's for the cores, because the workers of both spin a while after each call.
// GOMP_parallel is libgomp's stable entry for a parallel region; it returns when all threads have.
//
// A tape is hundreds of calls with nothing between them: its team spins from one to the next, and
// sleeps from the tape's end on. A worker that the system keeps from its core is not waited for: a
// call's work is shared out index by index, and the leader closes the call when none is left.
#include "parallel.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "api.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits a moment longer each time; after about 50 us lets others have the core.
class Patience {
  public:
    void wait() {
        if (++turns_ < kSpins) relax();
        else std::this_thread::yield();
    }

  private:
    static constexpr int kSpins = 1 << 11;
    int turns_ = 0;
};

// The present call stands in one word: its number, whether it may be entered, and who is inside.
constexpr uint64_t kInside = 0xffff, kOpen = 1 << 16, kNumber = 1 << 17;

class Crew {
  public:
    // False when another thread leads at the moment.
    bool begin(int num_threads) {
        if (!led_.try_lock()) return false;
        std::lock_guard<std::mutex> hold(sleep_);
        while (static_cast<int>(workers_.size()) < num_threads - 1)
            workers_.emplace_back([this, i = static_cast<int>(workers_.size())] { serve(i); });
        awake_ = num_threads - 1;
        working_.store(true, std::memory_order_release);
        ++shift_;
        wake_.notify_all();
        return true;
    }

    void end() {
        working_.store(false, std::memory_order_release);
        led_.unlock();
    }

    void run(void (*body)(void*), void* context) {
        body_ = body;
        context_ = context;
        number_ += kNumber;
        call_.store(number_ | kOpen, std::memory_order_release);
        body(context);
        call_.fetch_and(~kOpen, std::memory_order_acq_rel);
        Patience patience;
        while (call_.load(std::memory_order_acquire) & kInside) patience.wait();
    }

  private:
    std::mutex led_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    int awake_ = 0;       // workers of the present shift, by `sleep_`
    uint64_t shift_ = 0;  // by `sleep_`
    std::atomic<bool> working_{false};
    std::atomic<uint64_t> call_{0};
    uint64_t number_ = 0;
    void (*body_)(void*) = nullptr;
    void* context_ = nullptr;

    void serve(int index) {
        uint64_t shift = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> hold(sleep_);
                wake_.wait(hold, [&] { return shift_ != shift && index < awake_; });
                shift = shift_;
            }
            work();
        }
    }

    void work() {
        uint64_t done = 0;
        Patience patience;
        while (working_.load(std::memory_order_acquire)) {
            uint64_t call = call_.load(std::memory_order_acquire);
            const uint64_t number = call & ~(kOpen | kInside);
            if (!(call & kOpen) || number == done) {
                patience.wait();
                continue;
            }
            if (!call_.compare_exchange_weak(call, call + 1, std::memory_order_acq_rel)) continue;
            done = number;
            body_(context_);
            call_.fetch_sub(1, std::memory_order_acq_rel);
            patience = Patience();
        }
    }
};

// Never destroyed: its threads may sleep in it when the process ends.
Crew& crew() {
    static Crew* const one = new Crew;
    return *one;
}

thread_local bool leads = false;

}  // namespace

extern "C" void sgl_set_parallel(void* function) {
    gomp_parallel = reinterpret_cast<GompParallel>(function);
}

namespace sgl {

Team::Team(int num_threads) {
    leads_ = num_threads > 1 && !leads && crew().begin(num_threads);
    if (leads_) leads = true;
}

Team::~Team() {
    if (!leads_) return;
    leads = false;
    crew().end();
}

bool leads_team() { return leads; }

void run_on_threads(int num_threads, void (*body)(void*), void* context) {
    if (num_threads <= 1) {
        body(context);
        return;
    }
    if (leads) {
        crew().run(body, context);
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
