/* (x weight^T) s + bias for few rows. */
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const boft_dtype dtypes[] = {BOFT_F32, BOFT_BF16, BOFT_F16, BOFT_F64};

/* One layer: sizes, the values that the core is given, and what must come out, in double. */
typedef struct problem {
    boft_dtype dtype, real;
    int64_t rows, d, n, x_stride, weight_stride, out_stride;
    int biased;
    double *x, *weight, *s, *bias, *out, *bound;
    int integers; /* small ones: nothing rounds, so bounds do not count */
    char name[160];
} problem;

static double *random_values(boft_dtype dtype, int64_t count, int integers)
{
    double *values = doubles(count);
    for (int64_t i = 0; i < count; i++)
        values[i] = integers ? (double)(random_below(7) - 3) : rounded(dtype, 2 * random_unit());
    return values;
}

/* The truth, and d + 2 roundings of the absolute values; doubled for float64, where the truth rounds as much. */
static void find_truth(problem *p)
{
    const double u = unit_roundoff(p->real) * (p->real == BOFT_F64 ? 2 : 1);
    for (int64_t t = 0; t < p->rows; t++)
        for (int64_t j = 0; j < p->n; j++) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < p->d; k++) {
                const double term = p->x[t * p->d + k] * p->weight[j * p->d + k];
                sum += term;
                size += fabs(term);
            }
            const double bias = p->biased ? p->bias[j] : 0;
            p->out[t * p->n + j] = sum * p->s[j] + bias;
            p->bound[t * p->n + j] = (double)(p->d + 2) * u * (size * fabs(p->s[j]) + fabs(bias));
        }
}

static void make_problem(problem *p, boft_dtype dtype, int64_t rows, int64_t d, int64_t n, int biased, int gaps,
                         int integers)
{
    *p = (problem){.dtype = dtype,
                   .real = real_of(dtype),
                   .rows = rows,
                   .d = d,
                   .n = n,
                   .x_stride = d + 5 * gaps,
                   .weight_stride = d + 3 * gaps,
                   .out_stride = n + gaps,
                   .biased = biased,
                   .integers = integers};
    snprintf(p->name, sizeof p->name, "%s %lld rows, %lld to %lld%s%s%s", dtype_name(dtype), (long long)rows,
             (long long)d, (long long)n, biased ? ", bias" : "", gaps ? ", gaps" : "", integers ? ", integers" : "");
    p->x = random_values(dtype, rows * d, integers);
    p->weight = random_values(dtype, n * d, integers);
    p->s = random_values(p->real, n, integers);
    p->bias = random_values(p->real, n, integers);
    p->out = doubles(rows * n);
    p->bound = doubles(rows * n);
    find_truth(p);
}

static boft_linear_args make_args(const problem *p, guard side)
{
    return (boft_linear_args){
        .dtype = p->dtype,
        .rows = p->rows,
        .d = p->d,
        .n = p->n,
        .x = stored_rows(p->dtype, p->rows, p->d, p->x_stride, p->x, side),
        .x_stride = p->x_stride,
        .weight = stored_rows(p->dtype, p->n, p->d, p->weight_stride, p->weight, side),
        .weight_stride = p->weight_stride,
        .s = stored_rows(p->real, 1, p->n, p->n, p->s, side),
        .bias = p->biased ? stored_rows(p->real, 1, p->n, p->n, p->bias, side) : NULL,
        .out = room(p->dtype, extent(p->rows, p->n, p->out_stride), side),
        .out_stride = p->out_stride,
    };
}

static void run(const boft_linear_args *args, division how)
{
    const ranges r = divide(args->n, how);
    int64_t begin, end;
    scrub(args->out);
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++)
        EXPECT_OK(boft_linear(args, begin, end));
}

static void expect_truth(const problem *p, const void *out)
{
    EXPECT_CLOSE("out", p->dtype, out, p->out_stride, p->rows, p->n, p->out, p->integers ? NULL : p->bound);
    EXPECT_GAPS("out", p->dtype, out, p->out_stride, p->rows, p->n);
}

