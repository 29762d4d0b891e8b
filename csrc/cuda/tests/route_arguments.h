// route_arguments.h: arguments of krasis_cuda_route that ask for nothing beyond a softmax.
#pragma once

#include "krasis_cuda.h"

namespace test {

inline krasis_cuda_route_args plain_route_args() {
    krasis_cuda_route_args args{};
    args.scale = 1;
    args.groups = args.top_groups = 1;
    return args;
}

}  // namespace test
