/*
 * z s + bias (1 - s) and its backward for one type of data: DATA, with LOAD(load), LOAD(store) ... converting it to and
 * from vectors of REAL, and DATA_FN(x) naming its functions. Undefines the three at its end.
 *
 * Pointers are copied out of the arguments first: vector stores may alias anything, so the compiler would read a field
 * of the arguments again after each.
 */

/* Rows t ... t + rows - 1 of the forward; rows is a constant. */
VEC_FN void DATA_FN(scale_rows)(const boft_scale_args *args, const int rows, int64_t t)
{
    enum { LANES = VEC(VEC_LANES) };
    const REAL *s = args->s, *bias = args->bias;
    const DATA *z = (const DATA *)args->z + t * args->z_stride;
    DATA *out = (DATA *)args->out + t * args->out_stride;
    const int64_t n = args->n, z_stride = args->z_stride, out_stride = args->out_stride;
    const VEC(vec) one = VEC(set1)(1);
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        const VEC(vec) factor = VEC(load)(s + j);
#pragma GCC unroll 2
        for (int i = 0; i < rows; i++) {
            VEC(vec) sum = VEC(mul)(LOAD(load)(z + i * z_stride + j), factor);
            if (bias)
                sum = VEC(fma)(VEC(load)(bias + j), VEC(sub)(one, factor), sum);
            LOAD(store)(out + i * out_stride + j, sum);
        }
    }
    for (int i = 0; j < n && i < rows; i++) {
        const VEC(vec) factor = VEC(loadn)(s + j, n - j);
        VEC(vec) sum = VEC(mul)(LOAD(loadn)(z + i * z_stride + j, n - j), factor);
        if (bias)
            sum = VEC(fma)(VEC(loadn)(bias + j, n - j), VEC(sub)(one, factor), sum);
        LOAD(storen)(out + i * out_stride + j, sum, n - j);
    }
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
 * One vector of columns from column j on, `lanes` wide if `partial`, of `rows` rows. The sums are added to, or started if
 * `start`; dbias holds the plain sum of dy. rows and partial are constants.
 */
VEC_FN void DATA_FN(scale_backward_vector)(const DATA_FN(backward_rows) at, const int rows, const int partial,
                                           int64_t lanes, int64_t j, int start)
{
    const VEC(vec) factor = partial ? VEC(loadn)(at.s + j, lanes) : VEC(load)(at.s + j);
    VEC(vec) shift = VEC(zero)(), ds_sum = VEC(zero)(), dy_sum = VEC(zero)();
    if (at.bias)
        shift = partial ? VEC(loadn)(at.bias + j, lanes) : VEC(load)(at.bias + j);
    if (at.ds && !start)
        ds_sum = partial ? VEC(loadn)(at.ds + j, lanes) : VEC(load)(at.ds + j);
    if (at.dbias && !start)
        dy_sum = partial ? VEC(loadn)(at.dbias + j, lanes) : VEC(load)(at.dbias + j);
#pragma GCC unroll 2
    for (int i = 0; i < rows; i++) {
        const DATA *dy = at.dy + i * at.dy_stride + j;
        const VEC(vec) grad = partial ? LOAD(loadn)(dy, lanes) : LOAD(load)(dy);
        if (at.ds) {
            const DATA *z = at.z + i * at.z_stride + j;
            const VEC(vec) value = partial ? LOAD(loadn)(z, lanes) : LOAD(load)(z);
            ds_sum = VEC(fma)(grad, VEC(sub)(value, shift), ds_sum);
        }
        if (at.dbias)
            dy_sum = VEC(add)(grad, dy_sum);
        if (at.dz) {
            DATA *dz = at.dz + i * at.dz_stride + j;
            if (partial)
                LOAD(storen)(dz, VEC(mul)(grad, factor), lanes);
            else
                LOAD(store)(dz, VEC(mul)(grad, factor));
        }
    }
    if (at.ds && partial)
        VEC(storen)(at.ds + j, ds_sum, lanes);
    else if (at.ds)
        VEC(store)(at.ds + j, ds_sum);
    if (at.dbias && partial)
        VEC(storen)(at.dbias + j, dy_sum, lanes);
    else if (at.dbias)
        VEC(store)(at.dbias + j, dy_sum);
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
    /* Columns of a vector, and of as many vectors as there are in a line. */
    enum { LANES = VEC(VEC_LANES), LINE = BOFT_LINE_BYTES / sizeof(DATA), STEP = LINE > LANES ? LINE : LANES };
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
        for (int64_t i = j; i < j + STEP; i += LANES)
            DATA_FN(scale_backward_vector)(at, rows, 0, 0, i, start);
    }
    for (; j + LANES <= n; j += LANES)
        DATA_FN(scale_backward_vector)(at, rows, 0, 0, j, start);
    if (j < n)
        DATA_FN(scale_backward_vector)(at, rows, 1, n - j, j, start);
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
