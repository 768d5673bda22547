/* The CUDA kernels of x R, x R^T, the merge and the backward against the scalar reference. */
extern "C" {
#include "support.h"
}
#include "boft_cuda.h"
#include "on_cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const boft_dtype dtypes[] = {BOFT_F32, BOFT_BF16, BOFT_F16, BOFT_F64};
static const boft_dtype halves[] = {BOFT_BF16, BOFT_F16};

/* How rows lie: one after the other and aligned to 16 bytes, with gaps that keep that alignment, or without it. */
enum { ALIGNED, ALIGNED_GAPS, MISALIGNED, EXPANDED, LAYOUTS };

typedef struct problem {
    boft_plan plan;
    boft_dtype dtype, real;
    int transpose, layout;
    int64_t rows, x_stride, dy_stride, y_stride, dx_stride;
    void *blocks, *blocks_back;        /* as made, and each matrix transposed */
    double *x, *dy;                    /* (T, d) */
    double *y, *dx, *dblocks;          /* by the scalar reference in float64 from the same blocks */
} problem;

/* Rotations of a size: Cayley and collapse of random parameters. */
static void make_blocks(problem *p, double size)
{
    const boft_plan *plan = &p->plan;
    const int64_t n = plan->m * plan->d * plan->b;
    void *q = doubles(n);
    for (int64_t i = 0; i < n; i++)
        put(p->real, q, i, size * random_unit());
    EXPECT_OK(boft_cayley(p->real, plan->b, 0, plan->m * plan->blocks, q, NULL, q,
                          guarded(boft_cayley_workspace(plan->b), 64, GUARD_END)));
    p->blocks = doubles(plan->count);
    p->blocks_back = doubles(plan->count);
    void *workspace = guarded(boft_collapse_workspace(plan, p->real), 64, GUARD_END);
    for (int64_t l = 0; l < plan->levels; l++) {
        const int64_t groups = plan->d / plan->level[l].group;
        EXPECT_OK(boft_collapse(plan, p->real, l, 0, groups, q, p->blocks, workspace));
        EXPECT_OK(boft_transpose(plan, p->real, l, 0, groups, p->blocks, p->blocks_back));
    }
}

static double *widened(boft_dtype real, const void *data, int64_t n)
{
    double *made = doubles(n);
    for (int64_t i = 0; i < n; i++)
        made[i] = get(real, data, i);
    return made;
}

/* What must come out, in float64 by the scalar reference. */
static void make_truth(problem *p)
{
    const boft_plan *plan = &p->plan;
    const int64_t d = plan->d, n = p->rows * d, splits = boft_rotate_backward_splits(plan, p->rows);
    double *blocks = widened(p->real, p->blocks, plan->count), *back = widened(p->real, p->blocks_back, plan->count);
    p->y = doubles(n);
    p->dx = doubles(n);
    p->dblocks = doubles(splits * plan->count);
    boft_rotate_args args = {plan, BOFT_F64, p->transpose, p->rows, p->x, d, p->transpose ? back : blocks, p->y, d};
    EXPECT_OK(boft_rotate(&args, 0, p->rows, guarded(boft_rotate_workspace(plan, BOFT_F64), 64, GUARD_END)));
    boft_rotate_backward_args backward = {plan, BOFT_F64, p->transpose, p->rows, p->dy, d, p->x, d,
                                          p->transpose ? back : blocks, p->transpose ? blocks : back, p->dx, d,
                                          p->dblocks};
    EXPECT_OK(boft_rotate_backward(&backward, 0, boft_rotate_backward_tasks(plan, p->rows),
                                   guarded(boft_rotate_backward_workspace(plan, BOFT_F64), 64, GUARD_END)));
    EXPECT_OK(boft_sum_splits(BOFT_F64, splits, plan->count, p->dblocks, p->dblocks, 0, plan->count));
}

static double *random_rows(boft_dtype dtype, int64_t rows, int64_t d, int64_t stride)
{
    double *x = doubles(rows * d);
    for (int64_t i = 0; i < rows * d; i++)
        x[i] = stride == 0 && i >= d ? x[i - d] : rounded(dtype, random_unit());
    return x;
}

