/*
 * One table of kernels per variant. Entry [0] works on float blocks (data float32, bfloat16 or float16), entry [1] on
 * double. Arguments were checked by the public function of the same name.
 */
#ifndef BOFT_KERNELS_H
#define BOFT_KERNELS_H

#include "boft.h"

/* NULL in variants that leave such products to others. */
typedef struct boft_product_kernels {
    void (*pack)(const boft_product_pack_args *args, int64_t begin, int64_t end);
    void (*multiply)(const boft_product_args *args, int64_t begin, int64_t end);
} boft_product_kernels;

typedef struct boft_kernels {
    const char *name;
    void (*cayley[2])(int64_t b, int64_t begin, int64_t end, const void *a, const unsigned char *keep, void *q,
                      void *workspace);
    void (*cayley_backward[2])(int64_t b, int64_t begin, int64_t end, const void *dq, const void *q,
                               const unsigned char *keep, void *da, void *workspace);
    void (*collapse[2])(const boft_plan *plan, const boft_level *level, int64_t begin, int64_t end, const void *q,
                        void *blocks, void *workspace);
    void (*collapse_backward[2])(const boft_plan *plan, const boft_level *level, int64_t begin, int64_t end,
                                 const void *dblocks, const void *q, void *dq, void *workspace);
    void (*transpose[2])(const boft_level *level, int64_t begin, int64_t end, const void *blocks, void *transposed);
    /* factors: NULL, or a real for each row, which multiplies the product before it is rounded. */
    void (*rotate[2])(const boft_rotate_args *args, const void *factors, int64_t begin, int64_t end, void *workspace);
    void (*rotate_backward[2])(const boft_rotate_backward_args *args, int64_t begin, int64_t end, void *workspace);
    void (*scale[2])(const boft_scale_args *args, int64_t begin, int64_t end);
    void (*scale_backward[2])(const boft_scale_backward_args *args, int64_t begin, int64_t end);
    void (*linear[2])(const boft_linear_args *args, int64_t begin, int64_t end);
    boft_product_kernels product_f32, product_bf16;
    void (*digest)(const void *data, size_t bytes, uint64_t out[BOFT_DIGEST_WORDS]);
} boft_kernels;

extern const boft_kernels boft_kernels_scalar;
extern const boft_kernels boft_kernels_portable;
#if defined(__x86_64__) && !defined(BOFT_PORTABLE)
#define BOFT_X86 1
extern const boft_kernels boft_kernels_avx2;
extern const boft_kernels boft_kernels_avx512;
extern const boft_kernels boft_kernels_avx512bf16;
/* Tiles are Linux's to allow, and newer than the oldest compilers. */
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define BOFT_AMX 1
extern const boft_kernels boft_kernels_amx;
#endif
#endif

/* The table in use; never NULL. */
const boft_kernels *boft_kernels_current(void);

/* Index into the tables' pairs for data of this dtype. */
static inline int boft_real_index(boft_dtype dtype)
{
    return dtype == BOFT_F64;
}

static inline size_t boft_real_size(boft_dtype dtype)
{
    return dtype == BOFT_F64 ? sizeof(double) : sizeof(float);
}

#endif
