/* Kernels of the variant "portable". */
#include "kernels.h"

#include "vec_portable.h"

#define KERNELS boft_kernels_portable
#define KERNELS_NAME "portable"
#include "variant_template.h"
