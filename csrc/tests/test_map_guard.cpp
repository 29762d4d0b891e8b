// test_map_guard.cpp: what a process says and how it ends when a file it has mapped is cut short. Each case is a child.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <thread>

#include "../krasis.h"
#include "test.h"

namespace {

constexpr int64_t kBytes = 1 << 20;
constexpr int kCut = 33, kUnreadable = 66, kBefore = 99;

struct End {
    int status;
    std::string said;
    bool exited(int code) const { return WIFEXITED(status) && WEXITSTATUS(status) == code; }
    bool killed() const { return WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS; }
};

struct File {
    File() : path("/tmp/krasis_guard_XXXXXX") {
        fd = mkstemp(path.data());
        CHECK(fd >= 0 && ftruncate(fd, kBytes) == 0);
        address = static_cast<char *>(mmap(nullptr, kBytes, PROT_READ, MAP_SHARED, fd, 0));
        CHECK(address != MAP_FAILED);
    }
    ~File() { unlink(path.c_str()); }
    void add() const { CHECK_OK(krasis_guard_add(address, kBytes, fd, path.c_str(), "a.bin")); }
    void cut() const { CHECK(ftruncate(fd, 0) == 0); }
    void read(int64_t at = kBytes / 2) const { static_cast<void>(*static_cast<volatile char *>(address + at)); }
    std::string path;
    int fd;
    char *address;
};

void install() { CHECK_OK(krasis_guard_install("tool: ", ": cut", kCut, ": unreadable", kUnreadable)); }

template <class Body>
End child(Body body) {
    int pipes[2];
    CHECK(pipe(pipes) == 0);
    const pid_t pid = fork();
    if (pid == 0) {
        dup2(pipes[1], STDERR_FILENO);
        close(pipes[0]), close(pipes[1]);
        signal(SIGBUS, SIG_DFL);  // a sanitizer's own handler would speak instead
        body();
        _exit(0);
    }
    close(pipes[1]);
    End end{0, ""};
    char buffer[256];
    for (ssize_t count; (count = read(pipes[0], buffer, sizeof buffer)) > 0;) end.said.append(buffer, count);
    close(pipes[0]);
    CHECK(waitpid(pid, &end.status, 0) == pid);
    return end;
}

void a_cut_file_is_named() {
    const File file;
    End end = child([&] { install(), file.add(), file.cut(), file.read(); });
    CHECK(end.exited(kCut) && end.said == "tool: a.bin: cut\n");
    end = child([&] { install(), file.add(), file.cut(), std::thread([&] { file.read(); }).join(); });
    CHECK(end.exited(kCut) && end.said == "tool: a.bin: cut\n");
}

void many_mappings_and_threads() {
    End end = child([] {
        install();
        File *files[150];
        for (File *&file : files) file = new File, file->add();
        for (int i = 0; i < 150; i += 2) CHECK_OK(krasis_guard_remove(files[i]->address));
        for (int i = 0; i < 150; i += 2) files[i]->add();
        for (File *file : files) file->cut(), unlink(file->path.c_str());
        std::thread threads[8];
        for (int i = 0; i < 8; ++i) threads[i] = std::thread([&files, i] { files[10 * i]->read(); });
        for (std::thread &thread : threads) thread.join();
    });
    CHECK(end.exited(kCut) && end.said == "tool: a.bin: cut\n");  // once, whoever was first
}

// A file that is whole under its name: as if the disk had failed. (The mapping is of another file, which was cut.)
void an_unreadable_file_is_told_apart() {
    const File file, other;
    const End end = child([&] {
        install();
        CHECK_OK(krasis_guard_add(file.address, kBytes, other.fd, other.path.c_str(), "a.bin"));
        file.cut(), file.read();
    });
    CHECK(end.exited(kUnreadable) && end.said == "tool: a.bin: unreadable\n");
}

void others_keep_their_handlers() {
    const File file;
    End end = child([&] { install(), file.cut(), file.read(); });  // never added
    CHECK(end.killed() && end.said.empty());
    end = child([&] { install(), file.add(), krasis_guard_remove(file.address), file.cut(), file.read(); });
    CHECK(end.killed() && end.said.empty());
    end = child([] { install(), raise(SIGBUS); });
    CHECK(end.killed() && end.said.empty());
    const auto handler = [](int) { _exit(kBefore); };
    end = child([&] { signal(SIGBUS, handler), install(), file.cut(), file.read(); });
    CHECK(end.exited(kBefore));
    end = child([&] { signal(SIGBUS, handler), install(), file.add(), file.cut(), file.read(); });
    CHECK(end.exited(kCut));
    end = child([] { signal(SIGBUS, SIG_IGN), install(), raise(SIGBUS); });
    CHECK(end.exited(0));
}

void refusals() {
    const File file;
    CHECK(krasis_guard_install(nullptr, "", 1, "", 1) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_guard_install("", "", 256, "", 1) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_guard_add(nullptr, 1, file.fd, "", "") == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_guard_add(file.address, 0, file.fd, "", "") == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_guard_add(file.address, kBytes, -1, "", "") == KRASIS_ERR_SYSTEM);
    CHECK(krasis_guard_remove(file.address) == KRASIS_ERR_RANGE);
    CHECK(krasis_guard_remove(nullptr) == KRASIS_ERR_RANGE);
    file.add();
    CHECK(krasis_guard_remove(file.address) == KRASIS_OK);
    CHECK(krasis_guard_remove(file.address) == KRASIS_ERR_RANGE);
}

}  // namespace

int main() {
    a_cut_file_is_named();
    many_mappings_and_threads();
    an_unreadable_file_is_told_apart();
    others_keep_their_handlers();
    refusals();
    return test::finish("map_guard");
}
