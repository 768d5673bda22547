// A linear layer by its rotation: rotate, the frozen base layer, scale. The same arithmetic as the three one after the
// other, but each thread takes some of the rows through all three, so that one finds in cache what the other wrote, and
// there is one parallel region each way. What they hand to each other lies in recycled memory, which costs no page faults,
// and the gradient of the rotated input is rotated where it lies.
#include "linear.h"
#include "packed.h"
#include "parts.h"
#include "weight_product.h"

namespace boft {
namespace {

using at::Tensor;

// Rows of a part: an output of so many stays in a thread's share of the caches, and what a part hands on takes little
// memory. With fewer the products become slower (1576 rows of 384 to 1536 channels, two Sapphire Rapids cores, forward
// and backward of the layer, as multiples of the frozen one: parts of 394 rows 1.13 to 1.19 in float32, of 788 1.06 to
// 1.14; bfloat16 1.4 to 1.9 and 1.2 to 1.7).
constexpr int64_t kPartRows = 1024;

// z = (x R) weight^T + bias, and where `scale` is not NULL its rows scaled.
void multiply_rotated(const Layer& layer, const Tensor& blocks, const Tensor& x, const Tensor& z,
                      const boft_scale_args* scale) {
  const Rows in(x);
  const Tensor z_rows = rows_of(z);
  const int64_t parts = parts_of(in.rows, in.rows, kPartRows), size = x.element_size();
  const auto scale_rows = [&](int64_t begin, int64_t end, void*) {
    return scale == nullptr ? BOFT_OK : boft_scale(scale, begin, end);
  };
  if (parts == 0) {
    multiply(rows_of(rotate_cpu(x, blocks, layer.b, layer.m, false)), layer.weight.t(), layer.bias, z_rows);
    parallel(in.rows, z.numel() * 8, 0, scale_rows);
    return;
  }
  const boft_dtype dtype = data_dtype(x, "x");
  const boft_plan plan = check_rotate(x, blocks, layer.b, layer.m);
  const Tensor real_blocks = blocks.contiguous();
  const WeightProduct product(layer.weight, true, in.rows);
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
              product(desk.rows.narrow(0, 0, rows), layer.bias, z_rows.narrow(0, first, rows));
              check(scale_rows(first, past, nullptr));
            });
}

// By the kernels, part by part; nothing is recorded. False if the rows are too few.
bool backward_in_parts(const Layer& layer, const Tensor& blocks, const Activations& kept, const Needed& need,
                       const Tensor& dy, Gradients& gradients) {
  ScaleBackward scale(dy, optional_of(kept.out), layer.factors, layer.bias, false, false, need.s, false,
                      boft_scale_backward_splits);
  const int64_t rows = scale.grad.rows, n = scale.n, size = dy.element_size();
  const boft_plan plan = make_plan(layer.weight.size(1), layer.b, layer.m);
  const int64_t splits = boft_rotate_backward_splits(&plan, rows), parts = parts_of(rows, splits, kPartRows);
  if (parts == 0) return false;
  const Tensor dx = empty_rows(dy, plan.d);
  RotateBackwardSplits rotate(dx, need.boft_R ? kept.x : dx, blocks, layer.b, layer.m, false, need.x, need.boft_R,
                              true);
  const Tensor dx_rows = rows_of(dx);
  const int64_t scale_splits = boft_scale_backward_splits(rows), tasks = boft_rotate_backward_tasks(&plan, rows);
  const WeightProduct product(layer.weight, false, rows);
  for_parts(parts, rows, dy, n, boft_rotate_backward_workspace(&plan, rotate.dtype),
            [&](int64_t part, int64_t first, int64_t past, const Desk& desk) {
              // dz of the whole begins before the desk; only the part's rows of it are touched.
              boft_scale_backward_args args = scale.args;
              args.dz = row_of(desk.rows.mutable_data_ptr(), -first, n, size);
              args.dz_stride = n;
              check(boft_scale_backward(&args, scale_splits * part / parts, scale_splits * (part + 1) / parts));
              product(desk.rows.narrow(0, 0, past - first), std::nullopt, dx_rows.narrow(0, first, past - first));
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

}  // namespace

LinearForward rotated_forward(const Layer& layer, const Tensor& blocks, const Tensor& x, bool keep_z) {
  const int64_t n = layer.weight.size(0);
  const Tensor shifts = layer.shifts();
  const Tensor out = empty_rows(x, n), z = keep_z ? empty_rows(x, n) : out;
  const boft_scale_args scale = {data_dtype(x, "x"),
                                 x.numel() / x.size(-1),
                                 n,
                                 z.const_data_ptr(),
                                 n,
                                 layer.factors.const_data_ptr(),
                                 shifts.defined() ? shifts.const_data_ptr() : nullptr,
                                 out.mutable_data_ptr(),
                                 n};
  multiply_rotated(layer, blocks, x, z, &scale);
  return {out, keep_z ? z : Tensor()};
}

Tensor unscaled_output(const Layer& layer, const Tensor& blocks, const Tensor& x) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  Tensor z = empty_rows(x, layer.weight.size(0));
  multiply_rotated(layer, blocks, x, z, nullptr);
  return z;
}

Gradients rotated_backward(const Layer& layer, const Tensor& blocks, const Activations& kept, const Needed& need,
                           Tensor& dy) {
  Gradients gradients;
  if (need.through() && backward_in_parts(layer, blocks, kept, need, dy, gradients)) return gradients;
  return backward_at_once(layer, blocks, kept, need, dy, Tensor());
}

Gradients packed_backward(const Layer& layer, const Tensor& blocks, const Tensor& packed, const Needed& need,
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
    if (need.s) kept.out = unscaled_output(layer, blocks, kept.x);
    Tensor dy_rows = grad.narrow(0, first, count);
    const Gradients own = backward_at_once(layer, blocks, kept, need, dy_rows,
                                           need.x ? rows_of(whole.x).narrow(0, first, count) : Tensor());
    if (need.s) add_to(whole.factors, own.factors);
    if (need.boft_R) add_to(whole.blocks, own.blocks);
  }
  return whole;
}

}  // namespace boft
