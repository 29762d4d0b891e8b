// activation.cpp: csrc/cpu/activation_kernel.h for AVX-512.
#include "../activation_kernel.h"
