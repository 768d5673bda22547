// The operators and their registration by room: blocks.cpp, rotate.cpp, merge.cpp and scale.cpp on the CPU, the same
// with _cuda on CUDA devices; and calls around the dispatcher: inference.cpp.
#pragma once

#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace boft {

// Each adds its CPU kernels to a library opened for the CPU key.
void register_blocks_cpu(torch::Library& library);
void register_rotate_cpu(torch::Library& library);
void register_merge_cpu(torch::Library& library);
void register_scale_cpu(torch::Library& library);

// The same for the CUDA key; only in builds with BOFT_CUDA.
void register_blocks_cuda(torch::Library& library);
void register_rotate_cuda(torch::Library& library);
void register_merge_cuda(torch::Library& library);
void register_scale_cuda(torch::Library& library);

// The CPU kernels of the operators of the same names. With in_place, dx takes the place of dy, which is contiguous.
std::tuple<at::Tensor, at::Tensor> blocks_cpu(const at::Tensor& boft_R, const std::optional<at::Tensor>& keep);
at::Tensor blocks_backward_cpu(const at::Tensor& dblocks, const at::Tensor& q, const std::optional<at::Tensor>& keep);
std::tuple<at::Tensor, at::Tensor> rotate_backward_cpu(const at::Tensor& dy, const at::Tensor& x,
                                                       const at::Tensor& blocks, int64_t b, int64_t m, bool transpose,
                                                       bool need_x, bool need_blocks, bool in_place = false);
std::tuple<at::Tensor, at::Tensor, at::Tensor> scale_backward_cpu(const at::Tensor& dy,
                                                                  const std::optional<at::Tensor>& z,
                                                                  const at::Tensor& s,
                                                                  const std::optional<at::Tensor>& bias,
                                                                  bool bias_detached, bool need_z, bool need_s,
                                                                  bool need_bias);
at::Tensor rotate_cpu(const at::Tensor& x, const at::Tensor& blocks, int64_t b, int64_t m, bool transpose,
                      bool compact = false);
at::Tensor scale_cpu(const at::Tensor& z, const at::Tensor& s, const std::optional<at::Tensor>& bias,
                     bool bias_detached, bool compact = false);

// The same with an adapter for each run of rows of the first axis; rows without one are copied. In one pass and without
// gradients. Batches have at least two axes.
struct Rotation {
  at::Tensor blocks;  // contiguous
  int64_t b, m;
};
at::Tensor rotate_runs_cpu(const at::Tensor& x, const Runs& runs, const std::vector<Rotation>& rotations);
at::Tensor scale_runs_cpu(const at::Tensor& z, const Runs& runs, const std::vector<at::Tensor>& scales,
                          const std::optional<at::Tensor>& bias);

// The backward operators through the dispatcher, for what must be recorded or redirected.
at::Tensor call_blocks_backward(const at::Tensor& dblocks, const at::Tensor& q, const std::optional<at::Tensor>& keep);
std::tuple<at::Tensor, at::Tensor> call_rotate_backward(const at::Tensor& dy, const at::Tensor& x,
                                                        const at::Tensor& blocks, int64_t b, int64_t m, bool transpose,
                                                        bool need_x, bool need_blocks);
std::tuple<at::Tensor, at::Tensor, at::Tensor> call_scale_backward(const at::Tensor& dy,
                                                                   const std::optional<at::Tensor>& z,
                                                                   const at::Tensor& s,
                                                                   const std::optional<at::Tensor>& bias,
                                                                   bool bias_detached, bool need_z, bool need_s,
                                                                   bool need_bias);

bool cpu_kernels_in_use();

// Without gradients, and without the dispatcher: nothing if a tensor is not an ordinary one on the CPU, or if autocast,
// a mode, a transform or a tracer is active, so that the operators must be called as usual. Thread-safe.

// The collapsed blocks of boft_R (m, d / b, b, b) in float64 (`wide`) or float32, reused as long as boft_R lives and
// holds the same bytes. Read-only.
std::optional<at::Tensor> cached_blocks(const at::Tensor& boft_R, bool wide);

// x R or x R^T with cached blocks; z s + bias (1 - s); and the whole layer, z = (x R) weight^T + bias scaled so.
std::optional<at::Tensor> rotate_now(const at::Tensor& x, const at::Tensor& boft_R, bool transpose);
std::optional<at::Tensor> scale_now(const at::Tensor& z, const at::Tensor& s, const std::optional<at::Tensor>& bias);
std::optional<at::Tensor> linear_now(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, const at::Tensor& boft_R,
                                     const at::Tensor& s);

// The same for batches cut into runs, with cached blocks.
std::optional<at::Tensor> rotate_runs_now(const at::Tensor& x, const std::vector<int64_t>& ends,
                                          const std::vector<int64_t>& choice,
                                          const std::vector<at::Tensor>& parameters);
std::optional<at::Tensor> scale_runs_now(const at::Tensor& z, const std::vector<int64_t>& ends,
                                         const std::vector<int64_t>& choice, const std::vector<at::Tensor>& scales,
                                         const std::optional<at::Tensor>& bias);

// linear.cpp. Whether the functions of linear.h serve these.
bool linear_fits(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// With gradients: the whole layer as one function, linear.cpp. Nothing where linear_now would give nothing, where
// boft_R is not of the arithmetic's dtype, where weight or bias train, and for x without rows. With `recompute` only x
// is saved, packed, and what the backward needs of the output is computed from it again.
std::optional<at::Tensor> linear_train(const at::Tensor& x, const at::Tensor& weight,
                                       const std::optional<at::Tensor>& bias, const at::Tensor& boft_R,
                                       const at::Tensor& s, const std::optional<at::Tensor>& keep, bool recompute);

}  // namespace boft
