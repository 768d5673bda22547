// The matrix product of merged layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace boft {

// out = rows matrix + bias: as `multiply` (parts.h), or large ones of float32 by oneDNN while `onednn_products`.
// Thread-safe.
void multiply_merged(const at::Tensor& rows, const at::Tensor& matrix, const std::optional<at::Tensor>& bias,
                     at::Tensor out);

// Whether merged layers multiply float32 by oneDNN, and by the core what it takes (tile_matrix.h); with `on`, they do
// from now on or not (never where torch has no oneDNN that would). At first where MKL, which torch takes, is the slower
// one. Not while torch.backends.mkldnn is off. Thread-safe.
bool onednn_products(std::optional<bool> on = std::nullopt);

}  // namespace boft
