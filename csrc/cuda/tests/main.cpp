// main.cpp: runs all parts and says how long each took. Arguments: names of parts; none: all.
#include <chrono>
#include <cstring>

#include "check.h"
#include "simt.h"
#include "suites.h"

namespace {

struct Suite {
    const char *name;
    void (*run)();
};

constexpr Suite kSuites[] = {
#if !KRASIS_SIMT_DEVICE
    {"simt", test::run_simt},
#endif
    {"moe_align", test::run_moe_align},
    {"moe_rows", test::run_moe_rows},
    {"fused", test::run_fused},
    {"attention_rows", test::run_attention_rows},
    {"attention_decode", test::run_attention_decode},
    {"unpack", test::run_unpack},
    {"route", test::run_route},
    {"route_scores", test::run_route_scores},
    {"activation", test::run_activation},
    {"handover", test::run_handover},
    {"gated_delta", test::run_gated_delta},
    {"mamba", test::run_mamba},
    {"short_conv", test::run_short_conv},
    {"streams", test::run_streams},
    {"int8_rows", test::run_int8_rows},
    {"index", test::run_index},
    {"latent_rows", test::run_latent_rows},
    {"latent_attention", test::run_latent_attention},
    {"moe_gemm", test::run_moe_gemm},
};

bool is_wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; ++i) {
        if (std::strcmp(argv[i], name) == 0) return true;
    }
    return argc == 1;
}

}  // namespace

int main(int argc, char **argv) {
    for (const Suite &suite : kSuites) {
        if (!is_wanted(suite.name, argc, argv)) continue;
        const auto start = std::chrono::steady_clock::now();
        const int before = test::failures;
        suite.run();
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        std::printf("%-16s %s  %.2f s\n", suite.name, test::failures == before ? "ok" : "FAILED", taken.count());
        std::fflush(stdout);
    }
    return test::finish("cuda kernels");
}
