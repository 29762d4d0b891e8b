// activation.cpp: csrc/cpu/activation_kernel.h for AVX2.
#include "../activation_kernel.h"
