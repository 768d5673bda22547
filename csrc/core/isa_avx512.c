/* Kernels of the variant "avx512". */
#include "kernels.h"

#ifdef BOFT_X86
#include "vec_avx512.h"

#define KERNELS boft_kernels_avx512
#define KERNELS_NAME "avx512"
#include "variant_template.h"
#endif
