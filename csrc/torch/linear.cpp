// A layer as one function: rotate, the frozen base layer, scale. The same arithmetic as the three one after the other,
// but each thread takes some of the rows through all three, so that one finds in cache what the other wrote, and there
// is one parallel region each way. What they hand to each other lies in recycled memory, which costs no page faults,
// and the gradient of the rotated input is rotated where it lies.
#include "arguments.h"
#include "ops.h"
#include "packed.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <cmath>

namespace boft {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// `data` (..., columns) as a matrix of rows.
Tensor rows_of(const Tensor& data) { return data.dim() == 2 ? data : data.view({-1, data.size(-1)}); }

// An uninitialised tensor of the shape of `data` but for its last axis.
Tensor empty_rows(const Tensor& data, int64_t columns) {
  std::vector<int64_t> sizes = data.sizes().vec();
  sizes.back() = columns;
  return empty_contiguous(data, sizes);
}

// rows matrix + bias, by the operators that at::linear calls.
void multiply(const Tensor& rows, const Tensor& matrix, const std::optional<Tensor>& bias, Tensor out) {
  if (bias.has_value())
    at::addmm_out(out, *bias, rows, matrix);
  else
    at::mm_out(out, rows, matrix);
}

// Rows of a part: z of 512 rows stays in a thread's share of the caches; with fewer than 256 the matrix product itself
// becomes slower (weights of 4096 x 4096, two Zen 4 cores: 5 % with 256 rows, none with 512).
constexpr int64_t kPartRows = 512, kFewestPartRows = 256;

// Parts that `rows` are cut into, part i of n with the rows from rows i / n on; 0 where the operators one by one, each
// on all threads, are the better way. n is a power of two, at most `most`, as the splits of sums over rows are; with
// two threads it is what it is with one, and so are the results of the matrix product.
int64_t parts_of(int64_t rows, int64_t most) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  int64_t parts = 1;
  while (parts < most && (parts < std::max<int64_t>(2, threads) || rows > parts * kPartRows)) parts *= 2;
  const int64_t longest = (parts + threads - 1) / threads * rows / parts;
  const bool even = longest * threads <= rows + rows / 16;
  return even && rows >= parts * kFewestPartRows ? parts : 0;
}

// What a thread works on: its rows of one part after the other, `columns` values of the dtype of `like` each, and the
// core's workspace.
struct Desk {
  Desk(const Tensor& like, int64_t rows, int64_t columns, size_t workspace_bytes)
      : rows(empty_contiguous(like, {rows, columns})),
        workspace(c10::GetCPUAllocator()->allocate(std::max<size_t>(workspace_bytes, 1))) {}
  Tensor rows;
  c10::DataPtr workspace;
};

// Runs f(part, first, past, desk) for each part of `rows` on torch's threads, which see tensors without autograd.
template <typename F>
void for_parts(int64_t parts, int64_t rows, const Tensor& like, int64_t columns, size_t workspace_bytes, const F& f) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Desk desk(like, (rows + parts - 1) / parts, columns, workspace_bytes);
    for (int64_t part = begin; part < end; part++) f(part, rows * part / parts, rows * (part + 1) / parts, desk);
  });
}

template <typename Pointer>
Pointer row_of(Pointer data, int64_t row, int64_t stride, int64_t element_size) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return data == nullptr ? nullptr : static_cast<Byte*>(data) + row * stride * element_size;
}

// What a backward needs of the layer besides its activations and blocks; `factors` is s as the kernels take it.
struct Layer {
  Layer(at::ScalarType dtype, const Tensor& s, const Tensor& weight, const Tensor& bias, const Tensor& keep, int64_t b,
        int64_t m)
      : s(s),
        factors(real_vector(s, weight.size(0), real_dtype(dtype), "boft_s")),
        weight(weight),
        bias(optional_of(bias)),
        keep(optional_of(keep)),
        b(b),
        m(m) {}
  Tensor s, factors, weight;
  std::optional<Tensor> bias, keep;
  int64_t b, m;
};

// The collapsed blocks and, for their backward, those of the factors, which for one factor are the same.
struct MadeBlocks {
  MadeBlocks(Tensor blocks, Tensor q) : blocks(std::move(blocks)), q(std::move(q)) {}
  MadeBlocks(const Tensor& boft_R, const std::optional<Tensor>& keep) {
    std::tie(blocks, q) = blocks_cpu(boft_R, keep);
    if (boft_R.size(0) == 1) q = blocks.view(boft_R.sizes());
  }
  Tensor blocks, q;
};

// Undefined where no gradient needs them. `out` is the output before the scale, or after it if `scaled`.
struct Activations {
  Tensor x, out;
  bool scaled = false;
};

struct Needed {
  bool x, boft_R, s;
  bool through() const { return x || boft_R; }
};

// Of the factors: as if `out` were the output before the scale.
struct Gradients {
  Tensor x, blocks, factors;
};

