/* z s + bias (1 - s) and its backward. */
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const boft_dtype dtypes[] = {BOFT_F32, BOFT_BF16, BOFT_F16, BOFT_F64};

/* Rows one after the other, with gaps, or z and dy one row repeated (an expanded tensor). */
enum { DENSE, GAPS, EXPANDED, LAYOUTS };

/* No bias; one whose gradient flows through z too; one whose gradient all comes from here. */
enum { NO_BIAS, BIAS_IN_Z, BIAS_DETACHED, BIASES };

/* One scale: sizes, the values that the core is given, and what must come out, in double. */
typedef struct problem {
    boft_dtype dtype, real;
    int64_t rows, n, z_stride, dy_stride, out_stride, dz_stride, splits;
    int kind; /* of bias */
    double *z, *dy, *s, *bias;
    double *out, *out_bound, *dz, *dz_bound, *ds, *ds_bound, *dbias, *dbias_bound;
    int integers; /* small ones: nothing rounds, so bounds do not count */
    char name[160];
} problem;

typedef struct inputs {
    const void *z, *dy, *s, *bias;
} inputs;

static double *random_values(boft_dtype dtype, int64_t rows, int64_t n, int64_t stride, int integers)
{
    double *x = doubles(rows * n);
    for (int64_t i = 0; i < rows * n; i++) {
        const double value = integers ? (double)(random_below(7) - 3) : rounded(dtype, 2 * random_unit());
        x[i] = stride == 0 && i >= n ? x[i - n] : value;
    }
    return x;
}

/*
 * The truth and its bounds, in roundings of the arithmetic relative to the absolute values: z s + bias (1 - s) rounds
 * four times, dy s once, and ds and dbias once per row for the sum and two more times per term, and once per split.
 * Doubled for float64, since the truth rounds as much.
 */
static void find_truth(problem *p)
{
    const int64_t rows = p->rows, n = p->n;
    const double u = unit_roundoff(p->real) * (p->real == BOFT_F64 ? 2 : 1);
    const double sum = (double)(rows + 2 + p->splits) * u;
    p->out = doubles(rows * n), p->out_bound = doubles(rows * n);
    p->dz = doubles(rows * n), p->dz_bound = doubles(rows * n);
    p->ds = doubles(n), p->ds_bound = doubles(n);
    p->dbias = doubles(n), p->dbias_bound = doubles(n);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < n; j++) {
            const int64_t i = t * n + j;
            const double z = p->z[i], dy = p->dy[i], s = p->s[j], bias = p->kind == NO_BIAS ? 0 : p->bias[j];
            const double share = p->kind == BIAS_DETACHED ? 1 : 1 - s,
                         share_size = p->kind == BIAS_DETACHED ? 1 : 1 + fabs(s);
            p->out[i] = z * s + bias * (1 - s);
            p->out_bound[i] = 4 * u * (fabs(z * s) + fabs(bias) * (1 + fabs(s)));
            p->dz[i] = dy * s;
            p->dz_bound[i] = u * fabs(dy * s);
            p->ds[j] += dy * (z - bias);
            p->ds_bound[j] += sum * fabs(dy) * (fabs(z) + fabs(bias));
            p->dbias[j] += dy * share;
            p->dbias_bound[j] += sum * fabs(dy) * share_size;
        }
}

