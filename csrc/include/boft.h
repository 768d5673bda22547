/*
 * boft.h - the butterfly orthogonal transform (BOFT) on the CPU: the whole C interface.
 *
 * Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", ICLR 2024; sign, order and
 * parameter layout are those of Hugging Face PEFT's BOFT. Valid C11 and C++.
 *
 * The mathematics. d channels, block size b, D = d / b blocks, m butterfly factors, chunk c = b / 2.
 *   Cayley:   S = (A - A^T) / 2,  Q = (I - S)(I + S)^-1 = 2 (I + S)^-1 - I.
 *   Factor i: pairs chunk t with chunk t XOR 2^i. Its block n acts on the chunks t = (n >> i) 2^(i+1) + (n & (2^i - 1))
 *             and t + 2^i, as the row vector product x_block Q.
 *   R = F_{m-1} ... F_0; a row x is rotated as x R, so it meets factor m-1 first.
 *   A level is a run of `factors` consecutive factors from `first` on, multiplied together (collapsed): with
 *   inner = 2^first, the channels (d / (group inner), runs, inner, chunk) form groups (outer, lane) of
 *   group = runs * chunk = b 2^(factors-1) channels, and each group is multiplied by one dense block.
 *
 * Conventions for every function:
 *   - Matrices are row-major. Sizes and strides are int64_t in elements; a row stride is the distance between the
 *     starts of two rows, columns are contiguous.
 *   - Data may be float32, float64, bfloat16 or float16. Arithmetic, blocks and scales are float64 for float64 data
 *     and float32 for all others; "real" below means that type. 16-bit results are rounded once, to nearest even.
 *   - Nothing allocates, prints, exits or starts a thread. A function works on the range [begin, end) that it is given
 *     so that the caller can split work over threads; calls on disjoint ranges are independent, and every result is
 *     the same however ranges are split. Workspaces are per thread, of the stated number of bytes, aligned to 64.
 *   - Outputs must not overlap inputs unless said otherwise. Zero rows and empty ranges are valid and do nothing.
 *   - A function returns BOFT_OK or the reason for refusing; then nothing was written and boft_last_error() names the
 *     values. All are thread-safe except boft_cpu_select.
 */
#ifndef BOFT_H
#define BOFT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define BOFT_API __attribute__((visibility("default")))
#else
#define BOFT_API
#endif

typedef enum boft_status {
    BOFT_OK = 0,
    BOFT_BAD_SHAPE,   /* sizes that no BOFT rotation has, or ranges outside them */
    BOFT_BAD_DTYPE,   /* a dtype that the function does not take */
    BOFT_BAD_ARGUMENT, /* a missing pointer or an unknown name */
    BOFT_CUDA_FAILED   /* a launch failed: boft_cuda.h */
} boft_status;

typedef enum boft_dtype { BOFT_F32 = 0, BOFT_F64, BOFT_BF16, BOFT_F16 } boft_dtype;

/* The message of the last refusal in this thread; "" if there was none. Valid until the next refusal in the thread. */
BOFT_API const char *boft_last_error(void);

/* ---- Choice of kernels ------------------------------------------------------------------------------------------ */

/*
 * The variants this build knows, by index from 0, each able to do more than the next: "amx" (on Linux), "avx512bf16",
 * "avx512", "avx2", "portable", "scalar"; NULL past the end. "scalar" is the reference that all others are tested
 * against; "portable" uses compiler vectors and no x86 header.
 */
BOFT_API const char *boft_cpu_variant(int index);

/*
 * 1 if this processor and operating system can run the variant of that name, 0 if not or if the name is unknown. For "amx"
 * the process asks Linux for the tile registers.
 */
BOFT_API int boft_cpu_supported(const char *name);

/*
 * Use the variant `name` from now on; NULL means the environment variable BOFT_CPU if set, otherwise the fastest that is
 * supported (on Intel's processors without AMX avx512, although they have avx512bf16). BOFT_BAD_ARGUMENT if it is
 * unknown or not supported; the choice then stays. Without a call, the first kernel chooses as for NULL, falling back to
 * the fastest on a bad BOFT_CPU. Not while other threads run kernels.
 */
BOFT_API boft_status boft_cpu_select(const char *name);

/* The name of the variant in use. */
BOFT_API const char *boft_cpu_name(void);

/* ---- Plan: the one place that knows the shape rules and the levels ------------------------------------------------ */

enum { BOFT_MAX_LEVELS = 32 };

typedef struct boft_level {
    int64_t first;   /* lowest factor */
    int64_t factors; /* number of factors */
    int64_t group;   /* channels per group, b 2^(factors-1): blocks are group x group */
    int64_t runs;    /* contiguous runs of channels in a group; 1 when first is 0 */
    int64_t chunk;   /* channels per run, group / runs */
    int64_t inner;   /* 2^first: runs of different groups that lie between two runs of one group */
    int64_t offset;  /* of this level's blocks in the vector of all blocks */
} boft_level;

