/* From parameters to blocks: Cayley, collapse, transpose, and the backward of the first two. */
#include "oracle.h"
#include "support.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const boft_dtype reals[] = {BOFT_F32, BOFT_F64};

/* (n, b, b) parameters with entries uniform in [-size, size), as they are stored in dtype. */
static double *random_matrices(boft_dtype dtype, int64_t n, int64_t b, double size)
{
    double *a = doubles(n * b * b);
    for (int64_t i = 0; i < n * b * b; i++)
        a[i] = rounded(dtype, size * random_unit());
    return a;
}

/* Small integers, about two nonzero ones per row: sums of products of them are exact in any order. */
static double *integer_matrices(int64_t n, int64_t b)
{
    double *a = doubles(n * b * b);
    for (int64_t i = 0; i < n * b * b; i++)
        a[i] = random_below(b) < 2 ? (double)(random_below(3) - 1) : 0;
    return a;
}

static void *stored(boft_dtype dtype, const double *values, int64_t n, guard side)
{
    void *all = doubles(n);
    for (int64_t i = 0; i < n; i++)
        put(dtype, all, i, values[i]);
    return guarded_copy(all, (size_t)n * dtype_size(dtype), dtype_size(dtype), side);
}

/* ---- Cayley ---------------------------------------------------------------------------------------------------- */

static void run_cayley(boft_dtype dtype, int64_t b, int64_t n, division how, const void *a, const unsigned char *keep,
                       void *q, void *workspace)
{
    const ranges r = divide(n, how);
    int64_t begin, end;
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++) {
        scrub(workspace);
        EXPECT_OK(boft_cayley(dtype, b, begin, end, a, keep, q, workspace));
    }
}

/* The exact S of one block. */
static void skew(int64_t b, const double *a, double *s)
{
    for (int64_t i = 0; i < b; i++)
        for (int64_t j = 0; j < b; j++)
            s[i * b + j] = a[i * b + j] / 2 - a[j * b + i] / 2;
}

/* Largest singular value of S by power iteration, which falls short by a few percent at most. */
static double norm_of_skew(int64_t b, const double *s)
{
    double *v = doubles(b), *w = doubles(b), norm = 0;
    for (int64_t i = 0; i < b; i++)
        v[i] = random_unit();
    for (int step = 0; step < 40; step++) {
        double length = 0;
        for (int64_t i = 0; i < b; i++) {
            w[i] = 0;
            for (int64_t j = 0; j < b; j++)
                w[i] += s[i * b + j] * v[j];
            length += w[i] * w[i];
        }
        norm = sqrt(length);
        for (int64_t i = 0; i < b && norm > 0; i++)
            v[i] = w[i] / norm;
        if (norm == 0)
            return 0;
    }
    return norm;
}

/* How far entries may grow during an elimination: ample for small ones or with pivots. */
static const double growth = 8;

/*
 * Q (I + S) = I - S and Q Q^T = I, entry by entry.
 *
 * Error of one entry of Q, first order, u64 = 2^-53: the elimination in float64 is that of a matrix
 * b growth u64 |I + S| away, and |(I + S)^-1| <= 1, so it is at most b growth u64 (1 + |S|). float32 adds one
 * rounding, u32 |q|. Both residuals are linear in that error; 2 b u64 times the absolute products is the error of
 * forming the residuals here.
 */
static void expect_orthogonal(boft_dtype dtype, int64_t b, const double *a, const double *q)
{
    const double u64 = unit_roundoff(BOFT_F64), u = dtype == BOFT_F32 ? unit_roundoff(BOFT_F32) : 0;
    double *plus = doubles(b * b), *got = doubles(b * b), *size = doubles(b * b);
    double *truth = doubles(b * b), *bound = doubles(b * b), *abs_q = doubles(b * b), *abs_plus = doubles(b * b);
    double *s = doubles(b * b);
    skew(b, a, s);
    const double norm = norm_of_skew(b, s), elimination = (double)b * growth * u64 * (1 + norm);
    absolute(b * b, q, abs_q);

    for (int64_t i = 0; i < b * b; i++)
        plus[i] = s[i] + (i / b == i % b);
    absolute(b * b, plus, abs_plus);
    multiply(b, q, plus, got);
    multiply(b, abs_q, abs_plus, size);
    for (int64_t i = 0; i < b; i++)
        for (int64_t j = 0; j < b; j++) {
            double column = 0;
            for (int64_t k = 0; k < b; k++)
                column += abs_plus[k * b + j];
            truth[i * b + j] = (i == j) - s[i * b + j];
            bound[i * b + j] = (u + 2 * (double)b * u64) * size[i * b + j] + elimination * column;
        }
    EXPECT_CLOSE("Q (I + S)", BOFT_F64, got, b, b, b, truth, bound);

    multiply_nt(b, q, q, got);
    multiply_nt(b, abs_q, abs_q, size);
    for (int64_t i = 0; i < b; i++)
        for (int64_t j = 0; j < b; j++) {
            double rows = 0;
            for (int64_t k = 0; k < b; k++)
                rows += abs_q[i * b + k] + abs_q[j * b + k];
            truth[i * b + j] = i == j;
            bound[i * b + j] = (2 * u + 2 * (double)b * u64) * size[i * b + j] + elimination * rows;
        }
    EXPECT_CLOSE("Q Q^T", BOFT_F64, got, b, b, b, truth, bound);
}

/* The exact identity, as dropout makes it. */
static int is_identity(boft_dtype dtype, int64_t b, const void *q, int64_t n)
{
    for (int64_t i = 0; i < b * b; i++)
        if (get(dtype, q, n * b * b + i) != (i / b == i % b))
            return 0;
    return 1;
}