static void linear_case(boft_dtype dtype, int64_t rows, int64_t d, int64_t n, int biased, int gaps, int integers)
{
    problem p;
    make_problem(&p, dtype, rows, d, n, biased, gaps, integers);
    const boft_linear_args whole = make_args(&p, GUARD_END), cut = make_args(&p, GUARD_START);
    for (int v = 0; next_variant(&v);) {
        test_case("linear %s", p.name);
        run(&whole, WHOLE);
        expect_truth(&p, whole.out);
        run(&cut, n % 2 ? SINGLES : PIECES);
        EXPECT_SAME("out in pieces", dtype, whole.out, cut.out, p.out_stride, rows, n);
    }
    release_memory();
}

static void test_all_sizes(void)
{
    const int64_t inputs[] = {1,  2,  3,  4,  5,  7,  8,  9,  15,  16,  17,  23,
                              31, 32, 33, 47, 63, 64, 65, 100, 127, 257, 768, 1001};
    const int64_t outputs[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 67, 128, 131};
    enum { INPUTS = sizeof inputs / sizeof *inputs, OUTPUTS = sizeof outputs / sizeof *outputs };
    int turn = (int)random_below(1000);
    for (int i = 0; i < INPUTS; i++)
        for (int k = 0; k < (inputs[i] <= 65 ? OUTPUTS : 4); k++, turn++)
            for (int integers = 0; integers < 2; integers++)
                linear_case(dtypes[(turn + integers) % 4], 1 + turn / 4 % 9, inputs[i],
                            outputs[inputs[i] <= 65 ? k : turn % OUTPUTS], turn % 2, turn / 3 % 2, integers);
}

/* Each row gets what it gets alone, wherever it stands among others. */
static void test_rows_do_not_matter(void)
{
    for (int k = 0; k < 4; k++) {
        problem p;
        make_problem(&p, dtypes[k], 7, 203, 77, 1, 1, 0);
        const boft_linear_args args = make_args(&p, GUARD_END);
        const size_t size = dtype_size(p.dtype);
        void *alone = room(p.dtype, p.n, GUARD_END);
        for (int v = 0; next_variant(&v);) {
            test_case("row by row: linear %s", p.name);
            run(&args, WHOLE);
            for (int64_t t = 0; t < p.rows; t++) {
                boft_linear_args one = args;
                one.rows = 1;
                one.x = (const char *)args.x + (size_t)(t * p.x_stride) * size;
                one.out = alone;
                run(&one, WHOLE);
                const void *row = (char *)args.out + (size_t)(t * p.out_stride) * size;
                EXPECT_SAME("one row", p.dtype, row, alone, p.n, 1, p.n);
            }
        }
        release_memory();
    }
}

/* A range writes its own outputs only; an empty one, and one of no rows, nothing. */
static void test_partial_range(void)
{
    for (int k = 0; k < 4; k++) {
        problem p;
        make_problem(&p, dtypes[k], 1, 40, 300, 1, 0, 0);
        boft_linear_args args = make_args(&p, GUARD_END);
        const size_t size = dtype_size(p.dtype);
        for (int v = 0; next_variant(&v);) {
            test_case("outputs 7 ... 90 of linear %s", p.name);
            scrub(args.out);
            EXPECT_OK(boft_linear(&args, 7, 91));
            EXPECT(untouched(args.out, 7 * size), "earlier outputs were written");
            EXPECT(untouched((char *)args.out + 91 * size, (300 - 91) * size), "later outputs were written");
            scrub(args.out);
            EXPECT_OK(boft_linear(&args, 5, 5));
            args.rows = 0;
            EXPECT_OK(boft_linear(&args, 0, 300));
            EXPECT(untouched(args.out, 300 * size), "an empty range wrote");
            args.rows = 1;
        }
        release_memory();
    }
}

