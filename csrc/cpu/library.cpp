// library.cpp: version and status names.
#include "krasis.h"

int32_t krasis_abi_version(void) { return KRASIS_ABI_VERSION; }

const char *krasis_status_name(int32_t status) {
    switch (status) {
        case KRASIS_OK:
            return "ok";
        case KRASIS_ERR_ARGUMENT:
            return "argument";
        case KRASIS_ERR_SHAPE:
            return "shape";
        case KRASIS_ERR_NONFINITE:
            return "nonfinite";
        case KRASIS_ERR_ISA:
            return "isa";
        case KRASIS_ERR_MEMORY:
            return "memory";
        case KRASIS_ERR_THREAD:
            return "thread";
        case KRASIS_ERR_SYSTEM:
            return "system";
        case KRASIS_ERR_RANGE:
            return "range";
        case KRASIS_ERR_TIMEOUT:
            return "timeout";
        default:
            return "unknown";
    }
}
