/*
 * x R and x R^T, the same with factors of rows (the merge), their backward, the sum of splits, and the whole chain from
 * parameters to gradients.
 */
#include "oracle.h"
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const boft_dtype dtypes[] = {BOFT_F32, BOFT_BF16, BOFT_F16, BOFT_F64};

/* One rotation: sizes, the values that the core is given, and what must come out, in double. */
typedef struct problem {
    boft_plan plan;
    boft_dtype dtype, real;
    int transpose;
    int64_t rows, x_stride, dy_stride, y_stride, dx_stride, splits, tasks;
    double *q, *x, *dy; /* (m, D, b, b), (T, d), (T, d) */
    double *s, *merged, *merged_bound; /* factors of the rows of y, and y with them */
    double *y, *y_bound, *dx, *dx_bound, *dblocks, *dblocks_bound;
    int y_exact, dx_exact, dblocks_exact; /* integers so small that no sum of them rounds */
    void *blocks, *blocks_back;           /* as the core takes them; malloc'ed like doubles() */
    char name[200];
} problem;

/* Inputs of a problem in guarded, read-only memory. */
typedef struct inputs {
    const void *x, *dy, *s, *blocks, *blocks_back;
} inputs;

static double *copy_of(int64_t n, const double *x)
{
    double *made = doubles(n);
    memcpy(made, x, (size_t)n * sizeof *made);
    return made;
}

/* Roundings on the way through all levels: k b of collapsing k factors and a sum of `group` products. */
static double chain_length(const boft_plan *plan)
{
    int64_t length = 0;
    for (int64_t i = 0; i < plan->levels; i++) {
        const boft_level *level = &plan->level[i];
        length += (level->factors > 1 ? level->factors * plan->b : 0) + level->group;
    }
    return (double)length;
}

/*
 * out = in R or in R^T, and its bound: chain_length roundings relative to the product of absolute values; doubled for
 * float64, since the truth rounds as much. *exact: no sum exceeds 2^24, so that integers give the truth itself.
 */
static void rotation_truth(const problem *p, int transpose, const double *in, const double *abs_q, double **out,
                           double **bound, int integers, int *exact)
{
    const int64_t n = p->rows * p->plan.d;
    const double u = unit_roundoff(p->real) * (p->real == BOFT_F64 ? 2 : 1);
    *out = copy_of(n, in);
    *bound = doubles(n);
    absolute(n, in, *bound);
    apply_factors(p->rows, p->plan.d, p->plan.b, 0, p->plan.m, transpose, p->q, *out);
    apply_factors(p->rows, p->plan.d, p->plan.b, 0, p->plan.m, transpose, abs_q, *bound);
    *exact = integers && largest(n, *bound) <= 0x1p24;
    for (int64_t i = 0; i < n; i++)
        (*bound)[i] *= chain_length(&p->plan) * u;
}

/*
 * The gradient of the untransposed blocks of a level is U^T V per group: U is x past the factors above the level, V is
 * dy past those below it, turned back; for x R^T the two change places (y = x R^T has the gradient (x^T dy)^T). Bound:
 * a sum of T products and of the splits, and the roundings of U and V.
 */
static void dblocks_truth(problem *p, const double *abs_q, int integers)
{
    const boft_plan *plan = &p->plan;
    const int64_t n = p->rows * plan->d;
    const double terms = (double)(p->rows + p->splits) + chain_length(plan);
    const double u = unit_roundoff(p->real) * (p->real == BOFT_F64 ? 2 : 1);
    double *sizes[2] = {doubles(n), doubles(n)};
    p->dblocks = doubles(plan->count);
    p->dblocks_bound = doubles(plan->count);
    for (int64_t l = 0; l < plan->levels; l++) {
        const boft_level *level = &plan->level[l];
        const int64_t above = level->first + level->factors, group = level->group;
        double *up = copy_of(n, p->transpose ? p->dy : p->x), *down = copy_of(n, p->transpose ? p->x : p->dy);
        absolute(n, up, sizes[0]);
        absolute(n, down, sizes[1]);
        apply_factors(p->rows, plan->d, plan->b, above, plan->m - above, 0, p->q, up);
        apply_factors(p->rows, plan->d, plan->b, 0, level->first, 1, p->q, down);
        apply_factors(p->rows, plan->d, plan->b, above, plan->m - above, 0, abs_q, sizes[0]);
        apply_factors(p->rows, plan->d, plan->b, 0, level->first, 1, abs_q, sizes[1]);
        for (int64_t g = 0; g < plan->d / group; g++)
            for (int64_t t = 0; t < p->rows; t++)
                for (int64_t k = 0; k < group; k++) {
                    const int64_t from = t * plan->d + level_channel(level, g, k);
                    const int64_t at = level->offset + (g * group + k) * group;
                    for (int64_t run = 0; run < level->runs; run++) {
                        const int64_t to = t * plan->d + level_channel(level, g, run * level->chunk);
                        for (int64_t j = 0; j < level->chunk; j++) {
                            p->dblocks[at + run * level->chunk + j] += up[from] * down[to + j];
                            p->dblocks_bound[at + run * level->chunk + j] += sizes[0][from] * sizes[1][to + j];
                        }
                    }
                }
    }
    p->dblocks_exact = integers && largest(plan->count, p->dblocks_bound) <= 0x1p24;
    for (int64_t i = 0; i < plan->count; i++)
        p->dblocks_bound[i] *= terms * u;
}

/* Rows of y times factors, and the bound: that of y, and the rounding of the product, here too for float64. */
static void merge_truth(problem *p)
{
    const int64_t d = p->plan.d;
    const double u = unit_roundoff(p->real) * (p->real == BOFT_F64 ? 2 : 1);
    p->s = doubles(p->rows);
    p->merged = doubles(p->rows * d);
    p->merged_bound = doubles(p->rows * d);
    for (int64_t i = 0; i < p->rows * d; i++) {
        double *factor = &p->s[i / d];
        if (i % d == 0)
            *factor = rounded(p->real, 2 * random_unit());
        p->merged[i] = p->y[i] * *factor;
        p->merged_bound[i] = fabs(*factor) * (p->y_bound[i] + u * (fabs(p->y[i]) + p->y_bound[i]));
    }
}

/* How rows lie in memory: one after the other, with gaps, or x and dy one row repeated (an expanded tensor). */
enum { DENSE, GAPS, EXPANDED, LAYOUTS };

