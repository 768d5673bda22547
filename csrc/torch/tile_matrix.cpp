#include "tile_matrix.h"
#include "common.h"
#include "recycler.h"

#include <numeric>

namespace boft {

// Columns of a slice or more: what is packed of it lies in the second-level cache, and several threads find work.
constexpr int64_t kSliceColumns = 128;

bool TileMatrix::serves(at::ScalarType dtype, int64_t depth, int64_t columns) {
  return dtype == at::kBFloat16 && boft_product_serves(BOFT_BF16, depth, columns);
}

TileMatrix::TileMatrix(int64_t depth, int64_t columns, int64_t granule) : depth_(depth), columns_(columns) {
  const int64_t least = std::lcm(granule, int64_t{BOFT_PRODUCT_COLUMNS});
  slice_ = (kSliceColumns + least - 1) / least * least;
  packed_ = recycler().allocate(depth * columns * sizeof(at::BFloat16));
}

void TileMatrix::pack(int64_t slice, const void* data, int64_t stride, bool transposed) {
  const int64_t begin = first(slice), columns = first(slice + 1) - begin;
  const boft_product_pack_args args = {BOFT_BF16, depth_, columns, data, stride, transposed, packed() + begin * depth_};
  check(boft_product_pack(&args, 0, columns / BOFT_PRODUCT_COLUMNS));
}

void TileMatrix::multiply(const at::Tensor& rows, const std::optional<at::Tensor>& bias, const at::Tensor& out) const {
  const at::Tensor shift = bias.has_value() ? bias->contiguous() : at::Tensor();
  const boft_product_args args = {BOFT_BF16,
                                  rows.size(0),
                                  depth_,
                                  columns_,
                                  rows.const_data_ptr(),
                                  rows.stride(0),
                                  packed(),
                                  shift.defined() ? shift.const_data_ptr() : nullptr,
                                  out.mutable_data_ptr(),
                                  out.stride(0)};
  check(boft_product(&args, 0, args.rows));
}

}  // namespace boft
