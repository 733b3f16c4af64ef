// What this processor can do, asked once when the library is loaded.
#include "api.h"
#include "quantized.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>

namespace {

bool has_dot_products() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if (!(ecx & (1u << 11))) return false;  // AVX-512-VNNI
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
    return eax & (1u << 5);  // AVX-512-BF16
}

// With AVX-512-VBMI, which comes with every processor that has the tiles.
bool has_amx_bf16() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    const bool tile = edx & (1u << 24), bf16 = edx & (1u << 22), bytes = ecx & (1u << 1);
    return tile && bf16 && bytes;
}

// The tiles' 8 KiB of state are given to a process only when it asks (Linux, x86/xstate).
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

int32_t find_isa() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return SGL_GENERIC;
    if (!__builtin_cpu_supports("f16c")) return SGL_GENERIC;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return SGL_AVX2;
    if (!has_dot_products()) return SGL_AVX512;
    return has_amx_bf16() && may_use_tiles() ? SGL_AMX : SGL_AVX512_BF16;
}

bool find_avx_vnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 4));
}

}  // namespace

bool sgl::has_avx_vnni() {
    static const bool found = find_avx_vnni();
    return found;
}
#elif defined(__aarch64__)
static int32_t find_isa() { return SGL_NEON; }
#else
static int32_t find_isa() { return SGL_GENERIC; }
#endif

extern "C" int32_t sgl_cpu_isa() {
    static const int32_t isa = find_isa();
    return isa;
}
