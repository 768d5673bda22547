/*
 * Cayley and its backward: small blocks in the lanes of vectors, larger ones by themselves. A block of the forward pass
 * has the same bits either way, so which way it goes may depend on how many there are.
 */
#include "cayley_invert.h"
#include "cayley_lanes.h"
#include "cayley_product_template.h"
#include "cayley_lanes_template.h"

/* As load_tile, of doubles. */
VEC_FN void FN(load_tile_wide)(int64_t rows, int64_t columns, const REAL *from, int64_t stride,
                               vec_double tile[VEC_LANES_double])
{
#pragma GCC unroll 8
    for (int r = 0; r < VEC_LANES_double; r++)
        if (r >= rows)
            tile[r] = zero_double();
        else
            tile[r] = columns >= VEC_LANES_double ? VEC(load_wide)(from + r * stride)
                                                  : VEC(loadn_wide)(from + r * stride, columns);
}

/* The lower triangle of tiles of S = (A - A^T) / 2, and from it the upper one. Returns boft_largest. */
VEC_FN double FN(load_skew)(int64_t b, const REAL *a, double *s)
{
    enum { TILE = VEC_LANES_double };
    const int64_t ld = boft_padded(b);
    const vec_double half = set1_double(0.5);
    vec_double most = zero_double(), sick = zero_double();
    for (int64_t i = 0; i < b; i += TILE)
        for (int64_t j = 0; j <= i; j += TILE) {
            const int64_t rows = boft_min(TILE, b - i), columns = boft_min(TILE, b - j);
            vec_double tile[TILE], mirror[TILE];
            FN(load_tile_wide)(rows, columns, a + i * b + j, b, tile);
            FN(load_tile_wide)(columns, rows, a + j * b + i, b, mirror);
            transpose_double(mirror);
#pragma GCC unroll 8
            for (int r = 0; r < TILE; r++) {
                tile[r] = fma_double(half, tile[r], mul_double(set1_double(-0.5), mirror[r]));
                mirror[r] = sub_double(zero_double(), tile[r]);
                most = max_double(most, max_double(tile[r], mirror[r]));
                sick = fma_double(zero_double(), tile[r], sick); /* 0 unless an entry is not finite */
            }
            transpose_double(mirror);
            for (int r = 0; r < columns; r++)
                store_double(s + (j + r) * ld + i, mirror[r]);
            for (int r = 0; r < rows; r++)
                store_double(s + (i + r) * ld + j, tile[r]);
        }
    double largest[TILE], all = 0;
    store_double(largest, add_double(most, sick));
    for (int r = 0; r < TILE; r++)
        all = all >= largest[r] || isnan(all) ? all : largest[r];
    return all;
}

/* q = Cayley(a) of one block. q may be a. workspace: boft_cayley_workspace(b). */
VEC_ATTR static void FN(cayley_block)(int64_t b, const REAL *a, int kept, REAL *q, void *workspace)
{
    const int64_t ld = boft_padded(b);
    double *s = workspace, *deeper = s + b * ld;
    if (!kept) {
        memset(q, 0, (size_t)(b * b) * sizeof *q);
        for (int64_t i = 0; i < b; i++)
            q[i * b + i] = 1;
        return;
    }
    const double largest = FN(load_skew)(b, a, s);
    const int pivoted = largest > BOFT_UNPIVOTED_MAX;
    const double one = pivoted ? boft_scaled_one(largest) : 1;
    for (int64_t i = 0; pivoted && i < b; i++)
        for (int64_t j = 0; j < b; j++)
            s[i * ld + j] /= largest;
    for (int64_t i = 0; i < b; i++) {
        s[i * ld + i] = one;
        for (int64_t j = b; j % 8 != 0; j++)
            s[i * ld + j] = 0;
    }
    invert(b, s, pivoted, deeper);
    const vec_double twice = set1_double(isnan(largest) ? NAN : 2 * one);
    for (int64_t i = 0; i < b; i++) {
        const double *row = s + i * ld;
        int64_t j = 0;
        for (; j + VEC_LANES_double <= b; j += VEC_LANES_double)
            VEC(store_narrow)(q + i * b + j, mul_double(twice, load_double(row + j)));
        if (j < b)
            VEC(storen_narrow)(q + i * b + j, mul_double(twice, load_double(row + j)), b - j);
        q[i * b + i] = (REAL)(isnan(largest) ? NAN : 2 * one * row[i] - 1);
    }
}

