// A layer and the ways through it. Rotated: x R by the blocks, the product with the frozen weight, the scale;
// linear_rotated.cpp. Merged: the product with diag(s) W R^T, which is made for the call; linear_merged.cpp. Few rows
// without gradients: linear_few.cpp.
#pragma once

#include "arguments.h"
#include "ops.h"

namespace boft {

// What the kernels need of a layer besides its activations and blocks; `factors` is s as they take it.
struct Layer {
  Layer(at::ScalarType dtype, const at::Tensor& s, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
        const std::optional<at::Tensor>& keep, int64_t b, int64_t m)
      : s(s),
        factors(real_vector(s, weight.size(0), real_dtype(dtype), "boft_s")),
        weight(weight),
        bias(bias),
        keep(keep),
        b(b),
        m(m) {}
  // The bias as the kernels take it; undefined without one.
  at::Tensor shifts() const {
    return bias.has_value() ? real_vector(*bias, weight.size(0), factors.scalar_type(), "bias") : at::Tensor();
  }
  at::Tensor s, factors, weight;
  std::optional<at::Tensor> bias, keep;
  int64_t b, m;
};

struct LinearForward {
  at::Tensor out;
  at::Tensor z;  // the output before the scale; undefined unless asked for
};

// What the backward finds, undefined where no gradient needs it. `out` is the output before the scale, or after it if
// `scaled`.
struct Activations {
  at::Tensor x, out;
  bool scaled = false;
};

struct Needed {
  bool x, boft_R, s;
  bool through() const { return x || boft_R; }
};

// The gradient of the factors is as if `out` were the output before the scale.
struct Gradients {
  at::Tensor x, blocks, factors;
};

// The layer by the better of the two ways; with `keep_z`, the rotated one, which has it.
LinearForward linear_forward(const Layer& layer, const at::Tensor& blocks, const at::Tensor& x, bool keep_z);

// Its gradients, by the better way too; nothing is recorded. `dy` may be released early.
Gradients linear_backward(const Layer& layer, const at::Tensor& blocks, const Activations& kept, const Needed& need,
                          at::Tensor& dy);

// linear_rotated.cpp.
LinearForward rotated_forward(const Layer& layer, const at::Tensor& blocks, const at::Tensor& x, bool keep_z);
Gradients rotated_backward(const Layer& layer, const at::Tensor& blocks, const Activations& kept, const Needed& need,
                           at::Tensor& dy);

// (x R) weight^T + bias, without the scale.
at::Tensor unscaled_output(const Layer& layer, const at::Tensor& blocks, const at::Tensor& x);

// rotated_backward from packed x (`pack_shared`) and without the output.
Gradients packed_backward(const Layer& layer, const at::Tensor& blocks, const at::Tensor& packed, const Needed& need,
                          const at::Tensor& dy);

// linear_few.cpp. Whether a call without gradients is for so few rows that it goes its own way, and that.
bool is_few(const Layer& layer, const at::Tensor& x);
at::Tensor few_forward(const Layer& layer, const at::Tensor& blocks, const at::Tensor& x);

// linear_merged.cpp. Whether the merged way is the better one for so many rows.
bool merge_pays(const Layer& layer, int64_t rows);
at::Tensor merged_forward(const Layer& layer, const at::Tensor& blocks, const at::Tensor& x);
Gradients merged_backward(const Layer& layer, const at::Tensor& blocks, const Activations& kept, const Needed& need,
                          const at::Tensor& dy);

}  // namespace boft
