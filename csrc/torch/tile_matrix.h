// Matrices in the layout in which the core multiplies them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "boft.h"

namespace boft {

// A matrix (depth, columns) that boft_product_pack packs once for many products (boft.h), where torch packs it in every
// one. 788 rows on one Emerald Rapids core, bfloat16 by AMX, packed and by torch, which needs longer for W'^T than for
// W': 384 x 384 0.21 ms and 0.28 or 0.21, 384 x 1536 0.85 and 1.17 or 0.91. 512 rows on one Zen 4 core: 96 x 96 42 us
// and 58, 384 x 384 0.65 ms and 0.68, 768 x 2048 7.2 and 7.8; float32 there, by MKL and oneDNN, 96 x 96 82, 96 and
// 100 us, 384 x 384 1.3 ms, 1.5 and 1.4, 768 x 2048 14.3, 18.3 and 15.5; by AVX2 and MKL on a Zen 3 core, 256 rows, 96 x 96
// 59 us and 73, 384 x 384 0.88 ms and 1.0, 768 x 2048 10.8 and 12.2. Results do not depend on threads or slices.
class TileMatrix {
 public:
  // bfloat16, and float32 where MKL is not at its best (product.h), of the sizes that the core takes.
  static bool serves(at::ScalarType dtype, int64_t depth, int64_t columns);

  // In slices of the rows of what is packed, which are columns of the matrix if it is transposed.
  TileMatrix(at::ScalarType dtype, int64_t depth, int64_t columns, bool transposed);
  int64_t slices() const { return (sliced() + kSliceRows - 1) / kSliceRows; }
  int64_t first(int64_t slice) const { return std::min(slice * kSliceRows, sliced()); }

  // Packs rows first(slice) ... first(slice + 1)-1 of what is packed, which `data` has, `stride` apart. Thread-safe for
  // different slices.
  void pack(int64_t slice, const void* data, int64_t stride);

  // out = rows matrix + bias, all of the dtype and with columns that follow each other. Thread-safe.
  void multiply(const at::Tensor& rows, const std::optional<at::Tensor>& bias, const at::Tensor& out) const;

 private:
  // What is packed of a slice lies in the second-level cache, and several threads find work.
  static constexpr int64_t kSliceRows = 128;
  static_assert(kSliceRows % BOFT_PRODUCT_DEPTH == 0 && kSliceRows % BOFT_PRODUCT_COLUMNS == 0);
  int64_t sliced() const { return transposed_ ? columns_ : depth_; }
  boft_dtype dtype_;
  int64_t size_, depth_, columns_;
  bool transposed_;
  c10::DataPtr packed_;
};

}  // namespace boft
