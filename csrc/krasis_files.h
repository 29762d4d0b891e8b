/* krasis_files.h: mapped files and memory. Part of krasis.h. */
#ifndef KRASIS_FILES_H
#define KRASIS_FILES_H

#include "krasis_pool.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Maps a whole file read-only and shared at an address that is a multiple of alignment_bytes (a power of two, >= 4096),
 * with MADV_HUGEPAGE. bytes is the file's size; the mapping must be released with krasis_unmap_file(address, bytes). */
KRASIS_API int32_t krasis_map_file(int32_t fd, int64_t bytes, int64_t alignment_bytes, void **address);
KRASIS_API int32_t krasis_unmap_file(void *address, int64_t bytes);
/* Brings a mapped range into memory (MADV_POPULATE_READ, else touching); blocks; safe from any thread. */
KRASIS_API int32_t krasis_prefault(const void *address, int64_t bytes);
/* Moves the whole 2 MiB pieces of a mapped range into huge pages (MADV_COLLAPSE, Linux 6.1); blocks; others may read
 * the range meanwhile. *declined: 0, or the errno with which the kernel declined, EINVAL if it never does that for such
 * memory; some pieces may lie in huge pages all the same. */
KRASIS_API int32_t krasis_collapse(const void *address, int64_t bytes, int32_t *declined);
/* A page of a mapped file that was cut short, or that its disk does not give, raises SIGBUS in whatever thread reads
 * it. install: for whole programs, not for libraries; the first call counts. From then on such a fault inside a mapping
 * that was added writes prefix, the mapping's name and the text cut (unreadable, if path still leads to the file in its
 * old size) as one line to standard error and ends the process at once with that code; every other SIGBUS goes where it
 * went before. add: path is looked up when it happens and should be absolute; texts are copied. remove: before the
 * mapping is released; KRASIS_ERR_RANGE if none was added there. Both are safe from any thread. */
KRASIS_API int32_t krasis_guard_install(const char *prefix, const char *cut, int32_t cut_code, const char *unreadable,
                                        int32_t unreadable_code);
KRASIS_API int32_t krasis_guard_add(const void *address, int64_t bytes, int32_t fd, const char *path, const char *name);
KRASIS_API int32_t krasis_guard_remove(const void *address);
/* Reads the range once with all threads of the pool and returns the seconds: the ceiling for decode. */
KRASIS_API int32_t krasis_read_bandwidth(krasis_pool *pool, const void *address, int64_t bytes, double *seconds);

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_FILES_H */