/* The same rotation with a level for each factor: what plans have only where d is large. */
static void split_levels(boft_plan *plan)
{
    plan->levels = plan->m;
    plan->count = plan->m * plan->d * plan->b;
    for (int64_t i = 0; i < plan->m; i++) {
        const int64_t runs = i == 0 ? 1 : 2;
        plan->level[i] = {i, 1, plan->b, runs, plan->b / runs, (int64_t)1 << i, i * plan->d * plan->b};
    }
}

enum { FEW_LEVELS, ALL_LEVELS };

static void make_problem(problem *p, shape at, boft_dtype dtype, int64_t rows, int transpose, int layout, double size,
                         int levels = FEW_LEVELS)
{
    const int64_t vector = (int64_t)(16 / dtype_size(dtype));
    *p = {};
    p->dtype = dtype;
    p->real = real_of(dtype);
    p->transpose = transpose;
    p->layout = layout;
    p->rows = rows;
    EXPECT_OK(boft_plan_make(at.d, at.b, at.m, &p->plan));
    if (levels == ALL_LEVELS)
        split_levels(&p->plan);
    const int64_t gap = layout == ALIGNED ? 0 : layout == MISALIGNED ? 1 : vector;
    p->x_stride = layout == EXPANDED ? 0 : at.d + gap;
    p->dy_stride = layout == EXPANDED ? 0 : at.d + 3 * gap;
    p->y_stride = at.d + 2 * gap;
    p->dx_stride = at.d + 5 * gap;
    make_blocks(p, size);
    p->x = random_rows(dtype, rows, at.d, p->x_stride);
    p->dy = random_rows(dtype, rows, at.d, p->dy_stride);
    make_truth(p);
}

static guard next_side(void)
{
    return random_below(2) ? GUARD_START : GUARD_END;
}

static void *stored(const problem *p, int64_t stride, const double *values)
{
    const int64_t n = extent(p->rows, p->plan.d, stride), size = (int64_t)dtype_size(p->dtype);
    char *all = (char *)doubles(n + 1);
    memset(all, 0xff, (size_t)(n * size)); /* gaps hold NaN, which must not leak into results */
    for (int64_t t = 0; t < p->rows; t++)
        for (int64_t j = 0; j < p->plan.d; j++)
            put(p->dtype, all, t * stride + j, values[t * p->plan.d + j]);
    return guarded_copy(all, (size_t)(n * size), p->layout == MISALIGNED ? (size_t)size : 16, next_side());
}

static void *room(const problem *p, int64_t stride)
{
    const size_t size = dtype_size(p->dtype);
    return guarded((size_t)extent(p->rows, p->plan.d, stride) * size, p->layout == MISALIGNED ? size : 16, next_side());
}

/*
 * |got - truth| / |truth| of (rows, cols) is at most 1.1 times what rounding the truth once gives, and a few roundings
 * of the arithmetic. With NaN it fails.
 */
static void expect_norm(const char *what, boft_dtype dtype, boft_dtype real, const void *got, int64_t stride,
                        int64_t rows, int64_t cols, const double *truth, double roundings)
{
    double error = 0, once = 0, norm = 0;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < cols; j++) {
            const double exact = truth[t * cols + j], value = get(dtype, got, t * stride + j);
            error += (value - exact) * (value - exact);
            once += (rounded(dtype, exact) - exact) * (rounded(dtype, exact) - exact);
            norm += exact * exact;
        }
    const int is_half = dtype_size(dtype) == 2;
    const double limit = 1.1 * (is_half ? sqrt(once / norm) : 0) + roundings * unit_roundoff(real);
    EXPECT(norm == 0 ? error == 0 : sqrt(error / norm) <= limit, "%s: relative error %.3g, at most %.3g", what,
           sqrt(error / norm), limit);
}

/* Roundings on the way through all levels, of sums that gather error as their root. */
static double roundings(const boft_plan *plan, int64_t terms)
{
    return 4 + 2 * sqrt((double)(plan->levels * plan->super + terms));
}

/* Work of any shape takes one launch. */
static void expect_launches(const char *what, int expected)
{
    EXPECT(on_cpu_launches == expected, "%s: %d launches, expected %d", what, on_cpu_launches, expected);
}

