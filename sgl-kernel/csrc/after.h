// What goes on with the outputs of a product as soon as they are there.
#pragma once

#include <cstdint>

#include "api.h"

namespace sgl {

class After {
  public:
    // Outputs [first, last) of all rows are written. Called on the thread that wrote them, by several at
    // a time, and once for each output.
    virtual void done(int64_t first, int64_t last) = 0;

  protected:
    ~After() = default;
};

// sgl_linear() and sgl_quantized_linear(); `after` may be null.
int32_t linear_then(const SglLinear& call, After* after);
int32_t quantized_linear_then(const SglQuantized& call, After* after);

}  // namespace sgl