static void cayley_case(boft_dtype dtype, int64_t b, int64_t n, double size)
{
    const int64_t count = n * b * b;
    const size_t bytes = (size_t)count * dtype_size(dtype);
    const double *a = random_matrices(dtype, n, b, size);
    const void *a_end = stored(dtype, a, count, GUARD_END), *a_start = stored(dtype, a, count, GUARD_START);
    unsigned char flags[16];
    for (int64_t i = 0; i < n; i++)
        flags[i] = (unsigned char)(i % 3 == 1 ? 0 : 1 << i % 8);
    const unsigned char *keep = guarded_copy(flags, (size_t)n, 1, GUARD_END);
    void *ws_end = guarded(boft_cayley_workspace(b), 64, GUARD_END);
    void *ws_start = guarded(boft_cayley_workspace(b), 64, GUARD_START);
    void *whole = room(dtype, count, GUARD_END), *other = room(dtype, count, GUARD_START);
    int v = 0;
    for (const char *name; (name = next_variant(&v));) {
        test_case("cayley %s b = %lld, %lld blocks, entries of %g", dtype_name(dtype), (long long)b, (long long)n,
                  size);
        scrub(whole);
        run_cayley(dtype, b, n, WHOLE, a_end, NULL, whole, ws_end);
        for (int64_t i = 0; i < n && i < 2; i++) {
            double *q = doubles(b * b);
            for (int64_t k = 0; k < b * b; k++)
                q[k] = get(dtype, whole, i * b * b + k);
            expect_orthogonal(dtype, b, a + i * b * b, q);
        }
        scrub(other);
        run_cayley(dtype, b, n, PIECES, a_start, NULL, other, ws_start);
        EXPECT_SAME("pieces", dtype, whole, other, count, 1, count);
        memcpy(other, a_start, bytes);
        run_cayley(dtype, b, n, SINGLES, other, NULL, other, ws_end);
        EXPECT_SAME("in place", dtype, whole, other, count, 1, count);
        scrub(other);
        run_cayley(dtype, b, n, PIECES, a_end, keep, other, ws_end);
        for (int64_t i = 0; i < n; i++) {
            const size_t at = (size_t)(i * b * b) * dtype_size(dtype), one = (size_t)(b * b) * dtype_size(dtype);
            if (keep[i])
                EXPECT(memcmp((char *)whole + at, (char *)other + at, one) == 0, "kept block %lld differs",
                       (long long)i);
            else
                EXPECT(is_identity(dtype, b, other, i), "dropped block %lld is not the identity", (long long)i);
        }
        scrub(other);
        scrub(ws_start);
        EXPECT_OK(boft_cayley(dtype, b, n, n, a_end, keep, other, ws_start));
        EXPECT_OK(boft_cayley(dtype, b, 0, 0, NULL, NULL, NULL, NULL));
        EXPECT_OK(boft_cayley_backward(dtype, b, 0, 0, NULL, NULL, NULL, NULL, NULL));
        EXPECT(untouched(other, bytes), "an empty range wrote");
    }
    release_memory();
}

static void test_cayley(void)
{
    for (int64_t b = 1; b <= 40; b++)
        for (int r = 0; r < 2; r++)
            cayley_case(reals[r], b, b <= 16 ? 11 : 4, 1);
    const int64_t large[] = {64, 80, 96, 160, 320};
    for (int i = 0; i < 5; i++)
        for (int r = 0; r < 2; r++)
            cayley_case(reals[r], large[i], large[i] <= 96 ? 3 : 1, 1);
    const int64_t some[] = {1, 2, 3, 4, 7, 8, 10, 16, 31, 32, 64};
    const double sizes[] = {0, 1e-30, 1e-4, 10, 30, 1e4, 1e6};
    for (int i = 0; i < 11; i++)
        for (int k = 0; k < 7; k++)
            for (int r = 0; r < 2; r++)
                cayley_case(reals[r], some[i], 5, sizes[k]);
}

/* Parameters of size `size` in one of the patterns that break careless eliminations. */
enum { PATTERNS = 8 };
static double extreme_entry(int pattern, int64_t b, int64_t i, int64_t j, double size)
{
    const double sign = random_bits() & 1 ? 1 : -1;
    switch (pattern) {
    case 0: /* the same size everywhere: whole rows cancel */
        return sign * size;
    case 1: /* exactly skew */
        return i < j ? size : -size;
    case 2: /* nothing but one pair */
        return i == 0 && j == b - 1 ? size : 0;
    case 3: /* one pair among ordinary entries */
        return i == 0 && j == b - 1 ? size : random_unit();
    case 4: /* all magnitudes */
        return sign * size * pow(2, -(double)random_below(240));
    case 5: /* one row */
        return i == b / 2 ? sign * size : 0;
    case 6: /* rank two, singular to rounding */
        return size * sin((double)i) * cos(2.0 * (double)j);
    default:
        return size * random_unit();
    }
}

/* Any finite parameters give finite blocks, and do so without pulling in neighbours. */
static void test_extreme_parameters(void)
{
    const int64_t sizes_b[] = {2, 3, 4, 5, 7, 8, 16, 17, 31, 32, 80};
    const double sizes_32[] = {1e-40, 15, 17, 1e5, 1e10, 1e15, 1e18, 1e30, FLT_MAX};
    const double sizes_64[] = {1e-310, 1e10, 1e18, 1e30, 1e100, 1e154, 1e200, 1e300, DBL_MAX};
    for (int ib = 0; ib < 11; ib++)
        for (int r = 0; r < 2; r++)
            for (int k = 0; k < 9; k++) {
                const boft_dtype dtype = reals[r];
                const int64_t b = sizes_b[ib];
                const double size = r == 0 ? sizes_32[k] : sizes_64[k];
                double *a = doubles(PATTERNS * b * b);
                for (int64_t i = 0; i < PATTERNS * b * b; i++)
                    a[i] = extreme_entry((int)(i / (b * b)), b, i / b % b, i % b, size);
                const void *in = stored(dtype, a, PATTERNS * b * b, GUARD_END);
                void *q = room(dtype, PATTERNS * b * b, GUARD_END);
                void *workspace = guarded(boft_cayley_workspace(b), 64, GUARD_END);
                int v = 0;
                for (const char *name; (name = next_variant(&v));) {
                    test_case("cayley %s b = %lld of entries up to %g is finite", dtype_name(dtype), (long long)b,
                              size);
                    scrub(q);
                    run_cayley(dtype, b, PATTERNS, SINGLES, in, NULL, q, workspace);
                    for (int p = 0; p < PATTERNS; p++) {
                        int64_t bad = 0;
                        for (int64_t i = 0; i < b * b; i++)
                            bad += !isfinite(get(dtype, q, p * b * b + i));
                        EXPECT(bad == 0, "pattern %d: %lld entries are not finite", p, (long long)bad);
                    }
                }
                release_memory();
            }
}

/* A NaN anywhere in a block, the diagonal included, shows in that block alone; a dropped one is the identity. */
static void test_nan_parameters(void)
{
    enum { N = 5, SICK = 2 };
    for (int64_t b = 1; b <= 20; b++)
        for (int r = 0; r < 2; r++) {
            const boft_dtype dtype = reals[r];
            const int64_t count = N * b * b;
            double *a = random_matrices(dtype, N, b, 1);
            const void *clean = stored(dtype, a, count, GUARD_END);
            void *q_clean = room(dtype, count, GUARD_END), *q = room(dtype, count, GUARD_END);
            void *workspace = guarded(boft_cayley_workspace(b), 64, GUARD_END);
            const int64_t places[] = {0, b - 1, (b - 1) * b, b * b - 1, b / 2 * b + b / 3};
            for (int p = 0; p < 5; p++) {
                const int64_t at = SICK * b * b + places[p];
                const double before = a[at];
                a[at] = NAN;
                const void *sick = stored(dtype, a, count, GUARD_END);
                a[at] = before;
                unsigned char keep[N] = {1, 1, 0, 1, 1};
                int v = 0;
                for (const char *name; (name = next_variant(&v));) {
                    test_case("cayley %s b = %lld with a NaN at (%lld, %lld)", dtype_name(dtype), (long long)b,
                              (long long)(places[p] / b), (long long)(places[p] % b));
                    run_cayley(dtype, b, N, WHOLE, clean, NULL, q_clean, workspace);
                    scrub(q);
                    run_cayley(dtype, b, N, WHOLE, sick, NULL, q, workspace);
                    int64_t nans = 0;
                    for (int64_t i = 0; i < b * b; i++)
                        nans += isnan(get(dtype, q, SICK * b * b + i));
                    EXPECT(nans > 0, "the block has no NaN");
                    const int64_t size = (int64_t)dtype_size(dtype) * b * b, after = (SICK + 1) * size;
                    EXPECT(memcmp(q, q_clean, (size_t)(SICK * size)) == 0, "an earlier block changed");
                    EXPECT(memcmp((char *)q + after, (char *)q_clean + after, (size_t)((N - SICK - 1) * size)) == 0,
                           "a later block changed");
                    run_cayley(dtype, b, N, WHOLE, sick, keep, q, workspace);
                    EXPECT(is_identity(dtype, b, q, SICK), "the dropped block is not the identity");
                }
            }
            release_memory();
        }
}

