// status.cu: what the library says of itself and of its errors.
#include <cstring>

#include "status.h"

namespace krasis::cuda {
namespace {
thread_local char last_error[512] = "";
}

int32_t report_cuda_error(const char *words) {
    std::strncpy(last_error, words, sizeof(last_error) - 1);
    return KRASIS_ERR_CUDA;
}

}  // namespace krasis::cuda

int32_t krasis_cuda_abi_version(void) { return KRASIS_CUDA_ABI_VERSION; }
const char *krasis_cuda_last_error(void) { return krasis::cuda::last_error; }
