// map_file.cpp: mapping a bundle's shards at huge-page boundaries, and bringing them into memory.
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "../krasis.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14; older headers lack it
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace {

constexpr uintptr_t kHugePageBytes = uintptr_t{2} << 20;
constexpr int64_t kSliceBytes = int64_t{256} << 20;  // bounds one system call, so that signals are served between

int64_t page_bytes() { return sysconf(_SC_PAGESIZE); }

int32_t check_file(int fd, int64_t bytes) {
    struct stat info;
    if (fstat(fd, &info) != 0) return KRASIS_ERR_SYSTEM;
    if (!S_ISREG(info.st_mode)) return KRASIS_ERR_ARGUMENT;
    // Pages beyond the end of the file would kill the process with SIGBUS.
    return info.st_size == bytes ? KRASIS_OK : KRASIS_ERR_RANGE;
}

void unmap_keeping_errno(char *address, size_t bytes) {
    const int saved = errno;
    if (bytes > 0) munmap(address, bytes);
    errno = saved;
}

void touch(const char *address, int64_t bytes, int64_t page) {
    for (int64_t offset = 0; offset < bytes; offset += page) {
        static_cast<void>(*static_cast<const volatile char *>(address + offset));
    }
}

int32_t populate(char *address, int64_t bytes, int64_t page) {
    while (madvise(address, static_cast<size_t>(bytes), MADV_POPULATE_READ) != 0) {
        if (errno == EINVAL) {  // a kernel before 5.14
            touch(address, bytes, page);
            return KRASIS_OK;
        }
        if (errno != EINTR && errno != EAGAIN) return KRASIS_ERR_SYSTEM;
    }
    return KRASIS_OK;
}

}  // namespace

int32_t krasis_map_file(int32_t fd, int64_t bytes, int64_t alignment_bytes, void **address) {
    const int64_t page = page_bytes();
    if (!address || fd < 0 || bytes <= 0 || alignment_bytes < page || (alignment_bytes & (alignment_bytes - 1)) != 0 ||
        alignment_bytes > (int64_t{1} << 40) || bytes > INT64_MAX - 2 * alignment_bytes) {
        return KRASIS_ERR_ARGUMENT;
    }
    *address = nullptr;
    if (const int32_t status = check_file(fd, bytes)) return status;
    const size_t length = static_cast<size_t>((bytes + page - 1) / page * page);
    const size_t alignment = static_cast<size_t>(alignment_bytes), reserved = length + alignment;
    void *reservation = mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reservation == MAP_FAILED) return KRASIS_ERR_SYSTEM;
    char *base = static_cast<char *>(reservation);
    const size_t head = (alignment - reinterpret_cast<uintptr_t>(base) % alignment) % alignment;
    if (mmap(base + head, length, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        unmap_keeping_errno(base, reserved);
        return KRASIS_ERR_SYSTEM;
    }
    unmap_keeping_errno(base, head);
    unmap_keeping_errno(base + head + length, reserved - head - length);
    madvise(base + head, length, MADV_HUGEPAGE);  // a hint: kernels without huge pages for files refuse it
    *address = base + head;
    return KRASIS_OK;
}

int32_t krasis_unmap_file(void *address, int64_t bytes) {
    if (!address || bytes <= 0) return KRASIS_ERR_ARGUMENT;
    return munmap(address, static_cast<size_t>(bytes)) == 0 ? KRASIS_OK : KRASIS_ERR_SYSTEM;
}

int32_t krasis_prefault(const void *address, int64_t bytes) {
    if (!address || bytes < 0) return KRASIS_ERR_ARGUMENT;
    const int64_t page = page_bytes();
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address) / page * page;
    const int64_t total = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) - begin) + bytes;
    for (int64_t offset = 0; offset < total; offset += kSliceBytes) {
        const int64_t slice = total - offset < kSliceBytes ? total - offset : kSliceBytes;
        if (const int32_t status = populate(reinterpret_cast<char *>(begin) + offset, slice, page)) return status;
    }
    return KRASIS_OK;
}

int32_t krasis_collapse(const void *address, int64_t bytes, int32_t *declined) {
    if (!address || bytes <= 0 || !declined) return KRASIS_ERR_ARGUMENT;
    *declined = 0;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    const uintptr_t first = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kHugePageBytes * kHugePageBytes;
    if (first < last && madvise(reinterpret_cast<void *>(first), last - first, MADV_COLLAPSE) != 0) *declined = errno;
    return KRASIS_OK;
}
