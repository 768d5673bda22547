// boft::rotate: x R, and its backward.
#include "arguments.h"
#include "ops.h"
#include "packed.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstring>

namespace boft {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

boft_plan check_rotate_backward(const Tensor& dy, const Tensor& x, const Tensor& blocks, int64_t b, int64_t m,
                                bool need_blocks) {
  const boft_plan plan = check_rotate(dy, blocks, b, m);
  TORCH_CHECK_VALUE(!need_blocks || x.sizes() == dy.sizes(), "rotate backward: x ", x.sizes(), " and dy ", dy.sizes(),
                    " differ");
  TORCH_CHECK_TYPE(!need_blocks || x.scalar_type() == dy.scalar_type(), "rotate backward: x is ", x.scalar_type(),
                   " and dy ", dy.scalar_type());
  return plan;
}

// Multiply-adds per element of x.
int64_t work_per_element(const boft_plan& plan) {
  int64_t work = 0;
  for (int64_t i = 0; i < plan.levels; i++) work += plan.level[i].group + 8;
  return work;
}

}  // namespace

Tensor transposed_blocks(const boft_plan& plan, const Tensor& blocks) {
  const boft_dtype real = data_dtype(blocks, "blocks");
  Tensor out = empty_contiguous(blocks);
  for (int64_t i = 0; i < plan.levels; i++) {
    const int64_t group = plan.level[i].group, groups = plan.d / group;
    parallel(groups, groups * group * group, 0, [&](int64_t begin, int64_t end, void*) {
      return boft_transpose(&plan, real, i, begin, end, blocks.const_data_ptr(), out.mutable_data_ptr());
    });
  }
  return out;
}

boft_plan check_rotate(const Tensor& x, const Tensor& blocks, int64_t b, int64_t m, const char* op) {
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x needs at least one axis");
  const boft_plan plan = make_plan(x.size(-1), b, m);
  TORCH_CHECK_VALUE(blocks.numel() == plan.count, op, ": ", blocks.numel(), " elements of blocks do not fit ", plan.d,
                    " channels with b = ", plan.b, " and m = ", plan.m, ", which have ", plan.count);
  const at::ScalarType real = real_dtype(x.scalar_type());
  TORCH_CHECK_TYPE(blocks.scalar_type() == real, op, ": ", x.scalar_type(), " data needs ", real, " blocks, got ",
                   blocks.scalar_type());
  return plan;
}

Rotate::Rotate(const Tensor& x, const Tensor& blocks_any, int64_t b, int64_t m, bool transpose, const char* op)
    : dtype(data_dtype(x, "x")),
      plan(check_rotate(x, blocks_any, b, m, op)),
      in(x),
      blocks(blocks_any.contiguous()),
      y(empty_contiguous(x)) {
  args = {&plan,     dtype, transpose, in.rows, in.data(), in.stride, blocks.const_data_ptr(), y.mutable_data_ptr(),
          plan.d};
}

Tensor rotated_cpu(Rotate& call, const void* factors) {
  const boft_plan& plan = call.plan;
  const Tensor oriented = call.args.transpose ? transposed_blocks(plan, call.blocks) : call.blocks;
  call.args.blocks = oriented.const_data_ptr();
  parallel(call.in.rows, call.in.rows * plan.d * work_per_element(plan), boft_rotate_workspace(&plan, call.dtype),
           [&](int64_t begin, int64_t end, void* ws) { return boft_merge(&call.args, factors, begin, end, ws); });
  return call.y;
}

// compact matters to the backward only.
Tensor rotate_cpu(const Tensor& x, const Tensor& blocks, int64_t b, int64_t m, bool transpose, bool) {
  Rotate call(x, blocks, b, m, transpose);
  return rotated_cpu(call, nullptr);
}

namespace {

// Rows from which on a run is worth a call of its own; a core that packs blocks for pairs does so from as many rows.
constexpr int64_t kLongRun = 16;
// Rows that one call takes of those gathered for an adapter, and the bytes of x among which they should stay.
constexpr int64_t kGatheredRows = 128, kGatheredBytes = 1 << 18;

// Rows of one adapter that do not lie together.
struct Scattered {
  int64_t adapter, first, past;  // within Order::rows
};

// The rows of a batch seen as Rows, sorted by adapter, and cut into pieces by the batch's shape alone.
struct Order {
  std::vector<int64_t> rows;
  std::vector<Scattered> pieces;

