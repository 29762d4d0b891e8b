// acts.cpp: csrc/cpu/acts_kernel.h for AVX-512.
#include "../acts_kernel.h"
