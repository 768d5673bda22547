// boft::blocks: parameters to collapsed blocks, and its backward.
#include "common.h"
#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

namespace boft {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// keep as one byte a block, or NULL.
const unsigned char* keep_bytes(const std::optional<Tensor>& keep, int64_t blocks, Tensor& holder) {
  if (!keep.has_value()) return nullptr;
  TORCH_CHECK_TYPE(keep->scalar_type() == at::kBool, "keep: expected bool, got ", keep->scalar_type());
  TORCH_CHECK_VALUE(keep->numel() == blocks, "keep: expected one value for each of ", blocks, " blocks, got ",
                    keep->sizes());
  holder = keep->contiguous();
  return static_cast<const unsigned char*>(holder.const_data_ptr());
}

void check_blocks(const Tensor& blocks, const char* what) {
  TORCH_CHECK_VALUE(blocks.dim() == 4 && blocks.size(2) == blocks.size(3), what, ": expected (m, d / b, b, b), got ",
                    blocks.sizes());
  TORCH_CHECK_TYPE(blocks.scalar_type() == at::kFloat || blocks.scalar_type() == at::kDouble, what,
                   ": expected float32 or float64, got ", blocks.scalar_type());
}

// Multiply-adds that one group of a level costs to collapse, or a little for a copy.
int64_t collapse_work(const boft_plan& plan, const boft_level& level) {
  return level.group * level.group * (plan.b * (level.factors - 1) + 1);
}

std::tuple<Tensor, Tensor> blocks_cpu(const Tensor& boft_R, const std::optional<Tensor>& keep) {
  check_blocks(boft_R, "boft_R");
  const int64_t m = boft_R.size(0), count = boft_R.size(1), b = boft_R.size(2);
  const boft_plan plan = make_plan(count * b, b, m);
  const boft_dtype dtype = data_dtype(boft_R, "boft_R");
  Tensor holder;
  const unsigned char* kept = keep_bytes(keep, m * count, holder);
  const Tensor a = boft_R.contiguous();
  Tensor blocks = at::empty({plan.count}, a.options());
  // With one factor the blocks are Q itself.
  Tensor q = m == 1 ? at::empty({0}, a.options()) : at::empty_like(a);
  void* to = m == 1 ? blocks.mutable_data_ptr() : q.mutable_data_ptr();
  parallel(m * count, m * count * b * b * b * 2, boft_cayley_workspace(b), [&](int64_t begin, int64_t end, void* ws) {
    return boft_cayley(dtype, b, begin, end, a.const_data_ptr(), kept, to, ws);
  });
  for (int64_t i = 0; m > 1 && i < plan.levels; i++) {
    const boft_level& level = plan.level[i];
    const int64_t groups = plan.d / level.group;
    parallel(groups, groups * collapse_work(plan, level), boft_collapse_workspace(&plan, dtype),
             [&](int64_t begin, int64_t end, void* ws) {
               return boft_collapse(&plan, dtype, i, begin, end, to, blocks.mutable_data_ptr(), ws);
             });
  }
  return {blocks, q};
}

Tensor blocks_backward_cpu(const Tensor& dblocks, const Tensor& q, const std::optional<Tensor>& keep) {
  check_blocks(q, "q");
  const int64_t m = q.size(0), count = q.size(1), b = q.size(2);
  const boft_plan plan = make_plan(count * b, b, m);
  const boft_dtype dtype = data_dtype(q, "q");
  TORCH_CHECK_VALUE(dblocks.numel() == plan.count, "dblocks: expected ", plan.count, " elements, got ", dblocks.numel());
  TORCH_CHECK_TYPE(dblocks.scalar_type() == q.scalar_type(), "dblocks: expected ", q.scalar_type(), ", got ",
                   dblocks.scalar_type());
  Tensor holder;
  const unsigned char* kept = keep_bytes(keep, m * count, holder);
  const Tensor grad = dblocks.contiguous(), qc = q.contiguous();
  Tensor da = at::empty_like(qc);
  for (int64_t i = 0; i < plan.levels; i++) {
    const boft_level& level = plan.level[i];
    const int64_t groups = plan.d / level.group;
    parallel(groups, groups * collapse_work(plan, level) * 2, boft_collapse_workspace(&plan, dtype),
             [&](int64_t begin, int64_t end, void* ws) {
               return boft_collapse_backward(&plan, dtype, i, begin, end, grad.const_data_ptr(), qc.const_data_ptr(),
                                             da.mutable_data_ptr(), ws);
             });
  }
  parallel(m * count, m * count * b * b * b * 2, boft_cayley_workspace(b), [&](int64_t begin, int64_t end, void* ws) {
    return boft_cayley_backward(dtype, b, begin, end, da.const_data_ptr(), qc.const_data_ptr(), kept,
                                da.mutable_data_ptr(), ws);
  });
  return da;
}

std::tuple<Tensor, Tensor> call_blocks(const Tensor& boft_R, const std::optional<Tensor>& keep) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("boft::blocks", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, const std::optional<Tensor>&)>();
  return op.call(boft_R, keep);
}

Tensor call_blocks_backward(const Tensor& dblocks, const Tensor& q, const std::optional<Tensor>& keep) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("boft::blocks_backward", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&)>();
  return op.call(dblocks, q, keep);
}

class BlocksFunction : public torch::autograd::Function<BlocksFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& boft_R, const std::optional<Tensor>& keep) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [blocks, q] = call_blocks(boft_R, keep);
    const bool single = boft_R.sym_size(0) == 1;
    ctx->save_for_backward({single ? blocks.view_symint(boft_R.sym_sizes()) : q, keep.value_or(Tensor())});
    ctx->mark_non_differentiable({q});
    return {blocks, q};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const std::optional<Tensor> keep = saved[1].defined() ? std::optional<Tensor>(saved[1]) : std::nullopt;
    return {call_blocks_backward(grads[0], saved[0], keep), Tensor()};
  }
};

std::tuple<Tensor, Tensor> blocks_autograd(const Tensor& boft_R, const std::optional<Tensor>& keep) {
  auto out = BlocksFunction::apply(boft_R, keep);
  return {out[0], out[1]};
}

}  // namespace

void register_blocks_cpu(torch::Library& library) {
  library.impl("blocks", blocks_cpu);
  library.impl("blocks_backward", blocks_backward_cpu);
}

TORCH_LIBRARY_IMPL(boft, Autograd, library) {
  library.impl("blocks", blocks_autograd);
}

}  // namespace boft
