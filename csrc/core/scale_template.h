/*
 * z s + bias (1 - s) and its backward for one type of data: DATA, with LOAD(load), LOAD(store) ... converting it to and
 * from vectors of REAL, and DATA_FN(x) naming its functions. Undefines the three at its end.
 */

VEC_ATTR static void DATA_FN(scale)(const boft_scale_args *args, int64_t begin, int64_t end)
{
    enum { LANES = VEC(VEC_LANES) };
    const REAL *s = args->s, *bias = args->bias;
    const VEC(vec) one = VEC(set1)(1);
    const int64_t whole = args->n / LANES * LANES, rest = args->n - whole;
    for (int64_t t = begin; t < end; t++) {
        const DATA *z = (const DATA *)args->z + t * args->z_stride;
        DATA *out = (DATA *)args->out + t * args->out_stride;
        for (int64_t j = 0; j < whole; j += LANES) {
            const VEC(vec) factor = VEC(load)(s + j);
            VEC(vec) sum = VEC(mul)(LOAD(load)(z + j), factor);
            if (bias)
                sum = VEC(fma)(VEC(load)(bias + j), VEC(sub)(one, factor), sum);
            LOAD(store)(out + j, sum);
        }
        if (rest) {
            const VEC(vec) factor = VEC(loadn)(s + whole, rest);
            VEC(vec) sum = VEC(mul)(LOAD(loadn)(z + whole, rest), factor);
            if (bias)
                sum = VEC(fma)(VEC(loadn)(bias + whole, rest), VEC(sub)(one, factor), sum);
            LOAD(storen)(out + whole, sum, rest);
        }
    }
}

/* Rows first ... past-1 of `vectors` vectors of columns from column j on, the last one `lanes` wide if `partial`. */
VEC_FN void DATA_FN(scale_backward_columns)(const boft_scale_backward_args *args, const int vectors, const int partial,
                                            int64_t lanes, int64_t j, int64_t first, int64_t past, REAL *ds, REAL *dbias)
{
    enum { LANES = VEC(VEC_LANES) };
    const REAL *s = (const REAL *)args->s + j, *bias = args->bias ? (const REAL *)args->bias + j : NULL;
    VEC(vec) factor[4], shift[4], ds_sum[4], dy_sum[4];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        factor[v] = partial ? VEC(loadn)(s + v * LANES, lanes) : VEC(load)(s + v * LANES);
        shift[v] = VEC(zero)();
        if (bias)
            shift[v] = partial ? VEC(loadn)(bias + v * LANES, lanes) : VEC(load)(bias + v * LANES);
        ds_sum[v] = dy_sum[v] = VEC(zero)();
    }
    for (int64_t t = first; t < past; t++) {
        const DATA *dy = (const DATA *)args->dy + t * args->dy_stride + j;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const VEC(vec) grad = partial ? LOAD(loadn)(dy + v * LANES, lanes) : LOAD(load)(dy + v * LANES);
            if (ds) {
                const DATA *z = (const DATA *)args->z + t * args->z_stride + j + v * LANES;
                const VEC(vec) value = partial ? LOAD(loadn)(z, lanes) : LOAD(load)(z);
                ds_sum[v] = VEC(fma)(grad, VEC(sub)(value, shift[v]), ds_sum[v]);
            }
            if (dbias)
                dy_sum[v] = VEC(add)(grad, dy_sum[v]);
            if (args->dz) {
                DATA *dz = (DATA *)args->dz + t * args->dz_stride + j + v * LANES;
                if (partial)
                    LOAD(storen)(dz, VEC(mul)(grad, factor[v]), lanes);
                else
                    LOAD(store)(dz, VEC(mul)(grad, factor[v]));
            }
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        const VEC(vec) share = args->bias_detached ? VEC(set1)(1) : VEC(sub)(VEC(set1)(1), factor[v]);
        const VEC(vec) dbias_sum = VEC(mul)(dy_sum[v], share);
        if (ds && partial)
            VEC(storen)(ds + j + v * LANES, ds_sum[v], lanes);
        else if (ds)
            VEC(store)(ds + j + v * LANES, ds_sum[v]);
        if (dbias && partial)
            VEC(storen)(dbias + j + v * LANES, dbias_sum, lanes);
        else if (dbias)
            VEC(store)(dbias + j + v * LANES, dbias_sum);
    }
}

VEC_ATTR static void DATA_FN(scale_backward)(const boft_scale_backward_args *args, int64_t begin, int64_t end)
{
    enum { LANES = VEC(VEC_LANES) };
    for (int64_t split = begin; split < end; split++) {
        const int64_t first = split * BOFT_SCALE_SPLIT_ROWS;
        const int64_t past = boft_min(first + BOFT_SCALE_SPLIT_ROWS, args->rows);
        REAL *ds = args->ds ? (REAL *)args->ds + split * args->n : NULL;
        REAL *dbias = args->dbias ? (REAL *)args->dbias + split * args->n : NULL;
        int64_t j = 0;
        for (; j + 4 * LANES <= args->n; j += 4 * LANES)
            DATA_FN(scale_backward_columns)(args, 4, 0, 0, j, first, past, ds, dbias);
        for (; j + LANES <= args->n; j += LANES)
            DATA_FN(scale_backward_columns)(args, 1, 0, 0, j, first, past, ds, dbias);
        if (j < args->n)
            DATA_FN(scale_backward_columns)(args, 1, 1, args->n - j, j, first, past, ds, dbias);
    }
}

#undef DATA
#undef LOAD
#undef DATA_FN
