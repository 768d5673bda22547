#include "tile_matrix.h"
#include "parts.h"
#include "product.h"
#include "recycler.h"

namespace boft {

bool TileMatrix::serves(at::ScalarType dtype, int64_t depth, int64_t columns) {
  if (dtype == at::kFloat) return core_products() && boft_product_serves(BOFT_F32, depth, columns);
  return dtype == at::kBFloat16 && boft_product_serves(BOFT_BF16, depth, columns);
}

TileMatrix::TileMatrix(at::ScalarType dtype, int64_t depth, int64_t columns, bool transposed)
    : dtype_(dtype == at::kFloat ? BOFT_F32 : BOFT_BF16),
      size_(c10::elementSize(dtype)),
      depth_(depth),
      columns_(columns),
      transposed_(transposed),
      packed_(recycler().allocate(depth * columns * size_)) {}

void TileMatrix::pack(int64_t slice, const void* data, int64_t stride) {
  const int64_t begin = first(slice), rows = first(slice + 1) - begin;
  void* const packed = packed_.get();
  boft_product_pack_args args = {dtype_, depth_, columns_, begin, rows, data, stride, transposed_, packed};
  if (transposed_)
    args = {dtype_, depth_, rows, 0, depth_, data, stride, transposed_, row_of(packed, begin, depth_, size_)};
  check(boft_product_pack(&args, 0, args.columns / BOFT_PRODUCT_COLUMNS));
}

void TileMatrix::multiply(const at::Tensor& rows, const std::optional<at::Tensor>& bias, const at::Tensor& out) const {
  const at::Tensor shift = bias.has_value() ? bias->contiguous() : at::Tensor();
  const boft_product_args args = {dtype_,
                                  rows.size(0),
                                  depth_,
                                  columns_,
                                  rows.const_data_ptr(),
                                  rows.stride(0),
                                  packed_.get(),
                                  shift.defined() ? shift.const_data_ptr() : nullptr,
                                  out.mutable_data_ptr(),
                                  out.stride(0)};
  check(boft_product(&args, 0, args.rows));
}

}  // namespace boft