static void run_cayley_backward(boft_dtype dtype, int64_t b, int64_t n, division how, const void *dq, const void *q,
                                const unsigned char *keep, void *da, void *workspace)
{
    const ranges r = divide(n, how);
    int64_t begin, end;
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++) {
        scrub(workspace);
        EXPECT_OK(boft_cayley_backward(dtype, b, begin, end, dq, q, keep, da, workspace));
    }
}

/*
 * dA from the formula, in double, with the bound: two products of b terms each, q + I, a difference and a scaling
 * round 2 b + 4 times, relative to the same expression of absolute values. Double the bound for float64, since the
 * truth rounds as much.
 */
static void cayley_backward_truth(boft_dtype dtype, int64_t b, const double *dq, const double *q, double *da,
                                  double *bound)
{
    double *plus = doubles(b * b), *half = doubles(b * b), *ds = doubles(b * b), *size = doubles(b * b);
    double *abs_dq = doubles(b * b);
    const double u = (2 * (double)b + 4) * unit_roundoff(dtype) * (dtype == BOFT_F64 ? 2 : 1);
    for (int64_t i = 0; i < b * b; i++)
        plus[i] = q[i] + (i / b == i % b);
    multiply_tn(b, plus, dq, half);
    multiply_nt(b, half, plus, ds);
    absolute(b * b, plus, plus);
    absolute(b * b, dq, abs_dq);
    multiply_tn(b, plus, abs_dq, half);
    multiply_nt(b, half, plus, size);
    for (int64_t i = 0; i < b; i++)
        for (int64_t j = 0; j < b; j++) {
            da[i * b + j] = -(ds[i * b + j] - ds[j * b + i]) / 4;
            bound[i * b + j] = u * (size[i * b + j] + size[j * b + i]) / 4;
        }
}

/* exact: integers, for which dA is a multiple of 1/4 without rounding. Otherwise q is orthogonal. */
static void cayley_backward_case(boft_dtype dtype, int64_t b, int64_t n, int exact)
{
    const int64_t count = n * b * b;
    const size_t size = dtype_size(dtype), one = (size_t)(b * b) * size;
    void *ws_end = guarded(boft_cayley_workspace(b), 64, GUARD_END);
    void *ws_start = guarded(boft_cayley_workspace(b), 64, GUARD_START);
    double *dq = exact ? integer_matrices(n, b) : random_matrices(dtype, n, b, 1);
    double *q = exact ? integer_matrices(n, b) : random_matrices(dtype, n, b, 1);
    if (!exact) {
        const void *a = stored(dtype, q, count, GUARD_END);
        void *made = room(dtype, count, GUARD_END);
        EXPECT_OK(boft_cpu_select("scalar"));
        EXPECT_OK(boft_cayley(dtype, b, 0, n, a, NULL, made, ws_end));
        for (int64_t i = 0; i < count; i++)
            q[i] = get(dtype, made, i);
    }
    double *truth = doubles(count), *bound = doubles(count);
    for (int64_t i = 0; i < n; i++)
        cayley_backward_truth(dtype, b, dq + i * b * b, q + i * b * b, truth + i * b * b, bound + i * b * b);
    const void *dq_end = stored(dtype, dq, count, GUARD_END), *dq_start = stored(dtype, dq, count, GUARD_START);
    const void *q_end = stored(dtype, q, count, GUARD_END), *q_start = stored(dtype, q, count, GUARD_START);
    unsigned char keep[16];
    for (int64_t i = 0; i < n; i++)
        keep[i] = (unsigned char)(i % 3 == 1 ? 0 : 1 << i % 8);
    /* A NaN gradient of a dropped block must vanish with it. */
    if (n > 1)
        dq[b * b + b / 2] = NAN;
    const void *dq_sick = stored(dtype, dq, count, GUARD_END);
    void *whole = room(dtype, count, GUARD_END), *other = room(dtype, count, GUARD_START);
    int v = 0;
    for (const char *name; (name = next_variant(&v));) {
        test_case("cayley backward %s b = %lld, %lld blocks%s", dtype_name(dtype), (long long)b, (long long)n,
                  exact ? ", integers" : "");
        scrub(whole);
        run_cayley_backward(dtype, b, n, WHOLE, dq_end, q_end, NULL, whole, ws_end);
        EXPECT_CLOSE("dA", dtype, whole, b, n * b, b, truth, exact ? NULL : bound);
        scrub(other);
        run_cayley_backward(dtype, b, n, PIECES, dq_start, q_start, NULL, other, ws_start);
        EXPECT_SAME("pieces", dtype, whole, other, count, 1, count);
        memcpy(other, dq_start, (size_t)count * size);
        run_cayley_backward(dtype, b, n, SINGLES, other, q_end, NULL, other, ws_end);
        EXPECT_SAME("in place", dtype, whole, other, count, 1, count);
        scrub(other);
        run_cayley_backward(dtype, b, n, WHOLE, dq_sick, q_end, keep, other, ws_end);
        for (int64_t i = 0; i < n; i++) {
            int zero = 1;
            for (int64_t k = 0; k < b * b; k++)
                zero &= get(dtype, other, i * b * b + k) == 0;
            if (keep[i])
                EXPECT(memcmp((char *)whole + (size_t)i * one, (char *)other + (size_t)i * one, one) == 0,
                       "kept block %lld differs", (long long)i);
            else
                EXPECT(zero, "the gradient of dropped block %lld is not zero", (long long)i);
        }
        if (n > 2) {
            run_cayley_backward(dtype, b, n, WHOLE, dq_sick, q_end, NULL, other, ws_end);
            EXPECT(memcmp(whole, other, one) == 0 &&
                       memcmp((char *)whole + 2 * one, (char *)other + 2 * one, (size_t)(n - 2) * one) == 0,
                   "a NaN spread to another block");
        }
    }
    release_memory();
}

static double dot(int64_t n, const double *x, const double *y)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

/* A direction of length 1. */
static double *random_direction(int64_t n)
{
    double *e = doubles(n), norm;
    for (int64_t i = 0; i < n; i++)
        e[i] = random_unit();
    norm = sqrt(dot(n, e, e));
    for (int64_t i = 0; i < n; i++)
        e[i] /= norm;
    return e;
}

