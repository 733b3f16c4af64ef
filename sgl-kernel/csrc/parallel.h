// Runs a function on some threads: on the team of a running tape, else on those of OpenMP.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

namespace sgl {

void run_on_threads(int num_threads, void (*body)(void*), void* context);

// While it lives, the calls of this thread run on threads that wait for them without sleeping, which
// makes a call cost about a microsecond. One team works at a time in a process; for another thread, or
// with a single thread, nothing changes.
class Team {
  public:
    explicit Team(int num_threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

  private:
    bool leads_ = false;
};

// Whether the calls of this thread run on a team now: threads that a call need not wake.
bool leads_team();

// Calls `task(index)` for every index below `count`, each once, on up to `num_threads` threads.
// `make_worker()` runs once on each thread and gives the callable that takes the indices.
template <class MakeWorker>
void for_each_index(int64_t count, int num_threads, MakeWorker make_worker) {
    struct Shared {
        std::atomic<int64_t> next{0};
        int64_t count;
        MakeWorker* make;
    } shared;
    shared.count = count;
    shared.make = &make_worker;
    auto body = [](void* context) {
        auto* all = static_cast<Shared*>(context);
        auto worker = (*all->make)();
        for (int64_t i = all->next++; i < all->count; i = all->next++) worker(i);
    };
    const int64_t useful = count < num_threads ? count : num_threads;
    run_on_threads(static_cast<int>(useful), body, &shared);
}

}  // namespace sgl
