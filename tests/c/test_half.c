/* bfloat16 and float16 as data: every pattern read, and rounding to nearest even when written, in rotate and scale. */
#include "support.h"

#include <float.h>
#include <math.h>
#include <string.h>

static const boft_dtype halves[] = {BOFT_BF16, BOFT_F16};

enum { PATTERNS = 1 << 16, MAX_VALUES = 7 << 16 };

/* The conversions of the tests themselves invert each other, and know the usual landmarks. */
static void test_own_conversions(void)
{
    for (int i = 0; i < 2; i++) {
        const boft_dtype dtype = halves[i];
        test_case("%s patterns and values", dtype_name(dtype));
        int64_t wrong = 0;
        for (int k = 0; k < PATTERNS; k++) {
            const double value = half_value(dtype, (uint16_t)k);
            wrong +=
                isnan(value) ? !isnan(half_value(dtype, half_pattern(dtype, value))) : half_pattern(dtype, value) != k;
        }
        EXPECT(wrong == 0, "%lld patterns do not come back", (long long)wrong);
    }
    test_case("landmarks");
    EXPECT(half_value(BOFT_BF16, 0x3f80) == 1 && half_value(BOFT_F16, 0x3c00) == 1, "1");
    EXPECT(half_value(BOFT_F16, 0x7bff) == 65504 && half_value(BOFT_F16, 1) == 0x1p-24, "float16");
    EXPECT(half_value(BOFT_BF16, 0x7f7f) == 0x1.fep127 && half_value(BOFT_BF16, 1) == 0x1p-133, "bfloat16");
    EXPECT(half_pattern(BOFT_F16, 65519) == 0x7bff && half_pattern(BOFT_F16, 65520) == 0x7c00, "float16 overflow");
    EXPECT(half_pattern(BOFT_F16, 0x1p-25) == 0 && half_pattern(BOFT_F16, 0x1.8p-24) == 2, "float16 ties to even");
}

/* Got patterns equal those wanted; NaN may be any NaN, and 0 either zero, since a sum of -0 and 0 is 0. */
static void expect_patterns(boft_dtype dtype, const char *what, const uint16_t *got, const uint16_t *wanted, int64_t n)
{
    int64_t wrong = 0, first = 0;
    for (int64_t i = 0; i < n; i++) {
        const double a = half_value(dtype, got[i]), b = half_value(dtype, wanted[i]);
        if ((isnan(a) && isnan(b)) || a == b)
            continue;
        first = wrong++ ? first : i;
    }
    EXPECT(wrong == 0, "%s: %lld of %lld are wrong, first number %lld: %#x, not %#x", what, (long long)wrong,
           (long long)n, (long long)first, (unsigned)got[first], (unsigned)wanted[first]);
}

/* y = x R for (rows, d) 16-bit x and a diagonal R. */
static void rotate_diagonal(boft_dtype dtype, int64_t rows, int64_t d, const void *x, const float *diagonal, void *y)
{
    boft_plan plan;
    EXPECT_OK(boft_plan_make(d, 1, 1, &plan));
    void *workspace = guarded(boft_rotate_workspace(&plan, dtype), 64, GUARD_END);
    const boft_rotate_args args = {
        .plan = &plan, .dtype = dtype, .rows = rows, .x = x, .x_stride = d, .blocks = diagonal, .y = y, .y_stride = d};
    EXPECT_OK(boft_rotate(&args, 0, rows, workspace));
}

