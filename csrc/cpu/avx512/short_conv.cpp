// short_conv.cpp: csrc/cpu/short_conv_kernel.h for AVX-512.
#include "../short_conv_kernel.h"
