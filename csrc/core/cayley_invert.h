/*
 * The inverse of one matrix of doubles by Gauss-Jordan elimination in place; invert.h says when with row pivoting.
 *
 * Column by column, step l takes the pivot row l, divides it by its pivot, and adds factor -s(i, l) times it to every
 * other row i; column l then becomes the inverse's. Here steps are taken a panel of columns at a time: first in the
 * panel's columns alone, keeping the factors, then in all others, where the panel's pivot rows are done by themselves
 * and every other row gets their sum, a product. An entry still goes through the same operations in the same order, so
 * neither its value nor its error depends on how wide panels are.
 */
#ifndef BOFT_CAYLEY_INVERT_H
#define BOFT_CAYLEY_INVERT_H

VEC_ATTR static void product_of_double(int64_t rows, int64_t columns, int64_t depth, const double *a, int64_t a_row,
                                       int64_t a_depth, const double *b, int64_t ldb, double *c, int64_t ldc,
                                       int accumulate, void *workspace);

/* An n x n matrix and what its elimination needs. Rows are padded to whole vectors: 8 doubles at the most. */
typedef struct elimination {
    int64_t n, ld;
    double *s;       /* rows of stride ld */
    double *factors; /* n rows of stride `panel`: of the outermost panel's steps; inverse pivots in place of pivots */
    int64_t panel;
    double *rows;    /* `panel` rows of stride ld: pivot rows as they are when their turn comes */
    int64_t *pivots; /* NULL, or which row was taken for row k */
    void *deeper;    /* workspace of products */
} elimination;

enum { FEW = 8, FEW_VECTORS = FEW / VEC_LANES_double };

/*
 * Of at most 8 columns from k on, the steps in their own rows and columns, and the factors of these. upper: pivot row l
 * in columns beyond l, otherwise 0; lower: in columns up to l.
 */
