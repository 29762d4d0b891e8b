// map_guard.cpp: one sentence and an exit code where a mapped file cannot be read any more, instead of a bare SIGBUS.
//
// The handler may run on any thread at any instruction: it reads atomics, calls only what signal handlers may call
// (stat, write, _exit) and allocates nothing. Entries are never freed, only emptied and used again; the texts of an
// entry live as long as its mapping, and nobody can fault in a mapping that is gone.
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "../krasis.h"

namespace {

struct Entry {
    std::atomic<uintptr_t> begin{0};  // 0: free. Written last, so that whoever sees it sees the rest
    uintptr_t end = 0;
    dev_t device = 0;
    ino_t inode = 0;
    off_t bytes = 0;
    char *path = nullptr, *name = nullptr;
};

struct Chunk {
    Entry entries[64];
    std::atomic<Chunk *> next{nullptr};
};

struct Guard {
    char *prefix = nullptr, *cut = nullptr, *unreadable = nullptr;
    int cut_code = 1, unreadable_code = 1;
    bool on_terminal = false;
    struct sigaction before = {};
};

std::mutex g_mutex;  // of add, remove and install; the handler does without
Chunk g_first;
Guard g_guard;
bool g_installed = false;
std::atomic<bool> g_leaving{false};

const Entry *find(uintptr_t address) {
    for (const Chunk *chunk = &g_first; chunk; chunk = chunk->next.load(std::memory_order_acquire)) {
        for (const Entry &entry : chunk->entries) {
            const uintptr_t begin = entry.begin.load(std::memory_order_acquire);
            if (begin != 0 && address >= begin && address < entry.end) return &entry;
        }
    }
    return nullptr;
}

void say(const char *text) {
    size_t left = std::strlen(text);
    while (left > 0) {
        const ssize_t count = write(STDERR_FILENO, text, left);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return;
        text += count;
        left -= static_cast<size_t>(count);
    }
}

// A file of its old size under its old name was not cut: then the disk did not give what it holds.
bool is_whole(const Entry &entry) {
    struct stat info;
    return stat(entry.path, &info) == 0 && info.st_dev == entry.device && info.st_ino == entry.inode &&
           info.st_size >= entry.bytes;
}

[[noreturn]] void leave(const Entry &entry) {
    if (g_leaving.exchange(true)) {
        for (;;) pause();  // another thread is saying it, and ends the process
    }
    const bool whole = is_whole(entry);
    if (g_guard.on_terminal) say("\n");
    say(g_guard.prefix);
    say(entry.name);
    say(whole ? g_guard.unreadable : g_guard.cut);
    say("\n");
    _exit(whole ? g_guard.unreadable_code : g_guard.cut_code);
}

void pass_on(int number, siginfo_t *info, void *context) {
    const struct sigaction &before = g_guard.before;
    if ((before.sa_flags & SA_SIGINFO) && before.sa_sigaction) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else if (before.sa_handler == SIG_DFL || info->si_code > 0) {
        // As without us: a fault happens again at once and kills; what someone sent is sent again.
        signal(number, SIG_DFL);
        if (info->si_code <= 0) raise(number);
    }
}

void on_bus_error(int number, siginfo_t *info, void *context) {
    const int saved = errno;
    if (info->si_code == BUS_ADRERR) {
        if (const Entry *entry = find(reinterpret_cast<uintptr_t>(info->si_addr))) leave(*entry);
    }
    pass_on(number, info, context);
    errno = saved;
}

Entry *free_entry() {
    for (Chunk *chunk = &g_first;;) {
        for (Entry &entry : chunk->entries) {
            if (entry.begin.load(std::memory_order_relaxed) == 0) return &entry;
        }
        Chunk *next = chunk->next.load(std::memory_order_relaxed);
        if (!next) {
            next = new (std::nothrow) Chunk;
            if (!next) return nullptr;
            chunk->next.store(next, std::memory_order_release);
        }
        chunk = next;
    }
}

}  // namespace

int32_t krasis_guard_install(const char *prefix, const char *cut, int32_t cut_code, const char *unreadable,
                             int32_t unreadable_code) {
    if (!prefix || !cut || !unreadable || cut_code < 0 || cut_code > 255 || unreadable_code < 0 ||
        unreadable_code > 255) {
        return KRASIS_ERR_ARGUMENT;
    }
    const std::lock_guard<std::mutex> lock(g_mutex);
    if (g_installed) return KRASIS_OK;
    g_guard.prefix = strdup(prefix), g_guard.cut = strdup(cut), g_guard.unreadable = strdup(unreadable);
    if (!g_guard.prefix || !g_guard.cut || !g_guard.unreadable) return KRASIS_ERR_MEMORY;
    g_guard.cut_code = cut_code, g_guard.unreadable_code = unreadable_code;
    g_guard.on_terminal = isatty(STDERR_FILENO) == 1;
    if (sigaction(SIGBUS, nullptr, &g_guard.before) != 0) return KRASIS_ERR_SYSTEM;
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, nullptr) != 0) return KRASIS_ERR_SYSTEM;
    g_installed = true;
    return KRASIS_OK;
}

int32_t krasis_guard_add(const void *address, int64_t bytes, int32_t fd, const char *path, const char *name) {
    if (!address || bytes <= 0 || !path || !name) return KRASIS_ERR_ARGUMENT;
    struct stat info;
    if (fstat(fd, &info) != 0) return KRASIS_ERR_SYSTEM;
    const std::lock_guard<std::mutex> lock(g_mutex);
    Entry *entry = free_entry();
    if (!entry) return KRASIS_ERR_MEMORY;
    char *path_copy = strdup(path), *name_copy = strdup(name);
    if (!path_copy || !name_copy) {
        std::free(path_copy), std::free(name_copy);
        return KRASIS_ERR_MEMORY;
    }
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    entry->end = begin + static_cast<uintptr_t>(bytes);
    entry->device = info.st_dev, entry->inode = info.st_ino, entry->bytes = bytes;
    entry->path = path_copy, entry->name = name_copy;
    entry->begin.store(begin, std::memory_order_release);
    return KRASIS_OK;
}

int32_t krasis_guard_remove(const void *address) {
    const std::lock_guard<std::mutex> lock(g_mutex);
    for (Chunk *chunk = &g_first; chunk; chunk = chunk->next.load(std::memory_order_relaxed)) {
        for (Entry &entry : chunk->entries) {
            if (!address || entry.begin.load(std::memory_order_relaxed) != reinterpret_cast<uintptr_t>(address))
                continue;
            entry.begin.store(0, std::memory_order_release);
            std::free(entry.path), std::free(entry.name);
            entry.path = entry.name = nullptr;
            return KRASIS_OK;
        }
    }
    return KRASIS_ERR_RANGE;
}
