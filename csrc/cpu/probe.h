// probe.h: what the pool asks about the CPU.
#pragma once

#include "../krasis.h"

namespace krasis {

// CPUs in the affinity mask of the calling thread, at least 1.
int32_t num_available_cpus();
// The instruction set to use for a request (AUTO included); KRASIS_ISA_AUTO if the CPU or the OS lacks it.
int32_t resolve_isa(int32_t requested);

}  // namespace krasis
