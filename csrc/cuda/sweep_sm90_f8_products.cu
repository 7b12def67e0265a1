#include "sweep_sm90_instances.h"

template sst_fast::cuda::SweepKernel sst_fast::cuda::sweep_kernel_of<sst_fast::cuda::Float8Products>(
    int, sst_fast::Kind, bool);
