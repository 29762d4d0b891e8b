// rope.cpp: csrc/cpu/rope_kernel.h for AVX-512.
#include "../rope_kernel.h"
