// torch can multiply float32 matrices by MKL and by oneDNN, and takes MKL. That goes by AVX2 on processors of AMD, and not
// at its full speed. 512 rows, 768 to 3072 channels, one Zen 5 core: 107 GF/s by MKL 2024.2, 237 by oneDNN 3.12 (both in
// torch 2.13), and still 123 by oneDNN kept to AVX2 (ONEDNN_MAX_CPU_ISA), what units of 256 bits can do.
#include "product.h"
#include "parts.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>

#include <atomic>

// What at::addmm calls for 16-bit matrices: result = mat1 mat2 alpha + result beta. No header of torch declares it; where
// torch does not export it, it is null.
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta,
                                         float alpha);
}

namespace boft {
namespace {

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// torch lets its function multiply float32 only where oneDNN has bfloat16 too (AVX-512), and throws elsewhere.
bool onednn_serves() {
  if (at::native::mkldnn_matmul == nullptr || !at::globalContext().hasMKLDNN()) return false;
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor one = at::ones({1, 1}), product = at::empty({1, 1});
  try {
    at::native::mkldnn_matmul(one, one, product, 0, 1);
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

std::atomic<bool>& wanted_core() {
  static std::atomic<bool> wanted{is_amd()};
  return wanted;
}

std::atomic<bool>& wanted_onednn() {
  static std::atomic<bool> wanted{is_amd() && onednn_serves()};
  return wanted;
}

// Multiply-adds below which a product is left to torch: oneDNN, and a bias that it adds to, take some 20 us a call (two
// Zen 4 cores, steps as multiples of the frozen layer, all by oneDNN and with this: 512 rows of 96 x 96 1.76 and 1.48,
// 1024 1.54 and 1.33, 512 rows of 128 x 128 1.58 and 1.34).
constexpr int64_t kFewestProducts = 1 << 23;

}  // namespace

bool core_products(std::optional<bool> on) {
  if (on.has_value()) wanted_core() = *on;
  return wanted_core() && at::globalContext().userEnabledMkldnn();
}

bool onednn_products(std::optional<bool> on) {
  if (on.has_value()) wanted_onednn() = *on && onednn_serves();
  return wanted_onednn() && at::globalContext().userEnabledMkldnn();
}

void multiply_merged(const at::Tensor& rows, const at::Tensor& matrix, const std::optional<at::Tensor>& bias,
                     at::Tensor out) {
  if (rows.scalar_type() != at::kFloat || !onednn_products() || rows.numel() * matrix.size(1) < kFewestProducts)
    return multiply(rows, matrix, bias, out);
  if (bias.has_value()) out.copy_(bias->expand_as(out));
  at::native::mkldnn_matmul(rows, matrix, out, bias.has_value() ? 1 : 0, 1);
}

}  // namespace boft
