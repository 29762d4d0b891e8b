// test_numa.cpp: nodes as /sys tells them, rows split among nodes, and a pool on nodes that this machine lacks.
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

#include "made_up_nodes.h"

namespace {

using krasis::NumaNode;
using krasis::Topology;
using test::made_up_nodes;
using test::Pool;
using test::pool_on_nodes;
using test::Random;

std::string ranges_of(const char *list) {
    std::string text;
    for (int32_t first, last; krasis::next_range(&list, &first, &last);) {
        text += std::to_string(first) + ".." + std::to_string(last) + " ";
    }
    return text;
}

void lists() {
    CHECK(ranges_of("0-3,8-11\n") == "0..3 8..11 ");
    CHECK(ranges_of("5") == "5..5 ");
    CHECK(ranges_of("") == "" && ranges_of("\n") == "" && ranges_of("odd") == "" && ranges_of("-1") == "");
    CHECK(ranges_of("0,2,4-4\n") == "0..0 2..2 4..4 ");
    CHECK(ranges_of("1,7-5,9") == "1..1 " && ranges_of("3-") == "" && ranges_of("0-31:2/4") == "");
    CHECK(ranges_of("99999999999999999999") == "" && ranges_of("0-4294967296") == "");
}

// A folder like /sys/devices/system/node.
class Folder {
  public:
    Folder() {
        char path[] = "/tmp/krasis-nodes-XXXXXX";
        CHECK(mkdtemp(path) != nullptr);
        path_ = path;
    }
    ~Folder() {
        for (const std::string &name : names_) {
            unlink((path_ + "/" + name + "/cpulist").c_str());
            rmdir((path_ + "/" + name).c_str());
        }
        rmdir(path_.c_str());
    }
    void add(const std::string &name, const char *list) {
        names_.push_back(name);
        mkdir((path_ + "/" + name).c_str(), 0700);
        if (!list) return;
        std::FILE *file = std::fopen((path_ + "/" + name + "/cpulist").c_str(), "w");
        CHECK(file != nullptr);
        std::fputs(list, file);
        std::fclose(file);
    }
    std::string nodes(const std::vector<int32_t> &cpus) const {
        std::string text;
        for (const NumaNode &node : krasis::read_topology(path_.c_str(), cpus)) {
            text += std::to_string(node.id) + ":";
            for (int32_t cpu : node.cpus) text.append(" ").append(std::to_string(cpu));
            text += "; ";
        }
        return text;
    }

