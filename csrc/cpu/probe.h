// probe.h: what the pool asks about the CPU.
#pragma once

#include "../krasis.h"

namespace krasis {

// CPUs in the affinity mask of the calling thread, at least 1.
int32_t num_available_cpus();
// The instruction set to use for a request (AUTO included); KRASIS_ISA_AUTO if the CPU or the OS lacks it.
int32_t resolve_isa(int32_t requested);
// Whether CPU and operating system have AMX with int8 (the process still has to ask, see amx_permission.h).
bool has_tiles();
// Whether the CPU's own prefetcher keeps up with one stream of memory per thread, so that fetching ahead only disturbs
// it. AMD: yes (Zen 5 reads an 8-bit output head 3 to 4 % slower with fetching). Others are taken not to (a Xeon of
// family 6, model 207, decodes 9 to 16 % faster with it).
bool follows_streams();

}  // namespace krasis
