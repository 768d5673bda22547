// boft::blocks: parameters to collapsed blocks, and its backward.
#include "arguments.h"
#include "ops.h"

#include <torch/csrc/autograd/custom_function.h>

namespace boft {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The plan for blocks of shape (m, d / b, b, b).
boft_plan plan_of(const Tensor& blocks, const char* what) {
  TORCH_CHECK_VALUE(blocks.dim() == 4 && blocks.size(2) == blocks.size(3), what, ": expected (m, d / b, b, b), got ",
                    blocks.sizes());
  TORCH_CHECK_TYPE(blocks.scalar_type() == at::kFloat || blocks.scalar_type() == at::kDouble, what,
                   ": expected float32 or float64, got ", blocks.scalar_type());
  return make_plan(blocks.size(1) * blocks.size(2), blocks.size(2), blocks.size(0));
}

// Multiply-adds that one group of a level costs to collapse, or a little for a copy.
int64_t collapse_work(const boft_plan& plan, const boft_level& level) {
  return level.group * level.group * (plan.b * (level.factors - 1) + 1);
}

}  // namespace

Keep::Keep(const std::optional<Tensor>& keep, int64_t blocks) {
  if (!keep.has_value()) return;
  TORCH_CHECK_TYPE(keep->scalar_type() == at::kBool, "keep: expected bool, got ", keep->scalar_type());
  TORCH_CHECK_VALUE(keep->numel() == blocks, "keep: expected one value for each of ", blocks, " blocks, got ",
                    keep->sizes());
  tensor = keep->contiguous();
}

const unsigned char* Keep::data() const {
  return tensor.defined() ? static_cast<const unsigned char*>(tensor.const_data_ptr()) : nullptr;
}

Blocks::Blocks(const Tensor& boft_R, const std::optional<Tensor>& keep_any)
    : plan(plan_of(boft_R, "boft_R")),
      dtype(data_dtype(boft_R, "boft_R")),
      keep(keep_any, plan.m * plan.blocks),
      a(boft_R.contiguous()),
      blocks(empty_contiguous(a, {plan.count})),
      q(plan.m == 1 ? empty_contiguous(a, {0}) : empty_contiguous(a)) {}

BlocksBackward::BlocksBackward(const Tensor& dblocks_any, const Tensor& q_any, const std::optional<Tensor>& keep_any)
    : plan(plan_of(q_any, "q")), dtype(data_dtype(q_any, "q")), keep(keep_any, plan.m * plan.blocks) {
  TORCH_CHECK_VALUE(dblocks_any.numel() == plan.count, "dblocks: expected ", plan.count, " elements, got ",
                    dblocks_any.numel());
  TORCH_CHECK_TYPE(dblocks_any.scalar_type() == q_any.scalar_type(), "dblocks: expected ", q_any.scalar_type(),
                   ", got ", dblocks_any.scalar_type());
  dblocks = dblocks_any.contiguous();
  q = q_any.contiguous();
  da = empty_contiguous(q);
}

std::tuple<Tensor, Tensor> blocks_cpu(const Tensor& boft_R, const std::optional<Tensor>& keep) {
  const Blocks call(boft_R, keep);
  const boft_plan& plan = call.plan;
  const int64_t b = plan.b, count = plan.m * plan.blocks;
  void* const blocks = call.blocks.mutable_data_ptr();
  // With one factor the blocks are Q itself.
  void* const q = plan.m == 1 ? blocks : call.q.mutable_data_ptr();
  parallel(count, count * b * b * b * 2, boft_cayley_workspace(b), [&](int64_t begin, int64_t end, void* ws) {
    return boft_cayley(call.dtype, b, begin, end, call.a.const_data_ptr(), call.keep.data(), q, ws);
  });
  for (int64_t i = 0; plan.m > 1 && i < plan.levels; i++) {
    const boft_level& level = plan.level[i];
    const int64_t groups = plan.d / level.group;
    parallel(groups, groups * collapse_work(plan, level), boft_collapse_workspace(&plan, call.dtype),
             [&](int64_t begin, int64_t end, void* ws) {
               return boft_collapse(&plan, call.dtype, i, begin, end, q, blocks, ws);
             });
  }
  return {call.blocks, call.q};
}

Tensor blocks_backward_cpu(const Tensor& dblocks, const Tensor& q, const std::optional<Tensor>& keep) {
  const BlocksBackward call(dblocks, q, keep);
  const boft_plan& plan = call.plan;
  const int64_t b = plan.b, count = plan.m * plan.blocks;
  const void* const qs = call.q.const_data_ptr();
  void* const da = call.da.mutable_data_ptr();
  for (int64_t i = 0; i < plan.levels; i++) {
    const boft_level& level = plan.level[i];
    const int64_t groups = plan.d / level.group;
    parallel(groups, groups * collapse_work(plan, level) * 2, boft_collapse_workspace(&plan, call.dtype),
             [&](int64_t begin, int64_t end, void* ws) {
               return boft_collapse_backward(&plan, call.dtype, i, begin, end, call.dblocks.const_data_ptr(), qs, da,
                                             ws);
             });
  }
  parallel(count, count * b * b * b * 2, boft_cayley_workspace(b), [&](int64_t begin, int64_t end, void* ws) {
    return boft_cayley_backward(call.dtype, b, begin, end, da, qs, call.keep.data(), da, ws);
  });
  return call.da;
}

namespace {

std::tuple<Tensor, Tensor> call_blocks(const Tensor& boft_R, const std::optional<Tensor>& keep) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("boft::blocks", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, const std::optional<Tensor>&)>();
  return op.call(boft_R, keep);
}

}  // namespace

Tensor call_blocks_backward(const Tensor& dblocks, const Tensor& q, const std::optional<Tensor>& keep) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("boft::blocks_backward", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&)>();
  return op.call(dblocks, q, keep);
}

namespace {

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
    const std::optional<Tensor> keep = optional_of(saved[1]);
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
