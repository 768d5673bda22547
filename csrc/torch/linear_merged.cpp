// A linear layer through its merged weight W' = diag(s) W R^T, which is made in the forward and again in the backward:
// y = x W'^T + bias and dx = dy W'. The activations are not rotated at all. The gradient of R is x^T times the gradient
// of x R, which is dx R because R is orthogonal, so for every block it is the product of x^T dx with the block itself.
#include "linear.h"
#include "mkl_matrix.h"
#include "parts.h"
#include "product.h"
#include "tile_matrix.h"

#include <variant>

namespace boft {
namespace {

using at::Tensor;

Tensor merged_weight(const Layer& layer, const Tensor& blocks) {
  Merge call(layer.weight, blocks, layer.b, layer.m, layer.factors, true);
  return rotated_cpu(call, call.factors_data());
}

// Packs W'^T, which x is multiplied with, or W' for dy. Slices of it are made and packed one after the other, so that W'
// as a whole never lies in memory. A slice has all channels of some rows of W', or (`of_channels`) whole groups of
// channels of all rows.
template <typename Matrix>
Matrix packed_weight(const Layer& layer, const Tensor& blocks, bool of_channels, Matrix matrix) {
  const Rows weight(layer.weight);
  const boft_dtype dtype = data_dtype(layer.weight, "weight");
  const int64_t n = weight.rows, size = layer.weight.element_size();
  const boft_plan plan = make_plan(weight.columns, layer.b, layer.m);
  const Tensor flipped = transposed_blocks(plan, blocks);
  const auto *const rotations = flipped.const_data_ptr<float>(), *const factors = layer.factors.const_data_ptr<float>();
  at::parallel_for(0, matrix.slices(), 1, [&](int64_t begin, int64_t end) {
    const OneThread one_thread;
    for (int64_t slice = begin; slice < end; slice++) {
      const int64_t first = matrix.first(slice), count = matrix.first(slice + 1) - first;
      const int64_t channel = of_channels ? first : 0, row = of_channels ? 0 : first;
      const int64_t rows = of_channels ? n : count;
      const boft_plan own = of_channels ? make_plan(count, layer.b, layer.m) : plan;
      const Desk desk(layer.weight, rows, own.d, boft_rotate_workspace(&own, dtype));
      void* const values = desk.rows.mutable_data_ptr();
      const boft_rotate_args merge = {&own,
                                      dtype,
                                      1,
                                      rows,
                                      row_of(row_of(weight.data(), row, weight.stride, size), channel, 1, size),
                                      weight.stride,
                                      rotations + channel * plan.super,
                                      values,
                                      own.d};
      check(boft_merge(&merge, factors + row, 0, rows, desk.workspace.get()));
      matrix.pack(slice, values, own.d);
    }
  });
  return matrix;
}

// Whether products with such a weight are with a packed matrix.
bool is_packed(at::ScalarType dtype, int64_t d, int64_t n) {
  return MklMatrix::serves(dtype) || TileMatrix::serves(dtype, d, n);
}

// Rows of a part where torch multiplies. 16-bit parts may be long, as a part hands nothing on but what the next product
// reads. Steps on two Zen 4 cores, bfloat16, multiples of the frozen layer, parts of 1024 and of 2048 or more rows:
// 4096 rows of 96 x 96 1.40 and 1.31, of 96 x 384 1.20 and 1.15, of 384 x 384 1.07 and 1.03, 16384 of 96 x 96 1.44 and
// 1.23; 8192 of 2048 x 2048 equal. float32 gains nothing, and its bias, which oneDNN adds to, should lie in cache.
int64_t plain_part_rows(at::ScalarType dtype) { return c10::elementSize(dtype) == 2 ? 4096 : 1024; }

// Products with W'^T (`transposed`) or with W', made once.
class MergedProduct {
 public:
  MergedProduct(const Layer& layer, const Tensor& blocks, bool transposed) {
    const at::ScalarType dtype = layer.weight.scalar_type();
    packed_rows_ = dtype == at::kFloat ? 256 : 128;
    const int64_t d = layer.weight.size(1), n = layer.weight.size(0);
    const int64_t depth = transposed ? d : n, columns = transposed ? n : d;
    if (TileMatrix::serves(dtype, depth, columns)) {
      matrix_ = packed_weight(layer, blocks, false, TileMatrix(dtype, depth, columns, transposed));
    } else if (MklMatrix::serves(dtype)) {
      const int64_t granule = transposed ? make_plan(d, layer.b, layer.m).super : 1;
      matrix_ = packed_weight(layer, blocks, transposed, MklMatrix(depth, columns, transposed, granule));
    } else {
      matrix_ = transposed ? merged_weight(layer, blocks).t() : merged_weight(layer, blocks);
    }
  }

  // As parts_of. A packed matrix is not packed anew for every part, so these can be small: then what a product reads
  // and writes lies in cache for the sums over rows, and a thread takes fewer of them while its core is slow. Steps on
  // two shared Emerald Rapids cores, multiples of the frozen layer, means of several runs with one part a thread and
  // with these: float32 1024 rows of 768 x 768 1.02 and 0.97, 1576 of 384 x 1536 1.05 and 1.01; bfloat16 means of five
  // layers with parts of 512, 256 and 128 rows 1.24, 1.16 and 1.07.
  int64_t parts(int64_t rows, int64_t most) const {
    if (const auto* plain = std::get_if<Tensor>(&matrix_))
      return parts_of(rows, most, plain_part_rows(plain->scalar_type()));
    // Steps of whole models, float32 by MKL with 128 and 256 rows: Llama 1.06, 1.03 and 1.04, 0.93; ViT 1.16, 1.11 and
    // 1.06, 1.10. By the core on two Zen 4 cores, layers of 384 and 1536 channels 0.89, 0.94 and 0.84, 0.93.
    int64_t parts = 1;
    while (2 * parts <= most && rows > parts * packed_rows_) parts *= 2;
    return parts;
  }