static void make_problem(problem *p, boft_dtype dtype, int64_t rows, int64_t n, int kind, int layout, int integers)
{
    *p = (problem){.dtype = dtype,
                   .real = real_of(dtype),
                   .rows = rows,
                   .n = n,
                   .kind = kind,
                   .integers = integers,
                   .splits = boft_scale_backward_splits(rows)};
    p->z_stride = layout == DENSE ? n : layout == GAPS ? n + 3 : 0;
    p->dy_stride = layout == DENSE ? n : layout == GAPS ? n + 7 : 0;
    p->out_stride = layout == DENSE ? n : n + 1;
    p->dz_stride = layout == DENSE ? n : n + 5;
    snprintf(p->name, sizeof p->name, "%s %lld rows of %lld%s%s%s", dtype_name(dtype), (long long)rows, (long long)n,
             kind == NO_BIAS     ? ""
             : kind == BIAS_IN_Z ? ", bias"
                                 : ", bias detached",
             layout == GAPS       ? ", gaps"
             : layout == EXPANDED ? ", expanded"
                                  : "",
             integers ? ", integers" : "");
    p->z = random_values(dtype, rows, n, p->z_stride, integers);
    p->dy = random_values(dtype, rows, n, p->dy_stride, integers);
    p->s = random_values(p->real, 1, n, n, integers);
    p->bias = random_values(p->real, 1, n, n, integers);
    find_truth(p);
}

static inputs make_inputs(const problem *p, guard side)
{
    return (inputs){.z = stored_rows(p->dtype, p->rows, p->n, p->z_stride, p->z, side),
                    .dy = stored_rows(p->dtype, p->rows, p->n, p->dy_stride, p->dy, side),
                    .s = stored_rows(p->real, 1, p->n, p->n, p->s, side),
                    .bias = p->kind != NO_BIAS ? stored_rows(p->real, 1, p->n, p->n, p->bias, side) : NULL};
}

static boft_scale_args forward_args(const problem *p, const inputs *in, void *out)
{
    return (boft_scale_args){.dtype = p->dtype,
                             .rows = p->rows,
                             .n = p->n,
                             .z = in->z,
                             .z_stride = p->z_stride,
                             .s = in->s,
                             .bias = in->bias,
                             .out = out,
                             .out_stride = p->out_stride};
}

static void run_forward(const boft_scale_args *args, division how)
{
    const ranges r = divide(args->rows, how);
    int64_t begin, end;
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++)
        EXPECT_OK(boft_scale(args, begin, end));
}

/* z is NULL where boft.h calls it unneeded. */
static boft_scale_backward_args backward_args(const problem *p, const inputs *in, void *dz, void *ds, void *dbias)
{
    return (boft_scale_backward_args){.dtype = p->dtype,
                                      .rows = p->rows,
                                      .n = p->n,
                                      .dy = in->dy,
                                      .dy_stride = p->dy_stride,
                                      .z = ds ? in->z : NULL,
                                      .z_stride = ds ? p->z_stride : 0,
                                      .s = in->s,
                                      .bias = in->bias,
                                      .dz = dz,
                                      .dz_stride = dz ? p->dz_stride : 0,
                                      .ds = ds,
                                      .dbias = dbias,
                                      .bias_detached = p->kind == BIAS_DETACHED};
}

static void run_backward(const boft_scale_backward_args *args, division how)
{
    const ranges r = divide(boft_scale_backward_splits(args->rows), how);
    int64_t begin, end;
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++)
        EXPECT_OK(boft_scale_backward(args, begin, end));
}

static void check_forward(const problem *p, const inputs in[2], void *const out[2])
{
    const size_t bytes = (size_t)extent(p->rows, p->n, p->out_stride) * dtype_size(p->dtype);
    boft_scale_args args = forward_args(p, &in[0], out[0]);
    scrub(out[0]);
    run_forward(&args, WHOLE);
    EXPECT_CLOSE("out", p->dtype, out[0], p->out_stride, p->rows, p->n, p->out, p->integers ? NULL : p->out_bound);
    EXPECT_GAPS("out", p->dtype, out[0], p->out_stride, p->rows, p->n);
    args = forward_args(p, &in[1], out[1]);
    scrub(out[1]);
    run_forward(&args, p->rows % 2 ? SINGLES : PIECES);
    EXPECT_SAME("out in pieces", p->dtype, out[0], out[1], p->out_stride, p->rows, p->n);

    memcpy(out[1], stored_rows(p->dtype, p->rows, p->n, p->out_stride, p->z, GUARD_END), bytes);
    args = forward_args(p, &in[0], out[1]);
    args.z = out[1];
    args.z_stride = p->out_stride;
    run_forward(&args, PIECES);
    EXPECT_SAME("out in place", p->dtype, out[0], out[1], p->out_stride, p->rows, p->n);
}

