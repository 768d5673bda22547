/* Kernels of the variant "avx512bf16": those of "avx512", with the processor's own bfloat16 instructions. */
#include "kernels.h"

#ifdef BOFT_X86
#define VEC_NATIVE_BF16
#include "vec_avx512.h"

#define BF16_KERNELS "rotate_pairs.h"
#define PRODUCT_KERNELS "product_pairs.h"
#define KERNELS boft_kernels_avx512bf16
#define KERNELS_NAME "avx512bf16"
#include "variant_template.h"
#endif
