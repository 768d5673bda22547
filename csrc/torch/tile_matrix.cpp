#include "tile_matrix.h"
#include "common.h"

#include <numeric>

namespace boft {

// Columns of a slice or more: what is packed of it lies in the second-level cache, and several threads find work.
constexpr int64_t kSliceColumns = 128;

bool TileMatrix::serves(at::ScalarType dtype, int64_t depth, int64_t columns) {
  return dtype == at::kBFloat16 && boft_product_serves(BOFT_BF16, depth, columns);
}

TileMatrix::TileMatrix(const at::Tensor& like, int64_t depth, int64_t columns, int64_t granule)
    : depth_(depth), columns_(columns) {
  const int64_t least = std::lcm(granule, int64_t{BOFT_PRODUCT_COLUMNS});
  slice_ = (kSliceColumns + least - 1) / least * least;
  packed_ = empty_contiguous(like, {depth * columns});
}

void TileMatrix::pack(int64_t slice, const void* data, int64_t stride, bool transposed) {
  const int64_t begin = first(slice), columns = first(slice + 1) - begin;
  const boft_product_pack_args args = {data_dtype(packed_, "weight"),
                                       depth_,
                                       columns,
                                       data,
                                       stride,
                                       transposed,
                                       packed_.mutable_data_ptr<at::BFloat16>() + begin * depth_};
  check(boft_product_pack(&args, 0, columns / BOFT_PRODUCT_COLUMNS));
}

void TileMatrix::multiply(const at::Tensor& rows, const std::optional<at::Tensor>& bias, const at::Tensor& out) const {
  const at::Tensor shift = bias.has_value() ? bias->contiguous() : at::Tensor();
  const boft_product_args args = {data_dtype(packed_, "weight"),
                                  rows.size(0),
                                  depth_,
                                  columns_,
                                  rows.const_data_ptr(),
                                  rows.stride(0),
                                  packed_.const_data_ptr(),
                                  shift.defined() ? shift.const_data_ptr() : nullptr,
                                  out.mutable_data_ptr(),
                                  out.stride(0)};
  check(boft_product(&args, 0, args.rows));
}

}  // namespace boft