/* (T, d) values as they are stored in dtype; all rows the same for stride 0. */
static double *random_rows(boft_dtype dtype, int64_t rows, int64_t d, int64_t stride, int integers)
{
    double *x = doubles(rows * d);
    for (int64_t i = 0; i < rows * d; i++) {
        const double value = integers ? (double)(random_below(5) - 2) : rounded(dtype, random_unit());
        x[i] = stride == 0 && i >= d ? x[i - d] : value;
    }
    return x;
}

/* Collapsed blocks of q, by the fastest variant (test_blocks checks them all), and the same transposed. */
static void make_blocks(problem *p)
{
    const boft_plan *plan = &p->plan;
    const int64_t n = plan->m * plan->d * plan->b;
    void *q = doubles(n), *workspace = guarded(boft_collapse_workspace(plan, p->real), 64, GUARD_END);
    void *blocks = doubles(plan->count), *turned = doubles(plan->count);
    for (int64_t i = 0; i < n; i++)
        put(p->real, q, i, p->q[i]);
    int fastest = 0;
    next_variant(&fastest);
    for (int64_t l = 0; l < plan->levels; l++) {
        const int64_t groups = plan->d / plan->level[l].group;
        EXPECT_OK(boft_collapse(plan, p->real, l, 0, groups, q, blocks, workspace));
        EXPECT_OK(boft_transpose(plan, p->real, l, 0, groups, blocks, turned));
    }
    p->blocks = p->transpose ? turned : blocks;
    p->blocks_back = p->transpose ? blocks : turned;
}

static void make_problem(problem *p, shape at, boft_dtype dtype, int64_t rows, int transpose, int layout, int integers)
{
    *p = (problem){.dtype = dtype, .real = real_of(dtype), .rows = rows, .transpose = transpose};
    EXPECT_OK(boft_plan_make(at.d, at.b, at.m, &p->plan));
    p->x_stride = layout == DENSE ? at.d : layout == GAPS ? at.d + 5 : 0;
    p->dy_stride = layout == DENSE ? at.d : layout == GAPS ? at.d + 1 : 0;
    p->y_stride = layout == DENSE ? at.d : at.d + 3;
    p->dx_stride = layout == DENSE ? at.d : at.d + 7;
    p->splits = boft_rotate_backward_splits(&p->plan, rows);
    p->tasks = boft_rotate_backward_tasks(&p->plan, rows);
    snprintf(p->name, sizeof p->name, "%s d = %lld, b = %lld, m = %lld, %lld rows%s%s%s", dtype_name(dtype),
             (long long)at.d, (long long)at.b, (long long)at.m, (long long)rows, transpose ? ", transpose" : "",
             layout == GAPS       ? ", gaps"
             : layout == EXPANDED ? ", expanded"
                                  : "",
             integers ? ", integers" : "");
    const int64_t n = p->plan.m * at.d * at.b;
    double *abs_q = doubles(n);
    p->q = doubles(n);
    /* Rows of length about 1, so that products of factors do not grow. */
    for (int64_t i = 0; i < n; i++) {
        const double value = rounded(p->real, random_unit() * sqrt(3 / (double)at.b));
        p->q[i] = !integers ? value : random_below(at.b) < 2 ? (double)(random_below(3) - 1) : 0;
    }
    absolute(n, p->q, abs_q);
    make_blocks(p);
    p->x = random_rows(dtype, rows, at.d, p->x_stride, integers);
    p->dy = random_rows(dtype, rows, at.d, p->dy_stride, integers);
    rotation_truth(p, transpose, p->x, abs_q, &p->y, &p->y_bound, integers, &p->y_exact);
    rotation_truth(p, !transpose, p->dy, abs_q, &p->dx, &p->dx_bound, integers, &p->dx_exact);
    dblocks_truth(p, abs_q, integers);
    merge_truth(p);
}

static inputs make_inputs(const problem *p, guard side)
{
    const size_t size = dtype_size(p->real), bytes = (size_t)p->plan.count * size;
    return (inputs){.x = stored_rows(p->dtype, p->rows, p->plan.d, p->x_stride, p->x, side),
                    .dy = stored_rows(p->dtype, p->rows, p->plan.d, p->dy_stride, p->dy, side),
                    .s = stored_rows(p->real, 1, p->rows, p->rows, p->s, side),
                    .blocks = guarded_copy(p->blocks, bytes, size, side),
                    .blocks_back = guarded_copy(p->blocks_back, bytes, size, side)};
}

static boft_rotate_args forward_args(const problem *p, const inputs *in, void *y)
{
    return (boft_rotate_args){.plan = &p->plan,
                              .dtype = p->dtype,
                              .transpose = p->transpose,
                              .rows = p->rows,
                              .x = in->x,
                              .x_stride = p->x_stride,
                              .blocks = in->blocks,
                              .y = y,
                              .y_stride = p->y_stride};
}

/* y, with rows times the factors `s` unless they are NULL. */
static void run_forward(const problem *p, const inputs *in, const void *s, division how, void *y, void *workspace)
{
    const boft_rotate_args args = forward_args(p, in, y);
    const ranges r = divide(p->rows, how);
    int64_t begin, end;
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++) {
        scrub(workspace);
        EXPECT_OK(s ? boft_merge(&args, s, begin, end, workspace) : boft_rotate(&args, begin, end, workspace));
    }
}

static void run_rotate(const problem *p, const inputs *in, division how, void *y, void *workspace)
{
    run_forward(p, in, NULL, how, y, workspace);
}

/* Pointers that boft.h calls unneeded for what is wanted are NULL. */
static boft_rotate_backward_args backward_args(const problem *p, const inputs *in, void *dx, void *dblocks)
{
    const int several = p->plan.levels > 1;
    return (boft_rotate_backward_args){.plan = &p->plan,
                                       .dtype = p->dtype,
                                       .transpose = p->transpose,
                                       .rows = p->rows,
                                       .dy = in->dy,
                                       .dy_stride = p->dy_stride,
                                       .x = dblocks ? in->x : NULL,
                                       .x_stride = dblocks ? p->x_stride : 0,
                                       .blocks = dblocks && several ? in->blocks : NULL,
                                       .blocks_back = dx || several ? in->blocks_back : NULL,
                                       .dx = dx,
                                       .dx_stride = dx ? p->dx_stride : 0,
                                       .dblocks = dblocks};
}

