// A layer as one function: rotate, the frozen base layer, scale. The same arithmetic as the three one after the other,
// but each thread takes some of the rows through all three, so that one finds in cache what the other wrote, and there is
// one parallel region each way. What they hand to each other lies in recycled memory, which costs no page faults, and the
// gradient of the rotated input is rotated where it lies.
#include "arguments.h"
#include "ops.h"
#include "packed.h"

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

// Parts that `rows` are cut into, part i of n with the rows from rows i / n on; 0 where the operators one by one, each on
// all threads, are the better way. n is a power of two, at most `most`, as the splits of sums over rows are; with two
// threads it is what it is with one, and so are the results of the matrix product.
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

// x and z as they were; or, where the output is recomputed, x packed and boft_R instead of what is made of it.
struct Saved {
  Tensor x, blocks, q, z, s, weight, packed, boft_R;
  std::optional<Tensor> bias, keep;
  int64_t b, m;

  void make_blocks() {
    std::tie(blocks, q) = blocks_cpu(boft_R, keep);
    if (m == 1) q = blocks.view(boft_R.sizes());
  }
};

struct Needed {
  bool x, boft_R, s;
  bool through() const { return x || boft_R; }
};

// (x R) weight^T + bias.
Tensor output_of(const Saved& saved, const Tensor& x) {
  const Tensor z = empty_rows(x, saved.weight.size(0));
  multiply(rows_of(rotate_cpu(x, saved.blocks, saved.b, saved.m, false)), saved.weight.t(), saved.bias, rows_of(z));
  return z;
}

// Gradients of x, boft_R and s by the kernels, part by part; nothing is recorded. False if the rows are too few.
bool backward_in_parts(const Saved& saved, const Needed& need, const Tensor& dy, variable_list& gradients) {
  ScaleBackward scale(dy, optional_of(saved.z), saved.s, saved.bias, false, false, need.s, false,
                      boft_scale_backward_splits);
  const int64_t rows = scale.grad.rows, n = scale.n, size = dy.element_size();
  const boft_plan plan = make_plan(saved.weight.size(1), saved.b, saved.m);
  const int64_t splits = boft_rotate_backward_splits(&plan, rows), parts = parts_of(rows, splits);
  if (parts == 0) return false;
  const Tensor dx = empty_rows(dy, plan.d);
  RotateBackwardSplits rotate(dx, need.boft_R ? saved.x : dx, saved.blocks, saved.b, saved.m, false, need.x,
                              need.boft_R, true);
  const Tensor dx_rows = rows_of(dx);
  const int64_t scale_splits = boft_scale_backward_splits(rows), tasks = boft_rotate_backward_tasks(&plan, rows);
  for_parts(parts, rows, dy, n, boft_rotate_backward_workspace(&plan, rotate.dtype),
            [&](int64_t part, int64_t first, int64_t past, const Desk& desk) {
              // dz of the whole begins before the desk; only the part's rows of it are touched.
              boft_scale_backward_args args = scale.args;
              args.dz = row_of(desk.rows.mutable_data_ptr(), -first, n, size);
              args.dz_stride = n;
              check(boft_scale_backward(&args, scale_splits * part / parts, scale_splits * (part + 1) / parts));
              multiply(desk.rows.narrow(0, 0, past - first), saved.weight, std::nullopt,
                       dx_rows.narrow(0, first, past - first));
              check(boft_rotate_backward(&rotate.args, tasks * part / parts, tasks * (part + 1) / parts,
                                         desk.workspace.get()));
            });
  rotate.sum();
  gradients = {need.x ? dx : Tensor(),
               need.boft_R ? blocks_backward_cpu(rotate.dblocks, saved.q, saved.keep) : Tensor(),
               need.s ? sum_splits(scale.ds, saved.s) : Tensor()};
  return true;
}