  Order(const Runs& runs, int64_t count, int64_t adapters, int64_t most) {
    std::vector<std::vector<int64_t>> own(adapters + 1);
    const auto note = [&](int64_t adapter, int64_t, int64_t, int64_t first, int64_t stop) {
      for (int64_t row = first; row < stop; row++) own[adapter + 1].push_back(row);
      return BOFT_OK;
    };
    runs.visit(count, 0, count, note);
    rows.reserve(count);
    for (int64_t i = 0; i <= adapters; i++) {
      const int64_t start = rows.size(), size = own[i].size(), cuts = (size + most - 1) / most;
      rows.insert(rows.end(), own[i].begin(), own[i].end());
      for (int64_t cut = 0; cut < cuts; cut++)
        pieces.push_back({i - 1, start + size * cut / cuts, start + size * (cut + 1) / cuts});
    }
  }
};

}  // namespace

Tensor rotate_runs_cpu(const Tensor& x, const Runs& runs, const std::vector<Rotation>& rotations) {
  const boft_dtype dtype = data_dtype(x, "x");
  runs.check(x, static_cast<int64_t>(rotations.size()));
  const Rows in(x);
  Tensor y = empty_contiguous(x);
  std::vector<boft_plan> plans;
  size_t workspace = 0;
  int64_t work = 1;
  for (const auto& [blocks, b, m] : rotations) {
    plans.push_back(check_rotate(x, blocks, b, m));
    workspace = std::max(workspace, boft_rotate_workspace(&plans.back(), dtype));
    work = std::max(work, work_per_element(plans.back()));
  }
  const int64_t row_bytes = in.columns * x.element_size(), total_work = in.rows * in.columns * work;
  const char* const from = static_cast<const char*>(in.data());
  char* const to = static_cast<char*>(y.mutable_data_ptr());
  // Rows first ... past-1 as a call of their own, so that the core chooses its kernel by their number.
  const auto rotate = [&](int64_t adapter, int64_t rows, const char* data, int64_t stride, char* out, int64_t begin,
                          int64_t end, void* ws) {
    const boft_rotate_args args = {&plans[adapter], dtype, 0, rows, data, stride,
                                   rotations[adapter].blocks.const_data_ptr(), out, in.columns};
    return boft_rotate(&args, begin, end, ws);
  };
  if (in.rows >= kLongRun * static_cast<int64_t>(runs.ends.size())) {
    parallel(in.rows, total_work, workspace, [&](int64_t begin, int64_t end, void* ws) {
      return runs.visit(in.rows, begin, end, [&](int64_t adapter, int64_t first, int64_t past, int64_t start,
                                                 int64_t stop) {
        if (adapter < 0) return copy_rows(in, y, start, stop), BOFT_OK;
        return rotate(adapter, past - first, from + first * in.stride * x.element_size(), in.stride,
                      to + first * row_bytes, start - first, stop - first, ws);
      });
    });
    return y;
  }
  // Short runs: a row at a time would read the blocks for every row, so rows of an adapter are brought together.
  const int64_t most = std::clamp<int64_t>(kGatheredBytes / std::max<int64_t>(1, row_bytes), 32, kGatheredRows);
  const Order order(runs, in.rows, static_cast<int64_t>(rotations.size()), most);
  const size_t core = (workspace + 63) / 64 * 64;
  parallel(static_cast<int64_t>(order.pieces.size()), total_work, core + 2 * most * row_bytes,
           [&](int64_t begin, int64_t end, void* ws) {
             char* const gathered = static_cast<char*>(ws) + core;
             char* const rotated = gathered + most * row_bytes;
             for (int64_t i = begin; i < end; i++) {
               const auto& [adapter, first, past] = order.pieces[i];
               const int64_t rows = past - first;
               for (int64_t at = first; at < past && adapter < 0; at++)
                 copy_rows(in, y, order.rows[at], order.rows[at] + 1);
               if (adapter < 0) continue;
               for (int64_t t = 0; t < rows; t++)
                 std::memcpy(gathered + t * row_bytes, from + order.rows[first + t] * in.stride * x.element_size(),
                             row_bytes);
               check(rotate(adapter, rows, gathered, in.columns, rotated, 0, rows, ws));
               for (int64_t t = 0; t < rows; t++)
                 std::memcpy(to + order.rows[first + t] * row_bytes, rotated + t * row_bytes, row_bytes);
             }
             return BOFT_OK;
           });
  return y;
}

