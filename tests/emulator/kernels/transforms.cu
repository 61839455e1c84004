// SPDX-License-Identifier: BSD-3-Clause
// The transforms of both memory formats, which call one another: what make mutate breaks, without the other kernels.
#include "core/winograd/cuda_nchw.cu"
#include "core/winograd/cuda_transforms.cu"
