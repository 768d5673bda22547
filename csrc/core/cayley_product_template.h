/*
 * As gemm, for factors of any size: parts of A and B that a long product reads many times are copied to where they stay
 * in cache. Elements of C are the same chains of multiply-adds as in gemm. workspace: boft_product_workspace(rows,
 * depth).
 */
VEC_ATTR static void FN(product)(int64_t rows, int64_t columns, int64_t depth, const REAL *a, int64_t a_row,
                                 int64_t a_depth, const REAL *b, int64_t ldb, REAL *c, int64_t ldc, int accumulate,
                                 void *workspace)
{
    enum { WIDTH = 2 * VEC(VEC_LANES), ROWS = BOFT_CACHED_ROWS, DEPTH = BOFT_CACHED_DEPTH };
    if (boft_product_is_small(rows, depth)) {
        FN(gemm)(rows, columns, depth, a, a_row, a_depth, b, ldb, c, ldc, accumulate);
        return;
    }
    REAL *a_part = workspace, *b_part = a_part + ROWS * DEPTH;
    for (int64_t k = 0; k < depth; k += DEPTH)
        for (int64_t i = 0; i < rows; i += ROWS) {
            const int64_t deep = boft_min(DEPTH, depth - k), high = boft_min(ROWS, rows - i);
            for (int64_t r = 0; r < high; r++)
                for (int64_t l = 0; l < deep; l++)
                    a_part[r * deep + l] = a[(i + r) * a_row + (k + l) * a_depth];
            for (int64_t j = 0; j < columns; j += WIDTH) {
                const int64_t wide = boft_min(WIDTH, columns - j);
                for (int64_t l = 0; l < deep; l++)
                    memcpy(b_part + l * WIDTH, b + (k + l) * ldb + j, (size_t)wide * sizeof(REAL));
                FN(gemm)(high, wide, deep, a_part, deep, 1, b_part, WIDTH, c + i * ldc + j, ldc, accumulate || k > 0);
            }
        }
}

/* A square of as many rows and columns as a vector has lanes, of which `rows` and `columns` exist; others are 0. */
VEC_FN void FN(load_tile)(int64_t rows, int64_t columns, const REAL *from, int64_t stride, VEC(vec) tile[])
{
    enum { TILE = VEC(VEC_LANES) };
#pragma GCC unroll 16
    for (int r = 0; r < TILE; r++)
        if (r >= rows)
            tile[r] = VEC(zero)();
        else
            tile[r] = columns >= TILE ? VEC(load)(from + r * stride) : VEC(loadn)(from + r * stride, columns);
}

VEC_FN void FN(store_tile)(int64_t rows, int64_t columns, const VEC(vec) tile[], REAL *to, int64_t stride)
{
    enum { TILE = VEC(VEC_LANES) };
#pragma GCC unroll 16
    for (int r = 0; r < TILE; r++)
        if (r < rows && columns >= TILE)
            VEC(store)(to + r * stride, tile[r]);
        else if (r < rows)
            VEC(storen)(to + r * stride, tile[r], columns);
}

/* to (columns x rows) = from^T (rows x columns). */
VEC_FN void FN(transpose_matrix)(int64_t rows, int64_t columns, const REAL *from, int64_t from_stride, REAL *to,
                                 int64_t to_stride)
{
    enum { TILE = VEC(VEC_LANES) };
    for (int64_t i = 0; i < rows; i += TILE)
        for (int64_t j = 0; j < columns; j += TILE) {
            VEC(vec) tile[TILE];
            FN(load_tile)(rows - i, columns - j, from + i * from_stride + j, from_stride, tile);
            VEC(transpose)(tile);
            FN(store_tile)(columns - j, rows - i, tile, to + j * to_stride + i, to_stride);
        }
}
