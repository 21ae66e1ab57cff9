#include "isa.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "core.hpp"

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace polyce {

namespace baseline {
extern const Kernels kernels;
}
#if defined(POLYCE_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

#if defined(POLYCE_X86)
#if defined(_MSC_VER) && !defined(__clang__)
// Bits of CPUID, and those of XCR0 by which the system says that it saves the registers.
bool has_bits(int value, unsigned mask) { return (unsigned(value) & mask) == mask; }

bool has_avx2() {
    int one[4], seven[4];
    __cpuid(one, 1);
    if (!has_bits(one[2], 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29)) return false;
    if ((_xgetbv(0) & 6) != 6) return false;
    __cpuidex(seven, 7, 0);
    return has_bits(seven[1], 1u << 3 | 1u << 5 | 1u << 8);
}

bool has_avx512() {
    int seven[4];
    if (!has_avx2() || (_xgetbv(0) & 0xe6) != 0xe6) return false;
    __cpuidex(seven, 7, 0);
    return has_bits(seven[1], 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31);
}
#else
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
}
#endif
#endif

struct Found {
    const Kernels* kernels[3];
    const char* names[4] = {};
};

const Found& found() {
    static const Found here = [] {
        Found f{};
        int count = 0;
#if defined(POLYCE_X86)
        if (has_avx512()) f.kernels[count++] = &avx512::kernels;
        if (has_avx2()) f.kernels[count++] = &avx2::kernels;
#endif
        f.kernels[count++] = &baseline::kernels;
        for (int i = 0; i < count; ++i) f.names[i] = f.kernels[i]->name;
        return f;
    }();
    return here;
}

const Kernels* named(const char* name) {
    for (int i = 0; found().names[i]; ++i) {
        if (std::strcmp(found().names[i], name) == 0) return found().kernels[i];
    }
    return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& current_kernels() {
    const Kernels* kernels = chosen.load(std::memory_order_relaxed);
    return kernels ? *kernels : *found().kernels[0];
}

const char* isa_name() { return current_kernels().name; }

const char* const* isa_names() { return found().names; }

bool use_isa(const char* name) {
    const Kernels* kernels = named(name);
    if (kernels) chosen.store(kernels);
    return kernels != nullptr;
}

}  // namespace polyce
