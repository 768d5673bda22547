// boft::scale and its backward on CUDA devices.
#include "arguments.h"
#include "cuda.h"
#include "ops.h"

namespace boft {
namespace {

using at::Tensor;

Tensor scale_cuda(const CudaCall& cuda, const Tensor& z, const Tensor& s, const std::optional<Tensor>& bias, bool,
                  bool) {
  const Scale call(z, s, bias);
  check(boft_cuda_scale(&call.args, cuda.stream()));
  return call.out;
}

// The launcher adds the parts of its sums up itself.
int64_t one_sum(int64_t) { return 1; }

std::tuple<Tensor, Tensor, Tensor> scale_backward_cuda(const CudaCall& cuda, const Tensor& dy,
                                                       const std::optional<Tensor>& z, const Tensor& s,
                                                       const std::optional<Tensor>& bias, bool bias_detached,
                                                       bool need_z, bool need_s, bool need_bias) {
  const ScaleBackward call(dy, z, s, bias, bias_detached, need_z, need_s, need_bias, one_sum);
  const Workspace workspace = cuda.workspace(boft_cuda_scale_backward_workspace(call.dtype, call.grad.rows, call.n));
  const Counters counters = cuda.counters();
  check(boft_cuda_scale_backward(&call.args, workspace.data(), counters.data(), cuda.stream()));
  return {call.dz, need_s ? shaped_like(call.ds, s) : call.ds,
          need_bias ? shaped_like(call.dbias, *bias) : call.dbias};
}

constexpr char kScale[] = "boft::scale", kScaleBackward[] = "boft::scale_backward";

}  // namespace

void register_scale_cuda(torch::Library& library) {
  library.impl("scale", OnCuda<kScale, scale_cuda>::call);
  library.impl("scale_backward", OnCuda<kScaleBackward, scale_backward_cuda>::call);
}

}  // namespace boft
