/*
 * C = A B (or C += A B): the inner loop of every pass. For REAL and VEC see variant_template.h.
 *
 * Every element of C is one chain of multiply-adds over k in ascending order, whatever the tile it falls into, so
 * results do not depend on how rows are split.
 */

/* sum[i][v] += a_i b_v for one k. `a` holds a column of `rows` values a_row apart, `b` a row of vectors. */
VEC_FN void FN(gemm_step)(const int rows, const int vectors, const int partial, int64_t lanes, const REAL *a,
                          int64_t a_row, const REAL *b, VEC(vec) sum[8][2])
{
    enum { LANES = VEC(VEC_LANES) };
    VEC(vec) row[2];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
        row[v] = partial && v == vectors - 1 ? VEC(loadn)(b + v * LANES, lanes) : VEC(load)(b + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        const VEC(vec) factor = VEC(set1)(a[i * a_row]);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sum[i][v] = VEC(fma)(factor, row[v], sum[i][v]);
    }
}

/*
 * One tile of `rows` x (`vectors` vectors), the last vector `lanes` wide if `partial`. rows, vectors, partial and
 * `unrolled` are constants at every call, so the accumulators live in registers; if `unrolled`, so is depth.
 */
VEC_FN void FN(gemm_tile)(const int rows, const int vectors, const int partial, int64_t lanes, int64_t depth,
                          const REAL *a, int64_t a_row, int64_t a_depth, const REAL *b, int64_t ldb,
                          REAL *c, int64_t ldc, int accumulate)
{
    enum { LANES = VEC(VEC_LANES) };
    VEC(vec) sum[8][2];
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
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
        FN(gemm_step)(rows, vectors, partial, lanes, a + k * a_depth, a_row, b + k * ldb, sum);
        FN(gemm_step)(rows, vectors, partial, lanes, a + (k + 1) * a_depth, a_row, b + (k + 1) * ldb, sum);
        FN(gemm_step)(rows, vectors, partial, lanes, a + (k + 2) * a_depth, a_row, b + (k + 2) * ldb, sum);
        FN(gemm_step)(rows, vectors, partial, lanes, a + (k + 3) * a_depth, a_row, b + (k + 3) * ldb, sum);
    }
    for (; k < depth; k++)
        FN(gemm_step)(rows, vectors, partial, lanes, a + k * a_depth, a_row, b + k * ldb, sum);
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

/* All rows of a panel of columns, `tallest` rows at a time. */
VEC_FN void FN(gemm_panel)(const int tallest, const int vectors, const int partial, int64_t lanes, int64_t rows,
                           int64_t depth, const REAL *a, int64_t a_row, int64_t a_depth, const REAL *b, int64_t ldb,
                           REAL *c, int64_t ldc, int accumulate)
{
    int64_t i = 0;
#define TILE(height)                                                                                                   \
    FN(gemm_tile)(height, vectors, partial, lanes, depth, a + i * a_row, a_row, a_depth, b, ldb, c + i * ldc, ldc,     \
                  accumulate)
    for (; i + tallest <= rows; i += tallest)
        TILE(tallest);
    if (tallest > 4 && i + 4 <= rows) {
        TILE(4);
        i += 4;
    }
    if (i + 2 <= rows) {
        TILE(2);
        i += 2;
    }
    if (i < rows)
        TILE(1);
#undef TILE
}

/*
 * C (rows x columns, row stride ldc) = or += A (rows x depth, element (i, k) at i a_row + k a_depth) times
 * B (depth x columns, row stride ldb). C overlaps neither A nor B.
 */
VEC_ATTR static void FN(gemm)(int64_t rows, int64_t columns, int64_t depth, const REAL *a, int64_t a_row,
                              int64_t a_depth, const REAL *b, int64_t ldb, REAL *c, int64_t ldc, int accumulate)
{
    enum { LANES = VEC(VEC_LANES) };
    int64_t j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES)
        FN(gemm_panel)(VEC_TILE_ROWS_WIDE, 2, 0, 0, rows, depth, a, a_row, a_depth, b + j, ldb, c + j, ldc, accumulate);
    if (j + LANES <= columns) {
        FN(gemm_panel)(8, 1, 0, 0, rows, depth, a, a_row, a_depth, b + j, ldb, c + j, ldc, accumulate);
        j += LANES;
    }
    if (j < columns)
        FN(gemm_panel)(8, 1, 1, columns - j, rows, depth, a, a_row, a_depth, b + j, ldb, c + j, ldc, accumulate);
}