// (x R) weight^T + bias.
Tensor output_of(const Layer& layer, const Tensor& blocks, const Tensor& x) {
  return linear_kernels(x, layer.weight, layer.bias, blocks, layer.b, layer.m, std::nullopt, false).out;
}

// By the kernels, part by part; nothing is recorded. False if the rows are too few.
bool backward_in_parts(const Layer& layer, const Tensor& blocks, const Activations& kept, const Needed& need,
                       const Tensor& dy, Gradients& gradients) {
  ScaleBackward scale(dy, optional_of(kept.out), layer.factors, layer.bias, false, false, need.s, false,
                      boft_scale_backward_splits);
  const int64_t rows = scale.grad.rows, n = scale.n, size = dy.element_size();
  const boft_plan plan = make_plan(layer.weight.size(1), layer.b, layer.m);
  const int64_t splits = boft_rotate_backward_splits(&plan, rows), parts = parts_of(rows, splits);
  if (parts == 0) return false;
  const Tensor dx = empty_rows(dy, plan.d);
  RotateBackwardSplits rotate(dx, need.boft_R ? kept.x : dx, blocks, layer.b, layer.m, false, need.x, need.boft_R,
                              true);
  const Tensor dx_rows = rows_of(dx);
  const int64_t scale_splits = boft_scale_backward_splits(rows), tasks = boft_rotate_backward_tasks(&plan, rows);
  for_parts(parts, rows, dy, n, boft_rotate_backward_workspace(&plan, rotate.dtype),
            [&](int64_t part, int64_t first, int64_t past, const Desk& desk) {
              // dz of the whole begins before the desk; only the part's rows of it are touched.
              boft_scale_backward_args args = scale.args;
              args.dz = row_of(desk.rows.mutable_data_ptr(), -first, n, size);
              args.dz_stride = n;
              check(boft_scale_backward(&args, scale_splits * part / parts, scale_splits * (part + 1) / parts));
              multiply(desk.rows.narrow(0, 0, past - first), layer.weight, std::nullopt,
                       dx_rows.narrow(0, first, past - first));
              check(boft_rotate_backward(&rotate.args, tasks * part / parts, tasks * (part + 1) / parts,
                                         desk.workspace.get()));
            });
  rotate.sum();
  gradients = {dx, rotate.dblocks, need.s ? sum_splits(scale.ds, layer.factors) : Tensor()};
  return true;
}

// The same on all rows at once, each kernel on all threads. The gradient of x takes the place of `dx` if that is
// defined.
Gradients backward_at_once(const Layer& layer, const Tensor& blocks, const Activations& kept, const Needed& need,
                           Tensor& dy, Tensor dx) {
  const bool through = need.through();
  auto [dz, dfactors, dbias] =
      scale_backward_cpu(dy, optional_of(kept.out), layer.factors, layer.bias, false, through, need.s, false);
  // Nothing else holds it: its memory serves the next layer already.
  dy.reset();
  Tensor dblocks;
  if (through) {
    if (!dx.defined()) dx = empty_rows(dz, layer.weight.size(1));
    multiply(rows_of(dz), layer.weight, std::nullopt, rows_of(dx));
    dz.reset();
    std::tie(dx, dblocks) = rotate_backward_cpu(dx, need.boft_R ? kept.x : dx, blocks, layer.b, layer.m, false, need.x,
                                                need.boft_R, true);
  }
  return {dx, dblocks, dfactors};
}

// What is added up piece by piece, in the order of rows.
void add_to(Tensor& sum, const Tensor& part) {
  if (sum.defined())
    sum.add_(part);
  else
    sum = part;
}

// Rows whose inputs are unpacked, and whose outputs are computed again, at a time: what that takes should stay small
// beside what it saves.
constexpr int64_t kRecomputedRows = 256;

