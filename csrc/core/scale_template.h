/*
 * z s + bias (1 - s) and its backward for one type of data: DATA, with LOAD(load), LOAD(store) ... converting it to and
 * from vectors of REAL, and DATA_FN(x) naming its functions. Undefines the three at its end.
 *
 * Pointers are copied out of the arguments first: vector stores may alias anything, so the compiler would read a field
 * of the arguments again after each.
 */

/* Where rows t, t + 1, ... of the forward lie; bias may be NULL. */
typedef struct DATA_FN(forward_rows) {
    const DATA *z;
    DATA *out;
    int64_t z_stride, out_stride;
    const REAL *s, *bias;
} DATA_FN(forward_rows);

/* Columns from j on of `rows` (a constant) rows: those of load_vectors. */
VEC_FN void DATA_FN(scale_columns)(const DATA_FN(forward_rows) at, const int rows, const int vectors, const int partial,
                                   int64_t lanes, int64_t j)
{
    const VEC(vec) one = VEC(set1)(1), zero = VEC(zero)();
    VEC(vec) factor[2], shift[2] = {zero, zero}, sum[2];
    VEC(load_vectors)(vectors, partial, lanes, at.s + j, factor);
    if (at.bias)
        VEC(load_vectors)(vectors, partial, lanes, at.bias + j, shift);
#pragma GCC unroll 2
    for (int i = 0; i < rows; i++) {
        LOAD(load_vectors)(vectors, partial, lanes, at.z + i * at.z_stride + j, sum);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            sum[v] = VEC(mul)(sum[v], factor[v]);
            if (at.bias)
                sum[v] = VEC(fma)(shift[v], VEC(sub)(one, factor[v]), sum[v]);
        }
        LOAD(store_vectors)(vectors, partial, lanes, at.out + i * at.out_stride + j, sum);
    }
}

/* Rows t ... t + rows - 1; rows is a constant. */
VEC_FN void DATA_FN(scale_rows)(const boft_scale_args *args, const int rows, int64_t t)
{
    enum { LANES = VEC(VEC_LANES) };
    const int64_t n = args->n;
    const DATA_FN(forward_rows) at = {
        .z = (const DATA *)args->z + t * args->z_stride,
        .out = (DATA *)args->out + t * args->out_stride,
        .z_stride = args->z_stride,
        .out_stride = args->out_stride,
        .s = args->s,
        .bias = args->bias,
    };
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES)
        DATA_FN(scale_columns)(at, rows, 2, 0, 0, j);
    for (; j + LANES <= n; j += LANES)
        DATA_FN(scale_columns)(at, rows, 1, 0, 0, j);
    if (j < n)
        DATA_FN(scale_columns)(at, rows, 1, 1, n - j, j);
}

VEC_ATTR static void DATA_FN(scale)(const boft_scale_args *args, int64_t begin, int64_t end)
{
    int64_t t = begin;
    for (; t + 2 <= end; t += 2)
        DATA_FN(scale_rows)(args, 2, t);
    if (t < end)
        DATA_FN(scale_rows)(args, 1, t);
}

/* Where rows t, t + 1, ... of the backward lie, and the sums of their split; NULL for what is not wanted. */
typedef struct DATA_FN(backward_rows) {
    const DATA *dy, *z;
    DATA *dz;
    int64_t dy_stride, z_stride, dz_stride;
    const REAL *s, *bias;
    REAL *ds, *dbias;
} DATA_FN(backward_rows);

/*
 * Columns from j on of `rows` (a constant) rows: those of load_vectors. The sums are added to, or started if `start`;
 * dbias holds the plain sum of dy.
 */
VEC_FN void DATA_FN(scale_backward_columns)(const DATA_FN(backward_rows) at, const int rows, const int vectors,
                                            const int partial, int64_t lanes, int64_t j, int start)
{
    const VEC(vec) zero = VEC(zero)();
    VEC(vec) factor[2], shift[2] = {zero, zero}, ds_sum[2] = {zero, zero}, dy_sum[2] = {zero, zero}, grad[2], value[2];
    VEC(load_vectors)(vectors, partial, lanes, at.s + j, factor);
    if (at.bias)
        VEC(load_vectors)(vectors, partial, lanes, at.bias + j, shift);
    if (at.ds && !start)
        VEC(load_vectors)(vectors, partial, lanes, at.ds + j, ds_sum);
    if (at.dbias && !start)
        VEC(load_vectors)(vectors, partial, lanes, at.dbias + j, dy_sum);
#pragma GCC unroll 2
    for (int i = 0; i < rows; i++) {
        LOAD(load_vectors)(vectors, partial, lanes, at.dy + i * at.dy_stride + j, grad);
        if (at.ds)
            LOAD(load_vectors)(vectors, partial, lanes, at.z + i * at.z_stride + j, value);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            if (at.ds)
                ds_sum[v] = VEC(fma)(grad[v], VEC(sub)(value[v], shift[v]), ds_sum[v]);
            if (at.dbias)
                dy_sum[v] = VEC(add)(grad[v], dy_sum[v]);
            grad[v] = VEC(mul)(grad[v], factor[v]);
        }
        if (at.dz)
            LOAD(store_vectors)(vectors, partial, lanes, at.dz + i * at.dz_stride + j, grad);
    }
    if (at.ds)
        VEC(store_vectors)(vectors, partial, lanes, at.ds + j, ds_sum);
    if (at.dbias)
        VEC(store_vectors)(vectors, partial, lanes, at.dbias + j, dy_sum);
}