  private:
    std::string path_;
    std::vector<std::string> names_;
};

void folders() {
    Folder two;
    two.add("node10", "4-5,7\n");  // a gap in the numbers, and a name that sorts before node2
    two.add("node2", "0-3,6\n");
    two.add("node3", "\n");  // memory only
    two.add("node4", nullptr);
    two.add("nodes", "0-7");
    two.add("possible", "0-7");
    CHECK(two.nodes({0, 1, 2, 3, 4, 5, 6, 7}) == "2: 0 1 2 3 6; 10: 4 5 7; ");
    CHECK(two.nodes({1, 7}) == "2: 1; 10: 7; ");
    CHECK(two.nodes({4, 5}) == "10: 4 5; ");
    CHECK(two.nodes({1, 4, 9}) == "0: 1 4 9; ");  // CPU 9 is of no node
    two.add("node11", "3,4\n");                   // of two nodes
    CHECK(two.nodes({1, 4, 5}) == "0: 1 4 5; ");
    CHECK(two.nodes({1, 5}) == "2: 1; 10: 5; ");
    Folder none;
    CHECK(none.nodes({0, 2}) == "0: 0 2; ");
    CHECK(krasis::read_topology("/nowhere/at/all", {1}).size() == 1);
    CHECK(!krasis::machine_topology().front().cpus.empty());
}

void c_interface() {
    int64_t count = 0;
    CHECK_OK(krasis_numa_cpus(0, nullptr, &count));
    krasis_cpu_info info;
    CHECK_OK(krasis_cpu_probe(&info));
    CHECK(count == info.num_logical_cpus);
    std::vector<krasis_numa_cpu> cpus(static_cast<size_t>(count) + 1, krasis_numa_cpu{-1, -1, -1});
    CHECK_OK(krasis_numa_cpus(count, cpus.data(), &count));
    CHECK(cpus[0].cpu >= 0 && cpus[0].node == 0 && cpus.back().cpu == -1);
    CHECK(krasis_numa_cpus(-1, cpus.data(), &count) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_numa_cpus(1, nullptr, &count) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_numa_cpus(1, cpus.data(), nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_numa_first_unit(-1, 2, 0) == -1 && krasis_numa_first_unit(4, 0, 0) == -1);
    CHECK(krasis_numa_first_unit(4, 2, 3) == -1 && krasis_numa_first_unit(4, 2, -1) == -1);
    int32_t id = 0;
    CHECK(krasis_numa_page_nodes(nullptr, 1, &id) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_numa_page_nodes(nullptr, -1, &id) == KRASIS_ERR_ARGUMENT);
    CHECK_OK(krasis_numa_page_nodes(nullptr, 0, nullptr));
    CHECK(krasis_numa_read_exactly(nullptr, 4096, 1) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_numa_read_exactly(&id, 0, 1) == KRASIS_ERR_ARGUMENT);
}

void shares() {
    for (int64_t n : {1, 2, 3, 4, 7}) {
        for (int64_t units : {0, 1, 2, 3, 5, 24, 128, 1000}) {
            CHECK(krasis_numa_first_unit(units, n, 0) == 0 && krasis_numa_first_unit(units, n, n) == units);
            for (int64_t i = 0; i < n; ++i) {
                const int64_t width = krasis_numa_first_unit(units, n, i + 1) - krasis_numa_first_unit(units, n, i);
                CHECK(width == units / n || width == units / n + 1);
                CHECK(i > 0 || units == 0 || width > 0);
            }
        }
    }
    CHECK(krasis_numa_first_unit(INT64_MAX, 3, 3) == INT64_MAX);
}

void threads_by_cpus() {
    const Topology uneven = {{0, {0, 1, 2, 3, 4, 5}}, {1, {6, 7}}};
    CHECK((krasis::homes_of_threads(8, uneven) == std::vector<int32_t>{0, 0, 0, 0, 0, 0, 1, 1}));
    CHECK((krasis::homes_of_threads(4, uneven) == std::vector<int32_t>{0, 0, 0, 1}));
    CHECK((krasis::homes_of_threads(1, uneven) == std::vector<int32_t>{0}));
    CHECK((krasis::homes_of_threads(2, made_up_nodes(4)) == std::vector<int32_t>{0, 2}));
    CHECK((krasis::homes_of_threads(5, made_up_nodes(2)) == std::vector<int32_t>{0, 0, 0, 1, 1}));
}

// The node that owns a unit, by trying all.
int64_t owner(const krasis::Phase &phase, int64_t n, int64_t unit) {
    const int64_t within = unit % phase.period;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t share = phase.mirrored ? n - 1 - i : i;
        if (krasis::first_unit(phase.period, n, share) <= within &&
            within < krasis::first_unit(phase.period, n, share + 1)) {
            return i;
        }
    }
    return -1;
}

// Phases with and without a period: every unit once, none before the phase before is done.
void every_unit_once() {
    Random random(31);
    for (int32_t n : {1, 2, 3, 4}) {
        for (int32_t threads : {1, 2, 3, 7}) {
            Pool pool(pool_on_nodes(threads, KRASIS_ISA_AUTO, made_up_nodes(n)));
            for (int round = 0; round < 150; ++round) {
                constexpr int kPhases = 4;
                std::atomic<int> bad{0}, done{0};
                std::vector<std::atomic<int>> seen(static_cast<size_t>(kPhases * 400));
                int before = 0;
                struct Step {
                    std::atomic<int> *seen, *bad, *done;
                    int before;
                    krasis::Phase *phase;
                } steps[kPhases];
                krasis::Phase phases[kPhases];
                for (int p = 0; p < kPhases; ++p) {
                    steps[p] = {&seen[static_cast<size_t>(400 * p)], &bad, &done, before, &phases[p]};
                    phases[p].context = &steps[p];
                    phases[p].count = random.below(5) ? random.below(400) : 0;
                    phases[p].grain = random.between(1, 5);
                    phases[p].max_grain = random.below(30);
                    phases[p].period = random.below(3) ? random.between(1, 60) : 0;
                    phases[p].mirrored = random.below(2);
                    phases[p].fn = [](void *context, int64_t begin, int64_t end, int32_t) {
                        Step &step = *static_cast<Step *>(context);
                        if (begin < 0 || begin >= end || end > step.phase->count) {
                            ++*step.bad;
                            return;
                        }
                        if (*step.done < step.before) ++*step.bad;
                        for (int64_t u = begin; u < end; ++u) ++step.seen[u];
                        *step.done += static_cast<int>(end - begin);
                    };
                    before += static_cast<int>(phases[p].count);
                }
                krasis::parallel_phases(pool, phases, kPhases);
                CHECK(bad == 0 && done == before);
                for (int p = 0; p < kPhases; ++p) {
                    for (int u = 0; u < 400; ++u)
                        CHECK(seen[static_cast<size_t>(400 * p + u)] == (u < phases[p].count));
                }
            }
        }
    }
}

bool wait_until(const std::atomic<int> &value, int least) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (value.load() < least) {
        if (std::chrono::steady_clock::now() > end) return false;
        std::this_thread::yield();
    }
    return true;
}

