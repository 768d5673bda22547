/* Kernels of the variant "amx": those of "avx512bf16", with products of bfloat16 by the tiles of AMX. */
#include "kernels.h"

#ifdef BOFT_AMX
#define VEC_NATIVE_BF16
#define VEC_NATIVE_TILES
#include "vec_avx512.h"

#define BF16_KERNELS "rotate_amx.h"
#define PRODUCT_KERNELS "product_amx.h"
#define KERNELS boft_kernels_amx
#define KERNELS_NAME "amx"
#include "variant_template.h"
#endif