/* All patterns through the rotation of block size 1, which is the identity, and through a scale by 1. */
static void test_all_patterns(void)
{
    uint16_t *all = (uint16_t *)doubles(PATTERNS / 4);
    float *ones = (float *)doubles(PATTERNS / 2), *ds = (float *)doubles(PATTERNS / 2);
    for (int64_t i = 0; i < PATTERNS; i++) {
        all[i] = (uint16_t)i;
        ones[i] = 1;
    }
    const size_t bytes = PATTERNS * sizeof *all;
    const void *in = guarded_copy(all, bytes, 2, GUARD_END);
    uint16_t *out = guarded(bytes, 2, GUARD_END);
    const int64_t widths[] = {PATTERNS, 256, 16, 1};
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 4; k++)
            for (int v = 0; next_variant(&v);) {
                const boft_dtype dtype = halves[i];
                const int64_t d = widths[k], rows = PATTERNS / d;
                test_case("all %s patterns unchanged, %lld wide", dtype_name(dtype), (long long)d);
                scrub(out);
                rotate_diagonal(dtype, rows, d, in, ones, out);
                expect_patterns(dtype, "rotate", out, all, PATTERNS);
                scrub(out);
                const boft_scale_args args = {.dtype = dtype,
                                              .rows = rows,
                                              .n = d,
                                              .z = in,
                                              .z_stride = d,
                                              .s = ones,
                                              .out = out,
                                              .out_stride = d};
                EXPECT_OK(boft_scale(&args, 0, rows));
                expect_patterns(dtype, "scale", out, all, PATTERNS);
                scrub(out);
                const boft_scale_backward_args back = {.dtype = dtype,
                                                       .rows = rows,
                                                       .n = d,
                                                       .dy = in,
                                                       .dy_stride = d,
                                                       .s = ones,
                                                       .dz = out,
                                                       .dz_stride = d};
                EXPECT_OK(boft_scale_backward(&back, 0, boft_scale_backward_splits(rows)));
                expect_patterns(dtype, "scale backward", out, all, PATTERNS);
                if (rows == 1) {
                    /* Read alone: ds = dy z with dy = 1. */
                    const boft_scale_backward_args read = {.dtype = dtype,
                                                           .rows = 1,
                                                           .n = d,
                                                           .dy = out,
                                                           .dy_stride = d,
                                                           .z = in,
                                                           .z_stride = d,
                                                           .s = ones,
                                                           .ds = ds};
                    for (int64_t j = 0; j < d; j++)
                        put(dtype, out, j, 1);
                    EXPECT_OK(boft_scale_backward(&read, 0, 1));
                    int64_t wrong = 0;
                    for (int64_t j = 0; j < d; j++) {
                        const double value = half_value(dtype, all[j]);
                        wrong += !(ds[j] == value || (isnan(ds[j]) && isnan(value)));
                    }
                    EXPECT(wrong == 0, "%lld patterns were read wrong", (long long)wrong);
                }
            }
    release_memory();
}

/*
 * float32 numbers at which rounding to 16 bits is decided: each halfway case between neighbours with the float32
 * numbers next to it, the largest numbers, infinities, subnormals, NaN, and random patterns. Returns how many.
 */
static int64_t deciding_values(boft_dtype dtype, float *out)
{
    int64_t n = 0;
    for (int k = 0; k < 0x8000; k++) {
        const double here = half_value(dtype, (uint16_t)k);
        if (!isfinite(here))
            continue;
        /* Past the largest finite number the next one would be as far away as the one before. */
        const double next = half_value(dtype, (uint16_t)(k + 1)), before = half_value(dtype, (uint16_t)(k - 1));
        const float middle = (float)(here + (isfinite(next) ? next - here : here - before) / 2);
        const float three[] = {nextafterf(middle, 0), middle, nextafterf(middle, INFINITY)};
        for (int i = 0; i < 3; i++) {
            out[n++] = three[i];
            out[n++] = -three[i];
        }
    }
    const float special[] = {0, FLT_MIN, FLT_MAX, -FLT_MAX, FLT_TRUE_MIN, -FLT_TRUE_MIN, INFINITY, -INFINITY, NAN};
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        out[n++] = special[i];
    while (n < MAX_VALUES) {
        const uint32_t bits = (uint32_t)random_bits();
        memcpy(&out[n++], &bits, sizeof bits);
    }
    return n;
}

/* 1 times each value, through a diagonal rotation and through scale, is that value rounded once. */
static void test_rounding(void)
{
    for (int i = 0; i < 2; i++) {
        const boft_dtype dtype = halves[i];
        float *values = (float *)doubles(MAX_VALUES / 2);
        uint16_t *wanted = (uint16_t *)doubles(MAX_VALUES / 4), *ones = (uint16_t *)doubles(MAX_VALUES / 4);
        const int64_t n = deciding_values(dtype, values);
        for (int64_t k = 0; k < n; k++) {
            wanted[k] = half_pattern(dtype, (double)values[k]);
            put(dtype, ones, k, 1);
        }
        uint16_t *out = guarded((size_t)n * 2, 2, GUARD_END);
        for (int v = 0; next_variant(&v);) {
            test_case("rounding to %s", dtype_name(dtype));
            rotate_diagonal(dtype, 1, n, ones, values, out);
            expect_patterns(dtype, "rotate", out, wanted, n);
            scrub(out);
            const boft_scale_args args = {
                .dtype = dtype, .rows = 1, .n = n, .z = ones, .z_stride = n, .s = values, .out = out, .out_stride = n};
            EXPECT_OK(boft_scale(&args, 0, 1));
            expect_patterns(dtype, "scale", out, wanted, n);
            scrub(out);
            const boft_scale_backward_args back = {
                .dtype = dtype, .rows = 1, .n = n, .dy = ones, .dy_stride = n, .s = values, .dz = out, .dz_stride = n};
            EXPECT_OK(boft_scale_backward(&back, 0, 1));
            expect_patterns(dtype, "scale backward", out, wanted, n);
        }
        release_memory();
    }
}

int main(int argc, char **argv)
{
    test_start("test_half", argc, argv);
    test_own_conversions();
    test_all_patterns();
    test_rounding();
    return test_finish();
}
