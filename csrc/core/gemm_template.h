/*
 * C = A B (or C += A B): the inner loop of every pass. For REAL and VEC see variant_template.h.
 *
 * Every element of C is one chain of multiply-adds over k in ascending order, whatever the tile it falls into, so
 * results do not depend on how rows are split.
 */

/*
 * sum[i][v] += a_i b_v for one k. upper, lower: rows from 0 and from 4 on of a column of `rows` values a_row apart; b:
 * a row of vectors.
 */
VEC_FN void FN(gemm_step)(const int rows, const int vectors, const int partial, int64_t lanes, const REAL *upper,
                          const REAL *lower, int64_t a_row, const REAL *b, VEC(vec) sum[8][2])
{
    enum { LANES = VEC(VEC_LANES) };
    VEC(vec) row[2];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
        row[v] = partial && v == vectors - 1 ? VEC(loadn)(b + v * LANES, lanes) : VEC(load)(b + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        const VEC(vec) factor = VEC(set1)(i < 4 ? upper[i * a_row] : lower[(i - 4) * a_row]);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sum[i][v] = VEC(fma)(factor, row[v], sum[i][v]);
    }
}

/* The sums of a tile of C, as below: what they begin with, and where they go. */
VEC_FN void FN(gemm_begin)(const int rows, const int vectors, const int partial, int64_t lanes, const REAL *c,
                           int64_t ldc, int accumulate, VEC(vec) sum[8][2])
{
    enum { LANES = VEC(VEC_LANES) };
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const REAL *from = c + i * ldc + v * LANES;
            if (!accumulate)
                sum[i][v] = VEC(zero)();
            else
                sum[i][v] = partial && v == vectors - 1 ? VEC(loadn)(from, lanes) : VEC(load)(from);
        }
}

VEC_FN void FN(gemm_end)(const int rows, const int vectors, const int partial, int64_t lanes, VEC(vec) sum[8][2],
                         REAL *c, int64_t ldc)
{
    enum { LANES = VEC(VEC_LANES) };
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            REAL *to = c + i * ldc + v * LANES;
            if (partial && v == vectors - 1)
                VEC(storen)(to, sum[i][v], lanes);
            else
                VEC(store)(to, sum[i][v]);
        }
}

/*
 * One tile of `rows` x (`vectors` vectors), the last vector `lanes` wide if `partial`. rows, vectors and partial are
 * constants at every call, so the accumulators live in registers. So do the addresses of A: those of four rows are one
 * register and multiples of a_row, and they move with k, where an unrolled loop over k, with addresses of its own for
 * each, has them in memory (one Zen 4 core, float32, in cache: x^T dy of 32 rows in groups of 64 104 and 58 GF/s).
 */
VEC_FN void FN(gemm_tile)(const int rows, const int vectors, const int partial, int64_t lanes, int64_t depth,
                          const REAL *a, int64_t a_row, int64_t a_depth, const REAL *b, int64_t ldb,
                          REAL *c, int64_t ldc, int accumulate)
{
    VEC(vec) sum[8][2];
    FN(gemm_begin)(rows, vectors, partial, lanes, c, ldc, accumulate, sum);
    const REAL *upper = a, *lower = a + 4 * a_row;
    for (int64_t k = 0; k < depth; k++, upper += a_depth, lower += a_depth, b += ldb)
        FN(gemm_step)(rows, vectors, partial, lanes, upper, lower, a_row, b, sum);
    FN(gemm_end)(rows, vectors, partial, lanes, sum, c, ldc);
}

/* All rows of a panel of columns, `tallest` rows at a time. */
VEC_FN void FN(gemm_panel)(const int tallest, const int vectors, const int partial, int64_t lanes, int64_t rows,
                           int64_t depth, const REAL *a, int64_t a_row, int64_t a_depth, const REAL *b, int64_t ldb,
                           REAL *c, int64_t ldc, int accumulate)
{
    /* Two rows alone would wait for their sums: after tiles of six, eight that are left are two tiles of four. */
    const int64_t talls = rows / tallest - (tallest == 6 && rows >= 6 && rows % 6 == 2);
    int64_t i = 0;
#define TILE(height)                                                                                                   \
    FN(gemm_tile)(height, vectors, partial, lanes, depth, a + i * a_row, a_row, a_depth, b, ldb, c + i * ldc, ldc,     \
                  accumulate)
    for (; i < talls * tallest; i += tallest)
        TILE(tallest);
    for (; tallest > 4 && i + 4 <= rows; i += 4)
        TILE(4);
    if (i + 2 <= rows) {
        TILE(2);
        i += 2;
    }
    if (i < rows)
        TILE(1);
#undef TILE
}

/* Not inlined, so that each has the registers to itself (32 x 40 x 40: 76, inlined, and 92 GF/s). */
#define DEFINE_PANEL(name, tallest, vectors, partial)                                                                  \
    VEC_ATTR static __attribute__((noinline)) void FN(name)(int64_t lanes, int64_t rows, int64_t depth, const REAL *a, \
                                                            int64_t a_row, int64_t a_depth, const REAL *b,             \
                                                            int64_t ldb, REAL *c, int64_t ldc, int accumulate)         \
    {                                                                                                                  \
        FN(gemm_panel)(tallest, vectors, partial, lanes, rows, depth, a, a_row, a_depth, b, ldb, c, ldc, accumulate);  \
    }
DEFINE_PANEL(gemm_two, VEC_TILE_ROWS_WIDE, 2, 0)
DEFINE_PANEL(gemm_two_partial, VEC_TILE_ROWS_WIDE, 2, 1)
DEFINE_PANEL(gemm_one, 8, 1, 0)
DEFINE_PANEL(gemm_one_partial, 8, 1, 1)
#undef DEFINE_PANEL

/*
 * C (rows x columns, row stride ldc) = or += A (rows x depth, element (i, k) at i a_row + k a_depth) times
 * B (depth x columns, row stride ldb). C overlaps neither A nor B.
 */
VEC_ATTR static void FN(gemm)(int64_t rows, int64_t columns, int64_t depth, const REAL *a, int64_t a_row,
                              int64_t a_depth, const REAL *b, int64_t ldb, REAL *c, int64_t ldc, int accumulate)
{
    enum { LANES = VEC(VEC_LANES) };
#define PANEL(name, lanes) FN(name)(lanes, rows, depth, a, a_row, a_depth, b + j, ldb, c + j, ldc, accumulate)
    int64_t j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES)
        PANEL(gemm_two, 0);
    const int64_t rest = columns - j;
    if (rest > LANES)
        PANEL(gemm_two_partial, rest - LANES);
    else if (rest == LANES)
        PANEL(gemm_one, 0);
    else if (rest > 0)
        PANEL(gemm_one_partial, rest);
#undef PANEL
}
