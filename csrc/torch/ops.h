// The operators on the CPU and their registration by room: blocks.cpp, rotate.cpp and scale.cpp.
#pragma once

#include <torch/library.h>

namespace boft {

// Each adds its CPU kernels to a library opened for the CPU key.
void register_blocks_cpu(torch::Library& library);
void register_rotate_cpu(torch::Library& library);
void register_scale_cpu(torch::Library& library);

}  // namespace boft
