// index.cpp: csrc/cpu/index_kernel.h for AVX-512.
#include "../index_kernel.h"
