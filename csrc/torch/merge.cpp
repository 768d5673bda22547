// boft::merge: diag(s) W R^T.
#include "arguments.h"
#include "ops.h"

namespace boft {
namespace {

using at::Tensor;

const Tensor& check_weight(const Tensor& weight) {
  data_dtype(weight, "merge: weight");
  TORCH_CHECK_VALUE(weight.dim() == 2, "merge: expected a weight (rows, d), got ", weight.sizes());
  return weight;
}

Tensor merge_cpu(const Tensor& weight, const Tensor& blocks, int64_t b, int64_t m, const std::optional<Tensor>& s,
                 bool transpose) {
  Merge call(weight, blocks, b, m, s, transpose);
  return rotated_cpu(call, call.factors_data());
}

}  // namespace

Merge::Merge(const Tensor& weight, const Tensor& blocks, int64_t b, int64_t m, const std::optional<Tensor>& s,
             bool transpose)
    : Rotate(check_weight(weight), blocks, b, m, transpose, "merge"),
      factors(s ? real_vector(*s, weight.size(0), blocks.scalar_type(), "boft_s", "merge") : Tensor()) {}

void register_merge_cpu(torch::Library& library) { library.impl("merge", merge_cpu); }

}  // namespace boft
