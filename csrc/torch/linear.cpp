// A layer as one function of autograd.
#include "linear.h"
#include "packed.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <cmath>

namespace boft {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The collapsed blocks and, for their backward, those of the factors, which for one factor are the same.
struct MadeBlocks {
  MadeBlocks(Tensor blocks, Tensor q) : blocks(std::move(blocks)), q(std::move(q)) {}
  MadeBlocks(const Tensor& boft_R, const std::optional<Tensor>& keep) {
    std::tie(blocks, q) = blocks_cpu(boft_R, keep);
    if (boft_R.size(0) == 1) q = blocks.view(boft_R.sizes());
  }
  Tensor blocks, q;
};

// By registered operators, which refuse a second derivative and reach whatever mode is active.
variable_list backward_recorded(const Layer& layer, const MadeBlocks& made, const Activations& kept,
                                const Needed& need, const Tensor& dy) {
  auto [dz, ds, dbias] = call_scale_backward(dy, optional_of(kept.out), layer.s, layer.bias, false, need.through(),
                                             need.s, false);
  Tensor dx, dblocks;
  if (need.through()) {
    const Tensor rotated = at::matmul(dz, layer.weight);
    std::tie(dx, dblocks) = call_rotate_backward(rotated, need.boft_R ? kept.x : rotated, made.blocks, layer.b,
                                                 layer.m, false, need.x, need.boft_R);
  }
  return {need.x ? dx : Tensor(), need.boft_R ? call_blocks_backward(dblocks, made.q, layer.keep) : Tensor(),
          !need.s       ? Tensor()
          : kept.scaled ? ds.div(layer.s)
                        : ds};
}

// The gradient of s is the sum over rows of dy (z - bias), and the output after the scale differs from the bias by
// (z - bias) s. So that sum over the output, divided by s, serves as well, and costs no accuracy while s is near 1. The
// output needs no room besides, and where the next operation saves it too, none at all. A step of the three layers of a
// Llama's MLP (768 x 2048, 1024 rows, float32, two Emerald Rapids cores): 1.047 x the frozen one, 1.071 with z.
bool is_near_one(const Tensor& factors) {
  const auto all = [&](const auto* s) {
    return std::all_of(s, s + factors.numel(), [](auto one) { return 0.5 <= std::abs(one) && std::abs(one) <= 2; });
  };
  return factors.scalar_type() == at::kDouble ? all(factors.const_data_ptr<double>())
                                              : all(factors.const_data_ptr<float>());
}

// sums[i] /= factors[i], without an operator of torch: a call of one costs more.
void divide_each(const Tensor& sums, const Tensor& factors) {
  const auto all = [&](auto* to, const auto* by) {
    for (int64_t i = 0; i < sums.numel(); i++) to[i] /= by[i];
  };
  if (factors.scalar_type() == at::kDouble)
    all(sums.mutable_data_ptr<double>(), factors.const_data_ptr<double>());
  else
    all(sums.mutable_data_ptr<float>(), factors.const_data_ptr<float>());
}

// Tells whether the caller wrote to an output after it got it.
struct OutputVersion : torch::CustomClassHolder {
  explicit OutputVersion(const Tensor& out)
      : counter(torch::autograd::impl::version_counter(out)), then(counter.current_version()) {}
  bool is_current() const { return counter.current_version() == then; }
  c10::VariableVersion counter;
  uint32_t then;
};

class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& boft_R, const Tensor& s,
                        const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& keep,
                        bool recompute) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor none, given_bias = bias.value_or(none), given_keep = keep.value_or(none);
    const Layer layer(x.scalar_type(), s, weight, bias, keep, boft_R.size(2), boft_R.size(0));
    const MadeBlocks made(boft_R, keep);
    const bool trains_s = s.requires_grad(), trains_R = boft_R.requires_grad();
    // Without x there would be no way to compute again what the caller wrote over.
    const bool scaled = !recompute && trains_s && trains_R && is_near_one(layer.factors);
    const auto [out, z] = linear_forward(layer, made.blocks, x, trains_s && !recompute && !scaled);
    variable_list saved = {s, weight, given_bias, given_keep};
    if (recompute) {
      saved.insert(saved.end(), {trains_s || trains_R ? pack_shared(x) : none, boft_R});
      ctx->saved_data["sizes"] = x.sizes().vec();
    } else {
      // Saved as the output that it is, it could not be unpacked any more after a change in place. So it is saved as
      // another tensor with the same data, and such changes show by the version alone.
      saved.insert(saved.end(), {trains_R ? x : none, scaled ? out.variable_data() : z, made.blocks, made.q});
      if (scaled) ctx->saved_data["version"] = c10::IValue::make_capsule(c10::make_intrusive<OutputVersion>(out));
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["recompute"] = recompute;
    ctx->saved_data["b"] = layer.b;
    ctx->saved_data["m"] = layer.m;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    Tensor& dy = grads[0];
    const Layer layer(dy.scalar_type(), saved[0], saved[1], optional_of(saved[2]), optional_of(saved[3]),
                      ctx->saved_data["b"].toInt(), ctx->saved_data["m"].toInt());
    const Needed need{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    const bool now = is_plain(dy) && !at::GradMode::is_enabled() && cpu_kernels_in_use();
    variable_list gradients = ctx->saved_data["recompute"].toBool()
                                  ? backward_recomputed(ctx, layer, need, saved[4], saved[5], dy, now)
                                  : backward_exact(ctx, layer, need, saved, dy, now);
    gradients.resize(7);
    return gradients;
  }

 private:
  static variable_list backward_exact(AutogradContext* ctx, const Layer& layer, const Needed& need,
                                      const variable_list& saved, Tensor& dy, bool now) {
    const MadeBlocks made(saved[6], saved[7]);
    Activations kept{saved[4], saved[5]};
    const auto version = ctx->saved_data.find("version");
    if (version != ctx->saved_data.end() && need.s) {
      kept.scaled = c10::static_intrusive_pointer_cast<OutputVersion>(version->second.toCapsule())->is_current();
      if (!kept.scaled) kept.out = unscaled_output(layer, made.blocks, kept.x);
    }
    if (!now) return backward_recorded(layer, made, kept, need, dy);
    return of_parameters(layer, made, need, linear_backward(layer, made.blocks, kept, need, dy), kept.scaled);
  }

  static variable_list backward_recomputed(AutogradContext* ctx, const Layer& layer, const Needed& need,
                                           const Tensor& packed, const Tensor& boft_R, const Tensor& dy, bool now) {
    const MadeBlocks made(boft_R, layer.keep);
    if (now)
      return of_parameters(layer, made, need, packed_backward(layer, made.blocks, packed, need, dy), false);
    Activations kept;
    if (packed.defined()) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      kept.x = unpack(packed, dy.scalar_type(), layer.weight.size(1), kBitsOfX)
                   .view(ctx->saved_data["sizes"].toIntVector());
      kept.out = unscaled_output(layer, made.blocks, kept.x);
    }
    return backward_recorded(layer, made, kept, need, dy);
  }

  static variable_list of_parameters(const Layer& layer, const MadeBlocks& made, const Needed& need,
                                     const Gradients& gradients, bool scaled) {
    Tensor dfactors = gradients.factors;
    if (need.s && scaled) divide_each(dfactors, layer.factors);
    return {need.x ? gradients.x : Tensor(),
            need.boft_R ? blocks_backward_cpu(gradients.blocks, made.q, layer.keep) : Tensor(),
            need.s ? shaped_like(dfactors, layer.s) : Tensor()};
  }
};

