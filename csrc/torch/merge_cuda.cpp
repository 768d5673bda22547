// boft::merge on CUDA devices.
#include "arguments.h"
#include "cuda.h"
#include "ops.h"

namespace boft {
namespace {

using at::Tensor;

Tensor merge_cuda(const CudaCall& cuda, const Tensor& weight, const Tensor& blocks, int64_t b, int64_t m,
                  const std::optional<Tensor>& s, bool transpose) {
  const Merge call(weight, blocks, b, m, s, transpose);
  const Workspace workspace = cuda.workspace(boft_cuda_rotate_workspace(&call.plan, call.dtype, call.in.rows));
  check(boft_cuda_merge(&call.args, call.factors_data(), workspace.data(), cuda.stream()));
  return call.y;
}

constexpr char kMerge[] = "boft::merge";

}  // namespace

void register_merge_cuda(torch::Library& library) { library.impl("merge", OnCuda<kMerge, merge_cuda>::call); }

}  // namespace boft
