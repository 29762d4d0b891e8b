// made_up_nodes.h: pools on NUMA nodes that this machine need not have. Needs symbols that the library hides.
#pragma once

#include "cpu/pool.h"
#include "test.h"

namespace test {

// n nodes which share out the CPUs of this process, or all have the first one if there are too few.
inline krasis::Topology made_up_nodes(int32_t n) {
    const std::vector<int32_t> cpus = krasis::CpuMask().cpus();
    krasis::Topology nodes(static_cast<size_t>(n));
    for (int32_t i = 0; i < n; ++i) {
        nodes[i].id = i;
        nodes[i].cpus = {cpus[static_cast<size_t>(i) % cpus.size()]};
    }
    return nodes;
}

inline krasis_pool *pool_on_nodes(int32_t num_threads, int32_t isa, const krasis::Topology &topology) {
    krasis_pool *pool = nullptr;
    CHECK_OK(krasis::create_pool(num_threads, isa, topology, &pool));
    return pool;
}

}  // namespace test
