// delta.cpp: csrc/cpu/delta_kernel.h for AVX2.
#include "../delta_kernel.h"