bool trains(const std::optional<Tensor>& tensor) { return tensor.has_value() && tensor->requires_grad(); }

bool plain(const std::optional<Tensor>& tensor) { return !tensor.has_value() || is_plain(*tensor); }

}  // namespace

// What does not fit is refused by the operators, with their messages.
bool linear_fits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const at::ScalarType dtype = x.scalar_type();
  return x.dim() >= 2 && x.numel() > 0 && weight.dim() == 2 && weight.scalar_type() == dtype &&
         weight.size(1) == x.size(-1) && (!bias.has_value() || bias->scalar_type() == dtype);
}

LinearForward linear_forward(const Layer& layer, const Tensor& blocks, const Tensor& x, bool keep_z) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  if (!keep_z && merge_pays(layer, x.numel() / x.size(-1))) return {merged_forward(layer, blocks, x), Tensor()};
  return rotated_forward(layer, blocks, x, keep_z);
}

Gradients linear_backward(const Layer& layer, const Tensor& blocks, const Activations& kept, const Needed& need,
                          Tensor& dy) {
  if (need.through() && merge_pays(layer, dy.numel() / dy.size(-1)))
    return merged_backward(layer, blocks, kept, need, dy);
  return rotated_backward(layer, blocks, kept, need, dy);
}

std::optional<Tensor> linear_train(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const Tensor& boft_R, const Tensor& s, const std::optional<Tensor>& keep,
                                   bool recompute) {
  if (!cpu_kernels_in_use() || !is_plain(x) || !is_plain(weight) || !is_plain(boft_R) || !is_plain(s) || !plain(bias) ||
      !plain(keep) || trains(weight) || trains(bias))
    return std::nullopt;
  if (!linear_fits(x, weight, bias) || boft_R.dim() != 4 || boft_R.scalar_type() != real_dtype(x.scalar_type()))
    return std::nullopt;
  return LinearFunction::apply(x, boft_R, s, weight, bias, keep, recompute);
}

}  // namespace boft
