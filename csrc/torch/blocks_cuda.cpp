// boft::blocks and its backward on CUDA devices.
#include "arguments.h"
#include "cuda.h"
#include "ops.h"

namespace boft {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> blocks_cuda(const CudaCall& cuda, const Tensor& boft_R, const std::optional<Tensor>& keep) {
  const Blocks call(boft_R, keep);
  const Workspace workspace = cuda.workspace(boft_cuda_blocks_workspace(&call.plan, call.dtype));
  void* const q = call.plan.m == 1 ? nullptr : call.q.mutable_data_ptr();
  check(boft_cuda_blocks(&call.plan, call.dtype, call.a.const_data_ptr(), call.keep.data(), q,
                         call.blocks.mutable_data_ptr(), workspace.data(), cuda.stream()));
  return {call.blocks, call.q};
}

Tensor blocks_backward_cuda(const CudaCall& cuda, const Tensor& dblocks, const Tensor& q,
                            const std::optional<Tensor>& keep) {
  const BlocksBackward call(dblocks, q, keep);
  const Workspace workspace = cuda.workspace(boft_cuda_blocks_workspace(&call.plan, call.dtype));
  check(boft_cuda_blocks_backward(&call.plan, call.dtype, call.dblocks.const_data_ptr(), call.q.const_data_ptr(),
                                  call.keep.data(), call.da.mutable_data_ptr(), workspace.data(), cuda.stream()));
  return call.da;
}

constexpr char kBlocks[] = "boft::blocks", kBlocksBackward[] = "boft::blocks_backward";

}  // namespace

void register_blocks_cuda(torch::Library& library) {
  library.impl("blocks", OnCuda<kBlocks, blocks_cuda>::call);
  library.impl("blocks_backward", OnCuda<kBlocksBackward, blocks_backward_cuda>::call);
}

}  // namespace boft
