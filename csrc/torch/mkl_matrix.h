// Matrices in the layout in which MKL multiplies them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace boft {

// A float32 matrix (depth, columns) that MKL packs once for many products. As MKL packs it anew in every ordinary call,
// that saves a tenth and more of the time: 788 rows of 384 and 512 of 768 channels, one Emerald Rapids core, a product
// with a packed matrix takes 0.85 of an ordinary one, and to pack it 0.015 and 0.065. Products are bitwise the same
// for every number of threads, given that MKL works with one (OneThread, parts.h).
class MklMatrix {
 public:
  // Whether torch contains MKL and would multiply float32 by it, at full precision.
  static bool serves(at::ScalarType dtype);

  // In slices of rows, multiples of `granule` as `depth` is, which threads pack side by side; their number depends on
  // the shape alone. Each slice is a pass over the products, but every product of MKL packs its left side too.
  MklMatrix(int64_t depth, int64_t columns, bool transposed, int64_t granule);
  int64_t slices() const { return slices_; }
  int64_t first(int64_t slice) const { return depth_ / granule_ * slice / slices_ * granule_; }

  // Packs rows first(slice) ... first(slice + 1)-1. They are those of `data`, whose element (i, j) is
  // data[i * stride + j], or data[j * stride + i] if transposed. Thread-safe for different slices.
  void pack(int64_t slice, const void* data, int64_t stride);

  // out = rows matrix + bias, all float32 and with columns that follow each other. Thread-safe.
  void multiply(const at::Tensor& rows, const std::optional<at::Tensor>& bias, const at::Tensor& out) const;

 private:
  float* packed(int64_t slice) const { return static_cast<float*>(packed_.get()) + slice * room_; }
  int64_t depth_, columns_, granule_, slices_, room_;
  bool transposed_;
  c10::DataPtr packed_;
};

}  // namespace boft