// The same on all rows at once.
variable_list backward_now(const Saved& saved, const Needed& need, Tensor& dy) {
  const bool through = need.through();
  variable_list gradients;
  if (through && backward_in_parts(saved, need, dy, gradients)) return gradients;
  auto [dz, ds, dbias] = scale_backward_cpu(dy, optional_of(saved.z), saved.s, saved.bias, false, through, need.s, false);
  // Nothing else holds it: its memory serves the next layer already.
  dy.reset();
  Tensor dx, dblocks;
  if (through) {
    dx = empty_rows(dz, saved.weight.size(1));
    multiply(rows_of(dz), saved.weight, std::nullopt, rows_of(dx));
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
  const bool through = need.through();
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

// The same from packed x and without z.
variable_list backward_recomputed(Saved& saved, const Needed& need, const Tensor& dy) {
  saved.make_blocks();
  const int64_t d = saved.weight.size(1), n = saved.weight.size(0);
  const Tensor grad = dy.reshape({-1, n}), dx = need.x ? empty_rows(dy, d) : Tensor();
  const int64_t rows = grad.size(0), pieces = (rows + kRecomputedRows - 1) / kRecomputedRows;
  Tensor dblocks_sum, ds_sum;
  for (int64_t piece = 0; piece < pieces; piece++) {
    const int64_t first = rows * piece / pieces, count = rows * (piece + 1) / pieces - first;
    const Tensor x = need.boft_R || need.s
                         ? unpack(saved.packed.narrow(0, first, count), dy.scalar_type(), d, kBitsOfX)
                         : Tensor();
    const auto z = need.s ? std::optional<Tensor>(output_of(saved, x)) : std::nullopt;
    const auto [dz, ds, dbias] = scale_backward_cpu(grad.narrow(0, first, count), z, saved.s, saved.bias, false,
                                                    need.through(), need.s, false);
    if (need.s) add_to(ds_sum, ds);
    if (!need.through()) continue;
    const Tensor rotated = need.x ? rows_of(dx).narrow(0, first, count) : empty_rows(dz, d);
    multiply(dz, saved.weight, std::nullopt, rotated);
    const auto [back, dblocks] = rotate_backward_cpu(rotated, need.boft_R ? x : rotated, saved.blocks, saved.b, saved.m,
                                                     false, need.x, need.boft_R, true);
    if (need.boft_R) add_to(dblocks_sum, dblocks);
  }
  return {dx, need.boft_R ? blocks_backward_cpu(dblocks_sum, saved.q, saved.keep) : Tensor(), ds_sum};
}

class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& boft_R, const Tensor& s,
                        const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& keep,
                        bool recompute) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t m = boft_R.size(0), b = boft_R.size(2);
    const auto [blocks, q] = blocks_cpu(boft_R, keep);
    const bool trains_s = s.requires_grad(), trains_R = boft_R.requires_grad();
    const auto [out, z] = linear_kernels(x, weight, bias, blocks, b, m, s, trains_s && !recompute);
    const Tensor none, given_bias = bias.value_or(none), given_keep = keep.value_or(none);
    if (recompute) {
      ctx->saved_data["sizes"] = x.sizes().vec();
      ctx->save_for_backward({none, none, none, none, s, weight, trains_s || trains_R ? pack_shared(x) : none, boft_R,
                              given_bias, given_keep});
    } else {
      ctx->save_for_backward({trains_R ? x : none, blocks, m == 1 ? blocks.view(boft_R.sizes()) : q, z, s, weight, none,
                              none, given_bias, given_keep});
    }
    ctx->saved_data["b"] = b;
    ctx->saved_data["m"] = m;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    const auto tensors = ctx->get_saved_variables();
    Saved saved{tensors[0],
                tensors[1],
                tensors[2],
                tensors[3],
                tensors[4],
                tensors[5],
                tensors[6],
                tensors[7],
                optional_of(tensors[8]),
                optional_of(tensors[9]),
                ctx->saved_data["b"].toInt(),
                ctx->saved_data["m"].toInt()};
    const Needed need{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    Tensor& dy = grads[0];
    const bool now = is_plain(dy) && !at::GradMode::is_enabled() && cpu_kernels_in_use();
    const bool recompute = saved.boft_R.defined();
    if (recompute && !now) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      saved.make_blocks();
      if (saved.packed.defined()) {
        saved.x = unpack(saved.packed, dy.scalar_type(), saved.weight.size(1), kBitsOfX)
                      .view(ctx->saved_data["sizes"].toIntVector());
        saved.z = output_of(saved, saved.x);
      }
    }
    variable_list gradients = !now        ? backward_recorded(saved, need, dy)
                              : recompute ? backward_recomputed(saved, need, dy)
                                          : backward_now(saved, need, dy);
    gradients.resize(7);
    return gradients;
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
                             const Tensor& blocks, int64_t b, int64_t m, const Tensor& s, bool keep_z) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Rows in(x);
  const int64_t parts = parts_of(in.rows, in.rows), size = x.element_size(), n = weight.size(0);
  const Tensor factors = real_vector(s, n, blocks.scalar_type(), "boft_s");
  const Tensor shifts = bias.has_value() ? real_vector(*bias, n, blocks.scalar_type(), "bias") : Tensor();
  const boft_dtype dtype = data_dtype(x, "x");
  const Tensor rotated = parts == 0 ? rotate_cpu(x, blocks, b, m, false) : Tensor();
  const Tensor out = empty_rows(x, n), z = keep_z ? empty_rows(x, n) : out;
  const Tensor z_rows = rows_of(z), matrix = weight.t();
  const boft_scale_args scale = {dtype,
                                 in.rows,
                                 n,
                                 z.const_data_ptr(),
                                 n,
                                 factors.const_data_ptr(),
                                 shifts.defined() ? shifts.const_data_ptr() : nullptr,
                                 out.mutable_data_ptr(),
                                 n};
  if (parts == 0) {
    multiply(rows_of(rotated), matrix, bias, z_rows);
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
              check(boft_scale(&scale, first, past));
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
