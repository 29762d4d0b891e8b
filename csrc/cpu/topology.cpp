// topology.cpp: NUMA nodes from /sys, binding of threads, and where pages lie.
#include "topology.h"

#include <dirent.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <new>
#include <string>

#include "../krasis.h"

namespace krasis {
namespace {

constexpr int32_t kMaxCpus = 1 << 18;
constexpr char kNodes[] = "/sys/devices/system/node";

bool take_number(const char **text, int32_t *value) {
    const char *at = *text;
    int32_t sum = 0;
    for (; *at >= '0' && *at <= '9'; ++at) {
        sum = sum * 10 + (*at - '0');
        if (sum >= kMaxCpus) return false;
    }
    if (at == *text) return false;
    *text = at;
    *value = sum;
    return true;
}

// The number of a folder "node12"; -1 for any other name.
int32_t node_number(const char *name) {
    int32_t number;
    if (std::string(name).compare(0, 4, "node") != 0) return -1;
    name += 4;
    return take_number(&name, &number) && *name == '\0' ? number : -1;
}

std::string read_text(const std::string &path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path.c_str(), "re"), std::fclose);
    std::string text;
    char part[512];
    while (file && std::fgets(part, sizeof part, file.get())) text += part;
    return text;
}

std::vector<int32_t> node_numbers(const char *folder) {
    const std::unique_ptr<DIR, int (*)(DIR *)> entries(opendir(folder), closedir);
    std::vector<int32_t> numbers;
    while (const dirent *entry = entries ? readdir(entries.get()) : nullptr) {
        if (const int32_t number = node_number(entry->d_name); number >= 0) numbers.push_back(number);
    }
    std::sort(numbers.begin(), numbers.end());
    return numbers;
}

// Those of `cpus` that a list names, without repeats.
std::vector<int32_t> named_cpus(const std::string &list, const std::vector<int32_t> &cpus) {
    std::vector<int32_t> found;
    for (int32_t cpu : cpus) {
        const char *at = list.c_str();
        bool named = false;
        for (int32_t first, last; !named && next_range(&at, &first, &last);) named = first <= cpu && cpu <= last;
        if (named) found.push_back(cpu);
    }
    return found;
}

}  // namespace

CpuMask::CpuMask() {
    // The kernel refuses a mask smaller than its own: grow until it fits.
    for (capacity_ = 1024; capacity_ <= kMaxCpus && !set_; capacity_ *= 4) {
        set_ = CPU_ALLOC(capacity_);
        if (!set_) return;
        bytes_ = CPU_ALLOC_SIZE(capacity_);
        if (sched_getaffinity(0, bytes_, set_) == 0) return;
        CPU_FREE(set_);
        set_ = nullptr;
    }
}

CpuMask::~CpuMask() {
    if (set_) CPU_FREE(set_);
}

int32_t CpuMask::count() const { return set_ ? CPU_COUNT_S(bytes_, set_) : 0; }

std::vector<int32_t> CpuMask::cpus() const {
    std::vector<int32_t> found;
    for (int32_t cpu = 0; set_ && cpu < capacity_; ++cpu) {
        if (CPU_ISSET_S(static_cast<size_t>(cpu), bytes_, set_)) found.push_back(cpu);
    }
    return found;
}

bool next_range(const char **list, int32_t *first, int32_t *last) {
    const char *at = *list;
    if (!take_number(&at, first)) return false;
    *last = *first;
    if (*at == '-' && (!take_number(&++at, last) || *last < *first)) return false;
    if (*at == ',') {
        ++at;
    } else if (*at != '\0' && *at != '\n') {
        return false;
    }
    *list = at;
    return true;
}

