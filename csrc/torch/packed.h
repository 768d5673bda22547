// What backward needs, kept in 4 or 8 bits per value: boft::pack.
#pragma once

#include <ATen/core/Tensor.h>

namespace boft {

constexpr int kBitsOfX = 8, kBitsOfZ = 4;

// Rows that a backward unpacks at once into a buffer of its thread.
constexpr int64_t kUnpackedRows = 64;

// Whether what an operator saves of `data` for the gradient of `parameter` is to be packed. Asked before
// Function::apply, which turns gradients off.
bool packs(bool compact, const at::Tensor& data, const at::Tensor& parameter);

// boft::pack, through the dispatcher.
at::Tensor pack(const at::Tensor& data, int64_t bits);

// pack(x, kBitsOfX); the same tensor again if the calling thread packed the unchanged x last and the result is still in
// use, so that layers that share an input share its copy. Keeps neither alive.
at::Tensor pack_shared(const at::Tensor& x);

// The rows of n values that `packed` holds, as a contiguous matrix of `dtype`.
at::Tensor unpack(const at::Tensor& packed, at::ScalarType dtype, int64_t n, int bits);

// ValueError unless `packed` holds as many rows of n values.
void check_packed(const at::Tensor& packed, int64_t rows, int64_t n, int bits);

}  // namespace boft