VEC_FN void eliminate_few_in_square(const elimination *e, int64_t k, int64_t w, double *factors, double upper[FEW][FEW],
                                    double lower[FEW][FEW])
{
    double square[FEW][FEW] = {{0}};
    vec_double row[FEW][FEW_VECTORS], factor[FEW][FEW_VECTORS];
    for (int64_t i = 0; i < FEW; i++) {
        square[i][i] = 1;
        if (i < w)
            memcpy(square[i], e->s + (k + i) * e->ld + k, (size_t)w * sizeof(double));
    }
#pragma GCC unroll 8
    for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
        for (int v = 0; v < FEW_VECTORS; v++) {
            row[i][v] = load_double(square[i] + v * VEC_LANES_double);
            factor[i][v] = zero_double();
        }
#pragma GCC unroll 8
    for (int l = 0; l < FEW; l++) {
        const int at = l / VEC_LANES_double, lane = l % VEC_LANES_double;
        const vec_double inverse = div_double(set1_double(1), lane_double(row[l][at], lane));
        factor[l][at] = with_lane_double(factor[l][at], lane, inverse);
        row[l][at] = with_lane_double(row[l][at], lane, set1_double(1));
#pragma GCC unroll 4
        for (int v = 0; v < FEW_VECTORS; v++) {
            row[l][v] = mul_double(inverse, row[l][v]);
            store_double(lower[l] + v * VEC_LANES_double, row[l][v]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < FEW; i++) {
            if (i == l)
                continue;
            const vec_double times = sub_double(zero_double(), lane_double(row[i][at], lane));
            factor[i][at] = with_lane_double(factor[i][at], lane, times);
            row[i][at] = with_lane_double(row[i][at], lane, zero_double());
#pragma GCC unroll 4
            for (int v = 0; v < FEW_VECTORS; v++)
                row[i][v] = fma_double(times, row[l][v], row[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < FEW; i++)
#pragma GCC unroll 4
        for (int v = 0; v < FEW_VECTORS; v++)
            store_double(square[i] + v * VEC_LANES_double, row[i][v]);
    for (int64_t i = 0; i < w; i++) {
        memcpy(e->s + (k + i) * e->ld + k, square[i], (size_t)w * sizeof(double));
        for (int v = 0; v < FEW_VECTORS; v++)
            store_double(factors + (k + i) * e->panel + v * VEC_LANES_double, factor[i][v]);
    }
    for (int l = 0; l < FEW; l++)
        for (int j = 0; j < FEW; j++) {
            upper[l][j] = j > l ? lower[l][j] : 0;
            lower[l][j] = j > l ? 0 : lower[l][j];
        }
}

/* Of w <= 8 columns from k on, the factors of rows first ... end-1, which lose those columns. */
VEC_FN void take_factors(const elimination *e, int64_t k, int64_t first, int64_t end, double upper[FEW][FEW],
                         double *factors)
{
    for (int64_t i = first; i < end; i++) {
        double *entries = e->s + i * e->ld + k;
        vec_double factor[FEW_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < FEW_VECTORS; v++) {
            factor[v] = load_double(entries + v * VEC_LANES_double);
            store_double(entries + v * VEC_LANES_double, zero_double());
        }
#pragma GCC unroll 8
        for (int l = 0; l < FEW - 1; l++) {
            const vec_double entry = lane_double(factor[l / VEC_LANES_double], l % VEC_LANES_double);
            const vec_double times = sub_double(zero_double(), entry);
#pragma GCC unroll 4
            for (int v = (l + 1) / VEC_LANES_double; v < FEW_VECTORS; v++)
                factor[v] = fma_double(times, load_double(upper[l] + v * VEC_LANES_double), factor[v]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < FEW_VECTORS; v++)
            store_double(factors + i * e->panel + v * VEC_LANES_double, sub_double(zero_double(), factor[v]));
    }
}

/* eliminate_few_pivot_rows for w known. */
VEC_FN void eliminate_pivot_rows_of(const int w, const elimination *e, int64_t k, const double *factors, int64_t first,
                                    int64_t end, double *rows)
{
    for (int64_t j = first; j < end; j += VEC_LANES_double) {
        vec_double d[FEW];
#pragma GCC unroll 8
        for (int l = 0; l < w; l++)
            d[l] = load_double(e->s + (k + l) * e->ld + j);
#pragma GCC unroll 8
        for (int l = 0; l < w; l++) {
            d[l] = mul_double(set1_double(factors[(k + l) * e->panel + l]), d[l]);
            store_double(rows + l * e->ld + j, d[l]);
#pragma GCC unroll 8
            for (int i = 0; i < w; i++)
                if (i != l)
                    d[i] = fma_double(set1_double(factors[(k + i) * e->panel + l]), d[l], d[i]);
        }
#pragma GCC unroll 8
        for (int l = 0; l < w; l++)
            store_double(e->s + (k + l) * e->ld + j, d[l]);
    }
}

/* row += factor * other, or row *= factor, in whole vectors. */
VEC_FN void add_row(int64_t columns, double factor, const double *other, double *row)
{
    const vec_double times = set1_double(factor);
    for (int64_t j = 0; j < columns; j += VEC_LANES_double)
        store_double(row + j, fma_double(times, load_double(other + j), load_double(row + j)));
}

VEC_FN void scale_row(int64_t columns, double factor, double *row)
{
    for (int64_t j = 0; j < columns; j += VEC_LANES_double)
        store_double(row + j, mul_double(set1_double(factor), load_double(row + j)));
}

/* The steps of w <= 8 columns from k on, in columns first ... end-1 of their rows. rows: their pivot rows. */
VEC_ATTR static void eliminate_few_pivot_rows(int64_t w, const elimination *e, int64_t k, const double *factors,
                                              int64_t first, int64_t end, double *rows)
{
    if (w == FEW)
        eliminate_pivot_rows_of(FEW, e, k, factors, first, end, rows);
    for (int64_t l = 0; l < w && w < FEW; l++) {
        double *row = rows + l * e->ld;
        memcpy(row + first, e->s + (k + l) * e->ld + first, (size_t)(end - first) * sizeof *row);
        scale_row(end - first, factors[(k + l) * e->panel + l], row + first);
        memcpy(e->s + (k + l) * e->ld + first, row + first, (size_t)(end - first) * sizeof *row);
        for (int64_t i = 0; i < w; i++)
            if (i != l)
                add_row(end - first, factors[(k + i) * e->panel + l], row + first, e->s + (k + i) * e->ld + first);
    }
}

/* The steps of w <= 8 columns from k on in these columns of all rows, with row pivoting, one by one. */
VEC_FN void eliminate_few_pivoted(const elimination *e, int64_t k, int64_t w, double *factors)
{
    for (int64_t l = 0; l < w; l++) {
        double *pivot_row = e->s + (k + l) * e->ld;
        e->pivots[k + l] = boft_pivot_row(e->n, e->s, k + l);
        boft_swap_rows(e->n, e->s, k + l, e->pivots[k + l]);
        boft_swap(e->panel, e->factors + (k + l) * e->panel, e->factors + e->pivots[k + l] * e->panel);
        const double inverse = 1 / (pivot_row[k + l] == 0 ? BOFT_LEAST_PIVOT : pivot_row[k + l]);
        pivot_row[k + l] = 1;
        scale_row(FEW, inverse, pivot_row + k);
        for (int64_t i = 0; i < e->n; i++) {
            double *row = e->s + i * e->ld + k, *factor = factors + i * e->panel + l;
            if (i == k + l)
                continue;
            *factor = -row[l];
            row[l] = 0;
            add_row(FEW, *factor, pivot_row + k, row);
        }
        factors[(k + l) * e->panel + l] = inverse;
    }
}

/* Rows other than k ... k+w-1, in columns first ... end-1, plus their factors times the pivot rows. */
VEC_FN void add_pivot_rows_elsewhere(const elimination *e, int64_t k, int64_t w, const double *factors, int64_t first,
                                     int64_t end)
{
    const int64_t start[2] = {0, k + w}, count[2] = {k, e->n - k - w};
    for (int side = 0; side < 2; side++)
        product_of_double(count[side], end - first, w, factors + start[side] * e->panel, e->panel, 1, e->rows + first,
                          e->ld, e->s + start[side] * e->ld + first, e->ld, 1, e->deeper);
}

/* The steps of w columns from k on in columns first ... end-1, which are others, of all rows. */
VEC_ATTR static void eliminate_elsewhere(const elimination *e, int64_t k, int64_t w, const double *factors,
                                         int64_t first, int64_t end)
{
    if (first == end)
        return;
    for (int64_t l = 0; l < w; l += FEW) {
        const int64_t few = boft_min(FEW, w - l), start[2] = {0, l + few}, count[2] = {l, w - l - few};
        double *rows = e->rows + l * e->ld;
        eliminate_few_pivot_rows(few, e, k + l, factors + l, first, end, rows);
        for (int side = 0; side < 2; side++) /* the panel's other rows */
            product_of_double(count[side], end - first, few, factors + (k + start[side]) * e->panel + l, e->panel, 1,
                              rows + first, e->ld, e->s + (k + start[side]) * e->ld + first, e->ld, 1, e->deeper);
    }
    add_pivot_rows_elsewhere(e, k, w, factors, first, end);
}

/*
 * The steps of w columns from k on in columns first ... end-1 of all rows, those w columns among them. factors: where
 * those of column k start.
 */
VEC_ATTR static void eliminate(const elimination *e, int64_t k, int64_t w, double *factors, int64_t first, int64_t end)
{
    const int64_t after = k + (w + FEW - 1) / FEW * FEW;
    if (w <= FEW && !e->pivots) { /* the columns themselves can go with the others in all rows but their own */
        double upper[FEW][FEW], lower[FEW][FEW];
        eliminate_few_in_square(e, k, w, factors, upper, lower);
        for (int64_t l = 0; l < w; l++)
            memcpy(e->rows + l * e->ld + k, lower[l], sizeof lower[l]);
        eliminate_few_pivot_rows(w, e, k, factors, first, k, e->rows);
        eliminate_few_pivot_rows(w, e, k, factors, after, end, e->rows);
        take_factors(e, k, 0, k, upper, factors);
        take_factors(e, k, k + w, e->n, upper, factors);
        add_pivot_rows_elsewhere(e, k, w, factors, first, end);
        return;
    }
    const int64_t panel = boft_panel(w);
    if (w <= FEW)
        eliminate_few_pivoted(e, k, w, factors);
    else
        for (int64_t l = 0; l < w; l += panel)
            eliminate(e, k + l, boft_min(panel, w - l), factors + l, k, after);
    eliminate_elsewhere(e, k, w, factors, first, k);
    eliminate_elsewhere(e, k, w, factors, after, end);
}

/* s = s^-1: n rows of stride boft_padded(n), 0 from column n to a multiple of 8. Needs boft_invert_workspace(n). */
VEC_ATTR static void invert(int64_t n, double *s, int pivoted, void *workspace)
{
    elimination e = {.n = n, .ld = boft_padded(n), .s = s, .factors = workspace, .panel = boft_panel(n)};
    e.rows = e.factors + n * e.panel;
    e.pivots = (int64_t *)(e.rows + e.panel * e.ld);
    e.deeper = (char *)workspace + boft_aligned((size_t)(e.panel * (n + e.ld) + n) * sizeof(double));
    if (!pivoted)
        e.pivots = NULL;
    for (int64_t k = 0; k < n; k += e.panel)
        eliminate(&e, k, boft_min(e.panel, n - k), e.factors, 0, (n + FEW - 1) / FEW * FEW);
    if (pivoted)
        boft_unswap_columns(n, s, e.pivots);
}

#endif
