// attention.cpp: csrc/cpu/attention_kernel.h for AVX-512.
#include "../attention_kernel.h"
