/*
 * The product of a level's factors, group by group, from the top factor down. After the factors above f, row chunk u of
 * the product is non-zero only in column chunks that agree with u in the bits up to f; so multiplying by a block of
 * factor f involves only the rows whose chunks agree with the block's columns in the bits below f.
 */

/* The rows and columns of a product that one block of factor f involves. */
typedef struct FN(block_rows) {
    int64_t row_chunks; /* chunks of rows, 2^f apart, from chunk `low` on */
    int64_t low, step;  /* in chunks */
    int64_t left, right; /* first columns of the two chunks of columns */
} FN(block_rows);

VEC_FN FN(block_rows) FN(rows_of_block)(const boft_level *level, int64_t f, int64_t high, int64_t low, int64_t c)
{
    FN(block_rows) rows;
    rows.row_chunks = (int64_t)1 << (level->factors - f);
    rows.low = low;
    rows.step = (int64_t)1 << f;
    rows.left = ((high << (f + 1)) + low) * c;
    rows.right = rows.left + (c << f);
    return rows;
}

/* strip (row_chunks c rows of b columns) = the involved part of a (group x group) matrix. */
VEC_FN void FN(gather_rows)(const FN(block_rows) *rows, int64_t c, int64_t group, const REAL *matrix, REAL *strip)
{
    for (int64_t u = 0; u < rows->row_chunks; u++)
        for (int64_t r = 0; r < c; r++) {
            const REAL *from = matrix + ((rows->low + u * rows->step) * c + r) * group;
            REAL *to = strip + (u * c + r) * 2 * c;
            for (int64_t j = 0; j < c; j++) {
                to[j] = from[rows->left + j];
                to[c + j] = from[rows->right + j];
            }
        }
}

/* Undo gather_rows: the involved part of the matrix = strip. */
VEC_FN void FN(scatter_rows)(const FN(block_rows) *rows, int64_t c, int64_t group, const REAL *strip, REAL *matrix)
{
    for (int64_t u = 0; u < rows->row_chunks; u++)
        for (int64_t r = 0; r < c; r++) {
            REAL *to = matrix + ((rows->low + u * rows->step) * c + r) * group;
            const REAL *from = strip + (u * c + r) * 2 * c;
            for (int64_t j = 0; j < c; j++) {
                to[rows->left + j] = from[j];
                to[rows->right + j] = from[c + j];
            }
        }
}

/* product (zero where it is not written) = the top factor of the level, for group g. */
VEC_FN void FN(place_top_factor)(const boft_plan *plan, const boft_level *level, int64_t g, const REAL *q, REAL *product)
{
    const int64_t b = plan->b, c = b / 2, f = level->factors - 1;
    memset(product, 0, (size_t)(level->group * level->group) * sizeof(REAL));
    for (int64_t low = 0; low < (int64_t)1 << f; low++) {
        const int64_t n = boft_factor_block(level, g, f, 0, low);
        const FN(block_rows) rows = FN(rows_of_block)(level, f, 0, low, c);
        FN(scatter_rows)(&rows, c, level->group, q + ((level->first + f) * plan->blocks + n) * b * b, product);
    }
}

/* to = from * factor f, for group g. to may be from. strips: 2 group b reals. */
VEC_FN void FN(multiply_factor)(const boft_plan *plan, const boft_level *level, int64_t g, int64_t f, const REAL *q,
                                const REAL *from, REAL *to, REAL *strips)
{
    const int64_t b = plan->b, c = b / 2, group = level->group;
    for (int64_t high = 0; high < (int64_t)1 << (level->factors - 1 - f); high++)
        for (int64_t low = 0; low < (int64_t)1 << f; low++) {
            const int64_t n = boft_factor_block(level, g, f, high, low);
            const FN(block_rows) rows = FN(rows_of_block)(level, f, high, low, c);
            REAL *in = strips, *out = strips + group * b;
            FN(gather_rows)(&rows, c, group, from, in);
            FN(gemm)(rows.row_chunks * c, b, b, in, b, 1, q + ((level->first + f) * plan->blocks + n) * b * b, b, out, b, 0);
            FN(scatter_rows)(&rows, c, group, out, to);
        }
}