// Every thread holds its first piece until all have one: each is of the thread's own node (the caller's may be of any),
// and pieces never reach over what the node owns.
void own_rows_first() {
    for (int32_t n : {2, 3, 4}) {
        for (bool mirrored : {false, true}) {
            const int32_t threads = 2 * n;
            Pool pool(pool_on_nodes(threads, KRASIS_ISA_AUTO, made_up_nodes(n)));
            const std::vector<int32_t> homes = krasis::homes_of_threads(threads, made_up_nodes(n));
            std::atomic<int> arrived{0}, bad{0};
            std::vector<int> came(static_cast<size_t>(threads));  // each touched by its thread alone
            krasis::Phase phase;
            auto body = [&](int64_t begin, int64_t end, int32_t thread) {
                const int64_t node = owner(phase, n, begin);
                for (int64_t u = begin; u < end; ++u) bad += owner(phase, n, u) != node;
                if (came[static_cast<size_t>(thread)]++) return;
                if (thread > 0 && node != homes[static_cast<size_t>(thread)]) ++bad;
                ++arrived;
                if (!wait_until(arrived, threads)) ++bad;
            };
            // Enough pieces in each queue for the threads of the node and the caller.
            phase = krasis::make_phase(body, 17 * 40, 1);
            phase.period = 17;
            phase.mirrored = mirrored;
            krasis::parallel_phases(pool, &phase, 1);
            CHECK(bad == 0 && arrived == threads);
        }
    }
}

// A thread that is stuck in its first piece: all the rest is done by the other one, whosever it is.
void work_of_absent_threads() {
    for (int32_t n : {2, 4}) {
        Pool pool(pool_on_nodes(2, KRASIS_ISA_AUTO, made_up_nodes(n)));
        std::atomic<int> done{0}, bad{0}, held{0};
        auto body = [&](int64_t begin, int64_t end, int32_t) {
            if (held.fetch_add(1) == 0 && !wait_until(done, 300 - static_cast<int>(end - begin))) ++bad;
            done += static_cast<int>(end - begin);
        };
        krasis::Phase phase = krasis::make_phase(body, 300, 1);
        phase.period = 10;
        krasis::parallel_phases(pool, &phase, 1);
        CHECK(bad == 0 && done == 300);
    }
}

// Workers are bound to the CPUs of their nodes; with one node nothing is bound, nor ever the caller.
void binding() {
    const std::vector<int32_t> mine = krasis::CpuMask().cpus();
    for (int32_t n : {1, 2, 3}) {
        const Topology nodes = made_up_nodes(n);
        const std::vector<int32_t> homes = krasis::homes_of_threads(4, nodes);
        Pool pool(pool_on_nodes(4, KRASIS_ISA_AUTO, nodes));
        std::atomic<int> arrived{0}, bad{0};
        krasis::parallel_for(pool, 4, 1, [&](int64_t, int64_t, int32_t thread) {
            ++arrived;  // one piece each
            if (!wait_until(arrived, 4)) ++bad;
            const bool free = n == 1 || thread == 0;
            const auto &expected = free ? mine : nodes[static_cast<size_t>(homes[thread])].cpus;
            bad += krasis::CpuMask().cpus() != expected;
        });
        CHECK(bad == 0);
    }
    CHECK(!krasis::bind_thread(pthread_self(), {100'000}));
    CHECK(krasis::CpuMask().cpus() == mine);
}

// Many short jobs of several callers, so that phases open while threads fall asleep.
void stress() {
    Pool pool(pool_on_nodes(5, KRASIS_ISA_AUTO, made_up_nodes(3)));
    std::atomic<int64_t> total{0};
    auto body = [&](int64_t begin, int64_t end, int32_t) { total += end - begin; };
    std::vector<std::thread> callers;
    for (int c = 0; c < 3; ++c) {
        callers.emplace_back([&] {
            krasis::Phase phases[3] = {krasis::make_phase(body, 12, 1, 4), krasis::make_phase(body, 5, 1),
                                       krasis::make_phase(body, 7, 1)};
            phases[0].period = 6;
            phases[2].period = 2;
            phases[2].mirrored = true;
            for (int i = 0; i < 2000; ++i) {
                krasis::parallel_phases(pool, phases, 3);
                if (i % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
            }
        });
    }
    for (std::thread &caller : callers) caller.join();
    CHECK(total == 3 * 2000 * 24);
}

}  // namespace

int main() {
    lists();
    folders();
    c_interface();
    shares();
    threads_by_cpus();
    every_unit_once();
    own_rows_first();
    work_of_absent_threads();
    binding();
    stress();
    return test::finish("numa");
}
