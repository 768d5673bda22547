#include "weight_product.h"
#include "parts.h"

#include <string_view>

namespace boft {
namespace {

// To pack a weight takes time and memory, which should be little beside the product and what it reads and writes.
// Steps of a layer of 1280 x 1280 in groups of 160, as multiples of the frozen one, not packed and packed: two Zen 4
// cores, 1024 rows bfloat16 1.31 and 1.26, float32 merged; 512 rows 1.33 and 1.34, 1.23 and 1.15; two Zen 3 cores,
// float32, 1024 rows 1.28 and 1.25, 512 rows 1.22 and 1.17, in groups of 16 1.06 and 1.015, 512 rows of 1024 x 4096 1.03
// and 0.98. Beside the tiles of AMX, several times as fast as other products, packing would take too long.
bool packing_pays(const at::Tensor& weight, int64_t rows) {
  constexpr int64_t kFewestRows = 512;
  const int64_t n = weight.size(0), d = weight.size(1), gain = weight.scalar_type() == at::kFloat ? 2 : 1;
  return rows >= kFewestRows && n * d <= gain * rows * (n + d) && weight.stride(1) == 1 && weight.stride(0) >= d &&
         std::string_view(boft_cpu_name()) != "amx";
}

}  // namespace

WeightProduct::WeightProduct(const at::Tensor& weight, bool transposed, int64_t rows) {
  const int64_t n = weight.size(0), d = weight.size(1), depth = transposed ? d : n, columns = transposed ? n : d;
  if (!packing_pays(weight, rows) || !TileMatrix::serves(weight.scalar_type(), depth, columns)) {
    plain_ = transposed ? weight.t() : weight;
    return;
  }
  TileMatrix& packed = packed_.emplace(weight.scalar_type(), depth, columns, transposed);
  const int64_t stride = weight.stride(0);
  at::parallel_for(0, packed.slices(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; slice++)
      packed.pack(slice, row_of(weight.const_data_ptr(), packed.first(slice), stride, weight.element_size()), stride);
  });
}

void WeightProduct::operator()(const at::Tensor& rows, const std::optional<at::Tensor>& bias,
                               const at::Tensor& out) const {
  if (packed_.has_value())
    packed_->multiply(rows, bias, out);
  else
    multiply(rows, plain_, bias, out);
}

}  // namespace boft