/*
 * Central differences of step h along a direction E with |E| = 1 against <dA, E>. Each derivative of (I + S)^-1 brings
 * a factor (I + S)^-1 of norm <= 1, so the third of Q is at most 2 * 3! = 12 and the truncation at most 2 h^2 |dQ|;
 * rounding is at most b growth u (1 + |S|) per entry of Q and evaluation (expect_orthogonal), so b times that times
 * |dQ|, over h.
 */
static void cayley_difference_case(int64_t b)
{
    const int64_t n = b * b;
    const double h = 0x1p-17;
    double *a = random_matrices(BOFT_F64, 1, b, 1), *dq = random_matrices(BOFT_F64, 1, b, 1), *s = doubles(n);
    double *moved = doubles(n), *q = doubles(n), *q_up = doubles(n), *q_down = doubles(n), *da = doubles(n);
    void *workspace = guarded(boft_cayley_workspace(b), 64, GUARD_END);
    skew(b, a, s);
    const double norm = norm_of_skew(b, s), size = sqrt(dot(n, dq, dq));
    const double rounding = (double)b * growth * unit_roundoff(BOFT_F64) * (1 + norm) * (double)b;
    const double bound = 2 * size * (2 * h * h + rounding / h);
    int v = 0;
    for (const char *name; (name = next_variant(&v));) {
        test_case("cayley backward against differences, b = %lld", (long long)b);
        EXPECT_OK(boft_cayley(BOFT_F64, b, 0, 1, a, NULL, q, workspace));
        EXPECT_OK(boft_cayley_backward(BOFT_F64, b, 0, 1, dq, q, NULL, da, workspace));
        for (int trial = 0; trial < (b <= 5 ? b * b : 6); trial++) {
            double *e = random_direction(n);
            if (b <= 5) /* every entry by itself */
                for (int64_t i = 0; i < n; i++)
                    e[i] = i == trial;
            for (int64_t i = 0; i < n; i++)
                moved[i] = a[i] + h * e[i];
            EXPECT_OK(boft_cayley(BOFT_F64, b, 0, 1, moved, NULL, q_up, workspace));
            for (int64_t i = 0; i < n; i++)
                moved[i] = a[i] - h * e[i];
            EXPECT_OK(boft_cayley(BOFT_F64, b, 0, 1, moved, NULL, q_down, workspace));
            double difference = 0;
            for (int64_t i = 0; i < n; i++)
                difference += dq[i] * (q_up[i] - q_down[i]) / (2 * h);
            const double got = dot(n, da, e);
            EXPECT(fabs(difference - got) <= bound,
                   "direction %d: %.12g by differences, %.12g by backward, allowed %g", trial, difference, got, bound);
        }
    }
    release_memory();
}

static void test_cayley_backward(void)
{
    const int64_t sizes[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 12,  15, 16,
                             17, 20, 24, 31, 32, 33, 40, 64, 80, 96, 160, 320};
    for (int i = 0; i < 25; i++)
        for (int r = 0; r < 2; r++)
            for (int exact = 0; exact < 2; exact++)
                cayley_backward_case(reals[r], sizes[i], sizes[i] <= 16 ? 11 : sizes[i] <= 96 ? 4 : 1, exact);
    for (int64_t b = 1; b <= 33; b += b < 8 ? 1 : 5)
        cayley_difference_case(b);
}

/* Copies of block `from` of one array to block `to` of another. */
static void copy_block(boft_dtype dtype, int64_t b, void *into, int64_t to, const void *blocks, int64_t from)
{
    const size_t one = (size_t)(b * b) * dtype_size(dtype);
    memcpy((char *)into + (size_t)to * one, (const char *)blocks + (size_t)from * one, one);
}

/*
 * Blocks that go through the elimination in different ways - with and without pivots, dropped, not finite - side by
 * side in the lanes of the same vectors: each gives bit for bit what it gives alone, and so does its backward.
 */
static void mixed_case(boft_dtype dtype, int64_t b, int ordinary)
{
    enum { N = 37 };
    const int64_t count = N * b * b;
    const double sizes[] = {1, 1, 1e3, 1, 15, 1e30, 1, 1, 17};
    double *a = doubles(count), *dq = doubles(count);
    unsigned char keep[N];
    for (int64_t n = 0; n < N; n++) {
        const double size = ordinary ? 1 : sizes[random_below(9)];
        keep[n] = (unsigned char)(ordinary || random_below(5) > 0);
        for (int64_t i = 0; i < b * b; i++) {
            a[n * b * b + i] = rounded(dtype, size * random_unit());
            dq[n * b * b + i] = rounded(dtype, random_unit());
        }
        if (!ordinary && random_below(8) == 0)
            a[n * b * b + random_below(b * b)] = random_below(2) ? NAN : INFINITY;
    }
    const void *in = stored(dtype, a, count, GUARD_END), *grad = stored(dtype, dq, count, GUARD_END);
    void *q = room(dtype, count, GUARD_END), *da = room(dtype, count, GUARD_END);
    void *alone = room(dtype, count, GUARD_START), *da_alone = room(dtype, count, GUARD_START);
    void *one = room(dtype, b * b, GUARD_END), *dq_one = room(dtype, b * b, GUARD_END);
    void *q_one = room(dtype, b * b, GUARD_END), *da_one = room(dtype, b * b, GUARD_END);
    void *workspace = guarded(boft_cayley_workspace(b), 64, GUARD_END);
    int v = 0;
    for (const char *name; (name = next_variant(&v));) {
        test_case("cayley %s b = %lld, %s blocks alone and together", dtype_name(dtype), (long long)b,
                  ordinary ? "ordinary" : "mixed");
        run_cayley(dtype, b, N, WHOLE, in, keep, q, workspace);
        run_cayley_backward(dtype, b, N, WHOLE, grad, q, keep, da, workspace);
        for (int64_t n = 0; n < N; n++) {
            copy_block(dtype, b, one, 0, in, n);
            scrub(workspace);
            EXPECT_OK(boft_cayley(dtype, b, 0, 1, one, keep + n, q_one, workspace));
            copy_block(dtype, b, alone, n, q_one, 0);
            copy_block(dtype, b, dq_one, 0, grad, n);
            scrub(workspace);
            EXPECT_OK(boft_cayley_backward(dtype, b, 0, 1, dq_one, q_one, keep + n, da_one, workspace));
            copy_block(dtype, b, da_alone, n, da_one, 0);
        }
        EXPECT_SAME("blocks alone", dtype, q, alone, count, 1, count);
        EXPECT_SAME("gradients alone", dtype, da, da_alone, count, 1, count);
        run_cayley(dtype, b, N, PIECES, in, keep, alone, workspace);
        run_cayley_backward(dtype, b, N, PIECES, grad, alone, keep, da_alone, workspace);
        EXPECT_SAME("blocks in pieces", dtype, q, alone, count, 1, count);
        EXPECT_SAME("gradients in pieces", dtype, da, da_alone, count, 1, count);
    }
    release_memory();
}

static void test_lanes(void)
{
    const int64_t sizes[] = {1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16, 17, 20, 24, 31, 32, 33, 40, 48, 57, 64, 65};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int r = 0; r < 2; r++)
            for (int ordinary = 0; ordinary < 2; ordinary++)
                mixed_case(reals[r], sizes[i], ordinary);
}

