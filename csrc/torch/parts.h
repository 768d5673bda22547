// Rows cut into parts, each of which one thread takes through several operations, so that an operation finds in the
// thread's cache what the one before wrote.
#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>

#include "common.h"

// MKL's, where torch contains it; otherwise null.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace boft {

// `data` (..., columns), whose rows follow each other, as a matrix of them.
inline at::Tensor rows_of(const at::Tensor& data) { return data.dim() == 2 ? data : data.view({-1, data.size(-1)}); }

// An uninitialised tensor of the shape of `data` but for its last axis.
inline at::Tensor empty_rows(const at::Tensor& data, int64_t columns) {
  std::vector<int64_t> sizes = data.sizes().vec();
  sizes.back() = columns;
  return empty_contiguous(data, sizes);
}

// rows matrix + bias, by the operators that at::linear calls.
inline void multiply(const at::Tensor& rows, const at::Tensor& matrix, const std::optional<at::Tensor>& bias,
                     at::Tensor out) {
  if (bias.has_value())
    at::addmm_out(out, *bias, rows, matrix);
  else
    at::mm_out(out, rows, matrix);
}

// Fewer rows are not worth a part: each product packs the weight anew (weights of 4096 x 4096, two Zen 4 cores: 5 %
// with 256 rows, none with 512).
constexpr int64_t kFewestPartRows = 256;

// Parts of at most `longest` rows, where `most` allows it, that `rows` are cut into, part i of n with the rows from
// rows i / n on; 0 where the operators one by one, each on all threads, are the better way. n is a power of two, at
// most `most`, as the splits of sums over rows are; with two threads it is what it is with one, and so are the results
// of the matrix product.
inline int64_t parts_of(int64_t rows, int64_t most, int64_t longest) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  int64_t parts = 1;
  while (parts < most && (parts < std::max<int64_t>(2, threads) || rows > parts * longest)) parts *= 2;
  const int64_t rows_of_a_thread = (parts + threads - 1) / threads * rows / parts;
  const bool even = rows_of_a_thread * threads <= rows + rows / 16;
  return even && rows >= parts * kFewestPartRows ? parts : 0;
}

// While it lives, products of the thread at hand are those of one thread. In a parallel region they are computed by one
// anyway, but MKL and oneDNN plan them for as many as there are outside, and then sum narrow matrices in another order
// (dy W of 1024 x 1024 by 1024 x 64, float32 by MKL, and bfloat16 of 2100 rows by oneDNN, Sapphire Rapids): results
// would depend on the number of threads.
class OneThread {
 public:
  OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) of_mkl_ = MKL_Set_Num_Threads_Local(1);
#ifdef _OPENMP
    of_openmp_ = omp_get_max_threads();
    omp_set_num_threads(1);
#endif
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(of_mkl_);
#ifdef _OPENMP
    omp_set_num_threads(of_openmp_);
#endif
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  [[maybe_unused]] int of_mkl_ = 0, of_openmp_ = 0;
};

// What a thread works on: its rows of one part after the other, `columns` values of the dtype of `like` each, and the
// core's workspace.
struct Desk {
  Desk(const at::Tensor& like, int64_t rows, int64_t columns, size_t workspace_bytes)
      : rows(empty_contiguous(like, {rows, columns})),
        workspace(c10::GetCPUAllocator()->allocate(std::max<size_t>(workspace_bytes, 1))) {}
  at::Tensor rows;
  c10::DataPtr workspace;
};

// Runs f(part, first, past, desk) for each part of `rows` on torch's threads, which see tensors without autograd and
// take the next part when they are done with one.
template <typename F>
void for_parts(int64_t parts, int64_t rows, const at::Tensor& like, int64_t columns, size_t workspace_bytes,
               const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(parts, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const OneThread one_thread;
    const Desk desk(like, (rows + parts - 1) / parts, columns, workspace_bytes);
    for (int64_t part = next++; part < parts; part = next++)
      f(part, rows * part / parts, rows * (part + 1) / parts, desk);
  });
}

template <typename Pointer>
Pointer row_of(Pointer data, int64_t row, int64_t stride, int64_t element_size) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return data == nullptr ? nullptr : static_cast<Byte*>(data) + row * stride * element_size;
}

}  // namespace boft
