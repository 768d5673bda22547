/*
 * Every vector kernel of one variant, as the table KERNELS. The including file has included a vec_*.h before and
 * defines KERNELS, KERNELS_NAME and, where bfloat16 data is multiplied as it lies, BF16_KERNELS, the file that does it,
 * and PRODUCT_KERNELS, the one that multiplies with packed matrices.
 * REAL is the type of the arithmetic, FN(x) and VEC(x) name functions and vectors of it.
 */
#include "digest_keys.h"
#include "gather.h"
#include "invert.h"
#include "tiles.h"

#include <string.h>

/*
 * load_vectors and store_vectors: one or two vectors side by side, or the first `lanes` numbers of one if `partial`.
 * vectors and partial are constants. store_two, of which they make use: where the processor narrows two at once,
 * vec_*.h has it for bfloat16.
 */
#define STORE_TWO(name, type, real)                                                                                    \
    VEC_FN void store_two_##name(type *p, vec_##real a, vec_##real b)                                                  \
    {                                                                                                                  \
        store_##name(p, a);                                                                                            \
        store_##name(p + VEC_LANES_##real, b);                                                                         \
    }
#define VECTORS(name, type, real)                                                                                      \
    VEC_FN void load_vectors_##name(const int vectors, const int partial, int64_t lanes, const type *from,             \
                                    vec_##real to[2])                                                                  \
    {                                                                                                                  \
        _Pragma("GCC unroll 2")                                                                                        \
        for (int v = 0; v < vectors; v++)                                                                              \
            to[v] = partial ? loadn_##name(from, lanes) : load_##name(from + v * VEC_LANES_##real);                    \
    }                                                                                                                  \
    VEC_FN void store_vectors_##name(const int vectors, const int partial, int64_t lanes, type *to,                    \
                                     const vec_##real from[2])                                                         \
    {                                                                                                                  \
        if (partial)                                                                                                   \
            storen_##name(to, from[0], lanes);                                                                         \
        else if (vectors == 2)                                                                                         \
            store_two_##name(to, from[0], from[1]);                                                                    \
        else                                                                                                           \
            store_##name(to, from[0]);                                                                                 \
    }

STORE_TWO(float, float, float)
STORE_TWO(double, double, double)
STORE_TWO(f16, uint16_t, float)
#ifndef VEC_NATIVE_BF16
STORE_TWO(bf16, uint16_t, float)
#endif
VECTORS(float, float, float)
VECTORS(double, double, double)
VECTORS(f16, uint16_t, float)
VECTORS(bf16, uint16_t, float)
#undef STORE_TWO
#undef VECTORS

#define REAL float
#define FN(name) name##_of_float
#define VEC(name) name##_float
#include "gemm_template.h"
#include "cayley_template.h"
#include "collapse_template.h"
#include "rotate_template.h"
#include "product_template.h"

#define DATA float
#define LOAD(name) name##_float
#define DATA_FN(name) name##_of_f32
#include "scale_template.h"
#define DATA float
#define LOAD(name) name##_float
#define DATA_FN(name) name##_of_f32
#include "linear_template.h"
#define DATA uint16_t
#define LOAD(name) name##_bf16
#define DATA_FN(name) name##_of_bf16
#include "scale_template.h"
#define DATA uint16_t
#define LOAD(name) name##_bf16
#define DATA_FN(name) name##_of_bf16
#include "linear_template.h"
#define DATA uint16_t
#define LOAD(name) name##_f16
#define DATA_FN(name) name##_of_f16
#include "scale_template.h"
#define DATA uint16_t
#define LOAD(name) name##_f16
#define DATA_FN(name) name##_of_f16
#include "linear_template.h"
#undef REAL
#undef FN
#undef VEC

#define REAL double
#define FN(name) name##_of_double
#define VEC(name) name##_double
#include "gemm_template.h"
#include "cayley_template.h"
#include "collapse_template.h"
#include "rotate_template.h"

#define DATA double
#define LOAD(name) name##_double
#define DATA_FN(name) name##_of_f64
#include "scale_template.h"
#define DATA double
#define LOAD(name) name##_double
#define DATA_FN(name) name##_of_f64
#include "linear_template.h"
#undef REAL
#undef FN
#undef VEC

#ifdef BF16_KERNELS
#include "bf16_rows.h"
#include BF16_KERNELS
#include "rotate_bf16.h"

static void rotate_any(const boft_rotate_args *args, const void *factors, int64_t begin, int64_t end, void *workspace)
{
    if (bf16_serves(args->plan, args->dtype, args->rows))
        bf16_rotate(args, factors, begin, end, workspace);
    else
        rotate_of_float(args, factors, begin, end, workspace);
}

static void rotate_backward_any(const boft_rotate_backward_args *args, int64_t begin, int64_t end, void *workspace)
{
    if (bf16_serves(args->plan, args->dtype, args->rows))
        bf16_rotate_backward(args, begin, end, workspace);
    else
        rotate_backward_of_float(args, begin, end, workspace);
}
#else
#define rotate_any rotate_of_float
#define rotate_backward_any rotate_backward_of_float
#endif

#ifdef PRODUCT_KERNELS
#include PRODUCT_KERNELS
#endif

/* The function of the data's dtype, for an operator with one for each (scale_template.h, linear_template.h). */
#define BY_DTYPE(name, arguments)                                                                                      \
    static void name##_of_float(const arguments *args, int64_t begin, int64_t end)                                     \
    {                                                                                                                  \
        if (args->dtype == BOFT_BF16)                                                                                  \
            name##_of_bf16(args, begin, end);                                                                          \
        else if (args->dtype == BOFT_F16)                                                                              \
            name##_of_f16(args, begin, end);                                                                           \
        else                                                                                                           \
            name##_of_f32(args, begin, end);                                                                           \
    }

BY_DTYPE(scale, boft_scale_args)
BY_DTYPE(scale_backward, boft_scale_backward_args)
BY_DTYPE(linear, boft_linear_args)
#undef BY_DTYPE

#include "digest_template.h"

const boft_kernels KERNELS = {
    .name = KERNELS_NAME,
    .cayley = {cayley_of_float, cayley_of_double},
    .cayley_backward = {cayley_backward_of_float, cayley_backward_of_double},
    .collapse = {collapse_of_float, collapse_of_double},
    .collapse_backward = {collapse_backward_of_float, collapse_backward_of_double},
    .transpose = {transpose_blocks_of_float, transpose_blocks_of_double},
    .rotate = {rotate_any, rotate_of_double},
    .rotate_backward = {rotate_backward_any, rotate_backward_of_double},
    .scale = {scale_of_float, scale_of_f64},
    .scale_backward = {scale_backward_of_float, scale_backward_of_f64},
    .linear = {linear_of_float, linear_of_f64},
    .product_f32 = {product_pack_of_f32, product_of_f32},
#ifdef PRODUCT_KERNELS
    .product_bf16 = {product_pack_of_bf16, product_of_bf16},
#endif
    .digest = digest,
};