typedef struct boft_plan {
    int64_t d, b, m;
    int64_t blocks; /* D = d / b, blocks per factor */
    int64_t super;  /* channels that R mixes, b 2^(m-1): R is block-diagonal with blocks of this size */
    int64_t count;  /* elements of the collapsed blocks of all levels: the sum of d * group */
    int64_t levels;
    boft_level level[BOFT_MAX_LEVELS]; /* lowest factors first; x R meets the last one first */
} boft_plan;

/*
 * Checks (d, b, m) and chooses the levels. Valid: d, b, m >= 1, d divisible by b, and for m > 1 even b and d divisible
 * by b 2^(m-1). BOFT_BAD_SHAPE otherwise. The plan depends on nothing but d, b and m.
 */
BOFT_API boft_status boft_plan_make(int64_t d, int64_t b, int64_t m, boft_plan *plan);

/* ---- Cayley: parameters to orthogonal blocks ---------------------------------------------------------------------- */

/* Bytes for either direction, either dtype and any number of blocks: a little over 16 b^2 for b > 64. */
BOFT_API size_t boft_cayley_workspace(int64_t b);

/*
 * Blocks begin ... end-1: q = Cayley(a). a, q: (N, b, b) of BOFT_F32 or BOFT_F64. float32 is eliminated in float64.
 * keep: NULL or N bytes; where 0 the block becomes the identity (multiplicative dropout). Entries up to the largest
 * finite value give finite results; NaN gives NaN. q may be a.
 */
BOFT_API boft_status boft_cayley(boft_dtype dtype, int64_t b, int64_t begin, int64_t end, const void *a,
                                 const unsigned char *keep, void *q, void *workspace);

/*
 * da from dq: dS = -1/2 (I + Q)^T dQ (I + Q)^T, dA = (dS - dS^T) / 2, and 0 where keep is 0. Shapes as above.
 * da may be dq.
 */
BOFT_API boft_status boft_cayley_backward(boft_dtype dtype, int64_t b, int64_t begin, int64_t end, const void *dq,
                                          const void *q, const unsigned char *keep, void *da, void *workspace);

/* ---- Collapse: the factors of a level multiplied into one block per group ------------------------------------------ */

/* Bytes for either direction, any level. */
BOFT_API size_t boft_collapse_workspace(const boft_plan *plan, boft_dtype dtype);

/*
 * Groups begin ... end-1 of plan->level[level] (d / group of them). q: (m, D, b, b) real. blocks: plan->count reals,
 * of which (group, group) matrices at level.offset + g * group^2 are written. dtype: BOFT_F32 or BOFT_F64.
 */
BOFT_API boft_status boft_collapse(const boft_plan *plan, boft_dtype dtype, int64_t level, int64_t begin, int64_t end,
                                   const void *q, void *blocks, void *workspace);

/* dq from dblocks: writes those blocks of the level's factors that its groups begin ... end-1 are made of. */
BOFT_API boft_status boft_collapse_backward(const boft_plan *plan, boft_dtype dtype, int64_t level, int64_t begin,
                                            int64_t end, const void *dblocks, const void *q, void *dq,
                                            void *workspace);

/* Transposes each matrix of groups begin ... end-1 of a level: blocks of R become blocks for R^T. */
BOFT_API boft_status boft_transpose(const boft_plan *plan, boft_dtype dtype, int64_t level, int64_t begin, int64_t end,
                                    const void *blocks, void *transposed);

/* ---- Rotate: x R; merge ------------------------------------------------------------------------------------------ */

typedef struct boft_rotate_args {
    const boft_plan *plan;
    boft_dtype dtype;   /* of x and y */
    int transpose;      /* 0: y = x R; 1: y = x R^T */
    int64_t rows;       /* T */
    const void *x;      /* (T, d) */
    int64_t x_stride;   /* of rows, >= 0 */
    const void *blocks; /* plan->count reals: from boft_collapse, through boft_transpose when transpose is 1 */
    void *y;            /* (T, d) */
    int64_t y_stride;   /* of rows, >= d */
} boft_rotate_args;

BOFT_API size_t boft_rotate_workspace(const boft_plan *plan, boft_dtype dtype);

/* Rows begin ... end-1. */
BOFT_API boft_status boft_rotate(const boft_rotate_args *args, int64_t begin, int64_t end, void *workspace);

/*
 * The weight W of a layer with its adapter merged, diag(s) W R^T (PEFT, `Linear.merge`): boft_rotate of its rows as x,
 * with transpose 1, where row t of the product is multiplied by s[t] before it is rounded. With transpose 0 and 1 / s
 * it undoes that. s: args->rows reals, or NULL for ones. Workspace, ranges and refusals are those of boft_rotate.
 */
