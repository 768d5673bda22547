/*
 * Cayley and its backward of as many blocks as a vector has lanes. A group of blocks is an array of b b vectors, entry
 * (i, j) of all of them at (i b + j) VEC_LANES. Blocks that are missing or not for the lanes are read and written, too,
 * but from any other block and to memory that nobody reads.
 */

/* lanes = `count` elements of each block. */
VEC_FN void FN(load_lanes)(int64_t count, const REAL *const from[], REAL *lanes)
{
    enum { LANES = VEC(VEC_LANES) };
    int64_t at = 0;
    VEC(vec) v[LANES];
    for (; at + LANES <= count; at += LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            v[i] = VEC(load)(from[i] + at);
        VEC(transpose)(v);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            VEC(store)(lanes + (at + i) * LANES, v[i]);
    }
    if (at == count)
        return;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        v[i] = VEC(loadn)(from[i] + at, count - at);
    VEC(transpose)(v);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (at + i < count)
            VEC(store)(lanes + (at + i) * LANES, v[i]);
}

/* Undo load_lanes. */
VEC_FN void FN(store_lanes)(int64_t count, const REAL *lanes, REAL *const to[])
{
    enum { LANES = VEC(VEC_LANES) };
    int64_t at = 0;
    VEC(vec) v[LANES];
    for (; at + LANES <= count; at += LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            v[i] = VEC(load)(lanes + (at + i) * LANES);
        VEC(transpose)(v);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            VEC(store)(to[i] + at, v[i]);
    }
    if (at == count)
        return;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        v[i] = at + i < count ? VEC(load)(lanes + (at + i) * LANES) : VEC(zero)();
    VEC(transpose)(v);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        VEC(storen)(to[i] + at, v[i], count - at);
}

/* Of a group, the lanes that s has: s = I + S in double. largest: max |S| in each, or NaN if an entry is not finite. */
VEC_FN void FN(skew_lanes)(int64_t b, const REAL *a, double *s, double largest[VEC_LANES_double])
{
    enum { LANES = VEC(VEC_LANES) };
    const int64_t ld = boft_lanes_stride(b);
    const vec_double half = set1_double(0.5);
    vec_double most = zero_double(), sick = zero_double();
    for (int64_t i = 0; i < b; i++) {
        for (int64_t j = 0; j < i; j++) {
            const vec_double above = mul_double(set1_double(-0.5), VEC(load_wide)(a + (j * b + i) * LANES));
            const vec_double skew = fma_double(half, VEC(load_wide)(a + (i * b + j) * LANES), above);
            const vec_double minus = sub_double(zero_double(), skew);
            store_double(s + (i * ld + j) * VEC_LANES_double, skew);
            store_double(s + (j * ld + i) * VEC_LANES_double, minus);
            most = max_double(most, max_double(skew, minus));
            sick = fma_double(zero_double(), skew, sick); /* 0 unless skew is not finite */
        }
        sick = fma_double(zero_double(), VEC(load_wide)(a + (i * b + i) * LANES), sick);
        store_double(s + (i * ld + i) * VEC_LANES_double, set1_double(1));
    }
    store_double(largest, add_double(most, sick));
}

/* q = 2 s - I, where s is some of the lanes of q. */
VEC_FN void FN(cayley_of_inverse_lanes)(int64_t b, const double *s, REAL *q)
{
    enum { LANES = VEC(VEC_LANES) };
    const vec_double two = set1_double(2);
    for (int64_t i = 0; i < b; i++) {
        const double *row = s + i * boft_lanes_stride(b) * VEC_LANES_double;
        for (int64_t j = 0; j < b; j++)
            VEC(store_narrow)(q + (i * b + j) * LANES, mul_double(two, load_double(row + j * VEC_LANES_double)));
        const vec_double diagonal = load_double(row + i * VEC_LANES_double);
        VEC(store_narrow)(q + (i * b + i) * LANES, fma_double(two, diagonal, set1_double(-1)));
    }
}

/*
 * Cayley of those of `count` consecutive blocks that are kept, need no pivoting and are enough; bit i of the result
 * says whether block i was one. workspace: a group, the doubles of some of its lanes and some more rows, a block.
 */
VEC_ATTR static unsigned FN(cayley_lanes)(int64_t b, int64_t count, const REAL *a, const unsigned char *keep, REAL *q,
                                          void *workspace)
{
    enum { LANES = VEC(VEC_LANES) };
    REAL *group = workspace;
    double *s = (double *)(group + b * b * LANES);
    double *rows = s + b * boft_lanes_stride(b) * VEC_LANES_double;
    REAL *nowhere = (REAL *)(rows + LANES_PANEL * b * VEC_LANES_double), *to[LANES];
    const REAL *from[LANES];
    unsigned done = 0;
    if (!enough_for_lanes(b, count))
        return 0;
    for (int64_t i = 0; i < LANES; i++)
        from[i] = a + (i < count ? i : 0) * b * b;
    FN(load_lanes)(b * b, from, group);
    for (int64_t first = 0; first < count; first += VEC_LANES_double) {
        double largest[VEC_LANES_double];
        unsigned fit = 0, fits = 0;
        FN(skew_lanes)(b, group + first, s, largest);
        for (int64_t i = 0; i < VEC_LANES_double && first + i < count; i++)
            if ((!keep || keep[first + i]) && largest[i] <= BOFT_UNPIVOTED_MAX) {
                fit |= 1u << (first + i);
                fits++;
            }
        if (!enough_for_lanes(b, fits))
            continue;
        invert_lanes(b, boft_lanes_stride(b), s, rows);
        FN(cayley_of_inverse_lanes)(b, s, group + first);
        done |= fit;
    }
    for (int64_t i = 0; i < LANES; i++)
        to[i] = done >> i & 1 ? q + i * b * b : nowhere;
    if (done)
        FN(store_lanes)(b * b, group, to);
    return done;
}