/*
 * `rows` (a constant) rows from row t on, all columns; ds and dbias belong to their split. dy and z are fetched ahead, as
 * for rotate (boft_fetch): a layer's outputs lie in memory when its backward comes. Two Zen 4 cores, ds of 1576 rows,
 * bfloat16 from memory: 384 columns 60 us instead of 123, 1536 244 instead of 382; float32 from the second-level cache
 * 1.2 of the time without.
 */
VEC_FN void DATA_FN(scale_backward_rows)(const boft_scale_backward_args *args, const int rows, int64_t t, REAL *ds,
                                         REAL *dbias, int start)
{
    /* Columns of a vector, and of the vectors of a line, or of two where those are more. */
    enum { LANES = VEC(VEC_LANES), LINE = BOFT_LINE_BYTES / sizeof(DATA), STEP = LINE > 2 * LANES ? LINE : 2 * LANES };
    const int64_t n = args->n, ahead = boft_ahead(BOFT_BAND_ROWS, t, rows, args->rows);
    const DATA_FN(backward_rows) at = {
        .dy = (const DATA *)args->dy + t * args->dy_stride,
        .z = ds ? (const DATA *)args->z + t * args->z_stride : NULL,
        .dz = args->dz ? (DATA *)args->dz + t * args->dz_stride : NULL,
        .dy_stride = args->dy_stride,
        .z_stride = args->z_stride,
        .dz_stride = args->dz_stride,
        .s = args->s,
        .bias = args->bias,
        .ds = ds,
        .dbias = dbias,
    };
    int64_t j = 0;
    for (; j + STEP <= n; j += STEP) {
        boft_fetch(at.dy + j, sizeof *at.dy, at.dy_stride, ahead, rows, STEP);
        if (ds)
            boft_fetch(at.z + j, sizeof *at.z, at.z_stride, ahead, rows, STEP);
        for (int64_t i = j; i < j + STEP; i += 2 * LANES)
            DATA_FN(scale_backward_columns)(at, rows, 2, 0, 0, i, start);
    }
    for (; j + LANES <= n; j += LANES)
        DATA_FN(scale_backward_columns)(at, rows, 1, 0, 0, j, start);
    if (j < n)
        DATA_FN(scale_backward_columns)(at, rows, 1, 1, n - j, j, start);
}

VEC_ATTR static void DATA_FN(scale_backward)(const boft_scale_backward_args *args, int64_t begin, int64_t end)
{
    const REAL *s = args->s;
    const int64_t splits = boft_scale_backward_splits(args->rows);
    for (int64_t split = begin; split < end; split++) {
        const int64_t first = boft_split_begin(args->rows, split, splits);
        const int64_t past = boft_split_begin(args->rows, split + 1, splits);
        REAL *ds = args->ds ? (REAL *)args->ds + split * args->n : NULL;
        REAL *dbias = args->dbias ? (REAL *)args->dbias + split * args->n : NULL;
        int64_t t = first;
        for (; t + 2 <= past; t += 2)
            DATA_FN(scale_backward_rows)(args, 2, t, ds, dbias, t == first);
        for (; t < past; t++)
            DATA_FN(scale_backward_rows)(args, 1, t, ds, dbias, t == first);
        if (ds && first == past)
            memset(ds, 0, (size_t)args->n * sizeof *ds);
        if (dbias && first == past)
            memset(dbias, 0, (size_t)args->n * sizeof *dbias);
        for (int64_t j = 0; dbias && !args->bias_detached && j < args->n; j++)
            dbias[j] *= 1 - s[j];
    }
}

#undef DATA
#undef LOAD
#undef DATA_FN