/* Adds up the splits of a gradient of n elements and checks it. */
static void check_gradient(const problem *p, const char *what, void *parts, const double *truth, const double *bound)
{
    EXPECT_OK(boft_sum_splits(p->real, p->splits, p->n, parts, parts, 0, p->n));
    EXPECT_CLOSE(what, p->real, parts, p->n, 1, p->n, truth, p->integers ? NULL : bound);
}

static void check_backward(const problem *p, const inputs in[2], void *const dz[2], void *const ds[2],
                           void *const dbias[2])
{
    const int64_t parts = p->splits * p->n;
    const double *dz_bound = p->integers ? NULL : p->dz_bound;
    for (int i = 0; i < 2; i++) {
        scrub(dz[i]);
        scrub(ds[i]);
        scrub(dbias[i]);
        const boft_scale_backward_args args = backward_args(p, &in[i], dz[i], ds[i], dbias[i]);
        run_backward(&args, i ? SINGLES : WHOLE);
    }
    EXPECT_CLOSE("dz", p->dtype, dz[0], p->dz_stride, p->rows, p->n, p->dz, dz_bound);
    EXPECT_GAPS("dz", p->dtype, dz[0], p->dz_stride, p->rows, p->n);
    EXPECT_SAME("dz in pieces", p->dtype, dz[0], dz[1], p->dz_stride, p->rows, p->n);
    EXPECT_SAME("ds in pieces", p->real, ds[0], ds[1], parts, 1, parts);
    EXPECT_SAME("dbias in pieces", p->real, dbias[0], dbias[1], parts, 1, parts);
    check_gradient(p, "ds", ds[0], p->ds, p->ds_bound);
    check_gradient(p, "dbias", dbias[0], p->dbias, p->dbias_bound);

    /* Each subset of the three results, in place for dz. */
    for (int wanted = 1; wanted < 7; wanted++) {
        for (int i = 0; i < 2; i++)
            scrub(i ? dbias[1] : ds[1]);
        const size_t bytes = (size_t)extent(p->rows, p->n, p->dz_stride) * dtype_size(p->dtype);
        memcpy(dz[1], stored_rows(p->dtype, p->rows, p->n, p->dz_stride, p->dy, GUARD_END), bytes);
        boft_scale_backward_args args = backward_args(p, &in[0], wanted & 1 ? dz[1] : NULL, wanted & 2 ? ds[1] : NULL,
                                                      wanted & 4 ? dbias[1] : NULL);
        args.dy = dz[1];
        args.dy_stride = p->dz_stride;
        run_backward(&args, PIECES);
        if (wanted & 1)
            EXPECT_SAME("dz in place", p->dtype, dz[0], dz[1], p->dz_stride, p->rows, p->n);
        if (wanted & 2)
            check_gradient(p, "ds of some", ds[1], p->ds, p->ds_bound);
        if (wanted & 4)
            check_gradient(p, "dbias of some", dbias[1], p->dbias, p->dbias_bound);
    }
}

static void scale_case(boft_dtype dtype, int64_t rows, int64_t n, int kind, int layout, int integers)
{
    problem p;
    make_problem(&p, dtype, rows, n, kind, layout, integers);
    const guard sides[2] = {GUARD_END, GUARD_START};
    inputs in[2];
    void *out[2], *dz[2], *ds[2], *dbias[2];
    for (int i = 0; i < 2; i++) {
        in[i] = make_inputs(&p, sides[i]);
        out[i] = room(dtype, extent(rows, n, p.out_stride), sides[i]);
        dz[i] = room(dtype, extent(rows, n, p.dz_stride), sides[i]);
        ds[i] = room(p.real, p.splits * n, sides[i]);
        dbias[i] = room(p.real, p.splits * n, sides[i]);
    }
    for (int v = 0; next_variant(&v);) {
        test_case("scale %s", p.name);
        check_forward(&p, in, out);
        test_case("scale backward %s", p.name);
        check_backward(&p, in, dz, ds, dbias);
    }
    release_memory();
}

