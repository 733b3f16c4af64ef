// The function of the best instructions that a call allows: name_avx512, name_avx2 or name_generic.
#pragma once

#include "api.h"

#if defined(__x86_64__)
#define SGL_CHOOSE(isa, name)                                  \
    ((isa) >= SGL_AVX512 && (isa) != SGL_NEON ? name##_avx512  \
     : (isa) == SGL_AVX2                      ? name##_avx2    \
                                              : name##_generic)
#else
#define SGL_CHOOSE(isa, name) ((void)(isa), name##_generic)
#endif
