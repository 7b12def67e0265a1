#include "sweep_sm90_instances.h"

template sst_fast::cuda::SweepKernel sst_fast::cuda::sweep_kernel_of<__half>(int, sst_fast::Kind, bool);