static void test_all_sizes(void)
{
    const int64_t rows[] = {33, 8, 130, 1, 65, 9, 31, 3, 7, 2, 0};
    const int64_t sizes[] = {1,  2,  3,  4,  5,  7,  8,  9,   15,  16,  17,  23,
                             31, 32, 33, 47, 63, 64, 65, 100, 127, 257, 768, 1001};
    enum { ROWS = sizeof rows / sizeof *rows, SIZES = sizeof sizes / sizeof *sizes };
    int turn = (int)random_below(1000);
    for (int i = 0; i < SIZES; i++)
        for (int k = 0; k < (sizes[i] <= 33 ? ROWS : 4); k++, turn++)
            for (int integers = 0; integers < 2; integers++) {
                const int64_t t = rows[sizes[i] <= 33 ? k : turn % ROWS];
                scale_case(dtypes[(turn + integers) % 4], t, sizes[i], turn / 4 % BIASES, turn / 3 % LAYOUTS,
                           integers);
            }
    /* Several splits, the last one short. */
    for (int i = 0; i < 8; i++)
        scale_case(dtypes[i % 4], i < 4 ? 257 : 1500, i % 2 ? 19 : 40, (i + 1) % BIASES, i % LAYOUTS, i / 4);
    test_case("splits");
    for (int64_t t = 0; t < 5000; t += 1 + t / 7)
        EXPECT(boft_scale_backward_splits(t) >= 1, "%lld splits", (long long)boft_scale_backward_splits(t));
    EXPECT(boft_scale_backward_splits(100000) > 1, "100000 rows are summed in one split");
}

/* A range writes its own rows, or those of its splits, only; an empty one nothing. */
static void test_partial_range(void)
{
    for (int k = 0; k < 4; k++) {
        problem p;
        make_problem(&p, dtypes[k], 1000, 21, BIAS_IN_Z, GAPS, 0);
        const inputs in = make_inputs(&p, GUARD_END);
        const size_t size = dtype_size(p.dtype), out_bytes = (size_t)extent(1000, 21, p.out_stride) * size;
        void *out = room(p.dtype, extent(1000, 21, p.out_stride), GUARD_END);
        void *ds = room(p.real, p.splits * p.n, GUARD_END);
        boft_scale_args args = forward_args(&p, &in, out);
        boft_scale_backward_args back = backward_args(&p, &in, NULL, ds, NULL);
        for (int v = 0; next_variant(&v);) {
            test_case("rows 7 ... 28 and one split of scale %s", p.name);
            scrub(out);
            EXPECT_OK(boft_scale(&args, 7, 29));
            const size_t begin = 7 * (size_t)p.out_stride * size, end = (28 * (size_t)p.out_stride + 21) * size;
            EXPECT(untouched(out, begin), "earlier rows were written");
            EXPECT(untouched((char *)out + end, out_bytes - end), "later rows were written");
            scrub(out);
            EXPECT_OK(boft_scale(&args, 0, 0));
            EXPECT_OK(boft_scale(&args, 1000, 1000));
            EXPECT(untouched(out, out_bytes), "an empty range wrote");
            scrub(ds);
            EXPECT(p.splits > 2, "1000 rows make %lld splits", (long long)p.splits);
            EXPECT_OK(boft_scale_backward(&back, 1, 2));
            const size_t part = (size_t)p.n * dtype_size(p.real);
            EXPECT(untouched(ds, part) && untouched((char *)ds + 2 * part, (size_t)(p.splits - 2) * part),
                   "another split was written");
        }
        release_memory();
    }
}

