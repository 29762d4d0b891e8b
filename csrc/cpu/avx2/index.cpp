// index.cpp: csrc/cpu/index_kernel.h for AVX2.
#include "../index_kernel.h"