/* Of `plan->count` reals, which are aligned to no more than that. */
static void *blocks_room(const problem *p)
{
    const size_t real = dtype_size(p->real), skipped = (size_t)random_below(2) * real;
    return (char *)guarded((size_t)p->plan.count * real + skipped, real, next_side()) + skipped;
}

/* y, with rows times the factors `s` unless they are NULL. */
static void check_product(const char *what, const problem *p, const void *s, const double *truth)
{
    const boft_plan *plan = &p->plan;
    const size_t real = dtype_size(p->real);
    void *workspace = guarded(boft_cuda_rotate_workspace(plan, p->dtype, p->rows), 256, GUARD_END);
    void *y = room(p, p->y_stride);
    boft_rotate_args args = {plan, p->dtype, p->transpose, p->rows, stored(p, p->x_stride, p->x), p->x_stride,
                             guarded_copy(p->blocks, (size_t)plan->count * real, real, next_side()), y, p->y_stride};
    on_cpu_launches = 0;
    EXPECT_OK(s || random_below(4) == 0 ? boft_cuda_merge(&args, s, workspace, NULL)
                                        : boft_cuda_rotate(&args, workspace, NULL));
    expect_launches(what, p->rows > 0);
    expect_norm(what, p->dtype, p->real, y, p->y_stride, p->rows, plan->d, truth, roundings(plan, 0));
    EXPECT_GAPS(what, p->dtype, y, p->y_stride, p->rows, plan->d);
}

static void check_forward(const problem *p)
{
    const int64_t d = p->plan.d;
    double *merged = doubles(p->rows * d);
    void *s = doubles(p->rows);
    for (int64_t t = 0; t < p->rows; t++) {
        put(p->real, s, t, 2 * random_unit());
        for (int64_t j = 0; j < d; j++)
            merged[t * d + j] = p->y[t * d + j] * get(p->real, s, t);
    }
    const size_t real = dtype_size(p->real);
    check_product("y", p, NULL, p->y);
    check_product("merged", p, guarded_copy(s, (size_t)p->rows * real, real, next_side()), merged);
}

static void check_backward(const problem *p, int want_dx, int want_dblocks)
{
    const boft_plan *plan = &p->plan;
    const size_t real = dtype_size(p->real);
    void *workspace = guarded(boft_cuda_rotate_backward_workspace(plan, p->dtype, p->rows), 256, GUARD_END);
    unsigned *counters = (unsigned *)guarded(BOFT_CUDA_COUNTERS * sizeof(unsigned), sizeof(unsigned), GUARD_END);
    memset(counters, 0, BOFT_CUDA_COUNTERS * sizeof(unsigned));
    void *dx = want_dx ? room(p, p->dx_stride) : NULL;
    void *dblocks = want_dblocks ? blocks_room(p) : NULL;
    const void *dy = stored(p, p->dy_stride, p->dy), *x = want_dblocks ? stored(p, p->x_stride, p->x) : NULL;
    const void *blocks = guarded_copy(p->blocks, (size_t)plan->count * real, real, next_side());
    boft_rotate_backward_args args = {plan, p->dtype, p->transpose, p->rows, dy, p->dy_stride, x, p->x_stride,
                                      want_dx || plan->levels > 1 ? blocks : NULL, NULL, dx, p->dx_stride, dblocks};
    on_cpu_launches = 0;
    EXPECT_OK(boft_cuda_rotate_backward(&args, workspace, counters, NULL));
    expect_launches("rotate backward", want_dblocks || p->rows > 0);
    for (int i = 0; i < BOFT_CUDA_COUNTERS; i++)
        if (!EXPECT(counters[i] == 0, "counter %d is %u after the call", i, counters[i]))
            break;
    if (want_dx) {
        expect_norm("dx", p->dtype, p->real, dx, p->dx_stride, p->rows, plan->d, p->dx, roundings(plan, 0));
        EXPECT_GAPS("dx", p->dtype, dx, p->dx_stride, p->rows, plan->d);
    }
    if (want_dblocks) {
        int64_t at = 0;
        for (int64_t l = 0; l < plan->levels; at += plan->d * plan->level[l++].group)
            expect_norm("dblocks", p->real, p->real, (char *)dblocks + (size_t)at * real, plan->level[l].group, plan->d,
                        plan->level[l].group, p->dblocks + at, roundings(plan, p->rows));
    }
}

