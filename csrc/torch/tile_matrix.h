// Matrices in the layout in which the core multiplies them by the processor's matrix instructions.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace boft {

// A matrix (depth, columns) that boft_product_pack packs once for many products (boft.h), where torch packs it in every
// one. 788 rows on one Emerald Rapids core, bfloat16 by AMX, packed and by torch, which needs longer for W'^T than for
// W': 384 x 384 0.21 ms and 0.28 or 0.21, 384 x 1536 0.85 and 1.17 or 0.91. Results do not depend on threads or slices.
class TileMatrix {
 public:
  // Slices are of columns.
  static constexpr bool kSlicesColumns = true;

  static bool serves(at::ScalarType dtype, int64_t depth, int64_t columns);

  // Slices are multiples of `granule`, which divides `columns`, but for the last one.
  TileMatrix(int64_t depth, int64_t columns, int64_t granule);
  int64_t slices() const { return (columns_ + slice_ - 1) / slice_; }
  int64_t first(int64_t slice) const { return std::min(slice * slice_, columns_); }

  // Packs columns first(slice) ... first(slice + 1)-1. They are those of `data`, whose element (i, j) is
  // data[i * stride + j], or data[j * stride + i] if `transposed`. Thread-safe for different slices.
  void pack(int64_t slice, const void* data, int64_t stride, bool transposed);

  // out = rows matrix + bias, all bfloat16 and with columns that follow each other. Thread-safe.
  void multiply(const at::Tensor& rows, const std::optional<at::Tensor>& bias, const at::Tensor& out) const;

 private:
  at::BFloat16* packed() const { return static_cast<at::BFloat16*>(packed_.get()); }
  int64_t depth_, columns_, slice_;
  c10::DataPtr packed_;
};

}  // namespace boft