/*
 * Sizes around the edges of panels and of what products keep in cache, against the scalar variant: two eliminations,
 * each at most b growth u64 (1 + |S|) off (expect_orthogonal), and one rounding to float32 in each.
 */
static void large_cayley_case(boft_dtype dtype, int64_t b, double size)
{
    const double *a = random_matrices(dtype, 1, b, size);
    const void *in = stored(dtype, a, b * b, GUARD_END);
    void *q = room(dtype, b * b, GUARD_END), *workspace = guarded(boft_cayley_workspace(b), 64, GUARD_END);
    double *truth = doubles(b * b), *bound = doubles(b * b), *s = doubles(b * b);
    EXPECT_OK(boft_cpu_select("scalar"));
    EXPECT_OK(boft_cayley(dtype, b, 0, 1, in, NULL, q, workspace));
    skew(b, a, s);
    const double elimination = 2 * (double)b * growth * unit_roundoff(BOFT_F64) * (1 + norm_of_skew(b, s));
    for (int64_t i = 0; i < b * b; i++) {
        truth[i] = get(dtype, q, i);
        bound[i] = elimination + (dtype == BOFT_F32 ? 2 * unit_roundoff(dtype) * fabs(truth[i]) : 0);
    }
    int v = 0;
    for (const char *name; (name = next_variant(&v));) {
        test_case("cayley %s b = %lld, entries of %g, against scalar", dtype_name(dtype), (long long)b, size);
        scrub(q);
        scrub(workspace);
        EXPECT_OK(boft_cayley(dtype, b, 0, 1, in, NULL, q, workspace));
        EXPECT_CLOSE("Q", dtype, q, b, b, b, truth, bound);
    }
    release_memory();
}

static void test_large_cayley(void)
{
    const int64_t sizes[] = {41, 47, 63, 65, 71, 72, 73, 97, 127, 128, 129, 192, 255, 256, 257, 511, 513, 649};
    const double entries[] = {1, 16, 1e3};
    for (int i = 0; i < 18; i++)
        for (int k = 0; k < 3; k++)
            large_cayley_case(reals[(i + k) % 2], sizes[i], entries[k]);
}

static void test_cayley_refusals(void)
{
    float a[4] = {0}, q[4];
    unsigned char *workspace = guarded(boft_cayley_workspace(2), 64, GUARD_END);
    memset(q, 0xff, sizeof q);
    test_case("cayley refuses");
    EXPECT_REFUSED(boft_cayley(BOFT_BF16, 2, 0, 1, a, NULL, q, workspace), BOFT_BAD_DTYPE, "2");
    EXPECT_REFUSED(boft_cayley(BOFT_F16, 2, 0, 1, a, NULL, q, workspace), BOFT_BAD_DTYPE, "3");
    EXPECT_REFUSED(boft_cayley((boft_dtype)17, 2, 0, 1, a, NULL, q, workspace), BOFT_BAD_DTYPE, "17");
    EXPECT_REFUSED(boft_cayley(BOFT_F32, 0, 0, 1, a, NULL, q, workspace), BOFT_BAD_SHAPE, "0");
    EXPECT_REFUSED(boft_cayley(BOFT_F32, -7, 0, 1, a, NULL, q, workspace), BOFT_BAD_SHAPE, "-7");
    EXPECT_REFUSED(boft_cayley(BOFT_F32, 2, -3, 1, a, NULL, q, workspace), BOFT_BAD_SHAPE, "-3 1");
    EXPECT_REFUSED(boft_cayley(BOFT_F32, 2, 5, 4, a, NULL, q, workspace), BOFT_BAD_SHAPE, "5 4");
    EXPECT_REFUSED(boft_cayley(BOFT_F32, 2, 0, 1, NULL, NULL, q, workspace), BOFT_BAD_ARGUMENT, "a");
    EXPECT_REFUSED(boft_cayley(BOFT_F32, 2, 0, 1, a, NULL, NULL, workspace), BOFT_BAD_ARGUMENT, "q");
    EXPECT_REFUSED(boft_cayley(BOFT_F32, 2, 0, 1, a, NULL, q, NULL), BOFT_BAD_ARGUMENT, "workspace");
    EXPECT(untouched(q, sizeof q), "a refusal wrote");
    test_case("cayley backward refuses");
    EXPECT_REFUSED(boft_cayley_backward(BOFT_BF16, 2, 0, 1, a, a, NULL, q, workspace), BOFT_BAD_DTYPE, "2");
    EXPECT_REFUSED(boft_cayley_backward(BOFT_F32, 0, 0, 1, a, a, NULL, q, workspace), BOFT_BAD_SHAPE, "0");
    EXPECT_REFUSED(boft_cayley_backward(BOFT_F32, 2, -3, 1, a, a, NULL, q, workspace), BOFT_BAD_SHAPE, "-3 1");
    EXPECT_REFUSED(boft_cayley_backward(BOFT_F32, 2, 5, 4, a, a, NULL, q, workspace), BOFT_BAD_SHAPE, "5 4");
    EXPECT_REFUSED(boft_cayley_backward(BOFT_F32, 2, 0, 1, NULL, a, NULL, q, workspace), BOFT_BAD_ARGUMENT, "dq");
    EXPECT_REFUSED(boft_cayley_backward(BOFT_F32, 2, 0, 1, a, NULL, NULL, q, workspace), BOFT_BAD_ARGUMENT, "q");
    EXPECT_REFUSED(boft_cayley_backward(BOFT_F32, 2, 0, 1, a, a, NULL, NULL, workspace), BOFT_BAD_ARGUMENT, "da");
    EXPECT_REFUSED(boft_cayley_backward(BOFT_F32, 2, 0, 1, a, a, NULL, q, NULL), BOFT_BAD_ARGUMENT, "workspace");
    EXPECT(untouched(q, sizeof q), "a refusal wrote");
    release_memory();
}

/* ---- Collapse -------------------------------------------------------------------------------------------------- */

/* (group, d): row r has a 1 in channel r of every group of the level. Times the factors it gives the blocks. */
static double *unit_rows(const boft_plan *plan, const boft_level *level)
{
    double *x = doubles(level->group * plan->d);
    for (int64_t r = 0; r < level->group; r++)
        for (int64_t g = 0; g < plan->d / level->group; g++)
            x[r * plan->d + level_channel(level, g, r)] = 1;
    return x;
}

/* Blocks of a level (groups, group, group) from its rows (group, d), or back. */
static void blocks_of_rows(const boft_plan *plan, const boft_level *level, double *blocks, double *rows, int back)
{
    const int64_t group = level->group;
    for (int64_t g = 0; g < plan->d / group; g++)
        for (int64_t r = 0; r < group; r++)
            for (int64_t j = 0; j < group; j++) {
                double *row = &rows[r * plan->d + level_channel(level, g, j)];
                double *entry = &blocks[(g * group + r) * group + j];
                *(back ? row : entry) = *(back ? entry : row);
            }
}

static int64_t level_groups(const boft_plan *plan, int64_t level)
{
    return plan->d / plan->level[level].group;
}

