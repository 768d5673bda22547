/* Kernels of the variant "avx2". */
#include "kernels.h"

#ifdef BOFT_X86
#include "vec_avx2.h"

#define KERNELS boft_kernels_avx2
#define KERNELS_NAME "avx2"
#include "variant_template.h"
#endif