static void run_backward(const problem *p, const inputs *in, division how, void *dx, void *dblocks, void *workspace)
{
    const boft_rotate_backward_args args = backward_args(p, in, dx, dblocks);
    const ranges r = divide(p->tasks, how);
    int64_t begin, end;
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++) {
        scrub(workspace);
        EXPECT_OK(boft_rotate_backward(&args, begin, end, workspace));
    }
}

/* The workspaces and outputs of a problem, so that each variant meets the same guarded memory. */
typedef struct outputs {
    void *y, *dx, *parts, *ws, *ws_back;
} outputs;

static outputs make_outputs(const problem *p, guard side)
{
    return (outputs){.y = room(p->dtype, extent(p->rows, p->plan.d, p->y_stride), side),
                     .dx = room(p->dtype, extent(p->rows, p->plan.d, p->dx_stride), side),
                     .parts = room(p->real, p->splits * p->plan.count, side),
                     .ws = guarded(boft_rotate_workspace(&p->plan, p->dtype), 64, side),
                     .ws_back = guarded(boft_rotate_backward_workspace(&p->plan, p->dtype), 64, side)};
}

static void check_forward(const problem *p, const inputs in[2], const outputs out[2])
{
    const int64_t d = p->plan.d;
    scrub(out[0].y);
    run_rotate(p, &in[0], WHOLE, out[0].y, out[0].ws);
    EXPECT_CLOSE("y", p->dtype, out[0].y, p->y_stride, p->rows, d, p->y, p->y_exact ? NULL : p->y_bound);
    EXPECT_GAPS("y", p->dtype, out[0].y, p->y_stride, p->rows, d);
    scrub(out[1].y);
    run_rotate(p, &in[1], p->rows % 2 ? SINGLES : PIECES, out[1].y, out[1].ws);
    EXPECT_SAME("y in pieces", p->dtype, out[0].y, out[1].y, p->y_stride, p->rows, d);
}

static void check_merge(const problem *p, const inputs in[2], const outputs out[2])
{
    const int64_t d = p->plan.d;
    scrub(out[0].y);
    run_forward(p, &in[0], in[0].s, WHOLE, out[0].y, out[0].ws);
    EXPECT_CLOSE("merged", p->dtype, out[0].y, p->y_stride, p->rows, d, p->merged, p->merged_bound);
    EXPECT_GAPS("merged", p->dtype, out[0].y, p->y_stride, p->rows, d);
    scrub(out[1].y);
    run_forward(p, &in[1], in[1].s, p->rows % 2 ? PIECES : SINGLES, out[1].y, out[1].ws);
    EXPECT_SAME("merged in pieces", p->dtype, out[0].y, out[1].y, p->y_stride, p->rows, d);
}

/* The sum of the splits must be the gradient; it replaces the first part. */
static void check_sum_of_splits(const problem *p, void *parts)
{
    const int64_t n = p->plan.count;
    const ranges r = divide(n, PIECES);
    int64_t begin, end;
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++)
        EXPECT_OK(boft_sum_splits(p->real, p->splits, n, parts, parts, begin, end));
    EXPECT_CLOSE("dblocks", p->real, parts, n, 1, n, p->dblocks, p->dblocks_exact ? NULL : p->dblocks_bound);
}

static void check_backward(const problem *p, const inputs in[2], const outputs out[2])
{
    const int64_t d = p->plan.d, n = p->splits * p->plan.count;
    const double *dx_bound = p->dx_exact ? NULL : p->dx_bound;
    scrub(out[0].dx);
    scrub(out[0].parts);
    run_backward(p, &in[0], WHOLE, out[0].dx, out[0].parts, out[0].ws_back);
    EXPECT_CLOSE("dx", p->dtype, out[0].dx, p->dx_stride, p->rows, d, p->dx, dx_bound);
    EXPECT_GAPS("dx", p->dtype, out[0].dx, p->dx_stride, p->rows, d);
    scrub(out[1].dx);
    scrub(out[1].parts);
    run_backward(p, &in[1], p->tasks <= 64 ? SINGLES : PIECES, out[1].dx, out[1].parts, out[1].ws_back);
    EXPECT_SAME("dx in pieces", p->dtype, out[0].dx, out[1].dx, p->dx_stride, p->rows, d);
    EXPECT_SAME("dblocks in pieces", p->real, out[0].parts, out[1].parts, n, 1, n);
    if (p->dx_stride == p->dy_stride) {
        inputs same_place = in[1];
        same_place.dy = memcpy(out[1].dx, in[1].dy, (size_t)(p->rows * d) * dtype_size(p->dtype));
        scrub(out[1].parts);
        run_backward(p, &same_place, p->tasks <= 64 ? SINGLES : PIECES, out[1].dx, out[1].parts, out[1].ws_back);
        EXPECT_SAME("dx in the place of dy", p->dtype, out[0].dx, out[1].dx, p->dx_stride, p->rows, d);
        EXPECT_SAME("dblocks with dx in the place of dy", p->real, out[0].parts, out[1].parts, n, 1, n);
    }
    check_sum_of_splits(p, out[0].parts);

    scrub(out[1].dx);
    run_backward(p, &in[1], PIECES, out[1].dx, NULL, out[1].ws_back);
    EXPECT_CLOSE("dx alone", p->dtype, out[1].dx, p->dx_stride, p->rows, d, p->dx, dx_bound);
    EXPECT_GAPS("dx alone", p->dtype, out[1].dx, p->dx_stride, p->rows, d);
    scrub(out[0].parts);
    run_backward(p, &in[0], PIECES, NULL, out[0].parts, out[0].ws_back);
    check_sum_of_splits(p, out[0].parts);
}

static void rotate_case(shape at, boft_dtype dtype, int64_t rows, int transpose, int layout, int integers)
{
    problem p;
    make_problem(&p, at, dtype, rows, transpose, layout, integers);
    const inputs in[2] = {make_inputs(&p, GUARD_END), make_inputs(&p, GUARD_START)};
    const outputs out[2] = {make_outputs(&p, GUARD_END), make_outputs(&p, GUARD_START)};
    for (int v = 0; next_variant(&v);) {
        test_case("rotate %s", p.name);
        check_forward(&p, in, out);
        test_case("merge %s", p.name);
        check_merge(&p, in, out);
        test_case("rotate backward %s", p.name);
        check_backward(&p, in, out);
    }
    release_memory();
}

