// probe.cpp: CPU features as the CPU and the operating system together offer them.
#include "probe.h"

#include <cpuid.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "amx_permission.h"
#include "topology.h"

namespace krasis {
namespace {

struct Registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
    Registers r;
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return Registers{};
    return r;
}

bool bit(uint32_t value, int index) { return (value >> index) & 1u; }

// XCR0: which register states the OS saves. Zero without OSXSAVE.
uint64_t saved_states() {
    if (!bit(cpuid(1).c, 27)) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

void read_brand(char *brand, size_t capacity) {
    char text[49] = {};
    for (uint32_t i = 0; i < 3; ++i) {
        const Registers r = cpuid(0x80000002u + i);
        const uint32_t words[4] = {r.a, r.b, r.c, r.d};
        std::memcpy(text + 16 * i, words, 16);
    }
    const char *start = text;
    while (*start == ' ') ++start;
    std::snprintf(brand, capacity, "%s", start);
    for (size_t n = std::strlen(brand); n > 0 && brand[n - 1] == ' '; --n) brand[n - 1] = '\0';
}

// A line of a small file under /sys. False if it cannot be read.
bool read_line(const char *path, char *text, int capacity) {
    std::FILE *file = std::fopen(path, "re");
    if (!file) return false;
    const bool ok = std::fgets(text, capacity, file) != nullptr;
    std::fclose(file);
    return ok;
}

// Size of the cache of `level` that CPU 0 sees. Not sysconf: for a cache shared by some of a socket's cores glibc
// reports the whole socket's.
int64_t cache_bytes(int level) {
    for (int index = 0; index < 8; ++index) {
        char path[96], text[64];
        std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/level", index);
        int found = 0;
        if (!read_line(path, text, sizeof text) || std::sscanf(text, "%d", &found) != 1) return 0;
        if (found != level) continue;
        std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
        long long kib = 0;
        return read_line(path, text, sizeof text) && std::sscanf(text, "%lldK", &kib) == 1 ? kib * 1024 : 0;
    }
    return 0;
}

int32_t num_numa_nodes() {
    char text[256] = {};
    int32_t count = 0, first, last;
    if (!read_line("/sys/devices/system/node/online", text, sizeof text)) return 1;
    for (const char *at = text; next_range(&at, &first, &last);) count += last - first + 1;
    return count > 0 ? count : 1;
}

void read_features(krasis_cpu_info *info) {
    const uint64_t states = saved_states();
    const bool ymm = (states & 0x6) == 0x6;
    const bool zmm = ymm && (states & 0xe0) == 0xe0;
    const bool tiles = (states & 0x60000) == 0x60000;
    const Registers one = cpuid(1), seven = cpuid(7, 0), seven_one = seven.a >= 1 ? cpuid(7, 1) : Registers{};
    info->has_avx2 = ymm && bit(seven.b, 5) && bit(seven.b, 8);  // the AVX2 files are built with BMI2 too
    info->has_fma = ymm && bit(one.c, 12);
    info->has_f16c = ymm && bit(one.c, 29);
    info->has_avx512f = zmm && bit(seven.b, 16) && bit(seven.b, 17);  // with DQ, which every such CPU but Xeon Phi has
    info->has_avx512bw = zmm && bit(seven.b, 30);
    info->has_avx512vl = zmm && bit(seven.b, 31);
    info->has_avx512_vnni = zmm && bit(seven.c, 11);
    info->has_avx_vnni = ymm && bit(seven_one.a, 4);
    info->has_avx512_bf16 = zmm && bit(seven_one.a, 5);
    info->has_amx_int8 = tiles && bit(seven.d, 24) && bit(seven.d, 25);
}

}  // namespace

int32_t num_available_cpus() {
    const CpuMask mask;
    if (mask.readable()) return std::max(mask.count(), 1);
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? static_cast<int32_t>(online) : 1;
}

int32_t resolve_isa(int32_t requested) {
    krasis_cpu_info info{};
    read_features(&info);
    const bool avx2 = info.has_avx2 && info.has_fma && info.has_f16c;
    const bool avx512 = avx2 && info.has_avx512f && info.has_avx512bw && info.has_avx512vl && info.has_avx512_vnni;
    const bool tiles = avx512 && (requested == KRASIS_ISA_AUTO || requested == KRASIS_ISA_AMX_INT8);
    if (tiles && ask_for_tiles() == 0) return KRASIS_ISA_AMX_INT8;
    if (avx512 && (requested == KRASIS_ISA_AUTO || requested == KRASIS_ISA_AVX512_VNNI)) return KRASIS_ISA_AVX512_VNNI;
    if (avx2 && (requested == KRASIS_ISA_AUTO || requested == KRASIS_ISA_AVX2)) return KRASIS_ISA_AVX2;
    return KRASIS_ISA_AUTO;
}

bool has_tiles() {
    krasis_cpu_info info{};
    read_features(&info);
    return info.has_amx_int8 != 0;
}

bool follows_streams() {
    static const bool follows = [] {
        const Registers r = cpuid(0);  // the maker's name, in the order b, d, c
        const uint32_t words[3] = {r.b, r.d, r.c};
        return std::memcmp(words, "AuthenticAMD", sizeof words) == 0;
    }();
    return follows;
}

}  // namespace krasis

int32_t krasis_cpu_probe(krasis_cpu_info *info) {
    if (!info) return KRASIS_ERR_ARGUMENT;
    *info = krasis_cpu_info{};
    krasis::read_features(info);
    info->num_logical_cpus = krasis::num_available_cpus();
    info->num_numa_nodes = krasis::num_numa_nodes();
    info->l2_bytes = krasis::cache_bytes(2);
    info->l3_bytes = krasis::cache_bytes(3);
    krasis::read_brand(info->brand, sizeof info->brand);
    return KRASIS_OK;
}
