/*
 * The product of a level's factors, group by group, from the bottom factor up. The product of factors 0 ... f is
 * block-diagonal: 2^(factors - 1 - f) matrices of n = b 2^f rows, matrix `high` of which acts on the chunks whose bits
 * above f are those of high. Its row chunks are numbered by (bit', low), bit f and the f bits below, and column half
 * `bit` of it is
 *
 *     rows (bit', low) = Q[chunk bit', chunk bit] P[row chunk low]     for bit' = 0 and 1,
 *
 * where Q is block (high, low) of factor f, and P matrix (high, bit) of the product of factors 0 ... f-1, n / 2 rows of
 * n / 2 columns. One such pair of row chunks by half the columns, c n / 2 values each, is a "piece" below. In an array
 * of products the matrices of one lie one after the other.
 */

/* Piece i of 2^factors of the product of factors 0 ... f. */
typedef struct FN(piece) {
    int64_t high, low; /* the block of factor f */
    int64_t column;    /* of the block, where its chunk `bit` of columns starts */
    int64_t matrix;    /* (high, bit) as one number */
    int64_t half;      /* n / 2: columns of the piece, and rows from its upper chunk of rows to its lower */
    int64_t at;        /* where it starts in the matrices of the product */
    int64_t below;     /* where row chunk low of matrix (high, bit) starts in the matrices of the product below */
} FN(piece);

VEC_FN FN(piece) FN(find_piece)(int64_t b, int64_t f, int64_t i)
{
    const int64_t low = i & (((int64_t)1 << f) - 1), matrix = i >> f, c = b / 2, half = c << f;
    return (FN(piece)){
        .high = matrix >> 1,
        .low = low,
        .column = (matrix & 1) * c,
        .matrix = matrix,
        .half = half,
        .at = (matrix >> 1) * 4 * half * half + low * c * 2 * half + (matrix & 1) * half,
        .below = matrix * half * half + low * c * half,
    };
}

/* Where block (high, low) of factor f of group g starts in q. */
VEC_FN int64_t FN(block_offset)(const boft_plan *plan, const boft_level *level, int64_t g, int64_t f, int64_t high,
                                int64_t low)
{
    const int64_t n = boft_factor_block(level, g, f, high, low);
    return ((level->first + f) * plan->blocks + n) * plan->b * plan->b;
}

/* Elements of the products of factors 0 ... i of a group for i = 1 ... f-1, f >= 1. */
VEC_FN int64_t FN(products_size)(const boft_plan *plan, const boft_level *level, int64_t f)
{
    return level->group * plan->b * (((int64_t)1 << f) - 2);
}

/* Where P of a piece starts: in q if it is of one factor, in the products otherwise. */
VEC_FN int64_t FN(below_offset)(const boft_plan *plan, const boft_level *level, int64_t g, int64_t f, FN(piece) piece)
{
    if (f == 1)
        return FN(block_offset)(plan, level, g, 0, piece.matrix, 0) + piece.low * plan->b * plan->b / 2;
    return FN(products_size)(plan, level, f - 1) + piece.below;
}

#include "collapse_lanes_template.h"

/* A piece: rows of Q (stride 2 c, of which c columns count) times c rows P of half columns. */
VEC_FN void FN(multiply_piece_of)(const int c, int64_t half, const REAL *q, const REAL *p, REAL *to)
{
    enum { LANES = VEC(VEC_LANES) };
    for (int64_t j = 0; j < half; j += LANES) {
        const int64_t lanes = boft_min(LANES, half - j);
        VEC(vec) in[8];
#pragma GCC unroll 8
        for (int k = 0; k < c; k++)
            in[k] = lanes == LANES ? VEC(load)(p + k * half + j) : VEC(loadn)(p + k * half + j, lanes);
        for (int r = 0; r < 2 * c; r++) {
            VEC(vec) sum = VEC(mul)(VEC(set1)(q[r * 2 * c]), in[0]);
#pragma GCC unroll 8
            for (int k = 1; k < c; k++)
                sum = VEC(fma)(VEC(set1)(q[r * 2 * c + k]), in[k], sum);
            REAL *row = to + (r < c ? r : half + r - c) * 2 * half + j;
            if (lanes == LANES)
                VEC(store)(row, sum);
            else
                VEC(storen)(row, sum, lanes);
        }
    }
}

