// attention.cpp: csrc/cpu/attention_kernel.h for AVX2.
#include "../attention_kernel.h"
