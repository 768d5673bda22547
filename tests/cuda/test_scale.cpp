/* boft_cuda_scale and its backward against the scalar variant of the core, which gets the same values in float64. */
#include "boft_cuda.h"

extern "C" {
#include "support.h"
}

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const boft_dtype dtypes[] = {BOFT_F32, BOFT_BF16, BOFT_F16, BOFT_F64};

/*
 * One row after the other; with gaps that keep rows aligned to 16 bytes; with gaps that do not; everything one element
 * past such an address; z and dy one row repeated.
 */
enum layout { DENSE, WIDE_GAPS, ODD_GAPS, OFFSET, EXPANDED, LAYOUTS };
static const char *const layout_names[LAYOUTS] = {"dense", "wide gaps", "odd gaps", "offset", "expanded"};

enum { NO_BIAS, BIAS_IN_Z, BIAS_DETACHED, BIASES };
enum { WANT_DZ = 1, WANT_DS = 2, WANT_DBIAS = 4 };

typedef struct problem {
    boft_dtype dtype, real;
    int64_t rows, n, stride_in, stride_out;
    layout how;
    int kind; /* of bias */
    double *z, *dy, *s, *bias;
    double *out, *out_bound, *dz, *dz_bound, *ds, *ds_bound, *dbias, *dbias_bound;
    void *stored_z, *stored_dy, *stored_s, *stored_bias;
} problem;

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

/* Room for count elements where the layout puts it, of which the guarded buffer begins `before` elements earlier. */
static void *room(const problem *p, boft_dtype dtype, int64_t count)
{
    const size_t size = dtype_size(dtype);
    if (p->how == OFFSET)
        return (char *)guarded((size_t)(count + 1) * size, 16, GUARD_START) + size;
    return guarded((size_t)count * size, p->how == ODD_GAPS ? size : 16, GUARD_END);
}

/* Rows of values in memory whose gaps are NaN, which must not leak into results. */
static void *stored(const problem *p, boft_dtype dtype, int64_t rows, int64_t stride, const double *values)
{
    void *data = room(p, dtype, extent(rows, p->n, stride));
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < p->n; j++)
            put(dtype, data, t * stride + j, values[t * p->n + j]);
    return data;
}

static void check_around(const problem *p, const char *what, boft_dtype dtype, const void *data, int64_t rows,
                         int64_t stride)
{
    EXPECT_GAPS(what, dtype, data, stride, rows, p->n);
    if (p->how == OFFSET)
        EXPECT(untouched((const char *)data - dtype_size(dtype), dtype_size(dtype)), "%s: written before", what);
}

/* ---- Truth ------------------------------------------------------------------------------------------------------- */

static double *random_values(boft_dtype dtype, int64_t rows, int64_t n, int repeated)
{
    double *x = doubles(rows * n);
    for (int64_t i = 0; i < rows * n; i++)
        x[i] = repeated && i >= n ? x[i - n] : rounded(dtype, 2 * random_unit());
    return x;
}

/* The sums of all splits in the first. */
static double *all_splits(int64_t splits, int64_t n, double *parts)
{
    EXPECT_OK(boft_sum_splits(BOFT_F64, splits, n, parts, parts, 0, n));
    return parts;
}

/*
 * Roundings relative to absolute values: z s + bias (1 - s) rounds four times, dy s once; a sum once for each row, each
 * warp and part, and twice more for a term and the end. Doubled for float64, where the truth rounds as much.
 */