static void test_far_rows(void)
{
    const int64_t stride = ((int64_t)1 << 31) + 21, rows = 3, n = 43;
    for (int k = 0; k < 4; k++) {
        problem p;
        const boft_dtype dtype = dtypes[k];
        make_problem(&p, dtype, rows, n, BIAS_IN_Z, DENSE, 0);
        p.z_stride = p.dy_stride = p.out_stride = p.dz_stride = stride;
        const inputs in = {.z = far_values(dtype, rows, n, stride, p.z),
                           .dy = far_values(dtype, rows, n, stride, p.dy),
                           .s = stored_rows(p.real, 1, n, n, p.s, GUARD_END),
                           .bias = stored_rows(p.real, 1, n, n, p.bias, GUARD_END)};
        void *out = far_values(dtype, rows, n, stride, NULL), *dz = far_values(dtype, rows, n, stride, NULL);
        void *ds = room(p.real, p.splits * n, GUARD_END), *dbias = room(p.real, p.splits * n, GUARD_END);
        for (int v = 0; next_variant(&v);) {
            test_case("rows %lld elements apart: scale %s", (long long)stride, p.name);
            const boft_scale_args args = forward_args(&p, &in, out);
            run_forward(&args, WHOLE);
            EXPECT_CLOSE("out", dtype, out, stride, rows, n, p.out, p.out_bound);
            const boft_scale_backward_args back = backward_args(&p, &in, dz, ds, dbias);
            run_backward(&back, WHOLE);
            EXPECT_CLOSE("dz", dtype, dz, stride, rows, n, p.dz, p.dz_bound);
            check_gradient(&p, "ds", ds, p.ds, p.ds_bound);
            check_gradient(&p, "dbias", dbias, p.dbias, p.dbias_bound);
        }
        release_memory();
    }
}

/* Zero rows need no data (an empty tensor has no address), and make zero gradients all the same. */
static void test_no_rows(void)
{
    problem p;
    make_problem(&p, BOFT_F32, 0, 45, BIAS_IN_Z, DENSE, 0);
    const inputs in = make_inputs(&p, GUARD_END);
    void *ds = room(p.real, p.splits * p.n, GUARD_END), *dbias = room(p.real, p.splits * p.n, GUARD_END);
    const boft_scale_args args = {.dtype = p.dtype, .n = 45, .z_stride = 45, .s = in.s, .out_stride = 45};
    const boft_scale_backward_args back = {.dtype = p.dtype,
                                           .n = 45,
                                           .dy_stride = 45,
                                           .z_stride = 45,
                                           .s = in.s,
                                           .dz_stride = 45,
                                           .ds = ds,
                                           .dbias = dbias};
    for (int v = 0; next_variant(&v);) {
        test_case("no rows and no data");
        EXPECT_OK(boft_scale(&args, 0, 0));
        scrub(ds);
        scrub(dbias);
        EXPECT_OK(boft_scale_backward(&back, 0, p.splits));
        check_gradient(&p, "ds", ds, p.ds, p.ds_bound);
        check_gradient(&p, "dbias", dbias, p.dbias, p.dbias_bound);
    }
    release_memory();
}

/* A NaN reaches its own entry and its own column of the gradients only. */
static void test_nan(void)
{
    for (int k = 0; k < 4; k++) {
        problem p;
        const int64_t rows = 37, n = 45;
        make_problem(&p, dtypes[k], rows, n, k % BIASES, DENSE, 0);
        const int64_t row = random_below(rows), column = random_below(n), at = row * n + column;
        p.z[at] = p.dy[at] = NAN;
        find_truth(&p);
        const inputs in = make_inputs(&p, GUARD_END);
        void *out = room(p.dtype, rows * n, GUARD_END), *dz = room(p.dtype, rows * n, GUARD_END);
        void *ds = room(p.real, p.splits * n, GUARD_END), *dbias = room(p.real, p.splits * n, GUARD_END);
        for (int v = 0; next_variant(&v);) {
            test_case("NaN at (%lld, %lld) of scale %s", (long long)row, (long long)column, p.name);
            const boft_scale_args args = forward_args(&p, &in, out);
            run_forward(&args, WHOLE);
            EXPECT_CLOSE("out", p.dtype, out, n, rows, n, p.out, p.out_bound);
            const boft_scale_backward_args back = backward_args(&p, &in, dz, ds, dbias);
            run_backward(&back, WHOLE);
            EXPECT_CLOSE("dz", p.dtype, dz, n, rows, n, p.dz, p.dz_bound);
            check_gradient(&p, "ds", ds, p.ds, p.ds_bound);
            check_gradient(&p, "dbias", dbias, p.dbias, p.dbias_bound);
        }
        release_memory();
    }
}

