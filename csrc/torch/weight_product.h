// Products with a frozen weight.
#pragma once

#include "tile_matrix.h"

namespace boft {

// Products with W^T (`transposed`) or W, of `rows` rows in all, which threads take in parts: by the core, with the weight
// packed once for all of them, where that is the faster way, otherwise as at::linear.
class WeightProduct {
 public:
  WeightProduct(const at::Tensor& weight, bool transposed, int64_t rows);

  // out = rows matrix + bias, on the thread at hand. Thread-safe.
  void operator()(const at::Tensor& rows, const std::optional<at::Tensor>& bias, const at::Tensor& out) const;

 private:
  at::Tensor plain_;  // undefined where the matrix is packed
  std::optional<TileMatrix> packed_;
};

}  // namespace boft
