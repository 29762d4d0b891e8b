// amx_permission.h: whether this process may use AMX's int8 tiles.
#pragma once

#include <cstdint>

namespace krasis {

// 0 if it may; else the errno with which the kernel declines, ENODEV if the CPU has none. Linux gives a process its
// permission once it asks (the state is 8 KiB a thread); asking again is cheap.
int32_t ask_for_tiles();

}  // namespace krasis