VEC_ATTR static void FN(cayley)(int64_t b, int64_t begin, int64_t end, const void *a_all, const unsigned char *keep_all,
                                void *q_all, void *workspace)
{
    const int64_t together = b <= BOFT_LANES_MAX_B ? VEC(VEC_LANES) : 1;
    for (int64_t n = begin; n < end; n += together) {
        const REAL *a = (const REAL *)a_all + n * b * b;
        REAL *q = (REAL *)q_all + n * b * b;
        const unsigned char *keep = keep_all ? keep_all + n : NULL;
        const int64_t count = boft_min(together, end - n);
        const unsigned done = together > 1 ? FN(cayley_lanes)(b, count, a, keep, q, workspace) : 0;
        for (int64_t i = 0; i < count; i++)
            if (!(done >> i & 1))
                FN(cayley_block)(b, a + i * b * b, !keep || keep[i], q + i * b * b, workspace);
    }
}

/* x = (x - x^T) / 4 in place, b x b. */
VEC_FN void FN(skew_quarter)(int64_t b, REAL *x)
{
    enum { TILE = VEC(VEC_LANES) };
    const VEC(vec) quarter = VEC(set1)((REAL)0.25);
    for (int64_t i = 0; i < b; i += TILE)
        for (int64_t j = 0; j <= i; j += TILE) {
            VEC(vec) tile[TILE], mirror[TILE];
            FN(load_tile)(b - i, b - j, x + i * b + j, b, tile);
            FN(load_tile)(b - j, b - i, x + j * b + i, b, mirror);
            VEC(transpose)(mirror);
#pragma GCC unroll 16
            for (int r = 0; r < TILE; r++) {
                tile[r] = VEC(mul)(quarter, VEC(sub)(tile[r], mirror[r]));
                mirror[r] = VEC(sub)(VEC(zero)(), tile[r]);
            }
            VEC(transpose)(mirror);
            FN(store_tile)(b - j, b - i, mirror, x + j * b + i, b);
            FN(store_tile)(b - i, b - j, tile, x + i * b + j, b);
        }
}

/* With J = I + Q, -2 dS = J^T dQ J^T is the transpose of J (dQ^T J), whose factors need not be transposed. */
VEC_ATTR static void FN(cayley_backward_block)(int64_t b, const REAL *dq, const REAL *q, REAL *da, void *workspace)
{
    REAL *j = workspace, *half = j + b * b, *deeper = half + b * b;
    memcpy(j, q, (size_t)(b * b) * sizeof *j);
    for (int64_t i = 0; i < b; i++)
        j[i * b + i] += 1;
    FN(product)(b, b, b, dq, 1, b, j, b, half, b, 0, deeper);
    FN(product)(b, b, b, j, b, 1, half, b, da, b, 0, deeper);
    FN(skew_quarter)(b, da);
}

VEC_ATTR static void FN(cayley_backward)(int64_t b, int64_t begin, int64_t end, const void *dq_all, const void *q_all,
                                         const unsigned char *keep_all, void *da_all, void *workspace)
{
    const int64_t together = b <= BOFT_LANES_MAX_B_BACKWARD ? VEC(VEC_LANES) : 1;
    for (int64_t n = begin; n < end; n += together) {
        const REAL *dq = (const REAL *)dq_all + n * b * b, *q = (const REAL *)q_all + n * b * b;
        REAL *da = (REAL *)da_all + n * b * b;
        const unsigned char *keep = keep_all ? keep_all + n : NULL;
        const int64_t count = boft_min(together, end - n);
        if (together > 1)
            FN(cayley_backward_lanes)(b, count, dq, q, keep, da, workspace);
        else if (!keep || *keep)
            FN(cayley_backward_block)(b, dq, q, da, workspace);
        for (int64_t i = 0; keep && i < count; i++)
            if (!keep[i])
                memset(da + i * b * b, 0, (size_t)(b * b) * sizeof *da);
    }
}
