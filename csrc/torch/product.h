// The matrix product of merged layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace boft {

// out = rows matrix + bias: as `multiply` (parts.h), or large ones of float32 by oneDNN while `onednn_products`.
// Thread-safe.
void multiply_merged(const at::Tensor& rows, const at::Tensor& matrix, const std::optional<at::Tensor>& bias,
                     at::Tensor out);

// Whether layers multiply float32 by the core where it takes the sizes (tile_matrix.h), and whether merged layers multiply
// the others by oneDNN; with `on`, they do from now on or not (never by oneDNN where torch has none that would). At first
// where MKL, which torch takes, is the slower one. Not while torch.backends.mkldnn is off. Thread-safe.
bool core_products(std::optional<bool> on = std::nullopt);
bool onednn_products(std::optional<bool> on = std::nullopt);

}  // namespace boft