static void run_collapse(const boft_plan *plan, boft_dtype dtype, int64_t level, division how, const void *q,
                         void *blocks, void *workspace)
{
    const ranges r = divide(level_groups(plan, level), how);
    int64_t begin, end;
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++) {
        scrub(workspace);
        EXPECT_OK(boft_collapse(plan, dtype, level, begin, end, q, blocks, workspace));
    }
}

static void run_collapse_backward(const boft_plan *plan, boft_dtype dtype, int64_t level, division how,
                                  const void *dblocks, const void *q, void *dq, void *workspace)
{
    const ranges r = divide(level_groups(plan, level), how);
    int64_t begin, end;
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++) {
        scrub(workspace);
        EXPECT_OK(boft_collapse_backward(plan, dtype, level, begin, end, dblocks, q, dq, workspace));
    }
}

/* Bytes of a level's blocks outside its groups begin ... end-1, and of all other levels, are untouched. */
static int only_groups_written(const boft_plan *plan, boft_dtype dtype, int64_t level, int64_t begin, int64_t end,
                               const void *blocks)
{
    const size_t size = dtype_size(dtype);
    const int64_t square = plan->level[level].group * plan->level[level].group;
    const int64_t from = plan->level[level].offset + begin * square, to = plan->level[level].offset + end * square;
    return untouched(blocks, (size_t)from * size) &&
           untouched((const char *)blocks + (size_t)to * size, (size_t)(plan->count - to) * size);
}

/* Blocks of the level's factors are written exactly if their first channel lies in a group of begin ... end-1. */
static int only_factors_written(const boft_plan *plan, boft_dtype dtype, int64_t level_index, int64_t begin,
                                int64_t end, const void *dq)
{
    const boft_level *level = &plan->level[level_index];
    const int64_t square = plan->b * plan->b;
    char *wanted = (char *)doubles(plan->d);
    for (int64_t g = begin; g < end; g++)
        for (int64_t j = 0; j < level->group; j++)
            wanted[level_channel(level, g, j)] = 1;
    for (int64_t i = 0; i < plan->m; i++)
        for (int64_t n = 0; n < plan->blocks; n++) {
            const int in_level = i >= level->first && i < level->first + level->factors;
            const int should = in_level && wanted[factor_channel(plan->b, i, n, 0)];
            for (int64_t k = 0; k < square; k++) {
                const size_t at = (size_t)((i * plan->blocks + n) * square + k) * dtype_size(dtype);
                if (untouched((const char *)dq + at, dtype_size(dtype)) == should)
                    return 0;
            }
        }
    return 1;
}

/* The scale that keeps rows of random blocks at length about 1, so that products of factors do not grow. */
static double unit_row_size(int64_t b)
{
    return sqrt(3 / (double)b);
}

/*
 * The product of k factors rounds k b times at most, relative to the product of absolute values; its backward rounds
 * `group` times for the sum over rows and twice the former for the partial products and the gradients that reach a
 * factor. Double the bound for float64, since the truth rounds as much.
 */
static void collapse_case(shape at, boft_dtype dtype, int exact)
{
    boft_plan plan;
    EXPECT_OK(boft_plan_make(at.d, at.b, at.m, &plan));
    const int64_t q_count = plan.m * plan.d * plan.b;
    double *q = exact ? integer_matrices(plan.m * plan.blocks, plan.b)
                      : random_matrices(dtype, plan.m * plan.blocks, plan.b, unit_row_size(plan.b));
    double *abs_q = doubles(q_count);
    absolute(q_count, q, abs_q);
    const void *q_end = stored(dtype, q, q_count, GUARD_END), *q_start = stored(dtype, q, q_count, GUARD_START);
    void *blocks = room(dtype, plan.count, GUARD_END), *blocks_other = room(dtype, plan.count, GUARD_START);
    void *dq = room(dtype, q_count, GUARD_END), *dq_other = room(dtype, q_count, GUARD_START);
    const size_t bytes = boft_collapse_workspace(&plan, dtype);
    void *ws_end = guarded(bytes, 64, GUARD_END), *ws_start = guarded(bytes, 64, GUARD_START);
    const double u = unit_roundoff(dtype) * (dtype == BOFT_F64 ? 2 : 1);
    const double exact_limit = 0x1p24;

    for (int64_t l = 0; l < plan.levels; l++) {
        const boft_level *level = &plan.level[l];
        const int64_t group = level->group, groups = plan.d / group, n = plan.d * group;
        const int64_t first = level->first, factors = level->factors, dq_at = first * plan.d * plan.b;
        const int64_t dq_n = factors * plan.d * plan.b;
        double *rows = unit_rows(&plan, level), *truth = doubles(n), *bound = doubles(n);
        apply_factors(group, plan.d, plan.b, first, factors, 0, q, rows);
        blocks_of_rows(&plan, level, truth, rows, 0);
        rows = unit_rows(&plan, level);
        apply_factors(group, plan.d, plan.b, first, factors, 0, abs_q, rows);
        blocks_of_rows(&plan, level, bound, rows, 0);
        const int blocks_exact = (exact && largest(n, bound) <= exact_limit) || factors == 1;
        for (int64_t i = 0; i < n; i++)
            bound[i] *= (double)(factors * plan.b) * u;

        double *dblocks = doubles(plan.count), *dtruth = doubles(q_count), *dbound = doubles(q_count);
        for (int64_t i = level->offset; i < level->offset + n; i++)
            dblocks[i] = exact ? (double)(random_below(5) - 2) : rounded(dtype, random_unit());
        double *x = unit_rows(&plan, level), *dy = doubles(n);
        blocks_of_rows(&plan, level, dblocks + level->offset, dy, 1);
        factors_backward(group, plan.d, plan.b, first, factors, q, x, dy, dtruth);
        x = unit_rows(&plan, level);
        blocks_of_rows(&plan, level, dblocks + level->offset, dy, 1);
        absolute(n, dy, dy);
        factors_backward(group, plan.d, plan.b, first, factors, abs_q, x, dy, dbound);
        const int dq_exact = (exact && largest(dq_n, dbound + dq_at) <= exact_limit) || factors == 1;
        for (int64_t i = 0; i < dq_n; i++)
            dbound[dq_at + i] *= (double)(group + 2 * factors * plan.b) * u;
        const void *db_end = stored(dtype, dblocks, plan.count, GUARD_END);
        const void *db_start = stored(dtype, dblocks, plan.count, GUARD_START);
        const int64_t begin = random_below(groups), end = begin + random_below(groups - begin + 1);

        int v = 0;
        for (const char *name; (name = next_variant(&v));) {
            test_case("collapse %s d = %lld, b = %lld, m = %lld, level %lld (%lld factors from %lld)%s",
                      dtype_name(dtype), (long long)at.d, (long long)at.b, (long long)at.m, (long long)l,
                      (long long)factors, (long long)first, exact ? ", integers" : "");
            scrub(blocks);
            run_collapse(&plan, dtype, l, WHOLE, q_end, blocks, ws_end);
            EXPECT_CLOSE("blocks", dtype, (char *)blocks + (size_t)level->offset * dtype_size(dtype), group,
                         groups * group, group, truth, blocks_exact ? NULL : bound);
            EXPECT(only_groups_written(&plan, dtype, l, 0, groups, blocks), "another level was written");
            scrub(blocks_other);
            run_collapse(&plan, dtype, l, groups <= 32 ? SINGLES : PIECES, q_start, blocks_other, ws_start);
            EXPECT_SAME("pieces", dtype, blocks, blocks_other, plan.count, 1, plan.count);
            scrub(blocks_other);
            EXPECT_OK(boft_collapse(&plan, dtype, l, begin, end, q_end, blocks_other, ws_end));
            EXPECT(only_groups_written(&plan, dtype, l, begin, end, blocks_other),
                   "groups outside the range were written");

            test_case("collapse backward %s d = %lld, b = %lld, m = %lld, level %lld (%lld factors from %lld)%s",
                      dtype_name(dtype), (long long)at.d, (long long)at.b, (long long)at.m, (long long)l,
                      (long long)factors, (long long)first, exact ? ", integers" : "");
            scrub(dq);
            run_collapse_backward(&plan, dtype, l, WHOLE, db_end, q_end, dq, ws_end);
            EXPECT_CLOSE("dq", dtype, (char *)dq + (size_t)dq_at * dtype_size(dtype), plan.b, dq_n / plan.b, plan.b,
                         dtruth + dq_at, dq_exact ? NULL : dbound + dq_at);
            scrub(dq_other);
            run_collapse_backward(&plan, dtype, l, groups <= 32 ? SINGLES : PIECES, db_start, q_start, dq_other,
                                  ws_start);
            EXPECT_SAME("pieces", dtype, dq, dq_other, q_count, 1, q_count);
            scrub(dq_other);
            EXPECT_OK(boft_collapse_backward(&plan, dtype, l, begin, end, db_end, q_end, dq_other, ws_end));
            EXPECT(only_factors_written(&plan, dtype, l, begin, end, dq_other),
                   "not exactly the blocks of groups %lld ... %lld were written", (long long)begin,
                   (long long)end - 1);
        }
    }
    release_memory();
}

