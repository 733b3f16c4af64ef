// Memory that a thread keeps from call to call.
#include "scratch.h"

#include <cstdlib>
#include <new>

namespace sgl {

Scratch::~Scratch() { std::free(memory_); }

char* Scratch::take(int64_t bytes) {
    const bool too_much = size_ > kMostKept && bytes <= kMostKept;
    if (bytes <= size_ && !too_much) return memory_;
    std::free(memory_);
    size_ = (bytes + 63) / 64 * 64 + 64;
    memory_ = static_cast<char*>(std::aligned_alloc(64, size_));
    if (memory_) return memory_;
    size_ = 0;
    throw std::bad_alloc();
}

}  // namespace sgl
