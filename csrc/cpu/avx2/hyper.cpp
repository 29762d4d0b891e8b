// hyper.cpp: csrc/cpu/hyper_kernel.h for AVX2.
#include "../hyper_kernel.h"