RotateBackward::RotateBackward(const Tensor& dy, const Tensor& x, const Tensor& blocks_any, int64_t b, int64_t m,
                               bool transpose, bool need_x, bool need_blocks, bool in_place)
    : dtype(data_dtype(dy, "dy")),
      plan(check_rotate_backward(dy, x, blocks_any, b, m, need_blocks)),
      grad(dy),
      in(need_blocks ? x : dy),
      blocks(blocks_any.contiguous()),
      dx(!need_x ? empty_contiguous(dy, {0}) : in_place ? dy : empty_contiguous(dy)),
      dblocks(empty_contiguous(blocks, {need_blocks ? plan.count : 0})),
      args{} {
  args.plan = &plan;
  args.dtype = dtype;
  args.transpose = transpose;
  args.rows = grad.rows;
  args.dy = grad.data();
  args.dy_stride = grad.stride;
  args.x = need_blocks ? in.data() : nullptr;
  args.x_stride = in.stride;
  args.blocks = blocks.const_data_ptr();
  args.dx = need_x ? dx.mutable_data_ptr() : nullptr;
  args.dx_stride = plan.d;
  args.dblocks = need_blocks ? dblocks.mutable_data_ptr() : nullptr;
}

RotateBackwardSplits::RotateBackwardSplits(const Tensor& dy, const Tensor& x, const Tensor& blocks_any, int64_t b,
                                           int64_t m, bool transpose, bool need_x, bool need_blocks, bool in_place)
    : RotateBackward(dy, x, blocks_any, b, m, transpose, need_x, need_blocks, in_place),
      splits(boft_rotate_backward_splits(&plan, grad.rows)) {
  const bool several = plan.levels > 1;
  // Going back from x R needs the other orientation for dx, and from x R^T for the inputs between levels.
  const bool need_flipped = transpose ? need_blocks && several : need_x || several;
  flipped = need_flipped ? transposed_blocks(plan, blocks) : blocks;
  args.blocks = (transpose ? flipped : blocks).const_data_ptr();
  args.blocks_back = (transpose ? blocks : flipped).const_data_ptr();
  if (!need_blocks || splits == 1) return;
  parts = empty_contiguous(blocks, {splits, plan.count});
  args.dblocks = parts.mutable_data_ptr();
}

void RotateBackwardSplits::sum() {
  if (!parts.defined()) return;
  parallel(plan.count, plan.count * splits, 0, [&](int64_t begin, int64_t end, void*) { return sum(begin, end); });
}

boft_status RotateBackwardSplits::sum(int64_t begin, int64_t end) const {
  if (!parts.defined()) return BOFT_OK;
  return boft_sum_splits(data_dtype(parts, "dblocks"), splits, plan.count, parts.const_data_ptr(),
                         dblocks.mutable_data_ptr(), begin, end);
}

std::tuple<Tensor, Tensor> rotate_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& blocks, int64_t b,
                                               int64_t m, bool transpose, bool need_x, bool need_blocks,
                                               bool in_place) {
  RotateBackwardSplits call(dy, x, blocks, b, m, transpose, need_x, need_blocks, in_place);
  const boft_plan& plan = call.plan;
  const int64_t rows = call.grad.rows;
  parallel(boft_rotate_backward_tasks(&plan, rows), rows * plan.d * work_per_element(plan) * 2,
           boft_rotate_backward_workspace(&plan, call.dtype),
           [&](int64_t begin, int64_t end, void* ws) { return boft_rotate_backward(&call.args, begin, end, ws); });
  call.sum();
  return {call.dx, call.dblocks};
}