/*
 * <dblocks, collapse(q)> is linear in every factor, so a central difference of step h along a direction of length 1 is
 * off by the products of three or more moved factors only: at most h^2 k^3 |dblocks| for orthogonal q and k factors;
 * rounding is at most k b u |dblocks| sqrt(count) per evaluation, over h.
 */
static void collapse_difference_case(shape at)
{
    boft_plan plan;
    EXPECT_OK(boft_plan_make(at.d, at.b, at.m, &plan));
    const int64_t n = plan.m * plan.d * plan.b;
    const double h = 0x1p-17;
    void *cayley_workspace = guarded(boft_cayley_workspace(plan.b), 64, GUARD_END);
    void *workspace = guarded(boft_collapse_workspace(&plan, BOFT_F64), 64, GUARD_END);
    double *q = random_matrices(BOFT_F64, plan.m * plan.blocks, plan.b, 1), *moved = doubles(n), *dq = doubles(n);
    double *up = doubles(plan.count), *down = doubles(plan.count), *dblocks = doubles(plan.count);
    EXPECT_OK(boft_cpu_select("scalar"));
    EXPECT_OK(boft_cayley(BOFT_F64, plan.b, 0, plan.m * plan.blocks, q, NULL, q, cayley_workspace));
    for (int64_t i = 0; i < plan.count; i++)
        dblocks[i] = random_unit();
    const double size = sqrt(dot(plan.count, dblocks, dblocks)), k = (double)plan.m;
    const double rounding = k * (double)plan.b * unit_roundoff(BOFT_F64) * sqrt((double)plan.count);
    const double bound = 2 * size * (h * h * k * k * k + rounding / h);
    int v = 0;
    for (const char *name; (name = next_variant(&v));) {
        test_case("collapse backward against differences, d = %lld, b = %lld, m = %lld", (long long)at.d,
                  (long long)at.b, (long long)at.m);
        for (int64_t l = 0; l < plan.levels; l++)
            run_collapse_backward(&plan, BOFT_F64, l, WHOLE, dblocks, q, dq, workspace);
        for (int trial = 0; trial < 3; trial++) {
            const double *e = random_direction(n);
            for (int64_t i = 0; i < n; i++)
                moved[i] = q[i] + h * e[i];
            for (int64_t l = 0; l < plan.levels; l++)
                run_collapse(&plan, BOFT_F64, l, WHOLE, moved, up, workspace);
            for (int64_t i = 0; i < n; i++)
                moved[i] = q[i] - h * e[i];
            for (int64_t l = 0; l < plan.levels; l++)
                run_collapse(&plan, BOFT_F64, l, WHOLE, moved, down, workspace);
            double difference = 0;
            for (int64_t i = 0; i < plan.count; i++)
                difference += dblocks[i] * (up[i] - down[i]) / (2 * h);
            const double got = dot(n, dq, e);
            EXPECT(fabs(difference - got) <= bound,
                   "direction %d: %.12g by differences, %.12g by backward, allowed %g", trial, difference, got, bound);
        }
    }
    release_memory();
}

static void transpose_case(shape at, boft_dtype dtype)
{
    boft_plan plan;
    EXPECT_OK(boft_plan_make(at.d, at.b, at.m, &plan));
    double *values = doubles(plan.count);
    for (int64_t i = 0; i < plan.count; i++)
        values[i] = (double)(i % 100003);
    const void *blocks = stored(dtype, values, plan.count, GUARD_END);
    void *whole = room(dtype, plan.count, GUARD_END), *other = room(dtype, plan.count, GUARD_START);
    int v = 0;
    for (const char *name; (name = next_variant(&v));) {
        test_case("transpose %s d = %lld, b = %lld, m = %lld", dtype_name(dtype), (long long)at.d, (long long)at.b,
                  (long long)at.m);
        scrub(whole);
        scrub(other);
        for (int64_t l = 0; l < plan.levels; l++) {
            const int64_t group = plan.level[l].group, groups = plan.d / group, offset = plan.level[l].offset;
            EXPECT_OK(boft_transpose(&plan, dtype, l, 0, groups, blocks, whole));
            int64_t wrong = 0;
            for (int64_t i = 0; i < groups * group * group; i++) {
                const int64_t g = i / (group * group), r = i / group % group, c = i % group;
                wrong += get(dtype, whole, offset + (g * group + c) * group + r) != values[offset + i];
            }
            EXPECT(wrong == 0, "level %lld: %lld entries are wrong", (long long)l, (long long)wrong);
            const ranges r = divide(groups, PIECES);
            int64_t begin, end;
            for (int64_t i = 0; range_at(&r, i, &begin, &end); i++)
                EXPECT_OK(boft_transpose(&plan, dtype, l, begin, end, blocks, other));
        }
        EXPECT_SAME("pieces", dtype, whole, other, plan.count, 1, plan.count);
        const int64_t groups = level_groups(&plan, plan.levels - 1), begin = groups / 2;
        scrub(other);
        EXPECT_OK(boft_transpose(&plan, dtype, plan.levels - 1, begin, groups, blocks, other));
        EXPECT(only_groups_written(&plan, dtype, plan.levels - 1, begin, groups, other),
               "groups outside the range were written");
    }
    release_memory();
}

