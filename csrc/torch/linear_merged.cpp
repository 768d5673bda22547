// A linear layer through its merged weight W' = diag(s) W R^T, which is made in the forward and again in the backward:
// y = x W'^T + bias and dx = dy W'. The activations are not rotated at all. The gradient of R is x^T times the gradient
// of x R, which is dx R because R is orthogonal, so for every block it is the product of x^T dx with the block itself.
#include "linear.h"
#include "parts.h"
#include "product.h"

namespace boft {
namespace {

using at::Tensor;

Tensor merged_weight(const Layer& layer, const Tensor& blocks) {
  Merge call(layer.weight, blocks, layer.b, layer.m, layer.factors, true);
  return rotated_cpu(call, call.factors_data());
}

// The sum of what `gram` computed of its splits, every block of it times the block of R: its rows rotated, as the rows
// of a layer of one group.
Tensor sum_times_blocks(const RotateBackwardSplits& gram, const Layer& layer, const Tensor& blocks) {
  const boft_plan &plan = gram.plan, one = make_plan(plan.super, layer.b, layer.m);
  const boft_dtype real = data_dtype(blocks, "blocks");
  const int64_t square = plan.super * plan.super, size = blocks.element_size();
  const Tensor product = empty_contiguous(gram.dblocks);
  const auto block = [&](auto* data, int64_t group) { return row_of(data, group, square, size); };
  parallel(plan.d / plan.super, plan.count * (plan.super + gram.splits), boft_rotate_workspace(&one, real),
           [&](int64_t begin, int64_t end, void* workspace) {
             check(gram.sum(begin * square, end * square));
             for (int64_t group = begin; group < end; group++) {
               const boft_rotate_args rotate = {&one,
                                                real,
                                                0,
                                                plan.super,
                                                block(gram.dblocks.const_data_ptr(), group),
                                                plan.super,
                                                block(blocks.const_data_ptr(), group),
                                                block(product.mutable_data_ptr(), group),
                                                plan.super};
               check(boft_rotate(&rotate, 0, plan.super, workspace));
             }
             return BOFT_OK;
           });
  return product;
}

}  // namespace

// Rotations of weight and activations cost 4 n + 2 rows multiply-adds for each channel and G, against 6 rows; the
// passes of the scale over the outputs are saved besides. It needs groups that one level mixes: the gradients of
// several levels are of what lies between them. Few rows are the other way's, whatever the layer: calls count there.
// Steps of whole models, all linears, on two Zen 4 cores, as multiples of the frozen one, rotated and merged: ViT 384
// with 1576 rows float32 1.097 and 1.074, bfloat16 1.145 and 1.090; Llama 768 with 1024 rows 1.040 and 1.028, 1.060 and
// 1.045. With fewer rows than outputs, 1024 of layers 384 x 1536 and 768 x 2048, the merged way is up to 0.04 worse.
// Unless it multiplies by oneDNN (product.cpp): then it has all layers (Llama on two Zen 5 cores 0.64 instead of 0.80)
// but small ones, which have little to gain, and those whose merged weight would be large beside their input.
bool merge_pays(const Layer& layer, int64_t rows) {
  constexpr int64_t kFewestRows = 2 * kFewestPartRows, kFewestChannels = 256, kMostOutputs = 4;
  const int64_t d = layer.weight.size(1), n = layer.weight.size(0);
  const bool fast = d >= kFewestChannels && layer.weight.scalar_type() == at::kFloat && onednn_products();
  return rows >= kFewestRows && n <= (fast ? kMostOutputs * rows : rows) && make_plan(d, layer.b, layer.m).levels == 1;
}

Tensor merged_forward(const Layer& layer, const Tensor& blocks, const Tensor& x) {
  const Rows in(x);
  const Tensor x_rows = rows_of(in.tensor), out = empty_rows(x, layer.weight.size(0)), out_rows = rows_of(out);
  const Tensor matrix = merged_weight(layer, blocks).t();
  const int64_t parts = parts_of(in.rows, in.rows);
  if (parts == 0) multiply_merged(x_rows, matrix, layer.bias, out_rows);
  for_parts(parts, in.rows, x, 0, 0, [&](int64_t, int64_t first, int64_t past, const Desk&) {
    multiply_merged(x_rows.narrow(0, first, past - first), matrix, layer.bias, out_rows.narrow(0, first, past - first));
  });
  return out;
}

Gradients merged_backward(const Layer& layer, const Tensor& blocks, const Activations& kept, const Needed& need,
                          const Tensor& dy) {
  ScaleBackward scale(dy, optional_of(kept.out), layer.factors, layer.bias, false, false, need.s, false,
                      boft_scale_backward_splits);
  const boft_plan plan = make_plan(layer.weight.size(1), layer.b, layer.m);
  const Tensor dx = empty_rows(dy, plan.d), dx_rows = rows_of(dx), dy_rows = rows_of(scale.grad.tensor);
  RotateBackwardSplits gram(dx, need.boft_R ? kept.x : dx, blocks, layer.b, layer.m, false, false, need.boft_R, false);
  const int64_t rows = scale.grad.rows, scale_splits = boft_scale_backward_splits(rows);
  const int64_t tasks = boft_rotate_backward_tasks(&plan, rows), parts = parts_of(rows, gram.splits);
  const Tensor merged = merged_weight(layer, blocks);
  const size_t workspace = boft_rotate_backward_workspace(&plan, gram.dtype);
  const auto sum_scale = [&](int64_t begin, int64_t end, void*) {
    return need.s ? boft_scale_backward(&scale.args, begin, end) : BOFT_OK;
  };
  const auto sum_gram = [&](int64_t begin, int64_t end, void* ws) {
    return boft_rotate_backward(&gram.args, begin, end, ws);
  };
  if (parts == 0) {
    parallel(scale_splits, dy.numel() * 8, 0, sum_scale);
    multiply_merged(dy_rows, merged, std::nullopt, dx_rows);
    parallel(tasks, dx.numel() * plan.super, workspace, sum_gram);
  }
  for_parts(parts, rows, dy, 0, workspace, [&](int64_t part, int64_t first, int64_t past, const Desk& desk) {
    check(sum_scale(scale_splits * part / parts, scale_splits * (part + 1) / parts, nullptr));
    multiply_merged(dy_rows.narrow(0, first, past - first), merged, std::nullopt,
                    dx_rows.narrow(0, first, past - first));
    check(sum_gram(tasks * part / parts, tasks * (part + 1) / parts, desk.workspace.get()));
  });
  return {dx, need.boft_R ? sum_times_blocks(gram, layer, blocks) : Tensor(),
          need.s ? sum_splits(scale.ds, layer.factors) : Tensor()};
}

}  // namespace boft
