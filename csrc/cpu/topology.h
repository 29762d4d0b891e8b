// topology.h: the NUMA nodes this process may run on, and which node owns which rows of a weight.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace krasis {

struct NumaNode {
    int32_t id = 0;  // the kernel's number
    std::vector<int32_t> cpus;
};
// At least one node, each with at least one CPU.
using Topology = std::vector<NumaNode>;

// The affinity mask of the calling thread.
class CpuMask {
  public:
    CpuMask();
    ~CpuMask();
    CpuMask(const CpuMask &) = delete;
    CpuMask &operator=(const CpuMask &) = delete;

    bool readable() const { return set_ != nullptr; }
    int32_t count() const;
    std::vector<int32_t> cpus() const;

  private:
    cpu_set_t *set_ = nullptr;
    size_t bytes_ = 0;
    int32_t capacity_ = 0;
};

// Takes the next range off a list such as "0-3,8". False at its end, and at anything that is not a range of CPU
// numbers.
bool next_range(const char **list, int32_t *first, int32_t *last);

// The nodes under `folder` that have some of `cpus`, by number. One node with all of `cpus` unless every one of them is
// found in exactly one node: what cannot be understood is not acted on. Throws bad_alloc.
Topology read_topology(const char *folder, const std::vector<int32_t> &cpus);
Topology machine_topology();

// Rows are split by node: of a run of `units` units, node i of n owns [first_unit(units, n, i), first_unit(units, n, i
// + 1)). Rounded up, so that the first node owns the first unit of every run.
inline int64_t first_unit(int64_t units, int64_t num_nodes, int64_t node) {
    return units / num_nodes * node + (units % num_nodes * node + num_nodes - 1) / num_nodes;
}

// Threads dealt to nodes in proportion to their CPUs, neighbours together: the node of each thread.
std::vector<int32_t> homes_of_threads(int32_t num_threads, const Topology &topology);

// Lets a thread run on these CPUs only. False if the system refuses.
bool bind_thread(pthread_t thread, const std::vector<int32_t> &cpus);

}  // namespace krasis
