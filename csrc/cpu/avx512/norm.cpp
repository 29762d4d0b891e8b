// norm.cpp: csrc/cpu/norm_kernel.h for AVX-512.
#include "../norm_kernel.h"
