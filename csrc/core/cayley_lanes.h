/*
 * Inverses of as many b x b matrices as a vector has doubles, one matrix in each lane: entry (i, j) of all of them is
 * the vector at s + (i ld + j) VEC_LANES_double. The operations on an entry and their order are those of
 * cayley_invert.h, so a matrix has the same inverse here, in any lane, as there.
 */
#ifndef BOFT_CAYLEY_LANES_H
#define BOFT_CAYLEY_LANES_H

enum {
    /* Columns eliminated together: a wider panel loads entries less often, but its factors must fit the registers. */
    LANES_PANEL = VEC_LANES_double == 8 ? 4 : 2,
};

/* 1 if so many blocks are done sooner in lanes than one by one. */
VEC_FN int enough_for_lanes(int64_t b, int64_t count)
{
    return count > (b <= BOFT_LANES_ALWAYS_B ? 0 : VEC_LANES_double / 2);
}

/* The elimination of a panel's columns within the panel's rows; vectors throughout. */
typedef struct lanes_panel {
    vec_double inverse[LANES_PANEL];             /* of the pivots */
    vec_double factor[LANES_PANEL][LANES_PANEL]; /* [i][l]: what row i gets of pivot row l */
    vec_double above[LANES_PANEL][LANES_PANEL];  /* [l][j], j > l: pivot row l, as it is then */
} lanes_panel;

/*
 * The square of rows and columns k ... k+w-1 becomes its inverse. rows: the panel's pivot rows as they are when their
 * turn comes, b columns, of which these w are written; entries that the elimination of other rows consumes are 0 there.
 */