static void test_collapse(void)
{
    shape shapes[MAX_SHAPES];
    const int n = all_shapes(640, shapes);
    for (int i = 0; i < n; i++)
        for (int r = 0; r < 2; r++) {
            transpose_case(shapes[i], reals[r]);
            /* Of the shapes whose truth is costly, keep every (b, m), with one type each. */
            boft_plan plan;
            EXPECT_OK(boft_plan_make(shapes[i].d, shapes[i].b, shapes[i].m, &plan));
            if (plan.count * plan.b * plan.m > 2 << 20 && (plan.d > plan.super || r != i / 2 % 2))
                continue;
            collapse_case(shapes[i], reals[r], (i + r) % 2);
        }
    /* More groups than lanes, not a multiple of them; chunks from one channel to more than a vector of them. */
    const shape many[] = {{37 * 4, 2, 2},  {37 * 16, 2, 4},   {41 * 8, 4, 2},   {19 * 32, 4, 4},  {21 * 12, 6, 2},
                          {5 * 56, 14, 3}, {3 * 144, 36, 3}, {2 * 512, 2, 9}, {3 * 200, 100, 2}};
    for (size_t i = 0; i < sizeof many / sizeof *many; i++)
        for (int r = 0; r < 2; r++)
            collapse_case(many[i], reals[r], r == (int)i % 2);
    const shape differences[] = {{6, 3, 1}, {12, 2, 2}, {32, 4, 3}, {96, 8, 3}, {64, 2, 5}, {512, 2, 9}, {60, 10, 2}};
    for (size_t i = 0; i < sizeof differences / sizeof *differences; i++)
        collapse_difference_case(differences[i]);
}

static void test_collapse_refusals(void)
{
    boft_plan plan;
    EXPECT_OK(boft_plan_make(24, 4, 2, &plan));
    float *in = (float *)doubles(1000), *out = guarded(1000 * sizeof *out, 4, GUARD_END);
    void *ws = guarded(boft_collapse_workspace(&plan, BOFT_F32), 64, GUARD_END);
    const int64_t groups = plan.d / plan.level[0].group;
    test_case("collapse refuses");
    EXPECT_REFUSED(boft_collapse(NULL, BOFT_F32, 0, 0, 1, in, out, ws), BOFT_BAD_ARGUMENT, "NULL");
    EXPECT_REFUSED(boft_collapse(&plan, BOFT_BF16, 0, 0, 1, in, out, ws), BOFT_BAD_DTYPE, "2");
    EXPECT_REFUSED(boft_collapse(&plan, BOFT_F32, -1, 0, 1, in, out, ws), BOFT_BAD_SHAPE, "-1");
    EXPECT_REFUSED(boft_collapse(&plan, BOFT_F32, 9, 0, 1, in, out, ws), BOFT_BAD_SHAPE, "9");
    EXPECT_REFUSED(boft_collapse(&plan, BOFT_F32, 0, -2, 1, in, out, ws), BOFT_BAD_SHAPE, "-2");
    EXPECT_REFUSED(boft_collapse(&plan, BOFT_F32, 0, 0, groups + 77, in, out, ws), BOFT_BAD_SHAPE, "0 80 3");
    EXPECT_REFUSED(boft_collapse(&plan, BOFT_F32, 0, 2, 1, in, out, ws), BOFT_BAD_SHAPE, "2 1");
    EXPECT_REFUSED(boft_collapse(&plan, BOFT_F32, 0, 0, 1, NULL, out, ws), BOFT_BAD_ARGUMENT, "q");
    EXPECT_REFUSED(boft_collapse(&plan, BOFT_F32, 0, 0, 1, in, NULL, ws), BOFT_BAD_ARGUMENT, "blocks");
    EXPECT_REFUSED(boft_collapse(&plan, BOFT_F32, 0, 0, 1, in, out, NULL), BOFT_BAD_ARGUMENT, "workspace");
    test_case("collapse backward refuses");
    EXPECT_REFUSED(boft_collapse_backward(NULL, BOFT_F32, 0, 0, 1, in, in, out, ws), BOFT_BAD_ARGUMENT, "NULL");
    EXPECT_REFUSED(boft_collapse_backward(&plan, BOFT_F16, 0, 0, 1, in, in, out, ws), BOFT_BAD_DTYPE, "3");
    EXPECT_REFUSED(boft_collapse_backward(&plan, BOFT_F32, 9, 0, 1, in, in, out, ws), BOFT_BAD_SHAPE, "9");
    EXPECT_REFUSED(boft_collapse_backward(&plan, BOFT_F32, 0, 0, 80, in, in, out, ws), BOFT_BAD_SHAPE, "0 80 3");
    EXPECT_REFUSED(boft_collapse_backward(&plan, BOFT_F32, 0, 0, 1, NULL, in, out, ws), BOFT_BAD_ARGUMENT, "dblocks");
    EXPECT_REFUSED(boft_collapse_backward(&plan, BOFT_F32, 0, 0, 1, in, NULL, out, ws), BOFT_BAD_ARGUMENT, "q");
    EXPECT_REFUSED(boft_collapse_backward(&plan, BOFT_F32, 0, 0, 1, in, in, NULL, ws), BOFT_BAD_ARGUMENT, "dq");
    EXPECT_REFUSED(boft_collapse_backward(&plan, BOFT_F32, 0, 0, 1, in, in, out, NULL), BOFT_BAD_ARGUMENT,
                   "workspace");
    test_case("transpose refuses");
    EXPECT_REFUSED(boft_transpose(NULL, BOFT_F32, 0, 0, 1, in, out), BOFT_BAD_ARGUMENT, "NULL");
    EXPECT_REFUSED(boft_transpose(&plan, BOFT_BF16, 0, 0, 1, in, out), BOFT_BAD_DTYPE, "2");
    EXPECT_REFUSED(boft_transpose(&plan, BOFT_F32, -1, 0, 1, in, out), BOFT_BAD_SHAPE, "-1");
    EXPECT_REFUSED(boft_transpose(&plan, BOFT_F32, 0, 0, 80, in, out), BOFT_BAD_SHAPE, "0 80 3");
    EXPECT_REFUSED(boft_transpose(&plan, BOFT_F32, 0, 0, 1, NULL, out), BOFT_BAD_ARGUMENT, "blocks");
    EXPECT_REFUSED(boft_transpose(&plan, BOFT_F32, 0, 0, 1, in, NULL), BOFT_BAD_ARGUMENT, "transposed");
    EXPECT(untouched(out, 1000 * sizeof *out), "a refusal wrote");
    release_memory();
}

int main(int argc, char **argv)
{
    test_start("test_blocks", argc, argv);
    test_cayley();
    test_extreme_parameters();
    test_nan_parameters();
    test_cayley_backward();
    test_lanes();
    test_large_cayley();
    test_cayley_refusals();
    test_collapse();
    test_collapse_refusals();
    return test_finish();
}
