// delta.cpp: csrc/cpu/delta_kernel.h for AVX-512.
#include "../delta_kernel.h"