static void find_truth(problem *p)
{
    const int64_t rows = p->rows, n = p->n, splits = boft_scale_backward_splits(rows);
    const double *bias = p->kind == NO_BIAS ? NULL : p->bias;
    p->out = doubles(rows * n), p->dz = doubles(rows * n);
    p->ds = doubles(splits * n), p->dbias = doubles(splits * n);
    boft_scale_args forward = {BOFT_F64, rows, n, p->z, n, p->s, bias, p->out, n};
    boft_scale_backward_args backward = {BOFT_F64, rows, n,     p->dy, n,        p->z,           n, p->s, bias,
                                         p->dz,    n,    p->ds, p->dbias, p->kind == BIAS_DETACHED};
    EXPECT_OK(boft_scale(&forward, 0, rows));
    EXPECT_OK(boft_scale_backward(&backward, 0, splits));
    p->ds = all_splits(splits, n, p->ds);
    p->dbias = all_splits(splits, n, p->dbias);

    const double u = unit_roundoff(p->real) * (p->real == BOFT_F64 ? 2 : 1), sum = (double)(rows + 12) * u;
    p->out_bound = doubles(rows * n), p->dz_bound = doubles(rows * n);
    p->ds_bound = doubles(n), p->dbias_bound = doubles(n);
    for (int64_t i = 0; i < rows * n; i++) {
        const double s = p->s[i % n], size = bias ? fabs(bias[i % n]) : 0, dy = fabs(p->dy[i]), z = fabs(p->z[i]);
        p->out_bound[i] = 4 * u * (fabs(z * s) + size * (1 + fabs(s)));
        p->dz_bound[i] = u * fabs(dy * s);
        p->ds_bound[i % n] += sum * dy * (z + size);
        p->dbias_bound[i % n] += sum * dy * (p->kind == BIAS_DETACHED ? 1 : 1 + fabs(s));
    }
}

static problem make_problem(boft_dtype dtype, int64_t rows, int64_t n, layout how, int kind)
{
    problem p = {};
    const int64_t wide = 16 / (int64_t)dtype_size(dtype), up = (n + wide - 1) / wide * wide;
    p.dtype = dtype;
    p.real = real_of(dtype);
    p.rows = rows;
    p.n = n;
    p.how = how;
    p.kind = kind;
    p.stride_in = how == WIDE_GAPS ? up + wide : how == ODD_GAPS ? up + 1 : how == EXPANDED ? 0 : n;
    p.stride_out = how == WIDE_GAPS ? up + 2 * wide : how == ODD_GAPS ? up + 3 : n;
    p.z = random_values(dtype, rows, n, how == EXPANDED);
    p.dy = random_values(dtype, rows, n, how == EXPANDED);
    p.s = random_values(p.real, 1, n, 0);
    p.bias = random_values(p.real, 1, n, 0);
    find_truth(&p);
    p.stored_z = stored(&p, dtype, rows, p.stride_in, p.z);
    p.stored_dy = stored(&p, dtype, rows, p.stride_in, p.dy);
    p.stored_s = stored(&p, p.real, 1, n, p.s);
    p.stored_bias = kind == NO_BIAS ? NULL : stored(&p, p.real, 1, n, p.bias);
    return p;
}

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

static boft_scale_args forward_args(const problem *p, const void *z, int64_t z_stride, void *out)
{
    boft_scale_args args = {p->dtype, p->rows, p->n, z, z_stride, p->stored_s, p->stored_bias, out, p->stride_out};
    return args;
}

static void check_forward(const problem *p)
{
    void *out = room(p, p->dtype, extent(p->rows, p->n, p->stride_out));
    void *both = stored(p, p->dtype, p->rows, p->stride_out, p->z);
    boft_scale_args args = forward_args(p, p->stored_z, p->stride_in, out);
    EXPECT_OK(boft_cuda_scale(&args, NULL));
    EXPECT_CLOSE("out", p->dtype, out, p->stride_out, p->rows, p->n, p->out, p->out_bound);
    check_around(p, "out", p->dtype, out, p->rows, p->stride_out);
    args = forward_args(p, both, p->stride_out, both);
    EXPECT_OK(boft_cuda_scale(&args, NULL));
    EXPECT_CLOSE("out in place", p->dtype, both, p->stride_out, p->rows, p->n, p->out, p->out_bound);
    check_around(p, "out in place", p->dtype, both, p->rows, p->stride_out);
}

