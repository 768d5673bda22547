/* Cayley and its backward, one block at a time. The elimination is in double for both types; invert.h says why. */

/* row -= factor * pivot_row over b columns padded to a multiple of 8. */
VEC_FN void FN(eliminate_row)(int64_t padded, double factor, const double *pivot_row, double *row)
{
    const vec_double minus = set1_double(-factor);
    for (int64_t j = 0; j < padded; j += VEC_LANES_double)
        store_double(row + j, fma_double(minus, load_double(pivot_row + j), load_double(row + j)));
}

/* s = s^-1 in place, by Gauss-Jordan elimination. */
VEC_FN void FN(invert)(int64_t b, double *s, int64_t *pivots, int pivoted)
{
    const int64_t padded = boft_padded(b);
    for (int64_t k = 0; k < b; k++) {
        double *pivot_row = s + k * padded;
        if (pivoted) {
            pivots[k] = boft_pivot_row(b, s, k);
            boft_swap_rows(b, s, k, pivots[k]);
        }
        const double pivot = pivot_row[k] == 0 ? BOFT_LEAST_PIVOT : pivot_row[k];
        const vec_double inverse = set1_double(1 / pivot);
        pivot_row[k] = 1;
        for (int64_t j = 0; j < padded; j += VEC_LANES_double)
            store_double(pivot_row + j, mul_double(inverse, load_double(pivot_row + j)));
        for (int64_t i = 0; i < b; i++) {
            if (i == k)
                continue;
            const double factor = s[i * padded + k];
            s[i * padded + k] = 0;
            FN(eliminate_row)(padded, factor, pivot_row, s + i * padded);
        }
    }
    if (pivoted)
        boft_unswap_columns(b, s, pivots);
}

VEC_ATTR static void FN(cayley)(int64_t b, int64_t begin, int64_t end, const void *a_all, const unsigned char *keep,
                                void *q_all, void *workspace)
{
    const int64_t padded = boft_padded(b);
    double *s = workspace;
    int64_t *pivots = (int64_t *)(s + b * padded);
    for (int64_t n = begin; n < end; n++) {
        const REAL *a = (const REAL *)a_all + n * b * b;
        REAL *q = (REAL *)q_all + n * b * b;
        const int kept = !keep || keep[n];
        memset(s, 0, (size_t)(b * padded) * sizeof *s);
        for (int64_t i = 0; kept && i < b; i++)
            for (int64_t j = 0; j <= i; j++) { /* the diagonal is 0 unless it is not finite */
                const double skew = (double)a[i * b + j] / 2 - (double)a[j * b + i] / 2;
                s[j * padded + i] = -skew;
                s[i * padded + j] = skew;
            }
        const double largest = boft_largest(b, s);
        const int pivoted = largest > BOFT_UNPIVOTED_MAX;
        const double one = pivoted ? boft_scaled_one(largest) : 1;
        for (int64_t i = 0; pivoted && i < b * padded; i++)
            s[i] /= largest;
        for (int64_t i = 0; i < b; i++)
            s[i * padded + i] = one;
        FN(invert)(b, s, pivots, pivoted);
        const double twice = isnan(largest) ? NAN : 2 * one;
        for (int64_t i = 0; i < b; i++) {
            for (int64_t j = 0; j < b; j++)
                q[i * b + j] = (REAL)(twice * s[i * padded + j]);
            q[i * b + i] = (REAL)(twice * s[i * padded + i] - 1);
        }
    }
}

VEC_ATTR static void FN(cayley_backward)(int64_t b, int64_t begin, int64_t end, const void *dq_all, const void *q_all,
                                         const unsigned char *keep, void *da_all, void *workspace)
{
    REAL *jt = workspace, *half = jt + b * b, *ds = half + b * b;
    for (int64_t n = begin; n < end; n++) {
        const REAL *dq = (const REAL *)dq_all + n * b * b, *q = (const REAL *)q_all + n * b * b;
        REAL *da = (REAL *)da_all + n * b * b;
        if (keep && !keep[n]) {
            memset(da, 0, (size_t)(b * b) * sizeof *da);
            continue;
        }
        for (int64_t i = 0; i < b; i++)
            for (int64_t j = 0; j < b; j++)
                jt[i * b + j] = q[j * b + i] + (i == j);
        FN(gemm)(b, b, b, jt, b, 1, dq, b, half, b, 0);
        FN(gemm)(b, b, b, half, b, 1, jt, b, ds, b, 0);
        for (int64_t i = 0; i < b; i++)
            for (int64_t j = 0; j < b; j++)
                da[i * b + j] = (ds[j * b + i] - ds[i * b + j]) / 4;
    }
}
