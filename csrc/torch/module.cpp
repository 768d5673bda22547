// The module boft_ext._C: schemas of the operators, the switch of their kernels, and what the build knows.
#include "common.h"
#ifdef BOFT_CUDA
#include "cuda.h"
#endif
#include "ops.h"
#include "product.h"
#include "recycler.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

TORCH_LIBRARY(boft, library) {
  // boft_R (m, d / b, b, b), keep (m, d / b) bool -> blocks of all levels, and Q of boft_R's shape (empty for m = 1).
  library.def("blocks(Tensor boft_R, Tensor? keep) -> (Tensor blocks, Tensor q)");
  library.def("blocks_backward(Tensor dblocks, Tensor q, Tensor? keep) -> Tensor");
  // x (..., d) -> x R, or x R^T. With compact, x is kept for backward in 8 bits per value. Gradients that are not needed
  // come back empty.
  library.def("rotate(Tensor x, Tensor blocks, int b, int m, bool transpose, bool compact=False) -> Tensor");
  library.def(
      "rotate_backward(Tensor dy, Tensor x, Tensor blocks, int b, int m, bool transpose, bool need_x, "
      "bool need_blocks) -> (Tensor dx, Tensor dblocks)");
  library.def(
      "rotate_backward_packed(Tensor dy, Tensor packed, Tensor blocks, int b, int m, bool transpose, bool need_x) "
      "-> (Tensor dx, Tensor dblocks)");
  // weight (rows, d) -> diag(s) W R^T (diag(s) W R without transpose), s being one value for each row, or ones. Without
  // gradients.
  library.def("merge(Tensor weight, Tensor blocks, int b, int m, Tensor? s, bool transpose) -> Tensor");
  // z (..., n) -> z s + bias (1 - s). With bias_detached, z holds the bias without its gradient; with compact, it
  // is kept for backward in 4 bits per value.
  library.def("scale(Tensor z, Tensor s, Tensor? bias, bool bias_detached, bool compact=False) -> Tensor");
  library.def(
      "scale_backward(Tensor dy, Tensor? z, Tensor s, Tensor? bias, bool bias_detached, bool need_z, bool need_s, "
      "bool need_bias) -> (Tensor dz, Tensor ds, Tensor dbias)");
  library.def(
      "scale_backward_packed(Tensor dy, Tensor packed, Tensor s, Tensor? bias, bool bias_detached, bool need_z, "
      "bool need_bias) -> (Tensor dz, Tensor ds, Tensor dbias)");
  // x (..., n) -> its rows packed (rows, boft_pack_bytes(n, bits)); bits 4 or 8.
  library.def("pack(Tensor x, int bits) -> Tensor");
}

// A gradient, or a second one, is refused rather than silently wrong.
TORCH_LIBRARY_IMPL(boft, Autograd, library) {
  library.impl("blocks_backward", torch::autograd::autogradNotImplementedFallback());
  library.impl("rotate_backward", torch::autograd::autogradNotImplementedFallback());
  library.impl("rotate_backward_packed", torch::autograd::autogradNotImplementedFallback());
  library.impl("merge", torch::autograd::autogradNotImplementedFallback());
  library.impl("scale_backward", torch::autograd::autogradNotImplementedFallback());
  library.impl("scale_backward_packed", torch::autograd::autogradNotImplementedFallback());
  library.impl("pack", torch::autograd::autogradNotImplementedFallback());
}

namespace {

// The kernels, while they are in use: without them the operators run their device-independent form.
struct Kernels {
  torch::Library cpu{torch::Library::IMPL, "boft", c10::DispatchKey::CPU, __FILE__, __LINE__};
#ifdef BOFT_CUDA
  torch::Library cuda{torch::Library::IMPL, "boft", c10::DispatchKey::CUDA, __FILE__, __LINE__};
#endif