/* Runs a backward with a workspace and counters of its own and looks at those after. */
static void run_backward(const boft_scale_backward_args *args)
{
    const size_t bytes = boft_cuda_scale_backward_workspace(args->dtype, args->rows, args->n);
    void *workspace = bytes ? guarded(bytes, 256, GUARD_END) : NULL;
    unsigned *counters = (unsigned *)guarded(BOFT_CUDA_COUNTERS * sizeof(unsigned), 256, GUARD_END);
    memset(counters, 0, BOFT_CUDA_COUNTERS * sizeof(unsigned));
    EXPECT_OK(boft_cuda_scale_backward(args, workspace, counters, NULL));
    for (int i = 0; i < BOFT_CUDA_COUNTERS; i++)
        if (!EXPECT(counters[i] == 0, "counter %d is left at %u", i, counters[i]))
            break;
}

static boft_scale_backward_args backward_args(const problem *p, int wanted, void *dz)
{
    boft_scale_backward_args args = {};
    args.dtype = p->dtype;
    args.rows = p->rows;
    args.n = p->n;
    args.dy = p->stored_dy;
    args.dy_stride = p->stride_in;
    args.z = wanted & WANT_DS ? p->stored_z : NULL;
    args.z_stride = wanted & WANT_DS ? p->stride_in : 0;
    args.s = p->stored_s;
    args.bias = p->stored_bias;
    args.dz = wanted & WANT_DZ ? dz : NULL;
    args.dz_stride = wanted & WANT_DZ ? p->stride_out : 0;
    args.ds = wanted & WANT_DS ? room(p, p->real, p->n) : NULL;
    args.dbias = wanted & WANT_DBIAS ? room(p, p->real, p->n) : NULL;
    args.bias_detached = p->kind == BIAS_DETACHED;
    return args;
}

static void check_backward(const problem *p, int wanted, int in_place)
{
    void *dz = in_place ? stored(p, p->dtype, p->rows, p->stride_out, p->dy)
                        : room(p, p->dtype, extent(p->rows, p->n, p->stride_out));
    boft_scale_backward_args args = backward_args(p, wanted, dz);
    if (in_place) {
        args.dy = dz;
        args.dy_stride = p->stride_out;
    }
    run_backward(&args);
    if (args.dz) {
        EXPECT_CLOSE("dz", p->dtype, dz, p->stride_out, p->rows, p->n, p->dz, p->dz_bound);
        check_around(p, "dz", p->dtype, dz, p->rows, p->stride_out);
    }
    if (args.ds) {
        EXPECT_CLOSE("ds", p->real, args.ds, p->n, 1, p->n, p->ds, p->ds_bound);
        check_around(p, "ds", p->real, args.ds, 1, p->n);
    }
    if (args.dbias) {
        EXPECT_CLOSE("dbias", p->real, args.dbias, p->n, 1, p->n, p->dbias, p->dbias_bound);
        check_around(p, "dbias", p->real, args.dbias, 1, p->n);
    }
}

/* ---- Cases ------------------------------------------------------------------------------------------------------- */

/* Less than a vector, a strip and a block; whole ones; several strips, rows for several parts, both. */
static const struct {
    int64_t rows, n;
} sizes[] = {{0, 8},    {1, 1},    {2, 5},     {3, 64},   {9, 7},    {33, 256},
             {31, 257}, {65, 520}, {70, 1000}, {300, 40}, {530, 328}};

static void check_all(void)
{
    int turn = 0;
    for (boft_dtype dtype : dtypes)
        for (const auto &size : sizes)
            for (int how = 0; how < LAYOUTS; how++, turn++) {
                const int kind = turn % BIASES;
                test_case("%s %lld rows of %lld, %s, bias %d", dtype_name(dtype), (long long)size.rows,
                          (long long)size.n, layout_names[how], kind);
                const problem p = make_problem(dtype, size.rows, size.n, (layout)how, kind);
                check_forward(&p);
                check_backward(&p, WANT_DZ | WANT_DS | WANT_DBIAS, turn % 2);
                check_backward(&p, WANT_DZ | WANT_DS, (turn + 1) % 2);
                release_memory();
            }
}

