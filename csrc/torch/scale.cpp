// boft::scale: z s + bias (1 - s), and its backward.
#include "arguments.h"
#include "ops.h"
#include "packed.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace boft {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

int64_t outputs_of(const Tensor& z) {
  TORCH_CHECK_VALUE(z.dim() >= 1, "scale: z needs at least one axis");
  return z.size(-1);
}

int64_t check_scale_backward(const Tensor& dy, const std::optional<Tensor>& z, const std::optional<Tensor>& bias,
                             bool need_s, bool need_bias) {
  const int64_t n = outputs_of(dy);
  TORCH_CHECK_VALUE(!need_s || (z.has_value() && z->sizes() == dy.sizes()), "scale backward: z and dy differ in shape");
  TORCH_CHECK_TYPE(!need_s || z->scalar_type() == dy.scalar_type(), "scale backward: z and dy differ in dtype");
  TORCH_CHECK_VALUE(!need_bias || bias.has_value(), "scale backward: the gradient of a bias needs the bias");
  return n;
}

template <typename Data>
Tensor as_floats(const Tensor& values) {
  const Tensor floats = at::empty({values.numel()}, values.options().dtype(at::kFloat));
  const Data* const from = values.const_data_ptr<Data>();
  std::copy(from, from + values.numel(), floats.mutable_data_ptr<float>());
  return floats;
}

// A bias as `real_vector`, undefined without one.
Tensor optional_vector(const std::optional<Tensor>& bias, int64_t n, at::ScalarType real) {
  return bias.has_value() ? real_vector(*bias, n, real, "bias") : Tensor();
}

const void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

}  // namespace

Tensor real_vector(const Tensor& values, int64_t n, at::ScalarType real, const char* what, const char* op) {
  TORCH_CHECK_VALUE(values.numel() == n, op, ": ", n, " outputs need ", n, " values of ", what, ", got ",
                    values.sizes());
  TORCH_CHECK_TYPE(values.is_floating_point(), op, ": ", what, " is ", values.scalar_type());
  // Only its data is read, so a vector that is right already is not reshaped; and one of 16 bits is converted here, as
  // three operators of torch for it are a tenth of what the backward of a layer of 384 channels costs beside products.
  if (values.scalar_type() == real && values.is_contiguous()) return values;
  const bool converted = values.is_cpu() && values.is_contiguous() && real == at::kFloat;
  if (converted && values.scalar_type() == at::kBFloat16) return as_floats<at::BFloat16>(values);
  if (converted && values.scalar_type() == at::kHalf) return as_floats<at::Half>(values);
  return values.reshape({n}).to(real).contiguous();
}

Tensor sum_splits(const Tensor& parts, const Tensor& parameter) {
  const boft_dtype real = data_dtype(parts, "sums");
  const int64_t splits = parts.size(0), n = parts.size(1);
  Tensor sum = empty_contiguous(parts, parameter.sizes());
  parallel(n, n * splits, 0, [&](int64_t begin, int64_t end, void*) {
    return boft_sum_splits(real, splits, n, parts.const_data_ptr(), sum.mutable_data_ptr(), begin, end);
  });
  return shaped_like(sum, parameter);
}

Tensor shaped_like(const Tensor& sum, const Tensor& parameter) {
  // Two operators of torch take 2 us, which small layers feel.
  if (sum.scalar_type() == parameter.scalar_type() && sum.sizes() == parameter.sizes()) return sum;
  return sum.to(parameter.scalar_type()).view(parameter.sizes());
}

Scale::Scale(const Tensor& z, const Tensor& s, const std::optional<Tensor>& bias)
    : dtype(data_dtype(z, "z")),
      n(outputs_of(z)),
      factors(real_vector(s, n, real_dtype(z.scalar_type()), "boft_s")),
      shifts(optional_vector(bias, n, real_dtype(z.scalar_type()))),
      in(z),
      out(empty_contiguous(z)) {
  args = {dtype, in.rows, n, in.data(), in.stride, factors.const_data_ptr(), data_or_null(shifts),
          out.mutable_data_ptr(), n};
}

// bias_detached and compact matter to the backward only.
Tensor scale_cpu(const Tensor& z, const Tensor& s, const std::optional<Tensor>& bias, bool, bool) {
  const Scale call(z, s, bias);
  parallel(call.in.rows, z.numel() * 8, 0,
           [&](int64_t begin, int64_t end, void*) { return boft_scale(&call.args, begin, end); });
  return call.out;
}