/* `columns` columns from j on of rows i ... i+rows-1 of C = A B, where A(i, k) is the vector at i a_row + k a_depth. */
VEC_FN void FN(lanes_tile)(const int rows, const int columns, int64_t b, int64_t i, int64_t j, const REAL *a,
                           int64_t a_row, int64_t a_depth, const REAL *right, REAL *c)
{
    enum { LANES = VEC(VEC_LANES) };
    VEC(vec) sum[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < columns; v++)
            sum[r][v] = VEC(zero)();
    for (int64_t k = 0; k < b; k++) {
        VEC(vec) row[4];
#pragma GCC unroll 4
        for (int v = 0; v < columns; v++)
            row[v] = VEC(load)(right + (k * b + j + v) * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const VEC(vec) factor = VEC(load)(a + ((i + r) * a_row + k * a_depth) * LANES);
#pragma GCC unroll 4
            for (int v = 0; v < columns; v++)
                sum[r][v] = VEC(fma)(factor, row[v], sum[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < columns; v++)
            VEC(store)(c + ((i + r) * b + j + v) * LANES, sum[r][v]);
}

VEC_FN void FN(lanes_rows)(const int rows, int64_t b, int64_t i, const REAL *a, int64_t a_row, int64_t a_depth,
                           const REAL *right, REAL *c)
{
    int64_t j = 0;
    for (; j + 4 <= b; j += 4)
        FN(lanes_tile)(rows, 4, b, i, j, a, a_row, a_depth, right, c);
    if (j + 2 <= b) {
        FN(lanes_tile)(rows, 2, b, i, j, a, a_row, a_depth, right, c);
        j += 2;
    }
    if (j < b)
        FN(lanes_tile)(rows, 1, b, i, j, a, a_row, a_depth, right, c);
}

/* C = A B for the matrices of a group; C overlaps neither. */
VEC_ATTR static void FN(multiply_lanes)(int64_t b, const REAL *a, int64_t a_row, int64_t a_depth, const REAL *right,
                                        REAL *c)
{
    enum { ROWS = LANES_PANEL }; /* 4 x 4 sums need AVX-512's registers */
    int64_t i = 0;
    for (; i + ROWS <= b; i += ROWS)
        FN(lanes_rows)(ROWS, b, i, a, a_row, a_depth, right, c);
    if (ROWS > 2 && i + 2 <= b) {
        FN(lanes_rows)(2, b, i, a, a_row, a_depth, right, c);
        i += 2;
    }
    if (i < b)
        FN(lanes_rows)(1, b, i, a, a_row, a_depth, right, c);
}

/* Cayley's backward of `count` consecutive blocks, where kept; workspace: three groups and a block. */
VEC_ATTR static void FN(cayley_backward_lanes)(int64_t b, int64_t count, const REAL *dq, const REAL *q,
                                               const unsigned char *keep, REAL *da, void *workspace)
{
    enum { LANES = VEC(VEC_LANES) };
    REAL *j = workspace, *grad = j + b * b * LANES, *half = grad + b * b * LANES, *nowhere = half + b * b * LANES;
    const REAL *from[LANES];
    REAL *to[LANES];
    for (int64_t i = 0; i < LANES; i++)
        from[i] = q + (i < count ? i : 0) * b * b;
    FN(load_lanes)(b * b, from, j);
    for (int64_t i = 0; i < b * b; i += b + 1)
        VEC(store)(j + i * LANES, VEC(add)(VEC(load)(j + i * LANES), VEC(set1)(1)));
    for (int64_t i = 0; i < LANES; i++)
        from[i] = dq + (i < count ? i : 0) * b * b;
    FN(load_lanes)(b * b, from, grad);
    FN(multiply_lanes)(b, grad, 1, b, j, half);
    FN(multiply_lanes)(b, j, b, 1, half, grad);
    const VEC(vec) quarter = VEC(set1)((REAL)0.25);
    for (int64_t r = 0; r < b; r++)
        for (int64_t c = 0; c <= r; c++) {
            REAL *below = grad + (r * b + c) * LANES, *above = grad + (c * b + r) * LANES;
            const VEC(vec) skew = VEC(mul)(quarter, VEC(sub)(VEC(load)(below), VEC(load)(above)));
            VEC(store)(below, skew);
            VEC(store)(above, VEC(sub)(VEC(zero)(), skew));
        }
    for (int64_t i = 0; i < LANES; i++)
        to[i] = i < count && (!keep || keep[i]) ? da + i * b * b : nowhere;
    FN(store_lanes)(b * b, grad, to);
}
