// short_conv.cpp: csrc/cpu/short_conv_kernel.h for AVX2.
#include "../short_conv_kernel.h"
