// norm.cpp: csrc/cpu/norm_kernel.h for AVX2.
#include "../norm_kernel.h"