Tensor scale_runs_cpu(const Tensor& z, const Runs& runs, const std::vector<Tensor>& scales,
                      const std::optional<Tensor>& bias) {
  const boft_dtype dtype = data_dtype(z, "z");
  const int64_t n = outputs_of(z);
  const at::ScalarType real = real_dtype(z.scalar_type());
  runs.check(z, static_cast<int64_t>(scales.size()));
  std::vector<Tensor> factors;
  for (const Tensor& s : scales) factors.push_back(real_vector(s, n, real, "boft_s"));
  const Tensor shifts = optional_vector(bias, n, real);
  const Rows in(z);
  Tensor out = empty_contiguous(z);
  parallel(in.rows, in.rows * n * 8, 0, [&](int64_t begin, int64_t end, void*) {
    return runs.visit(in.rows, begin, end, [&](int64_t adapter, int64_t, int64_t, int64_t first, int64_t stop) {
      if (adapter < 0) return copy_rows(in, out, first, stop), BOFT_OK;
      const boft_scale_args args = {dtype, in.rows, n, in.data(), in.stride, factors[adapter].const_data_ptr(),
                                    data_or_null(shifts), out.mutable_data_ptr(), n};
      return boft_scale(&args, first, stop);
    });
  });
  return out;
}

ScaleBackward::ScaleBackward(const Tensor& dy, const std::optional<Tensor>& z, const Tensor& s,
                             const std::optional<Tensor>& bias, bool bias_detached, bool need_z, bool need_s,
                             bool need_bias, int64_t (*splits)(int64_t rows))
    : dtype(data_dtype(dy, "dy")),
      n(check_scale_backward(dy, z, bias, need_s, need_bias)),
      factors(real_vector(s, n, real_dtype(dy.scalar_type()), "boft_s")),
      shifts(optional_vector(bias, n, real_dtype(dy.scalar_type()))),
      grad(dy),
      in(need_s ? *z : dy),
      dz(need_z ? empty_contiguous(dy) : empty_contiguous(dy, {0})),
      ds(empty_contiguous(factors, {need_s ? splits(grad.rows) : 0, n})),
      dbias(empty_contiguous(factors, {need_bias ? splits(grad.rows) : 0, n})),
      args{} {
  args.dtype = dtype;
  args.rows = grad.rows;
  args.n = n;
  args.dy = grad.data();
  args.dy_stride = grad.stride;
  args.z = need_s ? in.data() : nullptr;
  args.z_stride = in.stride;
  args.s = factors.const_data_ptr();
  args.bias = data_or_null(shifts);
  args.dz = need_z ? dz.mutable_data_ptr() : nullptr;
  args.dz_stride = n;
  args.ds = need_s ? ds.mutable_data_ptr() : nullptr;
  args.dbias = need_bias ? dbias.mutable_data_ptr() : nullptr;
  args.bias_detached = bias_detached;
}

std::tuple<Tensor, Tensor, Tensor> scale_backward_cpu(const Tensor& dy, const std::optional<Tensor>& z, const Tensor& s,
                                                      const std::optional<Tensor>& bias, bool bias_detached,
                                                      bool need_z, bool need_s, bool need_bias) {
  const ScaleBackward call(dy, z, s, bias, bias_detached, need_z, need_s, need_bias, boft_scale_backward_splits);
  parallel(boft_scale_backward_splits(call.grad.rows), dy.numel() * 8, 0,
           [&](int64_t begin, int64_t end, void*) { return boft_scale_backward(&call.args, begin, end); });
  return {call.dz, need_s ? sum_splits(call.ds, s) : call.ds, need_bias ? sum_splits(call.dbias, *bias) : call.dbias};
}