VEC_ATTR static void FN(collapse)(const boft_plan *plan, const boft_level *level, int64_t begin, int64_t end,
                                  const void *q, void *blocks, void *workspace)
{
    const int64_t size = level->group * level->group;
    REAL *to = (REAL *)blocks + level->offset;
    if (level->factors == 1) { /* blocks of one factor are in the order of its groups */
        memcpy(to + begin * size, (const REAL *)q + level->first * plan->d * plan->b + begin * size,
               (size_t)((end - begin) * size) * sizeof(REAL));
        return;
    }
    for (int64_t g = begin; g < end; g++) {
        REAL *product = to + g * size;
        FN(place_top_factor)(plan, level, g, q, product);
        for (int64_t f = level->factors - 2; f >= 0; f--)
            FN(multiply_factor)(plan, level, g, f, q, product, product, workspace);
    }
}

/* Gradients of factor f's blocks, and the gradient of the product turned into that of the product above f. */
VEC_FN void FN(factor_backward)(const boft_plan *plan, const boft_level *level, int64_t g, int64_t f, const REAL *q,
                                const REAL *above, REAL *grad, REAL *dq, REAL *strips)
{
    const int64_t b = plan->b, c = b / 2, group = level->group;
    REAL *product_rows = strips, *grad_rows = product_rows + group * b, *new_rows = grad_rows + group * b;
    REAL *transposed = new_rows + group * b;
    for (int64_t high = 0; high < (int64_t)1 << (level->factors - 1 - f); high++)
        for (int64_t low = 0; low < (int64_t)1 << f; low++) {
            const int64_t at = ((level->first + f) * plan->blocks + boft_factor_block(level, g, f, high, low)) * b * b;
            const FN(block_rows) rows = FN(rows_of_block)(level, f, high, low, c);
            const int64_t count = rows.row_chunks * c;
            FN(gather_rows)(&rows, c, group, above, product_rows);
            FN(gather_rows)(&rows, c, group, grad, grad_rows);
            FN(gemm)(b, b, count, product_rows, 1, b, grad_rows, b, dq + at, b, 0);
            for (int64_t i = 0; i < b; i++)
                for (int64_t j = 0; j < b; j++)
                    transposed[j * b + i] = q[at + i * b + j];
            FN(gemm)(count, b, b, grad_rows, b, 1, transposed, b, new_rows, b, 0);
            FN(scatter_rows)(&rows, c, group, new_rows, grad);
        }
}

VEC_ATTR static void FN(collapse_backward)(const boft_plan *plan, const boft_level *level, int64_t begin, int64_t end,
                                           const void *dblocks, const void *q, void *dq, void *workspace)
{
    const int64_t size = level->group * level->group, b = plan->b, c = b / 2, top = level->factors - 1;
    const REAL *from = (const REAL *)dblocks + level->offset;
    if (top == 0) {
        memcpy((REAL *)dq + level->first * plan->d * b + begin * size, from + begin * size,
               (size_t)((end - begin) * size) * sizeof(REAL));
        return;
    }
    /* above[f]: the product of the factors above f, for f = 0 ... top - 1. */
    REAL *above = workspace, *grad = above + top * size, *strips = grad + size;
    for (int64_t g = begin; g < end; g++) {
        FN(place_top_factor)(plan, level, g, q, above + (top - 1) * size);
        for (int64_t f = top - 1; f > 0; f--) {
            memset(above + (f - 1) * size, 0, (size_t)size * sizeof(REAL));
            FN(multiply_factor)(plan, level, g, f, q, above + f * size, above + (f - 1) * size, strips);
        }
        memcpy(grad, from + g * size, (size_t)size * sizeof(REAL));
        for (int64_t f = 0; f < top; f++)
            FN(factor_backward)(plan, level, g, f, q, above + f * size, grad, dq, strips);
        for (int64_t low = 0; low < (int64_t)1 << top; low++) {
            const int64_t n = boft_factor_block(level, g, top, 0, low);
            const FN(block_rows) rows = FN(rows_of_block)(level, top, 0, low, c);
            FN(gather_rows)(&rows, c, level->group, grad, (REAL *)dq + ((level->first + top) * plan->blocks + n) * b * b);
        }
    }
}
