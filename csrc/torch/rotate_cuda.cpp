// boft::rotate and its backward on CUDA devices.
#include "arguments.h"
#include "cuda.h"
#include "ops.h"

namespace boft {
namespace {

using at::Tensor;

Tensor rotate_cuda(const CudaCall& cuda, const Tensor& x, const Tensor& blocks, int64_t b, int64_t m, bool transpose,
                   bool) {
  const Rotate call(x, blocks, b, m, transpose);
  const Workspace workspace = cuda.workspace(boft_cuda_rotate_workspace(&call.plan, call.dtype, call.in.rows));
  check(boft_cuda_rotate(&call.args, workspace.data(), cuda.stream()));
  return call.y;
}

std::tuple<Tensor, Tensor> rotate_backward_cuda(const CudaCall& cuda, const Tensor& dy, const Tensor& x,
                                                const Tensor& blocks, int64_t b, int64_t m, bool transpose, bool need_x,
                                                bool need_blocks) {
  const RotateBackward call(dy, x, blocks, b, m, transpose, need_x, need_blocks);
  const Workspace workspace =
      cuda.workspace(boft_cuda_rotate_backward_workspace(&call.plan, call.dtype, call.grad.rows));
  const Counters counters = cuda.counters();
  check(boft_cuda_rotate_backward(&call.args, workspace.data(), counters.data(), cuda.stream()));
  return {call.dx, call.dblocks};
}

constexpr char kRotate[] = "boft::rotate", kRotateBackward[] = "boft::rotate_backward";

}  // namespace

void register_rotate_cuda(torch::Library& library) {
  library.impl("rotate", OnCuda<kRotate, rotate_cuda>::call);
  library.impl("rotate_backward", OnCuda<kRotateBackward, rotate_backward_cuda>::call);
}

}  // namespace boft