/* Multiply-adds of one pass over the levels. */
static double pass_cost(shape at, int64_t rows)
{
    boft_plan plan;
    EXPECT_OK(boft_plan_make(at.d, at.b, at.m, &plan));
    return (double)rows * (double)plan.count;
}

/*
 * All shapes, with types, rows, layouts and directions taken in turn so that each meets many shapes; small shapes with
 * all rows. Larger shapes use the rows whose pass stays below a cost, so that the whole takes seconds.
 */
static void test_all_shapes(void)
{
    const int64_t rows[] = {33, 8, 130, 1, 65, 9, 31, 3, 7, 2, 0};
    enum { ROWS = sizeof rows / sizeof *rows };
    shape shapes[MAX_SHAPES];
    const int n = all_shapes(640, shapes);
    int turn = (int)random_below(1000);
    for (int i = 0; i < n; i++) {
        const int all = shapes[i].d <= 24, times = all ? ROWS : 2;
        for (int k = 0; k < times; k++)
            for (int integers = 0; integers < 2; integers++) {
                int row = all ? k : turn % ROWS;
                while (pass_cost(shapes[i], rows[row]) > (integers ? 100e3 : 400e3) && rows[row] > 3)
                    row = (row + 1) % ROWS;
                rotate_case(shapes[i], dtypes[turn % 4], rows[row], turn / 4 % 2, turn / 3 % LAYOUTS, integers);
                turn++;
            }
    }
}

/* Enough rows for the gradient to be summed in several splits, with a remainder. */
static void test_many_rows(void)
{
    const shape shapes[] = {{16, 8, 2}, {12, 3, 1}, {24, 2, 3}, {256, 8, 6}};
    const int64_t rows[] = {257, 1000, 4099};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (size_t k = 0; k < sizeof rows / sizeof *rows; k++)
            if (pass_cost(shapes[i], rows[k]) < 8e6)
                rotate_case(shapes[i], dtypes[(i + k) % 4], rows[k], (int)(i % 2), (int)((i + k) % LAYOUTS),
                            (int)(k % 2));
    boft_plan plan;
    EXPECT_OK(boft_plan_make(16, 8, 2, &plan));
    test_case("splits and tasks");
    EXPECT(boft_rotate_backward_splits(&plan, 100000) > 1, "100000 rows of 16 channels are summed in one split");
    for (int64_t t = 0; t < 5000; t += 1 + t / 7) {
        EXPECT(boft_rotate_backward_splits(&plan, t) >= 1, "%lld splits",
               (long long)boft_rotate_backward_splits(&plan, t));
        EXPECT(boft_rotate_backward_tasks(&plan, t) >= 1, "%lld tasks",
               (long long)boft_rotate_backward_tasks(&plan, t));
    }
}

/* A range writes its own rows only. */
static void test_partial_range(void)
{
    const shape shapes[] = {{48, 8, 2}, {35, 5, 1}, {256, 8, 6}};
    for (int i = 0; i < 12; i++) {
        problem p;
        make_problem(&p, shapes[i / 4], dtypes[i % 4], 41, 0, GAPS, 0);
        const inputs in = make_inputs(&p, GUARD_END);
        const outputs out = make_outputs(&p, GUARD_END);
        const boft_rotate_args args = forward_args(&p, &in, out.y);
        for (int v = 0; next_variant(&v);) {
            test_case("rotate rows 7 ... 28 of %s", p.name);
            scrub(out.y);
            EXPECT_OK(boft_rotate(&args, 7, 29, out.ws));
            const size_t row = (size_t)p.y_stride * dtype_size(p.dtype), size = dtype_size(p.dtype);
            const char *y = out.y;
            EXPECT(untouched(y, 7 * row), "earlier rows were written");
            EXPECT_CLOSE("y", p.dtype, y + 7 * row, p.y_stride, 22, p.plan.d, p.y + 7 * p.plan.d,
                         p.y_bound + 7 * p.plan.d);
            const size_t written = 28 * row + (size_t)p.plan.d * size;
            EXPECT(untouched(y + written, (size_t)extent(41, p.plan.d, p.y_stride) * size - written),
                   "later rows were written");
            EXPECT_OK(boft_rotate(&args, 41, 41, out.ws));
            EXPECT_OK(boft_rotate(&args, 0, 0, out.ws));
            EXPECT(untouched(y, 7 * row), "an empty range wrote");
        }
        release_memory();
    }
}

static void test_far_rows(void)
{
    const int64_t stride = ((int64_t)1 << 31) + 21, rows = 3;
    for (int k = 0; k < 4; k++) {
        problem p;
        const boft_dtype dtype = dtypes[k];
        make_problem(&p, (shape){48, 8, 2}, dtype, rows, 0, DENSE, 0);
        p.x_stride = p.y_stride = p.dy_stride = p.dx_stride = stride;
        const inputs in = {.x = far_values(dtype, rows, 48, stride, p.x),
                           .dy = far_values(dtype, rows, 48, stride, p.dy),
                           .blocks = p.blocks,
                           .blocks_back = p.blocks_back};
        const outputs out = {.y = far_values(dtype, rows, 48, stride, NULL),
                             .dx = far_values(dtype, rows, 48, stride, NULL),
                             .parts = room(p.real, p.splits * p.plan.count, GUARD_END),
                             .ws = guarded(boft_rotate_workspace(&p.plan, dtype), 64, GUARD_END),
                             .ws_back = guarded(boft_rotate_backward_workspace(&p.plan, dtype), 64, GUARD_END)};
        for (int v = 0; next_variant(&v);) {
            test_case("rows %lld elements apart: %s", (long long)stride, p.name);
            run_rotate(&p, &in, WHOLE, out.y, out.ws);
            EXPECT_CLOSE("y", dtype, out.y, stride, rows, 48, p.y, p.y_bound);
            run_backward(&p, &in, WHOLE, out.dx, out.parts, out.ws_back);
            EXPECT_CLOSE("dx", dtype, out.dx, stride, rows, 48, p.dx, p.dx_bound);
            check_sum_of_splits(&p, out.parts);
        }
        release_memory();
    }
}

