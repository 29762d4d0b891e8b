// rope.cpp: csrc/cpu/rope_kernel.h for AVX2.
#include "../rope_kernel.h"