/* What y, dx and dblocks are with x and dy as given. */
typedef struct results {
    char *y, *dx, *dblocks;
} results;

static results run(const problem *p)
{
    const boft_plan *plan = &p->plan;
    const size_t real = dtype_size(p->real);
    results out = {(char *)room(p, p->y_stride), (char *)room(p, p->dx_stride),
                   (char *)guarded((size_t)plan->count * real, real, next_side())};
    unsigned *counters = (unsigned *)doubles(BOFT_CUDA_COUNTERS);
    const void *x = stored(p, p->x_stride, p->x), *dy = stored(p, p->dy_stride, p->dy);
    boft_rotate_args args = {plan, p->dtype, p->transpose, p->rows, x, p->x_stride, p->blocks, out.y, p->y_stride};
    void *strips = guarded(boft_cuda_rotate_workspace(plan, p->dtype, p->rows), 256, GUARD_END);
    EXPECT_OK(boft_cuda_rotate(&args, strips, NULL));
    boft_rotate_backward_args backward = {plan, p->dtype, p->transpose, p->rows, dy, p->dy_stride, x, p->x_stride,
                                          p->blocks, NULL, out.dx, p->dx_stride, out.dblocks};
    void *workspace = guarded(boft_cuda_rotate_backward_workspace(plan, p->dtype, p->rows), 256, GUARD_END);
    EXPECT_OK(boft_cuda_rotate_backward(&backward, workspace, counters, NULL));
    return out;
}

/* However many thread blocks of a launch a device holds at a time, the results are the same bits. */
static void check_residents(shape at, boft_dtype dtype, int transpose, int levels)
{
    test_case("%s d = %lld, b = %lld, m = %lld%s in %s, resident blocks", dtype_name(dtype), (long long)at.d,
              (long long)at.b, (long long)at.m, transpose ? ", transpose" : "",
              levels == ALL_LEVELS ? "all levels" : "few levels");
    const int before = on_cpu_resident, residents[] = {1, 3, 32};
    problem p;
    make_problem(&p, at, dtype, 131, transpose, ALIGNED, 0.5, levels);
    const size_t rows_bytes = (size_t)(p.rows * at.d) * dtype_size(dtype);
    const size_t blocks_bytes = (size_t)p.plan.count * dtype_size(p.real);
    results first = {};
    for (int resident : residents) {
        on_cpu_resident = resident;
        const results now = run(&p);
        if (!first.y)
            first = now;
        EXPECT(memcmp(first.y, now.y, rows_bytes) == 0, "y differs with %d", resident);
        EXPECT(memcmp(first.dx, now.dx, rows_bytes) == 0, "dx differs with %d", resident);
        EXPECT(memcmp(first.dblocks, now.dblocks, blocks_bytes) == 0, "dblocks differs with %d", resident);
    }
    on_cpu_resident = before;
    release_memory();
}

/* The same bits as before, but NaN or an infinity where something depends on the value that is not finite. */
static void expect_confined(const char *what, boft_dtype dtype, const char *clean, const char *sick, int64_t i,
                            int depends)
{
    const size_t size = dtype_size(dtype);
    if (depends)
        EXPECT(!isfinite(get(dtype, sick, i)), "%s: entry %lld does not depend on the value", what, (long long)i);
    else
        EXPECT(memcmp(clean + (size_t)i * size, sick + (size_t)i * size, size) == 0, "%s: entry %lld was reached", what,
               (long long)i);
}

