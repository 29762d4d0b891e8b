// acts.cpp: csrc/cpu/acts_kernel.h for AVX2.
#include "../acts_kernel.h"