namespace {

// The same from packed z, unpacked kUnpackedRows rows at a time into a buffer of the thread; each piece is a split.
std::tuple<Tensor, Tensor, Tensor> scale_backward_packed_cpu(const Tensor& dy, const Tensor& packed, const Tensor& s,
                                                             const std::optional<Tensor>& bias, bool bias_detached,
                                                             bool need_z, bool need_bias) {
  const boft_dtype dtype = data_dtype(dy, "dy");
  const int64_t n = outputs_of(dy);
  TORCH_CHECK_VALUE(!need_bias || bias.has_value(), "scale backward: the gradient of a bias needs the bias");
  const at::ScalarType real_type = real_dtype(dy.scalar_type());
  const Tensor factors = real_vector(s, n, real_type, "boft_s");
  const Tensor shifts = optional_vector(bias, n, real_type);
  const Rows grad(dy);
  check_packed(packed, grad.rows, n, kBitsOfZ);
  const int64_t pieces = std::max<int64_t>(1, (grad.rows + kUnpackedRows - 1) / kUnpackedRows);
  Tensor dz = need_z ? empty_contiguous(dy) : at::empty({0}, dy.options());
  Tensor ds = at::empty({pieces, n}, factors.options()), dbias = at::empty({need_bias ? pieces : 0, n}, ds.options());
  const int64_t size = dy.element_size(), size_of_sums = n * ds.element_size();
  const char* const from = static_cast<const char*>(packed.const_data_ptr());
  char* const ds_at = static_cast<char*>(ds.mutable_data_ptr());
  char* const dbias_at = need_bias ? static_cast<char*>(dbias.mutable_data_ptr()) : nullptr;
  char* const dz_at = need_z ? static_cast<char*>(dz.mutable_data_ptr()) : nullptr;
  parallel(pieces, grad.rows * n * 8, static_cast<size_t>(kUnpackedRows * n * size),
           [&](int64_t begin, int64_t end, void* z) {
             for (int64_t piece = begin; piece < end; piece++) {
               const int64_t first = piece * kUnpackedRows, rows = std::min(kUnpackedRows, grad.rows - first);
               check(boft_unpack(dtype, kBitsOfZ, rows, n, from + first * packed.size(1), z, n, 0, rows));
               boft_scale_backward_args args = {};
               args.dtype = dtype;
               args.rows = rows;
               args.n = n;
               args.dy = static_cast<const char*>(grad.data()) + first * grad.stride * size;
               args.dy_stride = grad.stride;
               args.z = z;
               args.z_stride = n;
               args.s = factors.const_data_ptr();
               args.bias = data_or_null(shifts);
               args.dz = need_z ? dz_at + first * n * size : nullptr;
               args.dz_stride = n;
               args.ds = ds_at + piece * size_of_sums;
               args.dbias = need_bias ? dbias_at + piece * size_of_sums : nullptr;
               args.bias_detached = bias_detached;
               check(boft_scale_backward(&args, 0, 1));
             }
             return BOFT_OK;
           });
  return {dz, sum_splits(ds, s), need_bias ? sum_splits(dbias, *bias) : dbias};
}

Tensor call_scale(const Tensor& z, const Tensor& s, const std::optional<Tensor>& bias, bool bias_detached,
                  bool compact) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("boft::scale", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, bool, bool)>();
  return op.call(z, s, bias, bias_detached, compact);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> call_scale_backward(const Tensor& dy, const std::optional<Tensor>& z, const Tensor& s,
                                                       const std::optional<Tensor>& bias, bool bias_detached, bool need_z,
                                                       bool need_s, bool need_bias) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("boft::scale_backward", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const std::optional<Tensor>&, const Tensor&,
                                                    const std::optional<Tensor>&, bool, bool, bool, bool)>();
  return op.call(dy, z, s, bias, bias_detached, need_z, need_s, need_bias);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> call_scale_backward_packed(const Tensor& dy, const Tensor& packed, const Tensor& s,
                                                              const std::optional<Tensor>& bias, bool bias_detached,
                                                              bool need_z, bool need_bias) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("boft::scale_backward_packed", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                    const std::optional<Tensor>&, bool, bool, bool)>();
  return op.call(dy, packed, s, bias, bias_detached, need_z, need_bias);
}

class ScaleFunction : public torch::autograd::Function<ScaleFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& z, const Tensor& s, const std::optional<Tensor>& bias,
                        bool bias_detached, bool packed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    // z is the one large tensor here and serves the gradient of s alone.
    const Tensor kept = packed ? pack(z, kBitsOfZ) : s.requires_grad() ? z : Tensor();
    ctx->save_for_backward({kept, s, bias.value_or(Tensor())});
    ctx->saved_data["packed"] = packed;
    ctx->saved_data["bias_detached"] = bias_detached;
    return call_scale(z, s, bias, bias_detached, false);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const std::optional<Tensor> bias = optional_of(saved[2]);
    const bool need_z = ctx->needs_input_grad(0), need_s = ctx->needs_input_grad(1);
    const bool need_bias = bias.has_value() && ctx->needs_input_grad(2);
    const bool detached = ctx->saved_data["bias_detached"].toBool();
    auto [dz, ds, dbias] =
        ctx->saved_data["packed"].toBool() && need_s
            ? call_scale_backward_packed(grads[0], saved[0], saved[1], bias, detached, need_z, need_bias)
            : call_scale_backward(grads[0], need_s ? optional_of(saved[0]) : std::nullopt, saved[1], bias, detached,
                                  need_z, need_s, need_bias);
    return {need_z ? dz : Tensor(), need_s ? ds : Tensor(), need_bias ? dbias : Tensor(), Tensor(), Tensor()};
  }
};

Tensor scale_autograd(const Tensor& z, const Tensor& s, const std::optional<Tensor>& bias, bool bias_detached,
                      bool compact) {
  return ScaleFunction::apply(z, s, bias, bias_detached, packs(compact, z, s));
}

}  // namespace

void register_scale_cpu(torch::Library& library) {
  library.impl("scale", scale_cpu);
  library.impl("scale_backward", scale_backward_cpu);
}

// Not withdrawn with the other CPU kernels: what was packed must be unpacked.
TORCH_LIBRARY_IMPL(boft, CPU, library) {
  library.impl("scale_backward_packed", scale_backward_packed_cpu);
}

TORCH_LIBRARY_IMPL(boft, Autograd, library) {
  library.impl("scale", scale_autograd);
}

}  // namespace boft