/* One value of x and of dy is not finite. */
static void check_confined(shape at, boft_dtype dtype, int transpose, double value)
{
    test_case("%s d = %lld, b = %lld, m = %lld%s, a value %g", dtype_name(dtype), (long long)at.d, (long long)at.b,
              (long long)at.m, transpose ? ", transpose" : "", value);
    problem p;
    make_problem(&p, at, dtype, 40, transpose, ALIGNED, 0.5);
    const results clean = run(&p);
    const int64_t row = random_below(40), channel = random_below(at.d), super = p.plan.super, group = channel / super;
    p.x[row * at.d + channel] = p.dy[row * at.d + channel] = value;
    const results sick = run(&p);
    for (int64_t i = 0; i < 40 * at.d; i++) {
        const int depends = i / at.d == row && i % at.d / super == group;
        expect_confined("y", dtype, clean.y, sick.y, i, depends);
        expect_confined("dx", dtype, clean.dx, sick.dx, i, depends);
    }
    for (int64_t i = 0; i < p.plan.count && p.plan.levels == 1; i++)
        expect_confined("dblocks", p.real, clean.dblocks, sick.dblocks, i,
                        i / super == channel || (i / super / super == group && i % super == channel % super));
    release_memory();
}

static void check_refusals(void)
{
    test_case("refusals");
    boft_plan plan;
    EXPECT_OK(boft_plan_make(256, 8, 6, &plan));
    float x = 0;
    unsigned counters = 0;
    boft_rotate_args args = {&plan, BOFT_F32, 0, 1, &x, 256, &x, &x, 256};
    EXPECT_REFUSED(boft_cuda_rotate(NULL, &x, NULL), BOFT_BAD_ARGUMENT, "args");
    EXPECT_REFUSED(boft_cuda_rotate(&args, NULL, NULL), BOFT_BAD_ARGUMENT, "workspace");
    EXPECT_REFUSED(boft_cuda_merge(NULL, &x, &x, NULL), BOFT_BAD_ARGUMENT, "args");
    EXPECT_REFUSED(boft_cuda_merge(&args, &x, NULL, NULL), BOFT_BAD_ARGUMENT, "workspace");
    args.y_stride = 255;
    EXPECT_REFUSED(boft_cuda_rotate(&args, &x, NULL), BOFT_BAD_SHAPE, "255 256");
    EXPECT_REFUSED(boft_cuda_merge(&args, &x, &x, NULL), BOFT_BAD_SHAPE, "255 256");
    boft_rotate_backward_args backward = {&plan, BOFT_F32, 0, 1, &x, 256, &x, 256, NULL, NULL, &x, 256, &x};
    EXPECT_REFUSED(boft_cuda_rotate_backward(&backward, &x, &counters, NULL), BOFT_BAD_ARGUMENT, "blocks");
    backward.blocks = &x;
    EXPECT_REFUSED(boft_cuda_rotate_backward(&backward, &x, NULL, NULL), BOFT_BAD_ARGUMENT, "counters");
    backward.x = NULL;
    EXPECT_REFUSED(boft_cuda_rotate_backward(&backward, &x, &counters, NULL), BOFT_BAD_ARGUMENT, "x");
    backward.rows = -1;
    EXPECT_REFUSED(boft_cuda_rotate_backward(&backward, &x, &counters, NULL), BOFT_BAD_SHAPE, "-1");
}

static const char *layout_name(int layout)
{
    const char *const names[LAYOUTS] = {"aligned", "aligned gaps", "misaligned", "expanded"};
    return names[layout];
}

static void check(shape at, boft_dtype dtype, int64_t rows, int transpose, int layout, double size,
                  int levels = FEW_LEVELS)
{
    test_case("%s d = %lld, b = %lld, m = %lld%s, %lld rows%s, %s, parameters of %g", dtype_name(dtype),
              (long long)at.d, (long long)at.b, (long long)at.m, levels == ALL_LEVELS ? " in all levels" : "",
              (long long)rows, transpose ? ", transpose" : "", layout_name(layout), size);
    problem p;
    make_problem(&p, at, dtype, rows, transpose, layout, size, levels);
    check_forward(&p);
    check_backward(&p, 1, 1);
    if (rows < 20) {
        check_backward(&p, 1, 0);
        check_backward(&p, 0, 1);
    }
    release_memory();
}

