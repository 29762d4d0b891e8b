// avx2/moe.cpp: the pieces of krasis_moe for this instruction set.
#include "../moe_reduce.h"
#include "../moe_units.h"