static void check_wanted(void)
{
    for (boft_dtype dtype : dtypes)
        for (int wanted = 0; wanted < 8; wanted++)
            for (int how = DENSE; how <= ODD_GAPS; how++)
                for (int kind = 0; kind < BIASES; kind++) {
                    test_case("%s wanted %d, %s, bias %d", dtype_name(dtype), wanted, layout_names[how], kind);
                    const problem p = make_problem(dtype, 70, 40, (layout)how, kind);
                    check_backward(&p, wanted, 0);
                    release_memory();
                }
}

static void check_many_parts(void)
{
    for (boft_dtype dtype : dtypes) {
        test_case("%s with many parts", dtype_name(dtype));
        const problem p = make_problem(dtype, 9000, 8, DENSE, BIAS_IN_Z);
        EXPECT(boft_cuda_scale_backward_workspace(dtype, p.rows, p.n) >= 200 * 8 * dtype_size(p.real), "few parts");
        check_backward(&p, WANT_DZ | WANT_DS | WANT_DBIAS, 0);
        release_memory();
    }
}

/* Sums do not depend on how rows lie in memory. */
static void check_repeatable(void)
{
    for (boft_dtype dtype : dtypes) {
        test_case("%s, the same sums from other places", dtype_name(dtype));
        const problem p = make_problem(dtype, 200, 72, DENSE, BIAS_IN_Z);
        problem moved = p;
        moved.how = OFFSET;
        moved.stored_z = stored(&moved, dtype, p.rows, p.n, p.z);
        moved.stored_dy = stored(&moved, dtype, p.rows, p.n, p.dy);
        const boft_scale_backward_args one = backward_args(&p, WANT_DS | WANT_DBIAS, NULL),
                                       other = backward_args(&moved, WANT_DS | WANT_DBIAS, NULL);
        run_backward(&one);
        run_backward(&other);
        EXPECT_SAME("ds", p.real, one.ds, other.ds, p.n, 1, p.n);
        EXPECT_SAME("dbias", p.real, one.dbias, other.dbias, p.n, 1, p.n);
        release_memory();
    }
}

/* Rows may be aligned where scales and biases are not. */
static void check_odd_columns(void)
{
    for (boft_dtype dtype : dtypes)
        for (int which = 0; which < 2; which++) {
            test_case("%s with %s that are not aligned", dtype_name(dtype), which ? "biases" : "scales");
            problem p = make_problem(dtype, 20, 48, DENSE, BIAS_IN_Z), odd = p;
            odd.how = OFFSET;
            (which ? p.stored_bias : p.stored_s) = stored(&odd, p.real, 1, p.n, which ? p.bias : p.s);
            check_forward(&p);
            check_backward(&p, WANT_DZ | WANT_DS | WANT_DBIAS, 0);
            release_memory();
        }
}

/* Rows that are further apart than 32 bits can count. */
static void check_far_rows(void)
{
    const int64_t rows = 3, n = 16, stride = (int64_t)3 << 29;
    for (boft_dtype dtype : dtypes) {
        test_case("%s rows far apart", dtype_name(dtype));
        const problem p = make_problem(dtype, rows, n, DENSE, BIAS_IN_Z);
        const size_t size = dtype_size(dtype);
        void *z = far_rows(rows, (size_t)n * size, (size_t)stride * size);
        void *out = far_rows(rows, (size_t)n * size, (size_t)stride * size);
        for (int64_t t = 0; t < rows; t++)
            for (int64_t j = 0; j < n; j++)
                put(dtype, z, t * stride + j, p.z[t * n + j]);
        boft_scale_args args = forward_args(&p, z, stride, out);
        args.out_stride = stride;
        EXPECT_OK(boft_cuda_scale(&args, NULL));
        EXPECT_CLOSE("out", dtype, out, stride, rows, n, p.out, p.out_bound);
        release_memory();
    }
}

