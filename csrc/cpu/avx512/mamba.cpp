// mamba.cpp: csrc/cpu/mamba_kernel.h for AVX-512.
#include "../mamba_kernel.h"