VEC_FN void eliminate_square(const int w, int64_t b, int64_t ld, int64_t k, double *s, double *rows, lanes_panel *panel)
{
    vec_double d[LANES_PANEL][LANES_PANEL];
#pragma GCC unroll 4
    for (int i = 0; i < w; i++)
#pragma GCC unroll 4
        for (int j = 0; j < w; j++)
            d[i][j] = load_double(s + ((k + i) * ld + k + j) * VEC_LANES_double);
#pragma GCC unroll 4
    for (int l = 0; l < w; l++) {
        const vec_double inverse = div_double(set1_double(1), d[l][l]);
        panel->inverse[l] = d[l][l] = inverse;
#pragma GCC unroll 4
        for (int j = 0; j < w; j++) {
            if (j != l)
                d[l][j] = mul_double(inverse, d[l][j]);
            panel->above[l][j] = d[l][j];
            store_double(rows + (l * b + k + j) * VEC_LANES_double, j > l ? zero_double() : d[l][j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < w; i++) {
            if (i == l)
                continue;
            const vec_double factor = sub_double(zero_double(), d[i][l]);
            panel->factor[i][l] = factor;
#pragma GCC unroll 4
            for (int j = 0; j < w; j++)
                d[i][j] = fma_double(factor, d[l][j], j == l ? zero_double() : d[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < w; i++)
#pragma GCC unroll 4
        for (int j = 0; j < w; j++)
            store_double(s + ((k + i) * ld + k + j) * VEC_LANES_double, d[i][j]);
}

/* The same for columns first ... end-1 of the panel's rows. */
VEC_FN void eliminate_pivot_rows_in_lanes(const int w, const lanes_panel *panel, int64_t b, int64_t ld, int64_t k,
                                          int64_t first, int64_t end, double *s, double *rows)
{
    for (int64_t j = first; j < end; j++) {
        vec_double d[LANES_PANEL];
#pragma GCC unroll 4
        for (int l = 0; l < w; l++)
            d[l] = load_double(s + ((k + l) * ld + j) * VEC_LANES_double);
#pragma GCC unroll 4
        for (int l = 0; l < w; l++) {
            d[l] = mul_double(panel->inverse[l], d[l]);
            store_double(rows + (l * b + j) * VEC_LANES_double, d[l]);
#pragma GCC unroll 4
            for (int i = 0; i < w; i++)
                if (i != l)
                    d[i] = fma_double(panel->factor[i][l], d[l], d[i]);
        }
#pragma GCC unroll 4
        for (int l = 0; l < w; l++)
            store_double(s + ((k + l) * ld + j) * VEC_LANES_double, d[l]);
    }
}

/* Columns first ... end-1 of rows i ... i+height-1, taken as 0 if `fresh`, plus factor times the pivot rows. */
VEC_FN void add_pivot_rows_in_lanes(const int height, const int w, const int fresh, vec_double factor[4][LANES_PANEL],
                                    int64_t b, int64_t ld, int64_t i, int64_t first, int64_t end, double *s,
                                    const double *rows)
{
    for (int64_t j = first; j < end; j++) {
        vec_double sum[4];
#pragma GCC unroll 4
        for (int r = 0; r < height; r++)
            sum[r] = fresh ? zero_double() : load_double(s + ((i + r) * ld + j) * VEC_LANES_double);
#pragma GCC unroll 4
        for (int l = 0; l < w; l++) {
            const vec_double row = load_double(rows + (l * b + j) * VEC_LANES_double);
#pragma GCC unroll 4
            for (int r = 0; r < height; r++)
                sum[r] = fma_double(factor[r][l], row, sum[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < height; r++)
            store_double(s + ((i + r) * ld + j) * VEC_LANES_double, sum[r]);
    }
}

/* Rows i ... i+height-1, none of them the panel's, lose the panel's columns. */
VEC_FN void eliminate_rows(const int height, const int w, const lanes_panel *panel, int64_t b, int64_t ld, int64_t k,
                           int64_t i, double *s, const double *rows)
{
    vec_double factor[4][LANES_PANEL];
#pragma GCC unroll 4
    for (int r = 0; r < height; r++)
#pragma GCC unroll 4
        for (int l = 0; l < w; l++) {
            vec_double entry = load_double(s + ((i + r) * ld + k + l) * VEC_LANES_double);
#pragma GCC unroll 4
            for (int before = 0; before < l; before++)
                entry = fma_double(factor[r][before], panel->above[before][l], entry);
            factor[r][l] = sub_double(zero_double(), entry);
        }
    add_pivot_rows_in_lanes(height, w, 0, factor, b, ld, i, 0, k, s, rows);
    add_pivot_rows_in_lanes(height, w, 1, factor, b, ld, i, k, k + w, s, rows);
    add_pivot_rows_in_lanes(height, w, 0, factor, b, ld, i, k + w, b, s, rows);
}

VEC_FN void eliminate_panel(const int w, int64_t b, int64_t ld, int64_t k, double *s, double *rows)
{
    lanes_panel panel;
    eliminate_square(w, b, ld, k, s, rows, &panel);
    eliminate_pivot_rows_in_lanes(w, &panel, b, ld, k, 0, k, s, rows);
    eliminate_pivot_rows_in_lanes(w, &panel, b, ld, k, k + w, b, s, rows);
    const int64_t first[2] = {0, k + w}, end[2] = {k, b};
    for (int side = 0; side < 2; side++) {
        int64_t i = first[side];
        for (; i + 4 <= end[side]; i += 4)
            eliminate_rows(4, w, &panel, b, ld, k, i, s, rows);
        if (i + 2 <= end[side]) {
            eliminate_rows(2, w, &panel, b, ld, k, i, s, rows);
            i += 2;
        }
        if (i < end[side])
            eliminate_rows(1, w, &panel, b, ld, k, i, s, rows);
    }
}

/* s = s^-1 by Gauss-Jordan elimination without pivoting. rows: LANES_PANEL b vectors. */
VEC_ATTR static void invert_lanes(int64_t b, int64_t ld, double *s, double *rows)
{
    int64_t k = 0;
    for (; k + LANES_PANEL <= b; k += LANES_PANEL)
        eliminate_panel(LANES_PANEL, b, ld, k, s, rows);
    if (LANES_PANEL > 2 && k + 2 <= b) {
        eliminate_panel(2, b, ld, k, s, rows);
        k += 2;
    }
    if (k < b)
        eliminate_panel(1, b, ld, k, s, rows);
}

#endif
