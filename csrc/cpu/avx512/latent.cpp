// latent.cpp: csrc/cpu/latent_kernel.h for AVX-512.
#include "../latent_kernel.h"
