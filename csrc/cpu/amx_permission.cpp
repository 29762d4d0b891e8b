// amx_permission.cpp: asks the kernel for AMX. Built once more for tests of the twin, which needs no permission.
#include "amx_permission.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "probe.h"

namespace krasis {

int32_t ask_for_tiles() {
#if defined(KRASIS_AMX_TWIN)
    return 0;
#else
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (!has_tiles()) return ENODEV;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#endif
}

}  // namespace krasis

int32_t krasis_amx_declined(void) { return krasis::ask_for_tiles(); }