namespace {

// The same from packed x. Every piece of at most kUnpackedRows rows is unpacked into a buffer of its thread and gives
// partial gradients of the blocks, which are added in the order of rows, several pieces at a time as the shape
// prescribes. Pieces are of equal size: a short last one might run on another kernel, and dx would not be that of
// unpacked x.
std::tuple<Tensor, Tensor> rotate_backward_packed_cpu(const Tensor& dy, const Tensor& packed, const Tensor& blocks_any,
                                                      int64_t b, int64_t m, bool transpose, bool need_x) {
  constexpr int64_t kPartialElements = 1 << 18, kMostPieces = 32;
  const boft_dtype dtype = data_dtype(dy, "dy"), real = dtype == BOFT_F64 ? BOFT_F64 : BOFT_F32;
  const boft_plan plan = check_rotate(dy, blocks_any, b, m);
  const Rows grad(dy);
  check_packed(packed, grad.rows, plan.d, kBitsOfX);
  const bool need_flipped = transpose ? plan.levels > 1 : need_x || plan.levels > 1;
  const Tensor given = blocks_any.contiguous(), flipped = need_flipped ? transposed_blocks(plan, given) : given;
  Tensor dx = need_x ? empty_contiguous(dy) : at::empty({0}, dy.options());
  const int64_t pieces = (grad.rows + kUnpackedRows - 1) / kUnpackedRows;
  const int64_t together = std::clamp<int64_t>(kPartialElements / plan.count, 2, kMostPieces);
  // The sum so far, and the pieces to add.
  Tensor parts = at::empty({1 + std::min(together, pieces), plan.count}, given.options());
  Tensor dblocks = at::zeros({plan.count}, given.options());
  const int64_t size = dy.element_size(), size_of_real = given.element_size();
  const size_t core = (boft_rotate_backward_workspace(&plan, dtype) + 63) / 64 * 64;
  const size_t workspace = core + static_cast<size_t>(kUnpackedRows * plan.d * size);
  const auto at_row = [&](const void* data, int64_t row, int64_t stride) {
    return static_cast<const char*>(data) + row * stride * size;
  };
  char* const partial = static_cast<char*>(parts.mutable_data_ptr());
  char* const out = need_x ? static_cast<char*>(dx.mutable_data_ptr()) : nullptr;
  const auto one_piece = [&](int64_t piece, void* to, char* ws) {
    const int64_t first = grad.rows * piece / pieces, rows = grad.rows * (piece + 1) / pieces - first;
    void* const x = ws + core;
    check(boft_unpack(dtype, kBitsOfX, rows, plan.d, at_row(packed.const_data_ptr(), 0, 0) + first * packed.size(1), x,
                      plan.d, 0, rows));
    boft_rotate_backward_args args = {};
    args.plan = &plan;
    args.dtype = dtype;
    args.transpose = transpose;
    args.rows = rows;
    args.dy = at_row(grad.data(), first, grad.stride);
    args.dy_stride = grad.stride;
    args.x = x;
    args.x_stride = plan.d;
    args.blocks = (transpose ? flipped : given).const_data_ptr();
    args.blocks_back = (transpose ? given : flipped).const_data_ptr();
    args.dx = need_x ? out + first * plan.d * size : nullptr;
    args.dx_stride = plan.d;
    args.dblocks = to;
    return boft_rotate_backward(&args, 0, boft_rotate_backward_tasks(&plan, rows), ws);
  };
  static_assert(kUnpackedRows <= 128, "a piece must be one split");
  for (int64_t done = 0; done < pieces; done += together) {
    const int64_t now = std::min(together, pieces - done);
    parallel(now, now * kUnpackedRows * plan.d * work_per_element(plan) * 2, workspace,
             [&](int64_t begin, int64_t end, void* ws) {
               for (int64_t i = begin; i < end; i++)
                 check(one_piece(done + i, partial + (1 + i) * plan.count * size_of_real, static_cast<char*>(ws)));
               return BOFT_OK;
             });
    if (done == 0) std::memset(partial, 0, static_cast<size_t>(plan.count * size_of_real));
    void* const sum = done + now == pieces ? dblocks.mutable_data_ptr() : partial;
    parallel(plan.count, plan.count * now, 0, [&](int64_t begin, int64_t end, void*) {
      return boft_sum_splits(real, 1 + now, plan.count, partial, sum, begin, end);
    });
  }
  return {dx, dblocks};
}

Tensor call_rotate(const Tensor& x, const Tensor& blocks, int64_t b, int64_t m, bool transpose, bool compact) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("boft::rotate", "")
                             .typed<Tensor(const Tensor&, const Tensor&, int64_t, int64_t, bool, bool)>();
  return op.call(x, blocks, b, m, transpose, compact);
}

}  // namespace

