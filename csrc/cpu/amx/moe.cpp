// amx/moe.cpp: the products of krasis_moe for experts of many tokens.
#include "../moe_units.h"
