// What the operators' arguments are to the core, on every device: checked (ValueError or TypeError naming the values),
// laid out as the C interface takes them, and the results allocated. Each struct is one call; pointers in its `args`
// are into its tensors and its plan.
#pragma once

#include <optional>

#include "common.h"

namespace boft {

// One byte for each of `blocks` blocks, or NULL where there is none.
struct Keep {
  Keep(const std::optional<at::Tensor>& keep, int64_t blocks);
  at::Tensor tensor;
  const unsigned char* data() const;
};

// blocks.cpp. boft_R (m, d / b, b, b) -> collapsed blocks; q is empty for m = 1.
struct Blocks {
  Blocks(const at::Tensor& boft_R, const std::optional<at::Tensor>& keep);
  boft_plan plan;
  boft_dtype dtype;
  Keep keep;
  at::Tensor a, blocks, q;
};

struct BlocksBackward {
  BlocksBackward(const at::Tensor& dblocks, const at::Tensor& q, const std::optional<at::Tensor>& keep);
  boft_plan plan;
  boft_dtype dtype;
  Keep keep;
  at::Tensor dblocks, q, da;
};

// rotate.cpp. The plan for x (..., d), which the blocks must fit; `op` is in the messages.
boft_plan check_rotate(const at::Tensor& x, const at::Tensor& blocks, int64_t b, int64_t m, const char* op = "rotate");

// `blocks` as given: a caller whose kernels want them transposed says so in args.
struct Rotate {
  Rotate(const at::Tensor& x, const at::Tensor& blocks, int64_t b, int64_t m, bool transpose,
         const char* op = "rotate");
  Rotate(const Rotate&) = delete;
  boft_dtype dtype;
  boft_plan plan;
  Rows in;
  at::Tensor blocks, y;
  boft_rotate_args args;
};

// Every block transposed: what the CPU kernels take for R^T.
at::Tensor transposed_blocks(const boft_plan& plan, const at::Tensor& blocks);

// y of a call by the CPU kernels, its rows times `factors` unless they are NULL.
at::Tensor rotated_cpu(Rotate& call, const void* factors);

// merge.cpp. A Rotate of the rows of a weight (rows, d), and their factors: one for each row, undefined for ones.
struct Merge : Rotate {
  Merge(const at::Tensor& weight, const at::Tensor& blocks, int64_t b, int64_t m, const std::optional<at::Tensor>& s,
        bool transpose);
  const void* factors_data() const { return factors.defined() ? factors.const_data_ptr() : nullptr; }
  at::Tensor factors;
};

// dx and dblocks are empty where they are not needed; args.dblocks has the room of one split. With in_place, dx is dy,
// which is contiguous then; only the CPU kernels can do that.
struct RotateBackward {
  RotateBackward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& blocks, int64_t b, int64_t m,
                 bool transpose, bool need_x, bool need_blocks, bool in_place = false);
  RotateBackward(const RotateBackward&) = delete;
  boft_dtype dtype;
  boft_plan plan;
  Rows grad, in;
  at::Tensor blocks, dx, dblocks;
  boft_rotate_backward_args args;
};

// A RotateBackward of the CPU kernels, which need the blocks in the other orientation too and room for the
// gradients of all splits; `sum` adds these up once every task is done.
struct RotateBackwardSplits : RotateBackward {
  RotateBackwardSplits(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& blocks, int64_t b, int64_t m,
                       bool transpose, bool need_x, bool need_blocks, bool in_place);
  void sum();
  // Elements begin ... end-1 of the sum alone; nothing where there is one split.
  boft_status sum(int64_t begin, int64_t end) const;
  int64_t splits;
  at::Tensor flipped, parts;
};

// scale.cpp. A scale or bias of n values as a contiguous vector of the arithmetic's dtype; `op` is in the messages.
at::Tensor real_vector(const at::Tensor& values, int64_t n, at::ScalarType real, const char* what,
                       const char* op = "scale");

// The scale and the bias, undefined without one, as such vectors.
struct Scale {
  Scale(const at::Tensor& z, const at::Tensor& s, const std::optional<at::Tensor>& bias);
  Scale(const Scale&) = delete;
  boft_dtype dtype;
  int64_t n;
  at::Tensor factors, shifts;
  Rows in;
  at::Tensor out;
  boft_scale_args args;
};

// ds and dbias are (splits(rows), n), or (0, n) where they are not needed.
struct ScaleBackward {
  ScaleBackward(const at::Tensor& dy, const std::optional<at::Tensor>& z, const at::Tensor& s,
                const std::optional<at::Tensor>& bias, bool bias_detached, bool need_z, bool need_s, bool need_bias,
                int64_t (*splits)(int64_t rows));
  ScaleBackward(const ScaleBackward&) = delete;
  boft_dtype dtype;
  int64_t n;
  at::Tensor factors, shifts;
  Rows grad, in;
  at::Tensor dz, ds, dbias;
  boft_scale_backward_args args;
};

// Sums over rows, one vector per split, added in order: the gradient of `parameter`.
at::Tensor sum_splits(const at::Tensor& parts, const at::Tensor& parameter);

// A sum of n values with the shape and dtype of the parameter that it is the gradient of.
at::Tensor shaped_like(const at::Tensor& sum, const at::Tensor& parameter);

}  // namespace boft