static void test_far_rows(void)
{
    const int64_t stride = ((int64_t)1 << 31) + 21;
    for (int k = 0; k < 4; k++) {
        problem p;
        make_problem(&p, dtypes[k], 3, 43, 5, 1, 0, 0);
        boft_linear_args args = make_args(&p, GUARD_END);
        args.x = far_values(p.dtype, p.rows, p.d, stride, p.x);
        args.weight = far_values(p.dtype, p.n, p.d, stride, p.weight);
        args.out = far_values(p.dtype, p.rows, p.n, stride, NULL);
        args.x_stride = args.weight_stride = args.out_stride = stride;
        for (int v = 0; next_variant(&v);) {
            test_case("rows %lld elements apart: linear %s", (long long)stride, p.name);
            EXPECT_OK(boft_linear(&args, 0, p.n));
            EXPECT_CLOSE("out", p.dtype, args.out, stride, p.rows, p.n, p.out, p.bound);
        }
        release_memory();
    }
}

/* A NaN in x reaches its own row, and one in the weight its own output. */
static void test_nan(void)
{
    for (int k = 0; k < 4; k++) {
        problem p;
        make_problem(&p, dtypes[k], 3, 45, 9, 1, 0, 0);
        p.x[random_below(p.d)] = p.weight[3 * p.d + random_below(p.d)] = NAN;
        find_truth(&p);
        const boft_linear_args args = make_args(&p, GUARD_END);
        for (int v = 0; next_variant(&v);) {
            test_case("NaN in linear %s", p.name);
            run(&args, WHOLE);
            expect_truth(&p, args.out);
        }
        release_memory();
    }
}

static void test_refusals(void)
{
    problem p;
    make_problem(&p, BOFT_F32, 2, 8, 6, 0, 0, 0);
    const boft_linear_args good = make_args(&p, GUARD_END);
    boft_linear_args bad;
    test_case("refusals");
    scrub(good.out);
    EXPECT_REFUSED(boft_linear(NULL, 0, 1), BOFT_BAD_ARGUMENT, "linear args");
    bad = good, bad.dtype = (boft_dtype)17;
    EXPECT_REFUSED(boft_linear(&bad, 0, 6), BOFT_BAD_DTYPE, "linear 17");
    EXPECT_REFUSED(boft_linear(&good, 0, 7), BOFT_BAD_SHAPE, "linear 7 6");
    EXPECT_REFUSED(boft_linear(&good, -1, 2), BOFT_BAD_SHAPE, "linear -1");
    bad = good, bad.rows = -2;
    EXPECT_REFUSED(boft_linear(&bad, 0, 6), BOFT_BAD_SHAPE, "linear -2 rows");
    bad = good, bad.out_stride = 5;
    EXPECT_REFUSED(boft_linear(&bad, 0, 6), BOFT_BAD_SHAPE, "linear 5 6");
    bad = good, bad.weight_stride = -8;
    EXPECT_REFUSED(boft_linear(&bad, 0, 6), BOFT_BAD_SHAPE, "linear -8");
    bad = good, bad.x = NULL;
    EXPECT_REFUSED(boft_linear(&bad, 0, 6), BOFT_BAD_ARGUMENT, "linear x");
    bad = good, bad.weight = NULL;
    EXPECT_REFUSED(boft_linear(&bad, 0, 6), BOFT_BAD_ARGUMENT, "linear weight");
    bad = good, bad.s = NULL;
    EXPECT_REFUSED(boft_linear(&bad, 0, 6), BOFT_BAD_ARGUMENT, "linear s");
    bad = good, bad.out = NULL;
    EXPECT_REFUSED(boft_linear(&bad, 0, 6), BOFT_BAD_ARGUMENT, "linear out");
    EXPECT(untouched(good.out, 12 * sizeof(float)), "a refused call wrote");
    release_memory();
}

int main(int argc, char **argv)
{
    test_start("test_linear", argc, argv);
    test_all_sizes();
    test_rows_do_not_matter();
    test_partial_range();
    test_far_rows();
    test_nan();
    test_refusals();
    return test_finish();
}
