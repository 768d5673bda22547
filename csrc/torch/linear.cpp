// A layer in training as one autograd function: rotate, the frozen base layer, scale. The same arithmetic as the three
// one after the other, but what they hand to each other lies in recycled memory, which costs no page faults, the
// gradient of the rotated input is rotated where it lies, and there is one node instead of four.
#include "ops.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>

namespace boft {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// `data` (..., columns) as a matrix of rows.
Tensor rows_of(const Tensor& data) { return data.view({-1, data.size(-1)}); }

// An uninitialised tensor of the shape of `data` but for its last axis.
Tensor empty_rows(const Tensor& data, int64_t columns) {
  std::vector<int64_t> sizes = data.sizes().vec();
  sizes.back() = columns;
  return empty_contiguous(data, sizes);
}

// What at::linear computes, by the same operators; x is contiguous.
Tensor affine(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor z = empty_rows(x, weight.size(0));
  Tensor out = rows_of(z);
  if (bias.has_value())
    at::addmm_out(out, *bias, rows_of(x), weight.t());
  else
    at::mm_out(out, rows_of(x), weight.t());
  return z;
}

struct Saved {
  Tensor x, blocks, q, z, s, weight;
  std::optional<Tensor> bias, keep;
  int64_t b, m;
};

struct Needed {
  bool x, boft_R, s;
};

// Gradients of x, boft_R and s by the kernels; nothing is recorded.
variable_list backward_now(const Saved& saved, const Needed& need, Tensor& dy) {
  const bool through = need.x || need.boft_R;
  auto [dz, ds, dbias] = scale_backward_cpu(dy, optional_of(saved.z), saved.s, saved.bias, false, through, need.s, false);
  // Nothing else holds it: its memory serves the next layer already.
  dy.reset();
  Tensor dx, dblocks;
  if (through) {
    dx = empty_rows(dz, saved.weight.size(1));
    Tensor out = rows_of(dx);
    at::mm_out(out, rows_of(dz), saved.weight);
    dz.reset();
    std::tie(dx, dblocks) =
        rotate_backward_cpu(dx, need.boft_R ? saved.x : dx, saved.blocks, saved.b, saved.m, false, need.x, need.boft_R,
                            true);
  }
  return {need.x ? dx : Tensor(), need.boft_R ? blocks_backward_cpu(dblocks, saved.q, saved.keep) : Tensor(),
          need.s ? ds : Tensor()};
}

// The same by registered operators, which refuse a second derivative and reach whatever mode is active.
variable_list backward_recorded(const Saved& saved, const Needed& need, const Tensor& dy) {
  const bool through = need.x || need.boft_R;
  auto [dz, ds, dbias] =
      call_scale_backward(dy, optional_of(saved.z), saved.s, saved.bias, false, through, need.s, false);
  Tensor dx, dblocks;
  if (through) {
    const Tensor rotated = at::matmul(dz, saved.weight);
    std::tie(dx, dblocks) = call_rotate_backward(rotated, need.boft_R ? saved.x : rotated, saved.blocks, saved.b, saved.m,
                                                 false, need.x, need.boft_R);
  }
  return {need.x ? dx : Tensor(), need.boft_R ? call_blocks_backward(dblocks, saved.q, saved.keep) : Tensor(),
          need.s ? ds : Tensor()};
}

class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& boft_R, const Tensor& s,
                        const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& keep) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t m = boft_R.size(0), b = boft_R.size(2);
    const auto [blocks, q] = blocks_cpu(boft_R, keep);
    const Tensor z = affine(rotate_cpu(x, blocks, b, m, false), weight, bias);
    ctx->save_for_backward({boft_R.requires_grad() ? x : Tensor(), blocks, m == 1 ? blocks.view(boft_R.sizes()) : q,
                            s.requires_grad() ? z : Tensor(), s, weight, bias.value_or(Tensor()),
                            keep.value_or(Tensor())});
    ctx->saved_data["b"] = b;
    ctx->saved_data["m"] = m;
    return scale_cpu(z, s, bias, false);
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    const auto tensors = ctx->get_saved_variables();
    const Saved saved{tensors[0],           tensors[1],
                      tensors[2],           tensors[3],
                      tensors[4],           tensors[5],
                      optional_of(tensors[6]), optional_of(tensors[7]),
                      ctx->saved_data["b"].toInt(), ctx->saved_data["m"].toInt()};
    const Needed need{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    Tensor& dy = grads[0];
    const bool now = is_plain(dy) && !at::GradMode::is_enabled() && cpu_kernels_in_use();
    variable_list gradients = now ? backward_now(saved, need, dy) : backward_recorded(saved, need, dy);
    gradients.resize(6);
    return gradients;
  }
};

bool trains(const std::optional<Tensor>& tensor) { return tensor.has_value() && tensor->requires_grad(); }

bool plain(const std::optional<Tensor>& tensor) { return !tensor.has_value() || is_plain(*tensor); }

}  // namespace

std::optional<Tensor> linear_train(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const Tensor& boft_R, const Tensor& s, const std::optional<Tensor>& keep) {
  if (!cpu_kernels_in_use() || !is_plain(x) || !is_plain(weight) || !is_plain(boft_R) || !is_plain(s) || !plain(bias) ||
      !plain(keep) || trains(weight) || trains(bias))
    return std::nullopt;
  const at::ScalarType dtype = x.scalar_type();
  // What does not fit is refused by the operators, with their messages.
  if (x.dim() < 2 || x.numel() == 0 || weight.dim() != 2 || weight.scalar_type() != dtype ||
      weight.size(1) != x.size(-1) || (bias.has_value() && bias->scalar_type() != dtype) || boft_R.dim() != 4 ||
      boft_R.scalar_type() != real_dtype(dtype))
    return std::nullopt;
  return LinearFunction::apply(x, boft_R, s, weight, bias, keep);
}

}  // namespace boft
