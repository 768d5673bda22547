/*
 * (x weight^T) s + bias for few rows of x, for one type of data: DATA, LOAD(x) and DATA_FN(x) as in scale_template.h.
 * Undefines the three at its end.
 *
 * What counts is how fast the weight is read: several rows of it at a time as streams, each once for BOFT_LINEAR_ROWS
 * rows of x. Every product of two rows is one chain of multiply-adds over vectors in ascending order, and their lanes
 * are added in order, so it does not depend on the tile or the range that it falls into.
 */

/*
 * sums[t][column + i] = row t of x times row first + column + i of the weight. rows and outputs, at most
 * BOFT_LINEAR_ROWS, are constants.
 */
VEC_FN void DATA_FN(linear_tile)(const int rows, const int outputs, const boft_linear_args *args, const DATA *x,
                                 int64_t first, int64_t column, REAL sums[][BOFT_LINEAR_OUTPUTS])
{
    enum { LANES = VEC(VEC_LANES) };
    const int64_t d = args->d, x_stride = args->x_stride, stride = args->weight_stride;
    const DATA *weight = (const DATA *)args->weight + (first + column) * stride;
    VEC(vec) sum[BOFT_LINEAR_ROWS][BOFT_LINEAR_ROWS];
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int i = 0; i < outputs; i++)
            sum[t][i] = VEC(zero)();
    for (int64_t k = 0; k < d; k += LANES) {
        const int whole = k + LANES <= d;
        VEC(vec) in[BOFT_LINEAR_ROWS];
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++)
            in[t] = whole ? LOAD(load)(x + t * x_stride + k) : LOAD(loadn)(x + t * x_stride + k, d - k);
#pragma GCC unroll 4
        for (int i = 0; i < outputs; i++) {
            const DATA *from = weight + i * stride + k;
            const VEC(vec) w = whole ? LOAD(load)(from) : LOAD(loadn)(from, d - k);
#pragma GCC unroll 4
            for (int t = 0; t < rows; t++)
                sum[t][i] = VEC(fma)(w, in[t], sum[t][i]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int i = 0; i < outputs; i++) {
            REAL lanes[LANES], total = 0;
            VEC(store)(lanes, sum[t][i]);
            for (int lane = 0; lane < LANES; lane++)
                total += lanes[lane];
            sums[t][column + i] = total;
        }
}

/* Outputs begin ... end-1 of `rows` (a constant) rows from row t on. */
VEC_FN void DATA_FN(linear_rows)(const int rows, const boft_linear_args *args, int64_t t, int64_t begin, int64_t end)
{
    enum { LANES = VEC(VEC_LANES) };
    const REAL *s = args->s, *bias = args->bias;
    const DATA *x = (const DATA *)args->x + t * args->x_stride;
    DATA *out = (DATA *)args->out + t * args->out_stride;
    const int64_t out_stride = args->out_stride;
    REAL sums[BOFT_LINEAR_ROWS][BOFT_LINEAR_OUTPUTS];
    for (int64_t first = begin; first < end; first += BOFT_LINEAR_OUTPUTS) {
        const int64_t count = boft_min(BOFT_LINEAR_OUTPUTS, end - first);
        int64_t i = 0;
        for (; i + 4 <= count; i += 4)
            DATA_FN(linear_tile)(rows, 4, args, x, first, i, sums);
        for (; i < count; i++)
            DATA_FN(linear_tile)(rows, 1, args, x, first, i, sums);
        for (int64_t j = 0; j < count; j += LANES) {
            const int64_t lanes = boft_min(LANES, count - j);
            const VEC(vec) factor = VEC(loadn)(s + first + j, lanes);
            const VEC(vec) shift = bias ? VEC(loadn)(bias + first + j, lanes) : VEC(zero)();
            for (int r = 0; r < rows; r++)
                LOAD(storen)(out + r * out_stride + first + j,
                             VEC(fma)(VEC(loadn)(sums[r] + j, lanes), factor, shift), lanes);
        }
    }
}

VEC_ATTR static void DATA_FN(linear)(const boft_linear_args *args, int64_t begin, int64_t end)
{
    int64_t t = 0;
    for (; t + BOFT_LINEAR_ROWS <= args->rows; t += BOFT_LINEAR_ROWS)
        DATA_FN(linear_rows)(BOFT_LINEAR_ROWS, args, t, begin, end);
    switch (args->rows - t) {
    case 1:
        DATA_FN(linear_rows)(1, args, t, begin, end);
        break;
    case 2:
        DATA_FN(linear_rows)(2, args, t, begin, end);
        break;
    case 3:
        DATA_FN(linear_rows)(3, args, t, begin, end);
    }
}

#undef DATA
#undef LOAD
#undef DATA_FN
