// pool.cpp: to be replaced by the real pool; runs everything on the caller.
#include "pool.h"

#include <new>

struct krasis_pool {
    int32_t num_threads, isa;
};

int32_t krasis_pool_create(int32_t num_threads, int32_t isa, krasis_pool **pool) {
    *pool = new (std::nothrow) krasis_pool{num_threads > 0 ? num_threads : 1, isa ? isa : KRASIS_ISA_AVX2};
    return *pool ? KRASIS_OK : KRASIS_ERR_MEMORY;
}
void krasis_pool_destroy(krasis_pool *pool) { delete pool; }
int32_t krasis_pool_num_threads(const krasis_pool *pool) { return pool->num_threads; }
int32_t krasis_pool_isa(const krasis_pool *pool) { return pool->isa; }

namespace krasis {
void parallel_run(krasis_pool *, int64_t count, int64_t grain, TaskFn fn, void *context) {
    for (int64_t begin = 0; begin < count; begin += grain) {
        fn(context, begin, begin + grain < count ? begin + grain : count, 0);
    }
}
}  // namespace krasis
