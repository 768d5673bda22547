/*
 * Collapse and its backward for chunks of one or two channels, which are too short for vectors: as many groups at a
 * time as a vector has lanes, each element a vector with one lane for each of them. Pieces and products are those of
 * collapse_template.h; products 0 are the bottom factor's blocks.
 */

/* Loads or stores (with `store`) the blocks of groups g ... g+count-1: those of factor 0, then of factor 1, ... */
VEC_FN void FN(move_factors)(const boft_plan *plan, const boft_level *level, int64_t g, int64_t count, const int store,
                             const REAL *q, REAL *dq, REAL *lanes, REAL *nowhere)
{
    enum { LANES = VEC(VEC_LANES) };
    const int64_t top = level->factors - 1;
    const int64_t together = level->inner == 1 ? (int64_t)1 << top : 1; /* blocks of a factor that lie in a row */
    const int64_t values = together * plan->b * plan->b;
    for (int64_t f = 0; f <= top; f++)
        for (int64_t at = 0; at < (int64_t)1 << top; at += together, lanes += values * LANES) {
            const REAL *from[LANES];
            REAL *to[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const int64_t group = g + (i < count ? i : 0), low = at & (((int64_t)1 << f) - 1);
                const int64_t offset = FN(block_offset)(plan, level, group, f, at >> f, low);
                if (store)
                    to[i] = i < count ? dq + offset : nowhere;
                else
                    from[i] = q + offset;
            }
            if (store)
                FN(store_lanes)(values, lanes, to);
            else
                FN(load_lanes)(values, from, lanes);
        }
}

/* Of an array of the factors' blocks and then the products, the product of factors 0 ... f. */
VEC_FN REAL *FN(product_in_lanes)(const boft_plan *plan, const boft_level *level, int64_t f, REAL *factors)
{
    const int64_t one = level->group * plan->b; /* elements of a factor */
    return factors + (f == 0 ? 0 : level->factors * one + FN(products_size)(plan, level, f)) * VEC(VEC_LANES);
}

VEC_FN void FN(multiply_piece_lanes)(const int c, int64_t half, const REAL *q, const REAL *p, REAL *to)
{
    enum { LANES = VEC(VEC_LANES) };
    VEC(vec) block[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < 2 * c; r++)
#pragma GCC unroll 2
        for (int k = 0; k < c; k++)
            block[r][k] = VEC(load)(q + (r * 2 * c + k) * LANES);
    for (int64_t j = 0; j < half; j++) {
        VEC(vec) in[2];
#pragma GCC unroll 2
        for (int k = 0; k < c; k++)
            in[k] = VEC(load)(p + (k * half + j) * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < 2 * c; r++) {
            VEC(vec) sum = VEC(mul)(block[r][0], in[0]);
            if (c == 2)
                sum = VEC(fma)(block[r][1], in[1], sum);
            VEC(store)(to + ((r < c ? r : half + r - c) * 2 * half + j) * LANES, sum);
        }
    }
}

/* factors: the blocks, then room for the products, of which those of up to `last` factors more than one are made. */
VEC_FN void FN(multiply_factors_lanes)(const boft_plan *plan, const boft_level *level, int64_t last, REAL *factors)
{
    enum { LANES = VEC(VEC_LANES) };
    for (int64_t f = 1; f <= last; f++) {
        const REAL *blocks = factors + f * level->group * plan->b * LANES;
        const REAL *below = FN(product_in_lanes)(plan, level, f - 1, factors);
        REAL *to = FN(product_in_lanes)(plan, level, f, factors);
        for (int64_t i = 0; i < (int64_t)1 << level->factors; i++) {
            const FN(piece) piece = FN(find_piece)(plan->b, f, i);
            const int64_t number = (piece.high << f) + piece.low;
            const REAL *q = blocks + (number * plan->b * plan->b + piece.column) * LANES;
            if (plan->b == 2)
                FN(multiply_piece_lanes)(1, piece.half, q, below + piece.below * LANES, to + piece.at * LANES);
            else
                FN(multiply_piece_lanes)(2, piece.half, q, below + piece.below * LANES, to + piece.at * LANES);
        }
    }
}