/* Zero rows need no data (an empty tensor has no address), and make zero gradients all the same. */
static void test_no_rows(void)
{
    problem p;
    make_problem(&p, (shape){512, 2, 9}, BOFT_F32, 0, 0, DENSE, 0);
    const outputs out = make_outputs(&p, GUARD_END);
    const boft_rotate_args args = {.plan = &p.plan, .dtype = p.dtype, .x_stride = 512, .y_stride = 512};
    const boft_rotate_backward_args back = {
        .plan = &p.plan, .dtype = p.dtype, .dy_stride = 512, .x_stride = 512, .dx_stride = 512, .dblocks = out.parts};
    for (int v = 0; next_variant(&v);) {
        test_case("no rows and no data");
        EXPECT_OK(boft_rotate(&args, 0, 0, NULL));
        EXPECT_OK(boft_merge(&args, NULL, 0, 0, NULL));
        scrub(out.parts);
        EXPECT_OK(boft_rotate_backward(&back, 0, p.tasks, out.ws_back));
        check_sum_of_splits(&p, out.parts);
    }
    release_memory();
}

/* Same bits everywhere but in one row and one block of R; there, everything is NaN. */
static void expect_nan_stays(const char *what, const problem *p, const void *clean, const void *sick, int64_t stride,
                             int64_t sick_row, int64_t sick_channel)
{
    int64_t spread = 0, healthy = 0;
    for (int64_t t = 0; t < p->rows; t++)
        for (int64_t j = 0; j < p->plan.d; j++) {
            const double before = get(p->dtype, clean, t * stride + j), after = get(p->dtype, sick, t * stride + j);
            if (t == sick_row && j / p->plan.super == sick_channel / p->plan.super)
                healthy += !isnan(after);
            else
                spread += !(before == after);
        }
    EXPECT(spread == 0, "%s: a NaN spread to %lld entries", what, (long long)spread);
    EXPECT(healthy == 0, "%s: %lld entries that depend on a NaN are not NaN", what, (long long)healthy);
}

/* Gradients of blocks that a NaN does not reach have the same bits; each that it reaches has a NaN. */
static void expect_nan_stays_in_blocks(const problem *p, const void *clean, const void *sick, int64_t sick_channel)
{
    const int64_t super = sick_channel / p->plan.super;
    for (int64_t l = 0; l < p->plan.levels; l++) {
        const boft_level *level = &p->plan.level[l];
        const int64_t square = level->group * level->group;
        int64_t spread = 0, nans = 0;
        for (int64_t g = 0; g < p->plan.d / level->group; g++)
            for (int64_t i = 0; i < square; i++) {
                const int64_t at = level->offset + g * square + i;
                if (level_channel(level, g, 0) / p->plan.super == super)
                    nans += isnan(get(p->real, sick, at));
                else
                    spread += get(p->real, clean, at) != get(p->real, sick, at);
            }
        EXPECT(spread == 0, "dblocks of level %lld: a NaN spread to %lld entries", (long long)l, (long long)spread);
        EXPECT(nans > 0, "dblocks of level %lld: a NaN was lost", (long long)l);
    }
}

static const void *with_nan(const void *rows, size_t bytes, boft_dtype dtype, int64_t at)
{
    void *changed = doubles((int64_t)(bytes / sizeof(double)) + 1);
    memcpy(changed, rows, bytes);
    put(dtype, changed, at, NAN);
    return guarded_copy(changed, bytes, dtype_size(dtype), GUARD_END);
}

static void nan_case(shape at, boft_dtype dtype, int transpose)
{
    problem p;
    make_problem(&p, at, dtype, 37, transpose, DENSE, 0);
    const int64_t row = random_below(p.rows), channel = random_below(at.d), n = p.rows * at.d;
    const size_t bytes = (size_t)n * dtype_size(dtype), block_bytes = (size_t)p.plan.count * dtype_size(p.real);
    const inputs in = make_inputs(&p, GUARD_END);
    inputs sick_x = in, sick_dy = in, sick_blocks = in;
    sick_x.x = with_nan(in.x, bytes, dtype, row * at.d + channel);
    sick_dy.dy = with_nan(in.dy, bytes, dtype, row * at.d + channel);
    const boft_level *level = &p.plan.level[random_below(p.plan.levels)];
    const int64_t sick_group = random_below(at.d / level->group), group_channel = level_channel(level, sick_group, 0);
    sick_blocks.blocks =
        with_nan(in.blocks, block_bytes, p.real,
                 level->offset + sick_group * level->group * level->group + random_below(level->group * level->group));
    const outputs clean = make_outputs(&p, GUARD_END), out = make_outputs(&p, GUARD_END);
    for (int v = 0; next_variant(&v);) {
        test_case("NaN in row %lld, channel %lld: %s", (long long)row, (long long)channel, p.name);
        run_rotate(&p, &in, WHOLE, clean.y, clean.ws);
        run_rotate(&p, &sick_x, WHOLE, out.y, out.ws);
        expect_nan_stays("y", &p, clean.y, out.y, p.y_stride, row, channel);
        run_backward(&p, &in, WHOLE, clean.dx, clean.parts, clean.ws_back);
        run_backward(&p, &sick_dy, WHOLE, out.dx, out.parts, out.ws_back);
        expect_nan_stays("dx", &p, clean.dx, out.dx, p.dx_stride, row, channel);
        expect_nan_stays_in_blocks(&p, clean.parts, out.parts, channel);
        run_backward(&p, &sick_x, WHOLE, out.dx, out.parts, out.ws_back);
        EXPECT_SAME("dx of a NaN in x", dtype, clean.dx, out.dx, p.dx_stride, p.rows, at.d);
        expect_nan_stays_in_blocks(&p, clean.parts, out.parts, channel);

        test_case("NaN in the block of channel %lld: %s", (long long)group_channel, p.name);
        run_rotate(&p, &sick_blocks, WHOLE, out.y, out.ws);
        int64_t spread = 0, nans = 0;
        for (int64_t i = 0; i < n; i++)
            if (i % at.d / p.plan.super == group_channel / p.plan.super)
                nans += isnan(get(dtype, out.y, i));
            else
                spread += get(dtype, out.y, i) != get(dtype, clean.y, i);
        EXPECT(spread == 0 && nans > 0, "%lld NaN, %lld other entries changed", (long long)nans, (long long)spread);
    }
    release_memory();
}

