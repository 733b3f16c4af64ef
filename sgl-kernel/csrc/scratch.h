// Memory that a thread keeps from call to call, so that a step like the one before allocates nothing.
#pragma once

#include <cstdint>

namespace sgl {

// Meant to be thread_local, one for each use.
class Scratch {
  public:
    Scratch() = default;
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // At least `bytes` on a line of 64, of any content, until the next call. What one call wanted beyond
    // kMostKept is given back in the first that wants less. Throws std::bad_alloc.
    char* take(int64_t bytes);

  private:
    static constexpr int64_t kMostKept = 64 << 20;
    char* memory_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace sgl