/* blocks: of group g. */
VEC_ATTR static void FN(collapse_lanes)(const boft_plan *plan, const boft_level *level, int64_t g, int64_t count,
                                        const REAL *q, REAL *blocks, void *workspace)
{
    enum { LANES = VEC(VEC_LANES) };
    const int64_t size = level->group * level->group, top = level->factors - 1;
    REAL *factors = workspace, *product = FN(product_in_lanes)(plan, level, top, factors);
    REAL *nowhere = product + size * LANES, *to[LANES];
    FN(move_factors)(plan, level, g, count, 0, q, NULL, factors, NULL);
    FN(multiply_factors_lanes)(plan, level, top, factors);
    for (int64_t i = 0; i < LANES; i++)
        to[i] = i < count ? blocks + i * size : nowhere;
    FN(store_lanes)(size, product, to);
}

/* From the gradient of a piece, those of Q and P, which replace them. */
VEC_FN void FN(piece_backward_lanes)(const int c, int64_t half, const REAL *grad, REAL *q, REAL *p)
{
    enum { LANES = VEC(VEC_LANES) };
    VEC(vec) block[4][2], sum[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < 2 * c; r++)
#pragma GCC unroll 2
        for (int k = 0; k < c; k++) {
            block[r][k] = VEC(load)(q + (r * 2 * c + k) * LANES);
            sum[r][k] = VEC(zero)();
        }
    for (int64_t j = 0; j < half; j++) {
        VEC(vec) in[2], out[2];
#pragma GCC unroll 2
        for (int k = 0; k < c; k++) {
            in[k] = VEC(load)(p + (k * half + j) * LANES);
            out[k] = VEC(zero)();
        }
#pragma GCC unroll 4
        for (int r = 0; r < 2 * c; r++) {
            const VEC(vec) row = VEC(load)(grad + ((r < c ? r : half + r - c) * 2 * half + j) * LANES);
#pragma GCC unroll 2
            for (int k = 0; k < c; k++) {
                sum[r][k] = VEC(fma)(row, in[k], sum[r][k]);
                out[k] = VEC(fma)(block[r][k], row, out[k]);
            }
        }
#pragma GCC unroll 2
        for (int k = 0; k < c; k++)
            VEC(store)(p + (k * half + j) * LANES, out[k]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 2 * c; r++)
#pragma GCC unroll 2
        for (int k = 0; k < c; k++)
            VEC(store)(q + (r * 2 * c + k) * LANES, sum[r][k]);
}

/* dblocks: of group g. */
VEC_ATTR static void FN(collapse_backward_lanes)(const boft_plan *plan, const boft_level *level, int64_t g,
                                                 int64_t count, const REAL *dblocks, const REAL *q, REAL *dq,
                                                 void *workspace)
{
    enum { LANES = VEC(VEC_LANES) };
    const int64_t size = level->group * level->group, top = level->factors - 1;
    REAL *factors = workspace, *grads = FN(product_in_lanes)(plan, level, top, factors);
    REAL *nowhere = grads + size * LANES;
    const REAL *from[LANES];
    FN(move_factors)(plan, level, g, count, 0, q, NULL, factors, NULL);
    FN(multiply_factors_lanes)(plan, level, top - 1, factors);
    for (int64_t i = 0; i < LANES; i++)
        from[i] = dblocks + (i < count ? i : 0) * size;
    FN(load_lanes)(size, from, grads);
    for (int64_t f = top; f > 0; f--) {
        REAL *blocks = factors + f * level->group * plan->b * LANES;
        REAL *below = FN(product_in_lanes)(plan, level, f - 1, factors);
        const REAL *grad = FN(product_in_lanes)(plan, level, f, factors);
        for (int64_t i = 0; i < (int64_t)1 << level->factors; i++) {
            const FN(piece) piece = FN(find_piece)(plan->b, f, i);
            REAL *block = blocks + (((piece.high << f) + piece.low) * plan->b * plan->b + piece.column) * LANES;
            if (plan->b == 2)
                FN(piece_backward_lanes)(1, piece.half, grad + piece.at * LANES, block, below + piece.below * LANES);
            else
                FN(piece_backward_lanes)(2, piece.half, grad + piece.at * LANES, block, below + piece.below * LANES);
        }
    }
    FN(move_factors)(plan, level, g, count, 1, NULL, dq, factors, nowhere);
}