/* <dy, out> of the core, in float64. */
static double loss(const problem *p, const double *z, const double *s, const double *bias, double *out)
{
    const inputs in = {.z = z, .s = s, .bias = bias};
    const boft_scale_args args = forward_args(p, &in, out);
    EXPECT_OK(boft_scale(&args, 0, p->rows));
    double sum = 0;
    for (int64_t i = 0; i < p->rows * p->n; i++)
        sum += p->dy[i] * out[i];
    return sum;
}

/*
 * Every entry of the gradients in float64 by central differences: the loss is linear in z, s and bias one at a time,
 * so h = 1 has no truncation, and the rounding is at most 8 u per term of the loss, of absolute value below 32.
 */
static void difference_case(int kind)
{
    problem p;
    make_problem(&p, BOFT_F64, 5, 9, kind, DENSE, 0);
    const int64_t count = p.rows * p.n;
    double *out = doubles(count), *z = doubles(count), *dz = doubles(count), *ds = doubles(p.n), *dbias = doubles(p.n);
    const double bound = 8 * 32 * unit_roundoff(BOFT_F64) * (double)count;
    for (int v = 0; next_variant(&v);) {
        test_case("scale backward against differences: %s", p.name);
        const inputs in = {.z = p.z, .dy = p.dy, .s = p.s, .bias = p.bias};
        const boft_scale_backward_args args = backward_args(&p, &in, dz, ds, dbias);
        EXPECT_OK(boft_scale_backward(&args, 0, 1));
        double *const moved[] = {p.z, p.s, p.bias}, *const gradients[] = {dz, ds, dbias};
        const int64_t sizes[] = {count, p.n, p.n};
        for (int which = 0; which < 3; which++)
            for (int64_t i = 0; i < sizes[which]; i++) {
                /* z holds the bias; a detached one has its whole gradient here, so z moves with it. */
                const int with_z = which == 2 && kind == BIAS_DETACHED;
                double *move = moved[which], losses[2];
                const double before = move[i];
                for (int sign = 0; sign < 2; sign++) {
                    const double step = sign ? -1 : 1;
                    move[i] = before + step;
                    memcpy(z, p.z, (size_t)count * sizeof *z);
                    for (int64_t t = 0; with_z && t < p.rows; t++)
                        z[t * p.n + i] += step;
                    losses[sign] = loss(&p, z, p.s, p.bias, out);
                }
                move[i] = before;
                const double difference = (losses[0] - losses[1]) / 2;
                EXPECT(fabs(difference - gradients[which][i]) <= bound, "gradient %d, entry %lld: %.12g, not %.12g",
                       which, (long long)i, gradients[which][i], difference);
            }
    }
    release_memory();
}

/* `field` set to `value` in a copy of good arguments. */
#define REFUSE_SCALE(field, value, wanted, words)              \
    do {                                                       \
        boft_scale_args bad = good;                            \
        bad.field = value;                                     \
        EXPECT_REFUSED(boft_scale(&bad, 0, 5), wanted, words); \
    } while (0)
#define REFUSE_BACKWARD(field, value, wanted, words)                    \
    do {                                                                \
        boft_scale_backward_args bad = good_back;                       \
        bad.field = value;                                              \
        EXPECT_REFUSED(boft_scale_backward(&bad, 0, 1), wanted, words); \
    } while (0)