  void operator()(const Tensor& rows, const std::optional<Tensor>& bias, const Tensor& out) const {
    if (const auto* plain = std::get_if<Tensor>(&matrix_)) return multiply_merged(rows, *plain, bias, out);
    if (const auto* packed = std::get_if<MklMatrix>(&matrix_)) return packed->multiply(rows, bias, out);
    std::get<TileMatrix>(matrix_).multiply(rows, bias, out);
  }

 private:
  std::variant<Tensor, MklMatrix, TileMatrix> matrix_;
  int64_t packed_rows_;  // of a part, where the matrix is packed
};

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
// Unless its products are faster than torch's. With packed matrices layers with twice as many outputs as rows gain too
// (two Emerald Rapids cores, multiples of the frozen layer, rotated and merged: 1024 rows of 768 x 2048 float32 1.05
// and 1.04, bfloat16 1.22 and 1.07, of 384 x 1536 1.10 and 1.06, 1.34 and 1.12), with four times as many they lose (512
// of 768 x 2048 float32: 1.08 and 1.12). By oneDNN (product.cpp) all layers do (Llama on two Zen 5 cores 0.64 instead
// of 0.80) but small ones, which have little to gain, and those whose merged weight would be large beside their input.
// For fewer rows than outputs the rotations of the merged way cost more, by 4 (n - rows) multiply-adds for each channel
// and G, and the products save about a tenth of 4 n rows (float32 on two Zen 4 cores, rotated and merged: 512 rows of
// 1280 x 1280 in groups of 160 1.21 and 1.34, of 64 1.105 and 1.115; of 1024 x 4096 in groups of 64 1.05 and 0.98;
// bfloat16, where little is saved: 1024 rows of 1280 x 1280 1.28 and 1.31, 1.125 and 1.115).
bool merge_pays(const Layer& layer, int64_t rows) {
  constexpr int64_t kFewestRows = 2 * kFewestPartRows, kFewestChannels = 256;
  if (rows < kFewestRows) return false;
  const int64_t d = layer.weight.size(1), n = layer.weight.size(0);
  const at::ScalarType dtype = layer.weight.scalar_type();
  const bool not_mkl = dtype == at::kFloat && onednn_products();
  const int64_t faster = not_mkl ? 4 : is_packed(dtype, d, n) ? 2 : 1, dearer = not_mkl ? 8 : 64;
  const int64_t outputs = rows * (d >= kFewestChannels ? faster : 1);
  if (n > outputs) return false;
  const boft_plan plan = make_plan(d, layer.b, layer.m);
  return plan.levels == 1 && dearer * plan.super * (n - rows) <= n * rows;
}

Tensor merged_forward(const Layer& layer, const Tensor& blocks, const Tensor& x) {
  const Rows in(x);
  const Tensor x_rows = rows_of(in.tensor), out = empty_rows(x, layer.weight.size(0)), out_rows = rows_of(out);
  const MergedProduct product(layer, blocks, true);
  const int64_t parts = product.parts(in.rows, in.rows);
  if (parts == 0) product(x_rows, layer.bias, out_rows);
  for_parts(parts, in.rows, x, 0, 0, [&](int64_t, int64_t first, int64_t past, const Desk&) {
    product(x_rows.narrow(0, first, past - first), layer.bias, out_rows.narrow(0, first, past - first));
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
  const MergedProduct product(layer, blocks, false);
  const int64_t tasks = boft_rotate_backward_tasks(&plan, rows), parts = product.parts(rows, gram.splits);
  const size_t workspace = boft_rotate_backward_workspace(&plan, gram.dtype);
  const auto sum_scale = [&](int64_t begin, int64_t end, void*) {
    return need.s ? boft_scale_backward(&scale.args, begin, end) : BOFT_OK;
  };
  const auto sum_gram = [&](int64_t begin, int64_t end, void* ws) {
    return boft_rotate_backward(&gram.args, begin, end, ws);
  };
  if (parts == 0) {
    parallel(scale_splits, dy.numel() * 8, 0, sum_scale);
    product(dy_rows, std::nullopt, dx_rows);
    parallel(tasks, dx.numel() * plan.super, workspace, sum_gram);
  }
  for_parts(parts, rows, dy, 0, workspace, [&](int64_t part, int64_t first, int64_t past, const Desk& desk) {
    product(dy_rows.narrow(0, first, past - first), std::nullopt, dx_rows.narrow(0, first, past - first));
    check(sum_scale(scale_splits * part / parts, scale_splits * (part + 1) / parts, nullptr));
    check(sum_gram(tasks * part / parts, tasks * (part + 1) / parts, desk.workspace.get()));
  });
  return {dx, need.boft_R ? sum_times_blocks(gram, layer, blocks) : Tensor(),
          need.s ? sum_splits(scale.ds, layer.factors) : Tensor()};
}

}  // namespace boft