  Kernels() {
    boft::register_blocks_cpu(cpu);
    boft::register_rotate_cpu(cpu);
    boft::register_merge_cpu(cpu);
    boft::register_scale_cpu(cpu);
#ifdef BOFT_CUDA
    boft::register_blocks_cuda(cuda);
    boft::register_rotate_cuda(cuda);
    boft::register_merge_cuda(cuda);
    boft::register_scale_cuda(cuda);
#endif
  }
};

std::optional<Kernels>& kernels() {
  static std::optional<Kernels> kernels;
  return kernels;
}

void use_kernels(bool use) {
  if (use == kernels().has_value()) return;
  if (use)
    kernels().emplace();
  else
    kernels().reset();
}

#ifdef BOFT_CUDA
bool has_kernels(const at::Tensor& tensor) {
  return kernels().has_value() && (tensor.is_cpu() || (tensor.is_cuda() && boft::cuda_serves(tensor.device().index())));
}
using boft::cuda_streams;
#else
bool has_kernels(const at::Tensor& tensor) { return kernels().has_value() && tensor.is_cpu(); }
bool cuda_streams() { return false; }
#endif

}  // namespace

bool boft::cpu_kernels_in_use() { return kernels().has_value(); }

namespace {

std::vector<std::pair<int64_t, int64_t>> levels(int64_t d, int64_t b, int64_t m) {
  const boft_plan plan = boft::make_plan(d, b, m);
  std::vector<std::pair<int64_t, int64_t>> out;
  for (int64_t i = 0; i < plan.levels; i++) out.emplace_back(plan.level[i].first, plan.level[i].factors);
  return out;
}

std::vector<std::string> cpu_variants() {
  std::vector<std::string> out;
  for (int i = 0; const char* name = boft_cpu_variant(i); i++)
    if (boft_cpu_supported(name)) out.emplace_back(name);
  return out;
}

void select_cpu_variant(const std::optional<std::string>& name) {
  boft::check(boft_cpu_select(name.has_value() ? name->c_str() : nullptr));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("use_kernels", use_kernels, "Register (True) or withdraw (False) the kernels of all devices. Idempotent.");
  module.def("has_kernels", has_kernels, "Whether operators on a tensor's device run kernels, not the other form.");
  module.def("cuda_streams", cuda_streams, "Whether there are CUDA kernels and torch says which stream is current.");
  module.def("cpu_kernels_in_use", boft::cpu_kernels_in_use);
  module.def("idle_bytes", boft::idle_bytes, "Bytes of freed results that are kept to be used again.");
  module.def("release_idle", boft::release_idle, "Return them to the system.");
  module.def("cached_blocks", boft::cached_blocks, "csrc/torch/ops.h says what these seven do; None where they cannot.");
  module.def("rotate_now", boft::rotate_now, py::call_guard<py::gil_scoped_release>());
  module.def("scale_now", boft::scale_now, py::call_guard<py::gil_scoped_release>());
  module.def("linear_now", boft::linear_now, py::call_guard<py::gil_scoped_release>());
  module.def("linear_train", boft::linear_train, py::call_guard<py::gil_scoped_release>());
  module.def("rotate_runs_now", boft::rotate_runs_now, py::call_guard<py::gil_scoped_release>());
  module.def("scale_runs_now", boft::scale_runs_now, py::call_guard<py::gil_scoped_release>());
  module.def("levels", levels, "(first, factors) of each level for (d, b, m), lowest first; ValueError if invalid.");
  module.def("cpu_variants", cpu_variants, "The kernel variants that this processor can run, best first.");
  module.def("cpu_variant", [] { return std::string(boft_cpu_name()); }, "The kernel variant in use.");
  module.def("select_cpu_variant", select_cpu_variant,
             "Use a variant by name; None means BOFT_CPU if set, else the best. ValueError if it cannot run here.");
  // At import, before any mode could see its trial.
  boft::onednn_products();
  module.def("core_products", boft::core_products, py::arg("on") = py::none(), "csrc/torch/product.h");
  module.def("onednn_products", boft::onednn_products, py::arg("on") = py::none(), "csrc/torch/product.h");
  module.attr("compiler") = std::string(__VERSION__);
}