static void test_nan(void)
{
    const shape shapes[] = {{5, 1, 1},    {12, 2, 1},  {15, 3, 1},  {40, 4, 2},  {30, 5, 1},
                            {48, 8, 2},   {64, 16, 1}, {93, 31, 1}, {24, 2, 3},  {160, 8, 3},
                            {120, 10, 3}, {192, 2, 6}, {512, 2, 8}, {512, 16, 5}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int k = 0; k < 4; k++)
            nan_case(shapes[i], dtypes[k], (int)(i + (size_t)k) % 2);
}

/*
 * Of the chain parameters -> Cayley -> collapse -> rotate in float64: the loss <w, y> by central differences against
 * its gradients through every backward, along directions E with |E| = 1 in the parameters and with |E| = 1 in x.
 *
 * Truncation: the derivatives of one Cayley block are at most 2, 4, 12 per unit of its S, and R is a product of m
 * orthogonal factors, so the third derivative is at most 44 m^1.5 |x| |w| and the error h^2 / 6 of it. Rounding: that
 * of y in rotation_truth, and of the Cayley blocks 4 b u per entry; per evaluation, over h.
 */
static double chain_loss(const boft_plan *plan, int64_t rows, const double *a, const double *x, const double *w,
                         const outputs *work, void *ws_cayley, void *ws_collapse, double *q, double *blocks, double *y)
{
    EXPECT_OK(boft_cayley(BOFT_F64, plan->b, 0, plan->m * plan->blocks, a, NULL, q, ws_cayley));
    for (int64_t l = 0; l < plan->levels; l++)
        EXPECT_OK(boft_collapse(plan, BOFT_F64, l, 0, plan->d / plan->level[l].group, q, blocks, ws_collapse));
    const boft_rotate_args args = {.plan = plan,
                                   .dtype = BOFT_F64,
                                   .rows = rows,
                                   .x = x,
                                   .x_stride = plan->d,
                                   .blocks = blocks,
                                   .y = y,
                                   .y_stride = plan->d};
    EXPECT_OK(boft_rotate(&args, 0, rows, work->ws));
    double loss = 0;
    for (int64_t i = 0; i < rows * plan->d; i++)
        loss += w[i] * y[i];
    return loss;
}

static double length(int64_t n, const double *x)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sqrt(sum);
}

static void chain_case(shape at, int64_t rows)
{
    problem p;
    make_problem(&p, at, BOFT_F64, rows, 0, DENSE, 0);
    const boft_plan *plan = &p.plan;
    const int64_t n = plan->m * plan->d * plan->b, xn = rows * plan->d;
    const outputs work = make_outputs(&p, GUARD_END);
    void *ws_cayley = guarded(boft_cayley_workspace(at.b), 64, GUARD_END);
    void *ws_collapse = guarded(boft_collapse_workspace(plan, BOFT_F64), 64, GUARD_END);
    double *a = doubles(n), *q = doubles(n), *blocks = doubles(plan->count), *turned = doubles(plan->count);
    double *y = doubles(xn), *dblocks = doubles(plan->count * p.splits), *dq = doubles(n), *da = doubles(n);
    double *dx = doubles(xn), *moved_a = doubles(n), *moved_x = doubles(xn);
    for (int64_t i = 0; i < n; i++)
        a[i] = random_unit();
    const double h = 0x1p-16, sizes = length(xn, p.x) * length(xn, p.dy), m = (double)plan->m;
    const double u = unit_roundoff(BOFT_F64), steps = chain_length(plan) + 4 * (double)plan->b * m;
    const double bound = 2 * sizes * (h * h / 6 * 44 * pow(m, 1.5) + steps * u * sqrt((double)plan->super) / h);
    for (int v = 0; next_variant(&v);) {
        test_case("chain of all backwards against differences: %s", p.name);
        chain_loss(plan, rows, a, p.x, p.dy, &work, ws_cayley, ws_collapse, q, blocks, y);
        for (int64_t l = 0; l < plan->levels; l++)
            EXPECT_OK(boft_transpose(plan, BOFT_F64, l, 0, plan->d / plan->level[l].group, blocks, turned));
        const inputs in = {.x = p.x, .dy = p.dy, .blocks = blocks, .blocks_back = turned};
        run_backward(&p, &in, WHOLE, dx, dblocks, work.ws_back);
        EXPECT_OK(boft_sum_splits(BOFT_F64, p.splits, plan->count, dblocks, dblocks, 0, plan->count));
        for (int64_t l = 0; l < plan->levels; l++)
            EXPECT_OK(boft_collapse_backward(plan, BOFT_F64, l, 0, plan->d / plan->level[l].group, dblocks, q, dq,
                                             ws_collapse));
        EXPECT_OK(boft_cayley_backward(BOFT_F64, plan->b, 0, plan->m * plan->blocks, dq, q, NULL, da, ws_cayley));
        for (int trial = 0; trial < 6; trial++) {
            const int64_t count = trial % 2 ? xn : n;
            const double *from = trial % 2 ? p.x : a, *gradient = trial % 2 ? dx : da;
            double *moved = trial % 2 ? moved_x : moved_a, *e = doubles(count), loss[2], expected = 0;
            for (int64_t i = 0; i < count; i++)
                e[i] = random_unit();
            const double size = length(count, e);
            for (int sign = 0; sign < 2; sign++) {
                for (int64_t i = 0; i < count; i++)
                    moved[i] = from[i] + (sign ? -h : h) * e[i] / size;
                loss[sign] = chain_loss(plan, rows, trial % 2 ? a : moved, trial % 2 ? moved : p.x, p.dy, &work,
                                        ws_cayley, ws_collapse, q, blocks, y);
            }
            for (int64_t i = 0; i < count; i++)
                expected += gradient[i] * e[i] / size;
            const double difference = (loss[0] - loss[1]) / (2 * h);
            EXPECT(fabs(difference - expected) <= bound, "%s: %.12g by differences, %.12g by backward, allowed %g",
                   trial % 2 ? "x" : "parameters", difference, expected, bound);
        }
    }
    release_memory();
}