BOFT_API boft_status boft_merge(const boft_rotate_args *args, const void *s, int64_t begin, int64_t end,
                                void *workspace);

/*
 * Backward in one pass over x and dy: dx = dy R^T (dy R when transpose is 1) and the gradient of the blocks.
 * The sum over rows is split as the shape alone prescribes, into n = boft_rotate_backward_splits() parts that
 * boft_sum_splits adds in order, so gradients are bitwise the same for every division into ranges. n is a power of two,
 * and split i has the rows T i / n ... T (i + 1) / n - 1: those of one split are those of several where n is larger.
 */
typedef struct boft_rotate_backward_args {
    const boft_plan *plan;
    boft_dtype dtype;        /* of dy, x and dx */
    int transpose;           /* as in the forward call */
    int64_t rows;            /* T */
    const void *dy;          /* (T, d) */
    int64_t dy_stride;
    const void *x;           /* (T, d), the input of the forward call; NULL if dblocks is NULL */
    int64_t x_stride;
    const void *blocks;      /* as given to the forward call; needed when dblocks is wanted and plan->levels > 1 */
    const void *blocks_back; /* the same matrices transposed; needed when dx is wanted or plan->levels > 1 */
    void *dx;                /* (T, d) or NULL; may be dy with its stride */
    int64_t dx_stride;
    void *dblocks;           /* NULL, or splits * plan->count reals: the gradient of the untransposed blocks */
} boft_rotate_backward_args;

/* Row splits of the gradient of the blocks, from the shape alone; at least 1. */
BOFT_API int64_t boft_rotate_backward_splits(const boft_plan *plan, int64_t rows);

/* Independent tasks that boft_rotate_backward's range counts, equally many for each split and in the order of splits.
 * With rows == 0 there is still work: zero gradients. */
BOFT_API int64_t boft_rotate_backward_tasks(const boft_plan *plan, int64_t rows);

BOFT_API size_t boft_rotate_backward_workspace(const boft_plan *plan, boft_dtype dtype);

/* Tasks begin ... end-1. */
BOFT_API boft_status boft_rotate_backward(const boft_rotate_backward_args *args, int64_t begin, int64_t end,
                                          void *workspace);

/* out[i] = parts[0][i] + parts[1][i] + ... in that order, for i in begin ... end-1; parts: (splits, count) reals.
 * dtype: BOFT_F32 or BOFT_F64. out may be parts. */
BOFT_API boft_status boft_sum_splits(boft_dtype dtype, int64_t splits, int64_t count, const void *parts, void *out,
                                     int64_t begin, int64_t end);

/* ---- Scale: z s + bias (1 - s), where z is the output of a layer that has added its bias ------------------------------- */

typedef struct boft_scale_args {
    boft_dtype dtype; /* of z and out */
    int64_t rows, n;
    const void *z; /* (T, n) */
    int64_t z_stride;
    const void *s;    /* n reals */
    const void *bias; /* n reals or NULL */
    void *out;        /* (T, n); may be z */
    int64_t out_stride;
} boft_scale_args;

/* Rows begin ... end-1. */
BOFT_API boft_status boft_scale(const boft_scale_args *args, int64_t begin, int64_t end);

/*
 * Backward in one pass: dz = dy s, ds = sum_t dy (z - bias), dbias = sum_t dy (1 - s), which leaves out the part of a
 * bias's gradient that flows through z; with bias_detached none flows there, and dbias = sum_t dy is all of it. Sums are
 * split by rows as for rotate.
 */
typedef struct boft_scale_backward_args {
    boft_dtype dtype; /* of dy, z and dz */
    int64_t rows, n;
    const void *dy;
    int64_t dy_stride;
    const void *z; /* (T, n); NULL if ds is NULL */
    int64_t z_stride;
    const void *s;
    const void *bias; /* n reals or NULL */
    void *dz;         /* (T, n) or NULL; may be dy */
    int64_t dz_stride;
    void *ds;    /* NULL or splits * n reals */
    void *dbias; /* NULL or splits * n reals */
    int bias_detached;
} boft_scale_backward_args;

/* Row splits of ds and dbias, from the number of rows alone: a power of two, no less than rotate has for as many rows. */
BOFT_API int64_t boft_scale_backward_splits(int64_t rows);

/* Splits begin ... end-1 of ds and dbias and the rows of dz that belong to them. */
BOFT_API boft_status boft_scale_backward(const boft_scale_backward_args *args, int64_t begin, int64_t end);

/* ---- Linear: a whole layer, z s + bias (1 - s) with z = x weight^T + bias, for few rows ---------------------------------- */

