// route.cpp: csrc/cpu/route_kernel.h for AVX-512.
#include "../route_kernel.h"
