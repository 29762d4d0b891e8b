// latent.cpp: csrc/cpu/latent_kernel.h for AVX2.
#include "../latent_kernel.h"