// The same from packed x and without the output.
Gradients backward_from_packed(const Layer& layer, const Tensor& blocks, const Tensor& packed, const Needed& need,
                               const Tensor& dy) {
  const int64_t d = layer.weight.size(1), n = layer.weight.size(0);
  const Tensor grad = dy.reshape({-1, n});
  const int64_t rows = grad.size(0), pieces = (rows + kRecomputedRows - 1) / kRecomputedRows;
  Gradients whole;
  if (need.x) whole.x = empty_rows(dy, d);
  for (int64_t piece = 0; piece < pieces; piece++) {
    const int64_t first = rows * piece / pieces, count = rows * (piece + 1) / pieces - first;
    Activations kept;
    if (need.boft_R || need.s) kept.x = unpack(packed.narrow(0, first, count), dy.scalar_type(), d, kBitsOfX);
    if (need.s) kept.out = output_of(layer, blocks, kept.x);
    Tensor dy_rows = grad.narrow(0, first, count);
    const Gradients own = backward_at_once(layer, blocks, kept, need, dy_rows,
                                           need.x ? rows_of(whole.x).narrow(0, first, count) : Tensor());
    if (need.s) add_to(whole.factors, own.factors);
    if (need.boft_R) add_to(whole.blocks, own.blocks);
  }
  return whole;
}

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
    const Layer layer(x.scalar_type(), s, weight, given_bias, given_keep, boft_R.size(2), boft_R.size(0));
    const MadeBlocks made(boft_R, keep);
    const bool trains_s = s.requires_grad(), trains_R = boft_R.requires_grad();
    // Without x there would be no way to compute again what the caller wrote over.
    const bool scaled = !recompute && trains_s && trains_R && is_near_one(layer.factors);
    const auto [out, z] = linear_kernels(x, weight, bias, made.blocks, layer.b, layer.m, layer.factors,
                                         trains_s && !recompute && !scaled);
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
    const Layer layer(dy.scalar_type(), saved[0], saved[1], saved[2], saved[3], ctx->saved_data["b"].toInt(),
                      ctx->saved_data["m"].toInt());
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
      if (!kept.scaled) kept.out = output_of(layer, made.blocks, kept.x);
    }
    if (!now) return backward_recorded(layer, made, kept, need, dy);
    Gradients gradients;
    if (!need.through() || !backward_in_parts(layer, made.blocks, kept, need, dy, gradients))
      gradients = backward_at_once(layer, made.blocks, kept, need, dy, Tensor());
    return of_parameters(layer, made, need, gradients, kept.scaled);
  }

  static variable_list backward_recomputed(AutogradContext* ctx, const Layer& layer, const Needed& need,
                                           const Tensor& packed, const Tensor& boft_R, const Tensor& dy, bool now) {
    const MadeBlocks made(boft_R, layer.keep);
    if (now)
      return of_parameters(layer, made, need, backward_from_packed(layer, made.blocks, packed, need, dy), false);
    Activations kept;
    if (packed.defined()) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      kept.x = unpack(packed, dy.scalar_type(), layer.weight.size(1), kBitsOfX)
                   .view(ctx->saved_data["sizes"].toIntVector());
      kept.out = output_of(layer, made.blocks, kept.x);
    }
    return backward_recorded(layer, made, kept, need, dy);
  }

  static variable_list of_parameters(const Layer& layer, const MadeBlocks& made, const Needed& need,
                                     const Gradients& gradients, bool scaled) {
    Tensor dfactors = gradients.factors;
    if (need.s && scaled) dfactors.div_(layer.factors);
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

LinearForward linear_kernels(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Tensor& blocks, int64_t b, int64_t m, const std::optional<Tensor>& s, bool keep_z) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Rows in(x);
  const int64_t parts = parts_of(in.rows, in.rows), size = x.element_size(), n = weight.size(0);
  const Tensor factors = s.has_value() ? real_vector(*s, n, blocks.scalar_type(), "boft_s") : Tensor();
  const bool shifted = s.has_value() && bias.has_value();
  const Tensor shifts = shifted ? real_vector(*bias, n, blocks.scalar_type(), "bias") : Tensor();
  const boft_dtype dtype = data_dtype(x, "x");
  const Tensor rotated = parts == 0 ? rotate_cpu(x, blocks, b, m, false) : Tensor();
  const Tensor out = empty_rows(x, n), z = keep_z ? empty_rows(x, n) : out;
  const Tensor z_rows = rows_of(z), matrix = weight.t();
  const boft_scale_args scale = {dtype,
                                 in.rows,
                                 n,
                                 z.const_data_ptr(),
                                 n,
                                 s.has_value() ? factors.const_data_ptr() : nullptr,
                                 shifted ? shifts.const_data_ptr() : nullptr,
                                 out.mutable_data_ptr(),
                                 n};
  if (parts == 0) {
    multiply(rows_of(rotated), matrix, bias, z_rows);
    if (s.has_value())
      parallel(in.rows, z.numel() * 8, 0,
               [&](int64_t begin, int64_t end, void*) { return boft_scale(&scale, begin, end); });
    return {out, keep_z ? z : Tensor()};
  }
  const boft_plan plan = check_rotate(x, blocks, b, m);
  const Tensor real_blocks = blocks.contiguous();
  for_parts(parts, in.rows, x, plan.d, boft_rotate_workspace(&plan, dtype),
            [&](int64_t, int64_t first, int64_t past, const Desk& desk) {
              const int64_t rows = past - first;
              const boft_rotate_args rotate = {&plan,
                                               dtype,
                                               0,
                                               rows,
                                               row_of(in.data(), first, in.stride, size),
                                               in.stride,
                                               real_blocks.const_data_ptr(),
                                               desk.rows.mutable_data_ptr(),
                                               plan.d};
              check(boft_rotate(&rotate, 0, rows, desk.workspace.get()));
              multiply(desk.rows.narrow(0, 0, rows), matrix, bias, z_rows.narrow(0, first, rows));
              if (s.has_value()) check(boft_scale(&scale, first, past));
            });
  return {out, keep_z ? z : Tensor()};
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