static void check_refusals(void)
{
    test_case("refusals");
    const problem p = make_problem(BOFT_BF16, 100, 8, DENSE, BIAS_IN_Z);
    void *out = room(&p, p.dtype, p.rows * p.n);
    boft_scale_args args = forward_args(&p, p.stored_z, p.n, out);
    EXPECT_REFUSED(boft_cuda_scale(NULL, NULL), BOFT_BAD_ARGUMENT, "args");
    args.out_stride = 7;
    EXPECT_REFUSED(boft_cuda_scale(&args, NULL), BOFT_BAD_SHAPE, "7 8");
    args.out_stride = 8;
    args.dtype = (boft_dtype)9;
    EXPECT_REFUSED(boft_cuda_scale(&args, NULL), BOFT_BAD_DTYPE, "9");
    args.dtype = BOFT_BF16;
    args.s = NULL;
    EXPECT_REFUSED(boft_cuda_scale(&args, NULL), BOFT_BAD_ARGUMENT, "scale: s");
    args.rows = 0;
    EXPECT_OK(boft_cuda_scale(&args, NULL));
    EXPECT(untouched(out, (size_t)(p.rows * p.n) * 2), "written");

    const boft_scale_backward_args good = backward_args(&p, WANT_DZ | WANT_DS | WANT_DBIAS, out);
    boft_scale_backward_args bad = good;
    EXPECT_REFUSED(boft_cuda_scale_backward(NULL, NULL, NULL, NULL), BOFT_BAD_ARGUMENT, "args");
    EXPECT_REFUSED(boft_cuda_scale_backward(&good, NULL, NULL, NULL), BOFT_BAD_ARGUMENT, "workspace");
    EXPECT_REFUSED(boft_cuda_scale_backward(&good, out, NULL, NULL), BOFT_BAD_ARGUMENT, "counters");
    bad.z = NULL;
    EXPECT_REFUSED(boft_cuda_scale_backward(&bad, NULL, NULL, NULL), BOFT_BAD_ARGUMENT, "z");
    bad = good;
    bad.rows = -1;
    EXPECT_REFUSED(boft_cuda_scale_backward(&bad, NULL, NULL, NULL), BOFT_BAD_SHAPE, "-1");
    bad = good;
    bad.dz_stride = 7;
    EXPECT_REFUSED(boft_cuda_scale_backward(&bad, NULL, NULL, NULL), BOFT_BAD_SHAPE, "7 8");
    EXPECT(untouched(good.ds, (size_t)p.n * 4), "written");
}

/* A bias of infinity makes its own column infinite, whether or not rows fill whole rounds of the loop. */
static void check_infinite(void)
{
    for (boft_dtype dtype : dtypes) {
        test_case("%s with an infinite bias", dtype_name(dtype));
        const problem p = make_problem(dtype, 37, 24, DENSE, BIAS_IN_Z);
        put(p.real, p.stored_bias, 5, INFINITY);
        for (int64_t t = 0; t < p.rows; t++)
            put(dtype, p.stored_dy, t * p.n + 5, 1);
        p.ds[5] = -INFINITY;
        const boft_scale_backward_args args = backward_args(&p, WANT_DS, NULL);
        run_backward(&args);
        EXPECT_CLOSE("ds", p.real, args.ds, p.n, 1, p.n, p.ds, p.ds_bound);
        release_memory();
    }
}

/* Without rows sums are 0 and nothing else is needed. */
static void check_no_rows(void)
{
    test_case("no rows, no inputs");
    const problem p = make_problem(BOFT_F16, 0, 100, DENSE, NO_BIAS);
    boft_scale_backward_args args = backward_args(&p, WANT_DS | WANT_DBIAS, NULL);
    args.dy = args.z = args.s = NULL;
    EXPECT_OK(boft_cuda_scale_backward(&args, NULL, NULL, NULL));
    EXPECT_CLOSE("ds", p.real, args.ds, p.n, 1, p.n, p.ds, p.ds_bound);
    EXPECT_CLOSE("dbias", p.real, args.dbias, p.n, 1, p.n, p.dbias, p.dbias_bound);
}

int main(int argc, char **argv)
{
    test_start("test_scale", argc, argv);
    boft_cpu_select("scalar");
    check_all();
    check_wanted();
    check_many_parts();
    check_repeatable();
    check_odd_columns();
    check_far_rows();
    check_infinite();
    check_refusals();
    check_no_rows();
    return test_finish();
}