static void test_refusals(void)
{
    problem p;
    make_problem(&p, BOFT_F16, 5, 12, BIAS_IN_Z, GAPS, 0);
    const inputs in = make_inputs(&p, GUARD_END);
    void *out = room(p.dtype, 100, GUARD_END), *dz = room(p.dtype, 100, GUARD_END);
    void *ds = room(p.real, 12, GUARD_END), *dbias = room(p.real, 12, GUARD_END);
    const boft_scale_args good = forward_args(&p, &in, out);
    test_case("scale refuses");
    EXPECT_REFUSED(boft_scale(NULL, 0, 5), BOFT_BAD_ARGUMENT, "args");
    REFUSE_SCALE(dtype, (boft_dtype)44, BOFT_BAD_DTYPE, "44");
    REFUSE_SCALE(rows, -8, BOFT_BAD_SHAPE, "-8");
    REFUSE_SCALE(rows, 4, BOFT_BAD_SHAPE, "5 4");
    REFUSE_SCALE(n, -8, BOFT_BAD_SHAPE, "-8");
    REFUSE_SCALE(z_stride, -2, BOFT_BAD_SHAPE, "-2");
    REFUSE_SCALE(out_stride, 11, BOFT_BAD_SHAPE, "11 12");
    REFUSE_SCALE(z, NULL, BOFT_BAD_ARGUMENT, "z");
    REFUSE_SCALE(s, NULL, BOFT_BAD_ARGUMENT, "s");
    REFUSE_SCALE(out, NULL, BOFT_BAD_ARGUMENT, "out");
    EXPECT_REFUSED(boft_scale(&good, -3, 5), BOFT_BAD_SHAPE, "-3 5");
    EXPECT_REFUSED(boft_scale(&good, 4, 3), BOFT_BAD_SHAPE, "4 3");
    EXPECT_REFUSED(boft_scale(&good, 0, 66), BOFT_BAD_SHAPE, "66 5");
    test_case("scale backward refuses");
    const boft_scale_backward_args good_back = backward_args(&p, &in, dz, ds, dbias);
    EXPECT_REFUSED(boft_scale_backward(NULL, 0, 1), BOFT_BAD_ARGUMENT, "args");
    REFUSE_BACKWARD(dtype, (boft_dtype)44, BOFT_BAD_DTYPE, "44");
    REFUSE_BACKWARD(rows, -8, BOFT_BAD_SHAPE, "-8");
    REFUSE_BACKWARD(n, -8, BOFT_BAD_SHAPE, "-8");
    REFUSE_BACKWARD(dy_stride, -2, BOFT_BAD_SHAPE, "-2");
    REFUSE_BACKWARD(z_stride, -2, BOFT_BAD_SHAPE, "-2");
    REFUSE_BACKWARD(dz_stride, 11, BOFT_BAD_SHAPE, "11 12");
    REFUSE_BACKWARD(dy, NULL, BOFT_BAD_ARGUMENT, "dy");
    REFUSE_BACKWARD(z, NULL, BOFT_BAD_ARGUMENT, "z");
    REFUSE_BACKWARD(s, NULL, BOFT_BAD_ARGUMENT, "s");
    EXPECT_REFUSED(boft_scale_backward(&good_back, -3, 1), BOFT_BAD_SHAPE, "-3 1");
    EXPECT_REFUSED(boft_scale_backward(&good_back, 1, 0), BOFT_BAD_SHAPE, "1 0");
    EXPECT_REFUSED(boft_scale_backward(&good_back, 0, 66), BOFT_BAD_SHAPE, "66 1");
    EXPECT(untouched(out, 200) && untouched(dz, 200) && untouched(ds, 48) && untouched(dbias, 48), "a refusal wrote");
    release_memory();
}

int main(int argc, char **argv)
{
    test_start("test_scale", argc, argv);
    test_all_sizes();
    test_partial_range();
    test_far_rows();
    test_no_rows();
    test_nan();
    difference_case(BIAS_IN_Z);
    difference_case(BIAS_DETACHED);
    test_refusals();
    return test_finish();
}