/* |R R^T - I| per entry for float32 parameters of size 1: at most 1e-6 for b <= 16 and m <= 4. */
static void orthogonality_case(shape at)
{
    boft_plan plan;
    EXPECT_OK(boft_plan_make(at.d, at.b, at.m, &plan));
    const int64_t n = plan.m * plan.d * plan.b, d = plan.d;
    float *a = (float *)doubles(n), *q = (float *)doubles(n), *blocks = (float *)doubles(plan.count);
    float *eye = (float *)doubles(d * d), *r = (float *)doubles(d * d);
    void *ws_cayley = guarded(boft_cayley_workspace(at.b), 64, GUARD_END);
    void *ws_collapse = guarded(boft_collapse_workspace(&plan, BOFT_F32), 64, GUARD_END);
    void *ws = guarded(boft_rotate_workspace(&plan, BOFT_F32), 64, GUARD_END);
    double *dense = doubles(d * d), *product = doubles(d * d);
    for (int64_t i = 0; i < n; i++)
        a[i] = (float)random_unit();
    for (int64_t i = 0; i < d; i++)
        eye[i * d + i] = 1;
    for (int v = 0; next_variant(&v);) {
        test_case("R R^T = I for d = %lld, b = %lld, m = %lld", (long long)d, (long long)at.b, (long long)at.m);
        EXPECT_OK(boft_cayley(BOFT_F32, at.b, 0, plan.m * plan.blocks, a, NULL, q, ws_cayley));
        for (int64_t l = 0; l < plan.levels; l++)
            EXPECT_OK(boft_collapse(&plan, BOFT_F32, l, 0, d / plan.level[l].group, q, blocks, ws_collapse));
        const boft_rotate_args args = {.plan = &plan,
                                       .dtype = BOFT_F32,
                                       .rows = d,
                                       .x = eye,
                                       .x_stride = d,
                                       .blocks = blocks,
                                       .y = r,
                                       .y_stride = d};
        EXPECT_OK(boft_rotate(&args, 0, d, ws));
        for (int64_t i = 0; i < d * d; i++)
            dense[i] = r[i];
        multiply_nt(d, dense, dense, product);
        for (int64_t i = 0; i < d; i++)
            product[i * d + i] -= 1;
        const double worst = largest(d * d, product);
        EXPECT(worst <= 1e-6, "it is off by %g", worst);
    }
    release_memory();
}

