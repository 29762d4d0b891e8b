// mamba.cpp: csrc/cpu/mamba_kernel.h for AVX2.
#include "../mamba_kernel.h"
