#include "mkl_matrix.h"
#include "common.h"
#include "product.h"
#include "recycler.h"

#include <ATen/Context.h>

// MKL's, where torch contains it; otherwise null. Integers are of 32 bits there. Layouts: 101 is rows one after the
// other; operands: 111 as it lies, 112 transposed, 151 packed, 162 the second one.
extern "C" {
__attribute__((weak)) size_t cblas_sgemm_pack_get_size(int operand, int m, int n, int k);
__attribute__((weak)) void cblas_sgemm_pack(int layout, int operand, int transpose, int m, int n, int k, float alpha,
                                            const float* data, int stride, float* packed);
__attribute__((weak)) void cblas_sgemm_compute(int layout, int a_is, int b_is, int m, int n, int k, const float* a,
                                               int a_stride, const float* b, int b_stride, float beta, float* c,
                                               int c_stride);
}

namespace boft {
namespace {

constexpr int kRowMajor = 101, kPlain = 111, kTransposed = 112, kPacked = 151, kSecond = 162;

// Rows that a packed matrix is said to be for: it serves any number.
constexpr int kRows = 256;

// Slices have at most so many rows where there are more than two. Every slice is a pass over the products.
constexpr int64_t kSliceRows = 1024;

// Bytes.
constexpr size_t kAlignment = 64;

}  // namespace

bool MklMatrix::serves(at::ScalarType dtype) {
  if (dtype != at::kFloat || cblas_sgemm_pack == nullptr || onednn_products()) return false;
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return precision != at::Float32Precision::BF16 && precision != at::Float32Precision::TF32;
}

MklMatrix::MklMatrix(int64_t depth, int64_t columns, bool transposed, int64_t granule)
    : depth_(depth), columns_(columns), granule_(granule), transposed_(transposed) {
  const int64_t most = depth / granule;
  slices_ = std::clamp<int64_t>((depth + kSliceRows - 1) / kSliceRows, std::min<int64_t>(2, most), most);
  const int64_t longest = (most + slices_ - 1) / slices_ * granule;
  const size_t bytes = cblas_sgemm_pack_get_size(kSecond, kRows, static_cast<int>(columns), static_cast<int>(longest));
  room_ = static_cast<int64_t>(bytes + kAlignment - 1) / kAlignment * kAlignment / sizeof(float);
  // MKL asks for 8 MB and more besides, so that it may begin anywhere, and leaves them alone.
  packed_ = reserve(slices_ * room_ * sizeof(float), depth * columns * sizeof(float));
}

void MklMatrix::pack(int64_t slice, const void* data, int64_t stride) {
  cblas_sgemm_pack(kRowMajor, kSecond, transposed_ ? kTransposed : kPlain, kRows, static_cast<int>(columns_),
                   static_cast<int>(first(slice + 1) - first(slice)), 1, static_cast<const float*>(data),
                   static_cast<int>(stride), packed(slice));
}

void MklMatrix::multiply(const at::Tensor& any, const std::optional<at::Tensor>& bias, const at::Tensor& out) const {
  // MKL refuses rows that overlap, as those of an expanded tensor do.
  const at::Tensor rows = any.stride(0) < depth_ ? any.contiguous() : any;
  if (bias.has_value()) out.copy_(bias->expand_as(out));
  for (int64_t slice = 0; slice < slices(); slice++) {
    const int64_t begin = first(slice);
    cblas_sgemm_compute(kRowMajor, kPlain, kPacked, static_cast<int>(rows.size(0)), static_cast<int>(columns_),
                        static_cast<int>(first(slice + 1) - begin), rows.const_data_ptr<float>() + begin,
                        static_cast<int>(rows.stride(0)), packed(slice), static_cast<int>(columns_),
                        bias.has_value() || slice > 0 ? 1 : 0, out.mutable_data_ptr<float>(),
                        static_cast<int>(out.stride(0)));
  }
}

}  // namespace boft
