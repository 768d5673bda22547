// What the operators share: checks that become Python exceptions, rows of tensors, threads and workspaces.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "boft.h"

namespace boft {

// Turns a refusal of the core into ValueError or TypeError, or a failed launch into RuntimeError, with its message.
void check(boft_status status);

// The dtype as the core names it; TypeError, naming `what` and the dtype, if it is not one of the four.
boft_dtype data_dtype(const at::Tensor& tensor, const char* what);

// float64 for float64 data, float32 for all others: the dtype of blocks, scales and arithmetic.
at::ScalarType real_dtype(at::ScalarType data);

// The plan for (d, b, m); ValueError if there is none.
boft_plan make_plan(int64_t d, int64_t b, int64_t m);

// Whether an operator called with this tensor would reach the CPU kernel with no other key in between that acts:
// autocast, functorch, tracing, modes and subclasses in Python all show in one of the two sets.
bool is_plain(const at::Tensor& tensor);

// What save_for_backward keeps of a tensor that may be missing.
inline std::optional<at::Tensor> optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// `tensor` as rows of its last axis: contiguous columns and one row stride, copied only where strides demand it.
struct Rows {
  at::Tensor tensor;
  int64_t rows, columns, stride;
  explicit Rows(const at::Tensor& tensor);
  const void* data() const { return tensor.const_data_ptr(); }
};

// An uninitialised contiguous tensor like `tensor`, of its sizes or others; on the CPU from the `recycler`.
at::Tensor empty_contiguous(const at::Tensor& tensor);
at::Tensor empty_contiguous(const at::Tensor& tensor, at::IntArrayRef sizes);

// Elements of work, roughly multiply-adds, that pay for handing a part to another thread (about 10 us of one core).
constexpr int64_t kWorkPerThread = 1 << 18;

// Runs f(begin, end, workspace) over [0, count) on torch's threads, `work` elements in all, each call with its own
// workspace. f returns a status; the first refusal is raised in the calling thread, where the core left its message.
template <typename F>
void parallel(int64_t count, int64_t work, size_t workspace_bytes, const F& f) {
  const int64_t each = std::max<int64_t>(1, work / std::max<int64_t>(1, count));
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / each);
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    c10::DataPtr workspace;
    if (workspace_bytes > 0) workspace = c10::GetCPUAllocator()->allocate(workspace_bytes);
    check(f(begin, end, workspace.get()));
  });
}

// A batch cut along its first axis into runs of rows with the same adapter: run i ends before row ends[i] of the batch
// and has the adapter choice[i], or none, which is -1.
struct Runs {
  std::vector<int64_t> ends, choice;

  // ValueError unless the runs cover the first axis of `batch` in order, with choices below `adapters`.
  void check(const at::Tensor& batch, int64_t adapters) const;

  // Runs f(adapter, first, past, begin, end) on the parts of the runs within rows begin ... end-1 of the batch seen as
  // Rows, in order, until it refuses; first ... past-1 are the rows of the whole run.
  template <typename F>
  boft_status visit(int64_t rows, int64_t begin, int64_t end, const F& f) const {
    const int64_t each = ends.empty() || ends.back() == 0 ? 1 : rows / ends.back();
    size_t run = std::upper_bound(ends.begin(), ends.end(), begin / each) - ends.begin();
    for (; begin < end; run++) {
      const int64_t first = run == 0 ? 0 : ends[run - 1] * each, past = ends[run] * each, stop = std::min(end, past);
      const boft_status status = f(choice[run], first, past, begin, stop);
      if (status != BOFT_OK) return status;
      begin = stop;
    }
    return BOFT_OK;
  }
};

// Copies rows begin ... end-1 to the same rows of the contiguous tensor `out`.
void copy_rows(const Rows& in, const at::Tensor& out, int64_t begin, int64_t end);

}  // namespace boft