static void test_chain(void)
{
    const shape shapes[] = {{6, 3, 1}, {15, 5, 1}, {12, 2, 2}, {48, 8, 2}, {96, 4, 4}, {256, 2, 8}, {60, 10, 2}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        chain_case(shapes[i], 5);
    for (int64_t b = 2; b <= 16; b += 2)
        for (int64_t m = 1; m <= 4; m++)
            orthogonality_case((shape){(b << (m - 1)) * (m < 4 ? 2 : 1), b, m});
}

/* Sums in the stated order, so to the last bit; over the parts or elsewhere; elements outside the range stay. */
static void test_sum_splits(void)
{
    for (int i = 0; i < 24; i++) {
        const boft_dtype dtype = i % 2 ? BOFT_F64 : BOFT_F32;
        const int64_t splits = 1 + i / 2 % 6, count = 1 + random_below(200), n = splits * count;
        void *values = doubles(n), *truth = doubles(count);
        for (int64_t k = 0; k < n; k++)
            put(dtype, values, k, random_unit() * pow(2, (double)random_below(20)));
        for (int64_t k = 0; k < count; k++) {
            float sum_32 = 0;
            double sum_64 = 0;
            for (int64_t split = 0; split < splits; split++) {
                const double part = get(dtype, values, split * count + k);
                sum_32 = split ? sum_32 + (float)part : (float)part;
                sum_64 = split ? sum_64 + part : part;
            }
            put(dtype, truth, k, dtype == BOFT_F32 ? (double)sum_32 : sum_64);
        }
        const size_t size = dtype_size(dtype);
        const void *parts = guarded_copy(values, (size_t)n * size, size, i % 3 ? GUARD_END : GUARD_START);
        void *out = room(dtype, count, i % 3 ? GUARD_START : GUARD_END), *over = room(dtype, n, GUARD_END);
        for (int v = 0; next_variant(&v);) {
            test_case("sum of %lld splits of %lld %s", (long long)splits, (long long)count, dtype_name(dtype));
            scrub(out);
            const ranges r = divide(count, PIECES);
            int64_t begin, end;
            for (int64_t k = 0; range_at(&r, k, &begin, &end); k++)
                EXPECT_OK(boft_sum_splits(dtype, splits, count, parts, out, begin, end));
            EXPECT_SAME("sum", dtype, out, truth, count, 1, count);
            memcpy(over, values, (size_t)n * size);
            EXPECT_OK(boft_sum_splits(dtype, splits, count, over, over, 0, count));
            EXPECT_SAME("sum in place", dtype, over, truth, count, 1, count);
            scrub(out);
            EXPECT_OK(boft_sum_splits(dtype, splits, count, parts, out, count / 2, count));
            EXPECT(untouched(out, (size_t)(count / 2) * size), "elements outside the range were written");
        }
        release_memory();
    }
    test_case("sum of splits refuses");
    float in[4] = {0}, out[4];
    memset(out, 0xff, sizeof out);
    EXPECT_REFUSED(boft_sum_splits(BOFT_BF16, 1, 4, in, out, 0, 4), BOFT_BAD_DTYPE, "2");
    EXPECT_REFUSED(boft_sum_splits(BOFT_F32, 0, 4, in, out, 0, 4), BOFT_BAD_SHAPE, "0");
    EXPECT_REFUSED(boft_sum_splits(BOFT_F32, 1, 4, in, out, 0, 75), BOFT_BAD_SHAPE, "75 4");
    EXPECT_REFUSED(boft_sum_splits(BOFT_F32, 1, 4, in, out, -6, 4), BOFT_BAD_SHAPE, "-6");
    EXPECT_REFUSED(boft_sum_splits(BOFT_F32, 1, 4, in, out, 3, 2), BOFT_BAD_SHAPE, "3 2");
    EXPECT_REFUSED(boft_sum_splits(BOFT_F32, 1, -9, in, out, 0, 0), BOFT_BAD_SHAPE, "-9");
    EXPECT_REFUSED(boft_sum_splits(BOFT_F32, 1, 4, NULL, out, 0, 4), BOFT_BAD_ARGUMENT, "parts");
    EXPECT_REFUSED(boft_sum_splits(BOFT_F32, 1, 4, in, NULL, 0, 4), BOFT_BAD_ARGUMENT, "out");
    EXPECT(untouched(out, sizeof out), "a refusal wrote");
}

/* `field` set to `value` in a copy of good arguments. */
#define REFUSE_ROTATE(field, value, wanted, words)                      \
    do {                                                                \
        boft_rotate_args bad = good;                                    \
        bad.field = value;                                              \
        EXPECT_REFUSED(boft_rotate(&bad, 0, 3, out.ws), wanted, words); \
    } while (0)
#define REFUSE_BACKWARD(field, value, wanted, words)                                        \
    do {                                                                                    \
        boft_rotate_backward_args bad = good_back;                                          \
        bad.field = value;                                                                  \
        EXPECT_REFUSED(boft_rotate_backward(&bad, 0, p.tasks, out.ws_back), wanted, words); \
    } while (0)

static void test_refusals(void)
{
    problem p;
    /* Nine factors of two channels each: more than one level, so that every pointer is needed. */
    make_problem(&p, (shape){512, 2, 9}, BOFT_BF16, 3, 0, GAPS, 0);
    test_case("a plan with several levels");
    EXPECT(p.plan.levels > 1, "b = 2, m = 9 has one level");
    const inputs in = make_inputs(&p, GUARD_END);
    const outputs out = make_outputs(&p, GUARD_END);
    const boft_rotate_args good = forward_args(&p, &in, out.y);
    test_case("rotate refuses");
    EXPECT_REFUSED(boft_rotate(NULL, 0, 3, out.ws), BOFT_BAD_ARGUMENT, "args");
    REFUSE_ROTATE(plan, NULL, BOFT_BAD_ARGUMENT, "plan");
    REFUSE_ROTATE(dtype, (boft_dtype)44, BOFT_BAD_DTYPE, "44");
    REFUSE_ROTATE(dtype, (boft_dtype)-1, BOFT_BAD_DTYPE, "-1");
    REFUSE_ROTATE(rows, -5, BOFT_BAD_SHAPE, "-5");
    REFUSE_ROTATE(rows, 2, BOFT_BAD_SHAPE, "3 2");
    REFUSE_ROTATE(x_stride, -4, BOFT_BAD_SHAPE, "-4");
    REFUSE_ROTATE(y_stride, 511, BOFT_BAD_SHAPE, "511 512");
    REFUSE_ROTATE(x, NULL, BOFT_BAD_ARGUMENT, "x");
    REFUSE_ROTATE(y, NULL, BOFT_BAD_ARGUMENT, "y");
    REFUSE_ROTATE(blocks, NULL, BOFT_BAD_ARGUMENT, "blocks");
    EXPECT_REFUSED(boft_rotate(&good, -2, 3, out.ws), BOFT_BAD_SHAPE, "-2 3");
    EXPECT_REFUSED(boft_rotate(&good, 2, 1, out.ws), BOFT_BAD_SHAPE, "2 1");
    EXPECT_REFUSED(boft_rotate(&good, 0, 14, out.ws), BOFT_BAD_SHAPE, "14 3");
    EXPECT_REFUSED(boft_rotate(&good, 0, 3, NULL), BOFT_BAD_ARGUMENT, "workspace");
    EXPECT_REFUSED(boft_merge(NULL, in.s, 0, 3, out.ws), BOFT_BAD_ARGUMENT, "args");
    EXPECT_REFUSED(boft_merge(&good, in.s, 0, 14, out.ws), BOFT_BAD_SHAPE, "14 3");
    EXPECT_REFUSED(boft_merge(&good, in.s, 0, 3, NULL), BOFT_BAD_ARGUMENT, "workspace");
    EXPECT(untouched(out.y, (size_t)extent(3, 512, p.y_stride) * 2), "a refusal wrote");

    test_case("rotate backward refuses");
    const boft_rotate_backward_args good_back = backward_args(&p, &in, out.dx, out.parts);
    EXPECT_REFUSED(boft_rotate_backward(NULL, 0, 1, out.ws_back), BOFT_BAD_ARGUMENT, "args");
    REFUSE_BACKWARD(plan, NULL, BOFT_BAD_ARGUMENT, "plan");
    REFUSE_BACKWARD(dtype, (boft_dtype)44, BOFT_BAD_DTYPE, "44");
    REFUSE_BACKWARD(rows, -5, BOFT_BAD_SHAPE, "-5");
    REFUSE_BACKWARD(dy_stride, -4, BOFT_BAD_SHAPE, "-4");
    REFUSE_BACKWARD(x_stride, -4, BOFT_BAD_SHAPE, "-4");
    REFUSE_BACKWARD(dx_stride, 511, BOFT_BAD_SHAPE, "511 512");
    REFUSE_BACKWARD(dy, NULL, BOFT_BAD_ARGUMENT, "dy");
    REFUSE_BACKWARD(x, NULL, BOFT_BAD_ARGUMENT, "x");
    REFUSE_BACKWARD(blocks, NULL, BOFT_BAD_ARGUMENT, "blocks");
    REFUSE_BACKWARD(blocks_back, NULL, BOFT_BAD_ARGUMENT, "blocks_back");
    EXPECT_REFUSED(boft_rotate_backward(&good_back, -2, 1, out.ws_back), BOFT_BAD_SHAPE, "-2 1");
    EXPECT_REFUSED(boft_rotate_backward(&good_back, 1, 0, out.ws_back), BOFT_BAD_SHAPE, "1 0");
    EXPECT_REFUSED(boft_rotate_backward(&good_back, 0, p.tasks + 1000, out.ws_back), BOFT_BAD_SHAPE, "0");
    EXPECT_REFUSED(boft_rotate_backward(&good_back, 0, p.tasks, NULL), BOFT_BAD_ARGUMENT, "workspace");
    EXPECT(untouched(out.dx, (size_t)extent(3, 512, p.dx_stride) * 2), "a refusal wrote dx");
    EXPECT(untouched(out.parts, (size_t)(p.splits * p.plan.count) * 4), "a refusal wrote dblocks");
    release_memory();
}

int main(int argc, char **argv)
{
    test_start("test_rotate", argc, argv);
    test_all_shapes();
    test_many_rows();
    test_partial_range();
    test_far_rows();
    test_no_rows();
    test_nan();
    test_chain();
    test_sum_splits();
    test_refusals();
    return test_finish();
}
