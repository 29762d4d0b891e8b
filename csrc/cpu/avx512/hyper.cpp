// hyper.cpp: csrc/cpu/hyper_kernel.h for AVX-512.
#include "../hyper_kernel.h"
