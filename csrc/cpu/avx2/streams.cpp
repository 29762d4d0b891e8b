// streams.cpp: csrc/cpu/streams_kernel.h for AVX2.
#include "../streams_kernel.h"