Topology read_topology(const char *folder, const std::vector<int32_t> &cpus) {
    Topology nodes;
    std::vector<int32_t> all;
    for (int32_t number : node_numbers(folder)) {
        const std::string path = std::string(folder) + "/node" + std::to_string(number) + "/cpulist";
        NumaNode node{number, named_cpus(read_text(path), cpus)};
        if (node.cpus.empty()) continue;  // memory only, or not ours
        all.insert(all.end(), node.cpus.begin(), node.cpus.end());
        nodes.push_back(std::move(node));
    }
    std::sort(all.begin(), all.end());
    if (!nodes.empty() && all == cpus) return nodes;
    return {NumaNode{0, cpus.empty() ? std::vector<int32_t>{0} : cpus}};
}

Topology machine_topology() { return read_topology(kNodes, CpuMask().cpus()); }

std::vector<int32_t> homes_of_threads(int32_t num_threads, const Topology &topology) {
    int64_t total = 0, before = 0;
    for (const NumaNode &node : topology) total += static_cast<int64_t>(node.cpus.size());
    std::vector<int32_t> homes;
    for (size_t i = 0; i < topology.size(); ++i) {
        before += static_cast<int64_t>(topology[i].cpus.size());
        // Rounded up: thread 0 is of the first node.
        const int64_t end = (num_threads * before + total - 1) / total;
        homes.resize(static_cast<size_t>(end), static_cast<int32_t>(i));
    }
    return homes;
}

bool bind_thread(pthread_t thread, const std::vector<int32_t> &cpus) {
    const int32_t capacity = *std::max_element(cpus.begin(), cpus.end()) + 1;
    cpu_set_t *set = CPU_ALLOC(capacity);
    if (!set) return false;
    const size_t bytes = CPU_ALLOC_SIZE(capacity);
    CPU_ZERO_S(bytes, set);
    for (int32_t cpu : cpus) CPU_SET_S(static_cast<size_t>(cpu), bytes, set);
    const bool bound = pthread_setaffinity_np(thread, bytes, set) == 0;
    CPU_FREE(set);
    return bound;
}

}  // namespace krasis

int32_t krasis_numa_cpus(int64_t capacity, krasis_numa_cpu *cpus, int64_t *count) {
    if (capacity < 0 || !count || (capacity > 0 && !cpus)) return KRASIS_ERR_ARGUMENT;
    *count = 0;
    try {
        const krasis::Topology topology = krasis::machine_topology();
        for (size_t i = 0; i < topology.size(); ++i) {
            for (int32_t cpu : topology[i].cpus) {
                if (*count < capacity) cpus[*count] = {cpu, static_cast<int32_t>(i), topology[i].id};
                ++*count;
            }
        }
    } catch (const std::bad_alloc &) {
        return KRASIS_ERR_MEMORY;
    }
    return KRASIS_OK;
}

int64_t krasis_numa_first_unit(int64_t units, int64_t num_nodes, int64_t node) {
    if (units < 0 || num_nodes < 1 || num_nodes > krasis::kMaxCpus || node < 0 || node > num_nodes) return -1;
    return krasis::first_unit(units, num_nodes, node);
}

int32_t krasis_numa_page_nodes(const void *const *addresses, int64_t count, int32_t *ids) {
    if (count < 0 || (count > 0 && (!addresses || !ids))) return KRASIS_ERR_ARGUMENT;
    if (count == 0) return KRASIS_OK;
    return syscall(SYS_move_pages, 0, count, addresses, nullptr, ids, 0) == 0 ? KRASIS_OK : KRASIS_ERR_SYSTEM;
}

int32_t krasis_numa_read_exactly(void *address, int64_t bytes, int32_t exactly) {
    if (!address || bytes <= 0) return KRASIS_ERR_ARGUMENT;
    const size_t length = static_cast<size_t>(bytes);
    // Again what krasis_map_file asked for; a kernel without huge pages refuses it.
    if (madvise(address, length, MADV_HUGEPAGE) != 0) return errno == EINVAL ? KRASIS_OK : KRASIS_ERR_SYSTEM;
    return madvise(address, length, exactly ? MADV_RANDOM : MADV_NORMAL) == 0 ? KRASIS_OK : KRASIS_ERR_SYSTEM;
}