VEC_ATTR static void FN(multiply_piece)(int64_t c, int64_t half, const REAL *q, const REAL *p, REAL *to)
{
    switch (c) { /* products so small that a call of gemm costs as much as the work */
    case 3:
        FN(multiply_piece_of)(3, half, q, p, to);
        return;
    case 4:
        FN(multiply_piece_of)(4, half, q, p, to);
        return;
    case 5:
        FN(multiply_piece_of)(5, half, q, p, to);
        return;
    case 6:
        FN(multiply_piece_of)(6, half, q, p, to);
        return;
    case 7:
        FN(multiply_piece_of)(7, half, q, p, to);
        return;
    case 8:
        FN(multiply_piece_of)(8, half, q, p, to);
        return;
    }
    for (int64_t lower = 0; lower < 2; lower++)
        FN(gemm)(c, half, c, q + lower * 2 * c * c, 2 * c, 1, p, half, to + lower * 2 * half * half, 2 * half, 0);
}

/* to = the product of factors 0 ... f of group g. products: those of fewer factors. */
VEC_FN void FN(multiply_factor)(const boft_plan *plan, const boft_level *level, int64_t g, int64_t f, const REAL *q,
                                const REAL *products, REAL *to)
{
    for (int64_t i = 0; i < (int64_t)1 << level->factors; i++) {
        const FN(piece) piece = FN(find_piece)(plan->b, f, i);
        const REAL *block = q + FN(block_offset)(plan, level, g, f, piece.high, piece.low);
        const REAL *p = (f == 1 ? q : products) + FN(below_offset)(plan, level, g, f, piece);
        FN(multiply_piece)(plan->b / 2, piece.half, block + piece.column, p, to + piece.at);
    }
}

/* The products of factors 0 ... f for f = 1 ... factors - 2. */
VEC_FN void FN(multiply_lower_factors)(const boft_plan *plan, const boft_level *level, int64_t g, const REAL *q,
                                       REAL *products)
{
    for (int64_t f = 1; f < level->factors - 1; f++)
        FN(multiply_factor)(plan, level, g, f, q, products, products + FN(products_size)(plan, level, f));
}

VEC_ATTR static void FN(collapse)(const boft_plan *plan, const boft_level *level, int64_t begin, int64_t end,
                                  const void *q, void *blocks, void *workspace)
{
    const int64_t size = level->group * level->group, top = level->factors - 1;
    REAL *to = (REAL *)blocks + level->offset;
    if (top == 0) { /* blocks of one factor are in the order of its groups */
        memcpy(to + begin * size, (const REAL *)q + level->first * plan->d * plan->b + begin * size,
               (size_t)((end - begin) * size) * sizeof(REAL));
        return;
    }
    if (plan->b <= BOFT_COLLAPSE_LANES_MAX_B) {
        for (int64_t g = begin; g < end; g += VEC(VEC_LANES))
            FN(collapse_lanes)(plan, level, g, boft_min(VEC(VEC_LANES), end - g), q, to + g * size, workspace);
        return;
    }
    REAL *products = workspace;
    for (int64_t g = begin; g < end; g++) {
        FN(multiply_lower_factors)(plan, level, g, q, products);
        FN(multiply_factor)(plan, level, g, top, q, products, to + g * size);
    }
}

/*
 * Backward of a piece from its gradient: dp (c rows of half columns) = Q^T grad, and c columns of dq (rows of stride 2
 * c) = grad P^T, upper and lower rows alike.
 */
VEC_FN void FN(piece_backward_of)(const int c, int64_t half, const REAL *q, const REAL *p, const REAL *grad, REAL *dq,
                                  REAL *dp)
{
    enum { LANES = VEC(VEC_LANES) };
    for (int64_t j = 0; j < half; j += LANES) {
        const int64_t lanes = boft_min(LANES, half - j);
        VEC(vec) sum[8];
#pragma GCC unroll 8
        for (int k = 0; k < c; k++)
            sum[k] = VEC(zero)();
        for (int r = 0; r < 2 * c; r++) {
            const REAL *from = grad + (r < c ? r : half + r - c) * 2 * half + j;
            const VEC(vec) row = lanes == LANES ? VEC(load)(from) : VEC(loadn)(from, lanes);
#pragma GCC unroll 8
            for (int k = 0; k < c; k++)
                sum[k] = VEC(fma)(VEC(set1)(q[r * 2 * c + k]), row, sum[k]);
        }
#pragma GCC unroll 8
        for (int k = 0; k < c; k++)
            if (lanes == LANES)
                VEC(store)(dp + k * half + j, sum[k]);
            else
                VEC(storen)(dp + k * half + j, sum[k], lanes);
#pragma GCC unroll 4
        for (int k = 0; k < c; k += LANES) {
            const int64_t width = boft_min(LANES, c - k);
            VEC(vec) column[LANES]; /* of P */
            FN(load_tile)(c - k, lanes, p + k * half + j, half, column);
            VEC(transpose)(column);
            for (int r = 0; r < 2 * c; r++) {
                const REAL *from = grad + (r < c ? r : half + r - c) * 2 * half + j;
                REAL *to = dq + r * 2 * c + k;
                VEC(vec) products = j == 0 ? VEC(zero)() : VEC(loadn)(to, width);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    if (i < lanes)
                        products = VEC(fma)(VEC(set1)(from[i]), column[i], products);
                VEC(storen)(to, products, width);
            }
        }
    }
}

