// A linear layer for few rows without gradients, as in decoding, where reading the weight is what counts: one parallel
// region, in which every thread rotates the rows for itself and multiplies them by its share of the weight. Outputs are
// rounded once, so they are not the bits of the ways for many rows and for gradients.
//
// MKL 2024.2 and oneDNN 3.12 read at a third to a half of the speed of memory. A token of a Llama (hidden 768, 6
// layers, b 8, m 2 on all linears), not merged, as a multiple of the frozen one, two Zen 5 cores: float32 1.06 by them
// and 0.64 to 0.69 so, bfloat16 1.15 and 0.72 to 0.96.
#include "linear.h"
#include "parts.h"

namespace boft {

using at::Tensor;

bool is_few(const Layer& layer, const Tensor& x) {
  // Smaller weights come from cache: a few microseconds, for which the bits can stay those of the other ways.
  constexpr int64_t kFewRows = 4, kFewestWeights = 1 << 16;
  return x.numel() <= kFewRows * x.size(-1) && layer.weight.numel() >= kFewestWeights && layer.weight.stride(1) == 1;
}

// What threads are handed work by. MKL multiplies one row of float32 on one thread, so the others may sleep, and waking
// them takes longer than a small weight: 768 x 768 alone, after 10 ms of something else, took 211 us on two Zen 5 cores
// and takes 133 on one of them, the frozen layer 170. Awake, the Llama above gains by two threads there (0.62 instead of
// 0.64 to 0.69). 16-bit products of torch are on all threads anyway.
static int64_t work_for_threads(const Layer& layer, int64_t rows) {
  const int64_t products = layer.weight.numel() * rows;
  return layer.weight.element_size() > 2 ? products / 4 : products;
}

Tensor few_forward(const Layer& layer, const Tensor& blocks, const Tensor& x) {
  const Rows in(x);
  const int64_t n = layer.weight.size(0), rows = in.rows;
  const boft_dtype dtype = data_dtype(x, "x");
  const boft_plan plan = check_rotate(x, blocks, layer.b, layer.m);
  const Tensor out = empty_rows(x, n), real_blocks = blocks.contiguous(), shifts = layer.shifts();
  // The workspace of rotate, then the rotated rows.
  const size_t core = (boft_rotate_workspace(&plan, dtype) + 63) / 64 * 64;
  parallel(n, work_for_threads(layer, rows), core + x.nbytes(), [&](int64_t begin, int64_t end, void* workspace) {
    void* const rotated = static_cast<char*>(workspace) + core;
    const boft_rotate_args rotate = {&plan,
                                     dtype,
                                     0,
                                     rows,
                                     in.data(),
                                     in.stride,
                                     real_blocks.const_data_ptr(),
                                     rotated,
                                     plan.d};
    check(boft_rotate(&rotate, 0, rows, workspace));
    const boft_linear_args linear = {dtype,
                                     rows,
                                     plan.d,
                                     n,
                                     rotated,
                                     plan.d,
                                     layer.weight.const_data_ptr(),
                                     layer.weight.stride(0),
                                     layer.factors.const_data_ptr(),
                                     shifts.defined() ? shifts.const_data_ptr() : nullptr,
                                     out.mutable_data_ptr(),
                                     n};
    return boft_linear(&linear, begin, end);
  });
  return out;
}

}  // namespace boft