std::tuple<Tensor, Tensor> call_rotate_backward(const Tensor& dy, const Tensor& x, const Tensor& blocks, int64_t b,
                                                int64_t m, bool transpose, bool need_x, bool need_blocks) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("boft::rotate_backward", "")
          .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool, bool,
                                            bool)>();
  return op.call(dy, x, blocks, b, m, transpose, need_x, need_blocks);
}

namespace {

std::tuple<Tensor, Tensor> call_rotate_backward_packed(const Tensor& dy, const Tensor& packed, const Tensor& blocks,
                                                       int64_t b, int64_t m, bool transpose, bool need_x) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("boft::rotate_backward_packed", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                               int64_t, bool, bool)>();
  return op.call(dy, packed, blocks, b, m, transpose, need_x);
}

class RotateFunction : public torch::autograd::Function<RotateFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& blocks, int64_t b, int64_t m,
                        bool transpose, bool packed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    // x is needed for the gradient of the blocks alone.
    ctx->save_for_backward({packed ? pack_shared(x) : blocks.requires_grad() ? x : Tensor(), blocks});
    ctx->saved_data["packed"] = packed;
    ctx->saved_data["b"] = b;
    ctx->saved_data["m"] = m;
    ctx->saved_data["transpose"] = transpose;
    return call_rotate(x, blocks, b, m, transpose, false);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const bool need_x = ctx->needs_input_grad(0), need_blocks = ctx->needs_input_grad(1);
    const int64_t b = ctx->saved_data["b"].toInt(), m = ctx->saved_data["m"].toInt();
    const bool transpose = ctx->saved_data["transpose"].toBool();
    const Tensor& dy = grads[0];
    auto [dx, dblocks] =
        ctx->saved_data["packed"].toBool() && need_blocks
            ? call_rotate_backward_packed(dy, saved[0], saved[1], b, m, transpose, need_x)
            : call_rotate_backward(dy, need_blocks ? saved[0] : dy, saved[1], b, m, transpose, need_x, need_blocks);
    return {need_x ? dx : Tensor(), need_blocks ? dblocks : Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor rotate_autograd(const Tensor& x, const Tensor& blocks, int64_t b, int64_t m, bool transpose, bool compact) {
  return RotateFunction::apply(x, blocks, b, m, transpose, packs(compact, x, blocks));
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor rotate_autocast(const Tensor& x, const Tensor& blocks, int64_t b, int64_t m, bool transpose, bool compact) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType to = at::autocast::get_autocast_dtype(device);
  return call_rotate(at::autocast::cached_cast(to, x, device), blocks, b, m, transpose, compact);
}

}  // namespace

void register_rotate_cpu(torch::Library& library) {
  library.impl("rotate", rotate_cpu);
  library.impl("rotate_backward", +[](const Tensor& dy, const Tensor& x, const Tensor& blocks, int64_t b, int64_t m,
                                      bool transpose, bool need_x, bool need_blocks) {
    return rotate_backward_cpu(dy, x, blocks, b, m, transpose, need_x, need_blocks);
  });
}

// Not withdrawn with the other CPU kernels: what was packed must be unpacked.
TORCH_LIBRARY_IMPL(boft, CPU, library) {
  library.impl("rotate_backward_packed", rotate_backward_packed_cpu);
}

TORCH_LIBRARY_IMPL(boft, Autograd, library) {
  library.impl("rotate", rotate_autograd);
}

TORCH_LIBRARY_IMPL(boft, AutocastCPU, library) {
  library.impl("rotate", rotate_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(boft, AutocastCUDA, library) {
  library.impl("rotate", rotate_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace boft
