// route.cpp: csrc/cpu/route_kernel.h for AVX2.
#include "../route_kernel.h"
