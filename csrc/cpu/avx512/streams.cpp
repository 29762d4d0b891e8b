// streams.cpp: csrc/cpu/streams_kernel.h for AVX-512.
#include "../streams_kernel.h"