typedef struct boft_linear_args {
    boft_dtype dtype;   /* of x, weight and out */
    int64_t rows, d, n; /* any number of rows; every BOFT_LINEAR_ROWS of them (tiles.h) read the weight once */
    const void *x;      /* (T, d), rotated */
    int64_t x_stride;
    const void *weight; /* (n, d) */
    int64_t weight_stride;
    const void *s;    /* n reals */
    const void *bias; /* n reals or NULL */
    void *out;        /* (T, n), overlapping nothing else */
    int64_t out_stride;
} boft_linear_args;

/* Outputs begin ... end-1 of all rows: (x weight^T) s + bias, summed in reals and rounded once. */
BOFT_API boft_status boft_linear(const boft_linear_args *args, int64_t begin, int64_t end);

/* ---- Product: rows times a matrix that is packed once for many of them --------------------------------------------- */

/*
 * Whether the variant at hand multiplies with packed matrices (depth, columns) of this dtype: float32 by all but "scalar",
 * bfloat16 by "avx512bf16" and "amx", where depth is a multiple of BOFT_PRODUCT_DEPTH and columns of
 * BOFT_PRODUCT_COLUMNS. What one variant packed is for products of that variant. Other shapes are refused.
 */
enum { BOFT_PRODUCT_DEPTH = 32, BOFT_PRODUCT_COLUMNS = 32 };
BOFT_API int boft_product_serves(boft_dtype dtype, int64_t depth, int64_t columns);

typedef struct boft_product_pack_args {
    boft_dtype dtype; /* of matrix and packed */
    int64_t depth, columns; /* of the packed matrix */
    int64_t first, rows;    /* rows first ... first + rows-1 of it are packed; both multiples of BOFT_PRODUCT_DEPTH */
    const void *matrix;     /* these: (rows, columns), or (columns, rows) if transposed */
    int64_t stride;         /* of its rows, no less than they are long */
    int transposed;
    void *packed; /* depth * columns numbers, aligned to 64 bytes; those of other rows are left alone */
} boft_product_pack_args;

/* Panels begin ... end-1 of the packed matrix: panel i has columns 32 i ... 32 i + 31. Ranges and rows that differ may
 * be packed at the same time. */
BOFT_API boft_status boft_product_pack(const boft_product_pack_args *args, int64_t begin, int64_t end);

typedef struct boft_product_args {
    boft_dtype dtype; /* of x, packed, bias and y */
    int64_t rows, depth, columns;
    const void *x; /* (T, depth) */
    int64_t x_stride;
    const void *packed; /* from boft_product_pack */
    const void *bias;   /* columns numbers or NULL */
    void *y;            /* (T, columns), overlapping nothing else */
    int64_t y_stride;
} boft_product_args;

/* Rows begin ... end-1 of y = x matrix + bias, summed in float32 and rounded once. A row gets the same bits in every
 * range. Subnormal bfloat16 numbers count as zeros. */
BOFT_API boft_status boft_product(const boft_product_args *args, int64_t begin, int64_t end);

/* ---- Pack: rows kept for backward in 4 or 8 bits per value --------------------------------------------------------- */

/* Bytes of a packed row of n >= 0 values, bits 4 or 8: 64 values (the last ones: fewer) share a 16-bit scale. */
BOFT_API size_t boft_pack_bytes(int64_t n, int bits);

/*
 * Packs rows begin ... end-1 of x (T, n), `stride` >= 0 apart, into rows of boft_pack_bytes(n, bits) bytes one after
 * the other. Values become multiples of a scale s, |v - unpacked| <= s / 2 with s <= (1 + 2^-7) max|v| / 7 (127 for 8
 * bits), max over the values that share it, but s >= 2^-133; nearest even, so equal rows give equal bytes everywhere.
 * A NaN, an infinity or a float64 beyond float32's range makes the values that share its scale NaN.
 */
BOFT_API boft_status boft_pack(boft_dtype dtype, int bits, int64_t rows, int64_t n, const void *x, int64_t stride,
                               void *packed, int64_t begin, int64_t end);

/* Rows begin ... end-1 of x (T, n), `stride` >= n apart, from packed rows; rounded once to a 16-bit dtype. */
BOFT_API boft_status boft_unpack(boft_dtype dtype, int bits, int64_t rows, int64_t n, const void *packed, void *x,
                                 int64_t stride, int64_t begin, int64_t end);

/* ---- Digest: whether parameters still hold the same bytes ---------------------------------------------------------- */

#define BOFT_DIGEST_WORDS 8

/*
 * A digest of `bytes` bytes, the same for every variant of kernels. Other bytes give another digest but for a chance of
 * 2^-64 or less, and certainly if one number alone changed; it does not withstand somebody who looks for a collision.
 */
BOFT_API boft_status boft_digest(const void *data, size_t bytes, uint64_t digest[BOFT_DIGEST_WORDS]);

#ifdef __cplusplus
}
#endif

#endif
