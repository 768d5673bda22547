// torch can multiply float32 matrices by MKL and by oneDNN, and takes MKL. That has no AVX-512 kernels for processors of
// AMD, which costs half of the speed from Zen 5 on, whose units are 512 bits wide: 1576 x 384 times 384 x 1536 on two
// Zen 5 cores took 8.8 ms by MKL 2024.2 and 4.1 ms by oneDNN 3.12, both in torch 2.13.
#include "product.h"
#include "parts.h"

#include <ATen/Context.h>

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// What at::addmm calls for 16-bit matrices: result = mat1 mat2 alpha + result beta. No header of torch declares it; where
// torch does not export it, it is null.
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta,
                                         float alpha);
}

namespace boft {
namespace {

// AMD from Zen 5 on, by its family: virtual machines hide the bit that tells of 512-bit units (CPUID 8000001A).
bool mkl_is_slow() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  if (!__builtin_cpu_is("amd") || !__builtin_cpu_supports("avx512f") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx))
    return false;
  const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
  return family >= 0x1a;
#else
  return false;
#endif
}

bool has_onednn() { return at::native::mkldnn_matmul != nullptr && at::globalContext().hasMKLDNN(); }

std::atomic<bool>& wanted() {
  static std::atomic<bool> wanted{has_onednn() && mkl_is_slow()};
  return wanted;
}

}  // namespace

bool onednn_products(std::optional<bool> on) {
  if (on.has_value()) wanted() = *on && has_onednn();
  return wanted() && at::globalContext().userEnabledMkldnn();
}

void multiply_merged(const at::Tensor& rows, const at::Tensor& matrix, const std::optional<at::Tensor>& bias,
                     at::Tensor out) {
  if (rows.scalar_type() != at::kFloat || !onednn_products()) return multiply(rows, matrix, bias, out);
  if (bias.has_value()) out.copy_(bias->expand_as(out));
  at::native::mkldnn_matmul(rows, matrix, out, bias.has_value() ? 1 : 0, 1);
}

}  // namespace boft