/* transposed: c half reals. */
VEC_ATTR static void FN(piece_backward)(int64_t c, int64_t half, const REAL *q, const REAL *p, const REAL *grad,
                                        REAL *dq, REAL *dp, REAL *transposed)
{
    switch (c) {
    case 3:
        FN(piece_backward_of)(3, half, q, p, grad, dq, dp);
        return;
    case 4:
        FN(piece_backward_of)(4, half, q, p, grad, dq, dp);
        return;
    case 5:
        FN(piece_backward_of)(5, half, q, p, grad, dq, dp);
        return;
    case 6:
        FN(piece_backward_of)(6, half, q, p, grad, dq, dp);
        return;
    case 7:
        FN(piece_backward_of)(7, half, q, p, grad, dq, dp);
        return;
    case 8:
        FN(piece_backward_of)(8, half, q, p, grad, dq, dp);
        return;
    }
    FN(transpose_matrix)(c, half, p, half, transposed, c);
    for (int64_t lower = 0; lower < 2; lower++) {
        const REAL *rows = grad + lower * 2 * half * half;
        FN(gemm)(c, half, c, q + lower * 2 * c * c, 1, 2 * c, rows, 2 * half, dp, half, lower > 0);
        FN(gemm)(c, c, half, rows, 2 * half, 1, transposed, c, dq + lower * 2 * c * c, 2 * c, 0);
    }
}

VEC_ATTR static void FN(collapse_backward)(const boft_plan *plan, const boft_level *level, int64_t begin, int64_t end,
                                           const void *dblocks, const void *q_all, void *dq_all, void *workspace)
{
    const int64_t size = level->group * level->group, b = plan->b, c = b / 2, top = level->factors - 1;
    const REAL *from = (const REAL *)dblocks + level->offset, *q = q_all;
    REAL *dq = dq_all;
    if (top == 0) {
        memcpy(dq + level->first * plan->d * b + begin * size, from + begin * size,
               (size_t)((end - begin) * size) * sizeof(REAL));
        return;
    }
    if (b <= BOFT_COLLAPSE_LANES_MAX_B) {
        for (int64_t g = begin; g < end; g += VEC(VEC_LANES))
            FN(collapse_backward_lanes)(plan, level, g, boft_min(VEC(VEC_LANES), end - g), from + g * size, q, dq,
                                        workspace);
        return;
    }
    /* The gradients of the products lie as the products do. */
    REAL *products = workspace, *grads = products + FN(products_size)(plan, level, top);
    REAL *transposed = grads + FN(products_size)(plan, level, top);
    for (int64_t g = begin; g < end; g++) {
        FN(multiply_lower_factors)(plan, level, g, q, products);
        for (int64_t f = top; f > 0; f--) {
            const REAL *grad = f == top ? from + g * size : grads + FN(products_size)(plan, level, f);
            for (int64_t i = 0; i < (int64_t)1 << level->factors; i++) {
                const FN(piece) piece = FN(find_piece)(b, f, i);
                const int64_t block = FN(block_offset)(plan, level, g, f, piece.high, piece.low) + piece.column;
                const int64_t below = FN(below_offset)(plan, level, g, f, piece);
                FN(piece_backward)(c, piece.half, q + block, (f == 1 ? q : products) + below, grad + piece.at,
                                   dq + block, (f == 1 ? dq : grads) + below, transposed);
            }
        }
    }
}

/* The blocks of groups begin ... end-1 of a level, transposed. */
VEC_ATTR static void FN(transpose_blocks)(const boft_level *level, int64_t begin, int64_t end, const void *blocks,
                                          void *transposed)
{
    const int64_t group = level->group, size = group * group;
    for (int64_t g = begin; g < end; g++)
        FN(transpose_matrix)(group, group, (const REAL *)blocks + level->offset + g * size, group,
                             (REAL *)transposed + level->offset + g * size, group);
}