int main(int argc, char **argv)
{
    test_start("test_rotate", argc, argv);
    EXPECT_OK(boft_cpu_select("scalar"));
    const shape shapes[] = {
        {6, 1, 1},     {15, 5, 1},    {12, 2, 1},    {10, 10, 1},   {48, 4, 2},   {72, 8, 1},   {24, 2, 3},
        {96, 8, 2},    {144, 16, 1},  {96, 4, 4},    {64, 32, 1},   {264, 33, 1}, {60, 20, 1},  {80, 20, 2},
        {64, 64, 1},   {192, 8, 4},   {160, 80, 1},  {320, 20, 4},  {97, 97, 1},  {96, 96, 1},  {128, 16, 4},
        {40, 20, 2},   {120, 40, 1},  {224, 112, 1},
        {50, 50, 1},   {72, 12, 1},   {160, 160, 1}, {260, 130, 2}, {200, 50, 1}, {256, 256, 1},
        {256, 16, 5},  {512, 2, 9},   {256, 8, 6},   {384, 6, 7},
    };
    for (const shape &at : shapes)
        for (boft_dtype dtype : dtypes)
            for (int transpose = 0; transpose < 2; transpose++) {
                const int64_t rows[] = {1, 7, 19, 35, 65, 131};
                const int layout = (int)random_below(LAYOUTS);
                check(at, dtype, rows[random_below(6)], transpose, layout, 0.5);
                if (layout != ALIGNED)
                    check(at, dtype, rows[random_below(6)], transpose, ALIGNED, 0.5);
            }
    /* Wide groups on tensor cores: of all numbers of chunks of 32 channels, and several groups. */
    const shape wide[] = {{272, 136, 1}, {320, 160, 1}, {320, 80, 2}, {216, 216, 1}, {224, 224, 1},
                          {512, 256, 1}, {320, 320, 1}, {384, 384, 1}};
    int which = 0;
    for (const shape &at : wide)
        for (boft_dtype dtype : halves) {
            const int64_t rows[] = {35, 131, 7, 19};
            check(at, dtype, rows[which % 4], which % 3 == 0, which % 2 ? ALIGNED_GAPS : ALIGNED, 0.5);
            which++;
        }
    for (boft_dtype dtype : halves) {
        check({160, 160, 1}, dtype, 300, dtype == BOFT_BF16, EXPANDED, 0.5);
        check({160, 160, 1}, dtype, 16, 0, ALIGNED, 1e-4);
    }
    /* More levels than plans have at this size. */
    const shape deep[] = {{48, 4, 3}, {96, 6, 5}, {64, 2, 6}, {272, 34, 4}, {192, 96, 2}};
    for (const shape &at : deep)
        for (boft_dtype dtype : dtypes)
            for (int transpose = 0; transpose < 2; transpose++) {
                const int64_t rows[] = {1, 19, 35, 65, 131};
                check(at, dtype, rows[random_below(5)], transpose, (int)random_below(LAYOUTS), 0.5, ALL_LEVELS);
            }
    check({1024, 16, 7}, BOFT_BF16, 9, 0, ALIGNED, 0.5);
    for (boft_dtype dtype : dtypes) {
        check_residents({96, 6, 5}, dtype, 0, ALL_LEVELS);
        check_residents({256, 8, 6}, dtype, 1, FEW_LEVELS);
    }
    check_residents({160, 160, 1}, BOFT_F16, 0, FEW_LEVELS);
    for (boft_dtype dtype : dtypes)
        for (double size = 1e-4; size < 2; size *= 100)
            check({96, 8, 2}, dtype, 33, 0, ALIGNED, size);
    for (boft_dtype dtype : dtypes) {
        check({96, 8, 2}, dtype, 0, 0, ALIGNED, 0.5);
        check({160, 160, 1}, dtype, 0, 0, ALIGNED, 0.5);
        check({256, 8, 6}, dtype, 0, 1, ALIGNED, 0.5);
    }
    const shape confined[] = {{64, 4, 1},   {96, 8, 2},   {120, 5, 1}, {160, 20, 2},
                              {144, 24, 1}, {256, 64, 1}, {256, 8, 6}};
    for (const shape &at : confined)
        for (boft_dtype dtype : dtypes)
            for (int transpose = 0; transpose < 2; transpose++)
                check_confined(at, dtype, transpose, transpose ? (double)NAN : -INFINITY);
    check_refusals();
    return test_finish();
}
