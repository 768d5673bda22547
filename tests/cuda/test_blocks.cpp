/*
 * boft_cuda_blocks and its backward against the scalar kernels of the CPU, in both orders of threads and any number of
 * CUDA blocks that wait for each other: one launch each, and the same bits.
 */
#include "boft_cuda.h"
#include "on_cpu.h"

extern "C" {
#include "support.h"
}

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const boft_dtype reals[] = {BOFT_F32, BOFT_F64};

/* How the threads of a launch run: their order, and resident CUDA blocks, of which only those of large blocks wait. */
typedef struct way {
    const char *order;
    int resident;
} way;

static const way ways[] = {{"forward", 8}, {"reverse", 1}, {"reverse", 3}};

static int ways_of(int64_t b)
{
    return b > 32 ? 3 : 2;
}

/* ---- Data ------------------------------------------------------------------------------------------------------- */

static void *stored(boft_dtype dtype, const double *values, int64_t n)
{
    void *all = doubles(n);
    for (int64_t i = 0; i < n; i++)
        put(dtype, all, i, values[i]);
    return guarded_copy(all, (size_t)n * dtype_size(dtype), dtype_size(dtype),
                        random_bits() & 1 ? GUARD_END : GUARD_START);
}

static void *room(boft_dtype dtype, int64_t n)
{
    return guarded((size_t)n * dtype_size(dtype), dtype_size(dtype), random_bits() & 1 ? GUARD_END : GUARD_START);
}

static double *random_values(boft_dtype dtype, int64_t n, double size)
{
    double *values = doubles(n);
    for (int64_t i = 0; i < n; i++)
        values[i] = rounded(dtype, size * random_unit());
    return values;
}

/* A third of the blocks dropped, others marked by any number but 0. */
static unsigned char *random_keep(int64_t n)
{
    unsigned char *keep = (unsigned char *)guarded((size_t)n, 1, GUARD_END);
    for (int64_t i = 0; i < n; i++)
        keep[i] = (unsigned char)(random_below(3) == 0 ? 0 : 1 + random_below(255));
    return keep;
}

/* ---- Reference -------------------------------------------------------------------------------------------------- */

static void *guarded_workspace(size_t bytes)
{
    return guarded(bytes, 64, GUARD_END);
}

static void reference(const boft_plan *plan, boft_dtype dtype, const void *a, const unsigned char *keep, void *q,
                      void *blocks)
{
    EXPECT_OK(boft_cayley(dtype, plan->b, 0, plan->m * plan->blocks, a, keep, q,
                          guarded_workspace(boft_cayley_workspace(plan->b))));
    void *workspace = guarded_workspace(boft_collapse_workspace(plan, dtype));
    for (int64_t l = 0; l < plan->levels; l++)
        EXPECT_OK(boft_collapse(plan, dtype, l, 0, plan->d / plan->level[l].group, q, blocks, workspace));
}

static void reference_backward(const boft_plan *plan, boft_dtype dtype, const void *dblocks, const void *q,
                               const unsigned char *keep, void *da)
{
    void *workspace = guarded_workspace(boft_collapse_workspace(plan, dtype));
    for (int64_t l = 0; l < plan->levels; l++)
        EXPECT_OK(boft_collapse_backward(plan, dtype, l, 0, plan->d / plan->level[l].group, dblocks, q, da, workspace));
    EXPECT_OK(boft_cayley_backward(dtype, plan->b, 0, plan->m * plan->blocks, da, q, keep, da,
                                   guarded_workspace(boft_cayley_workspace(plan->b))));
}

/* The largest |got - truth| / |truth| (Frobenius) of n matrices of `size` elements; NaN if anything is NaN. */
static double error_of(boft_dtype dtype, const void *got, const double *truth, int64_t n, int64_t size)
{
    double most = 0;
    for (int64_t z = 0; z < n; z++) {
        double error = 0, norm = 0;
        for (int64_t i = z * size; i < (z + 1) * size; i++) {
            const double difference = get(dtype, got, i) - truth[i];
            error += difference * difference;
            norm += truth[i] * truth[i];
        }
        const double relative = error == 0 ? 0 : sqrt(error / norm);
        most = most >= relative || isnan(most) ? most : relative;
    }
    return most;
}

/* The error may be twice that of the CPU's kernel for the same type, and a rounding. */
static void expect_error(const char *what, boft_dtype dtype, const void *got, const void *cpu, const double *truth,
                         int64_t n, int64_t size, double elimination)
{
    const double error = error_of(dtype, got, truth, n, size), accepted = error_of(dtype, cpu, truth, n, size);
    const double most = 2 * accepted + 2 * unit_roundoff(dtype) + elimination;
    EXPECT(error <= most, "%s: relative error %g, the CPU's is %g", what, error, accepted);
}

/* ---- Runs ------------------------------------------------------------------------------------------------------- */

static void run(const boft_plan *plan, boft_dtype dtype, const void *a, const unsigned char *keep, void *q,
                void *blocks)
{
    const size_t bytes = boft_cuda_blocks_workspace(plan, dtype);
    on_cpu_launches = 0;
    EXPECT_OK(boft_cuda_blocks(plan, dtype, a, keep, q, blocks, bytes ? guarded(bytes, 256, GUARD_END) : NULL, NULL));
    EXPECT(on_cpu_launches == 1, "%d launches", on_cpu_launches);
}

static void run_backward(const boft_plan *plan, boft_dtype dtype, const void *dblocks, const void *q,
                         const unsigned char *keep, void *da)
{
    const size_t bytes = boft_cuda_blocks_workspace(plan, dtype);
    on_cpu_launches = 0;
    EXPECT_OK(boft_cuda_blocks_backward(plan, dtype, dblocks, q, keep, da,
                                        bytes ? guarded(bytes, 256, GUARD_END) : NULL, NULL));
    EXPECT(on_cpu_launches == 1, "%d launches backward", on_cpu_launches);
}

static void go(const way *w)
{
    setenv("BOFT_CUDA_ORDER", w->order, 1);
    on_cpu_resident = w->resident;
}

/* got: of each way, `bytes` bytes. */
static void expect_same(const char *what, void *const got[], int count, size_t bytes)
{
    for (int i = 1; i < count; i++)
        EXPECT(memcmp(got[0], got[i], bytes) == 0, "%s differs in %s order with %d resident blocks", what,
               ways[i].order, ways[i].resident);
}

/* |Q Q^T - I| of the largest entry. */
static double residual(boft_dtype dtype, int64_t b, const void *q, int64_t z)
{
    double most = 0;
    for (int64_t i = 0; i < b; i++)
        for (int64_t j = 0; j < b; j++) {
            double sum = i == j ? -1 : 0;
            for (int64_t k = 0; k < b; k++)
                sum += get(dtype, q, (z * b + i) * b + k) * get(dtype, q, (z * b + j) * b + k);
            most = fabs(sum) <= most ? most : fabs(sum);
        }
    return most;
}

/* size: of parameters. with_keep: some blocks are dropped. */
static void check(boft_dtype dtype, int64_t d, int64_t b, int64_t m, double size, int with_keep)
{
    boft_plan plan;
    test_case("%s d = %lld, b = %lld, m = %lld, entries of %g%s", dtype_name(dtype), (long long)d, (long long)b,
              (long long)m, size, with_keep ? ", dropout" : "");
    EXPECT_OK(boft_plan_make(d, b, m, &plan));
    const int64_t count = m * d * b, blocks_of_q = m * plan.blocks;
    const double *values = random_values(dtype, count, size), *gradient = random_values(dtype, plan.count, 1);
    const void *a = stored(dtype, values, count), *dblocks = stored(dtype, gradient, plan.count);
    const unsigned char *keep = with_keep ? random_keep(blocks_of_q) : NULL;

    /* The truth from the same parameters in float64; what that elimination itself may be wrong by. */
    double *q_truth = doubles(count), *truth = doubles(plan.count);
    reference(&plan, BOFT_F64, values, keep, q_truth, truth);
    const double elimination = 4e-16 * (double)b * (double)m * (b % 2 ? 1 + size : 1 + (size > 16 ? 1e4 : size));

    void *q_cpu = doubles(count), *cpu = doubles(plan.count);
    reference(&plan, dtype, a, keep, q_cpu, cpu);
    void *q[3], *blocks[3];
    for (int i = 0; i < ways_of(b); i++) {
        go(&ways[i]);
        q[i] = room(dtype, count);
        blocks[i] = room(dtype, plan.count);
        run(&plan, dtype, a, keep, q[i], blocks[i]);
    }
    expect_same("q", q, ways_of(b), (size_t)count * dtype_size(dtype));
    expect_same("blocks", blocks, ways_of(b), (size_t)plan.count * dtype_size(dtype));
    if (elimination < 1e-3) {
        expect_error("q", dtype, q[0], q_cpu, q_truth, blocks_of_q, b * b, elimination);
        for (int64_t l = 0; l < plan.levels; l++) {
            const boft_level *level = &plan.level[l];
            const size_t at = (size_t)level->offset * dtype_size(dtype);
            expect_error("blocks", dtype, (char *)blocks[0] + at, (char *)cpu + at, truth + level->offset,
                         d / level->group, level->group * level->group, elimination);
        }
    } else { /* I + S is singular to rounding: results are only finite */
        int64_t bad = 0;
        for (int64_t i = 0; i < count; i++)
            bad += !isfinite(get(dtype, q[0], i));
        for (int64_t i = 0; i < plan.count; i++)
            bad += !isfinite(get(dtype, blocks[0], i));
        EXPECT(bad == 0, "%lld results are not finite", (long long)bad);
    }
    if (dtype == BOFT_F32 && b <= 16 && m <= 4 && size <= 100)
        for (int64_t z = 0; z < blocks_of_q; z++)
            EXPECT(residual(dtype, b, q[0], z) <= 1e-6, "|Q Q^T - I| = %g", residual(dtype, b, q[0], z));
    if (m == 1) {
        void *alone = room(dtype, plan.count);
        run(&plan, dtype, a, keep, NULL, alone);
        EXPECT(memcmp(alone, blocks[0], (size_t)plan.count * dtype_size(dtype)) == 0, "blocks differ without q");
    }

    /* Backward from the same q for all. */
    double *q_given = doubles(count), *da_truth = doubles(count);
    for (int64_t i = 0; i < count; i++)
        q_given[i] = get(dtype, q_cpu, i);
    const void *q_stored = stored(dtype, q_given, count);
    reference_backward(&plan, BOFT_F64, gradient, q_given, keep, da_truth);
    void *da_cpu = doubles(count), *da[3];
    reference_backward(&plan, dtype, dblocks, q_stored, keep, da_cpu);
    for (int i = 0; i < ways_of(b); i++) {
        go(&ways[i]);
        da[i] = room(dtype, count);
        run_backward(&plan, dtype, dblocks, q_stored, keep, da[i]);
    }
    expect_same("da", da, ways_of(b), (size_t)count * dtype_size(dtype));
    /* For large parameters J = I + Q nearly vanishes, and so does da: errors count against a gradient of size 1. */
    if (size <= 1)
        expect_error("da", dtype, da[0], da_cpu, da_truth, 1, count, 1e-16 * (double)(b * m));
    else
        for (int64_t i = 0; i < count; i++) {
            const double error = fabs(get(dtype, da[0], i) - da_truth[i]);
            if (!EXPECT(error <= 100 * (double)(b * m) * unit_roundoff(dtype), "da: error %g", error))
                break;
        }
    for (int64_t i = 0; keep && i < count; i++)
        if (!keep[i / (b * b)] && !EXPECT(get(dtype, da[0], i) == 0, "the gradient of a dropped block is not 0"))
            break;
    release_memory();
}

/* A NaN shows in its block and the groups it is part of, and nowhere else; dropped, it does not show. */
static void check_nan(boft_dtype dtype, int64_t d, int64_t b, int64_t m)
{
    boft_plan plan;
    test_case("%s d = %lld, b = %lld, m = %lld with a NaN", dtype_name(dtype), (long long)d, (long long)b,
              (long long)m);
    EXPECT_OK(boft_plan_make(d, b, m, &plan));
    const int64_t count = m * d * b, blocks_of_q = m * plan.blocks, sick = random_below(blocks_of_q), size = b * b;
    double *values = random_values(dtype, count, 1);
    const void *clean = stored(dtype, values, count);
    const double bad[] = {NAN, INFINITY};
    values[sick * size + random_below(size)] = bad[random_below(2)];
    const void *a = stored(dtype, values, count);
    void *q_clean = room(dtype, count), *blocks_clean = room(dtype, plan.count);
    void *q = room(dtype, count), *blocks = room(dtype, plan.count);
    run(&plan, dtype, clean, NULL, q_clean, blocks_clean);
    run(&plan, dtype, a, NULL, q, blocks);
    int64_t wrong = 0;
    for (int64_t i = 0; i < count; i++)
        wrong += i / size == sick ? !isnan(get(dtype, q, i)) : get(dtype, q, i) != get(dtype, q_clean, i);
    EXPECT(wrong == 0, "%lld entries of q", (long long)wrong);
    const int64_t factor = sick / plan.blocks;
    for (int64_t l = 0; l < plan.levels; l++) {
        const boft_level *level = &plan.level[l];
        const int64_t square = level->group * level->group;
        int64_t touched = 0;
        for (int64_t g = 0; g < d / level->group; g++) {
            int64_t nans = 0, differ = 0;
            for (int64_t i = level->offset + g * square; i < level->offset + (g + 1) * square; i++) {
                nans += isnan(get(dtype, blocks, i));
                differ += !isnan(get(dtype, blocks, i)) && get(dtype, blocks, i) != get(dtype, blocks_clean, i);
            }
            touched += nans > 0;
            EXPECT(differ == 0, "level %lld, group %lld: %lld entries changed", (long long)l, (long long)g,
                   (long long)differ);
        }
        const int has_it = factor >= level->first && factor < level->first + level->factors;
        EXPECT(touched == has_it, "level %lld: %lld groups with a NaN", (long long)l, (long long)touched);
    }
    unsigned char *keep = (unsigned char *)guarded((size_t)blocks_of_q, 1, GUARD_END);
    memset(keep, 1, (size_t)blocks_of_q);
    keep[sick] = 0;
    run(&plan, dtype, a, keep, q, blocks);
    run(&plan, dtype, clean, keep, q_clean, blocks_clean);
    EXPECT(memcmp(blocks, blocks_clean, (size_t)plan.count * dtype_size(dtype)) == 0, "a dropped NaN shows");
    EXPECT(memcmp(q, q_clean, (size_t)count * dtype_size(dtype)) == 0, "a dropped NaN shows in q");
    release_memory();
}

static void check_refusals(void)
{
    test_case("refusals");
    boft_plan plan;
    EXPECT_OK(boft_plan_make(16, 4, 2, &plan));
    float a[2 * 16 * 4], q[2 * 16 * 4], blocks[16 * 8];
    const boft_status missing = BOFT_BAD_ARGUMENT, untyped = BOFT_BAD_DTYPE;
    EXPECT_REFUSED(boft_cuda_blocks(NULL, BOFT_F32, a, NULL, q, blocks, NULL, NULL), missing, "blocks");
    EXPECT_REFUSED(boft_cuda_blocks(&plan, BOFT_BF16, a, NULL, q, blocks, NULL, NULL), untyped, "blocks");
    EXPECT_REFUSED(boft_cuda_blocks(&plan, BOFT_F32, NULL, NULL, q, blocks, NULL, NULL), missing, "blocks: a");
    EXPECT_REFUSED(boft_cuda_blocks(&plan, BOFT_F32, a, NULL, NULL, blocks, NULL, NULL), missing, "q");
    EXPECT_REFUSED(boft_cuda_blocks(&plan, BOFT_F32, a, NULL, q, NULL, NULL, NULL), missing, "blocks");
    EXPECT_REFUSED(boft_cuda_blocks_backward(&plan, BOFT_F16, blocks, q, NULL, a, NULL, NULL), untyped, "backward");
    EXPECT_REFUSED(boft_cuda_blocks_backward(&plan, BOFT_F32, NULL, q, NULL, a, NULL, NULL), missing, "dblocks");
    EXPECT_REFUSED(boft_cuda_blocks_backward(&plan, BOFT_F32, blocks, NULL, NULL, a, NULL, NULL), missing, "q");
    EXPECT_REFUSED(boft_cuda_blocks_backward(&plan, BOFT_F32, blocks, q, NULL, NULL, NULL, NULL), missing, "da");
    EXPECT_OK(boft_plan_make(4096, 128, 1, &plan));
    EXPECT_REFUSED(boft_cuda_blocks(&plan, BOFT_F32, a, NULL, q, blocks, NULL, NULL), missing, "workspace");
    EXPECT_OK(boft_plan_make((int64_t)1 << 33, 4, 1, &plan));
    EXPECT_REFUSED(boft_cuda_blocks(&plan, BOFT_F32, a, NULL, q, blocks, NULL, NULL), BOFT_BAD_SHAPE, "2^34");
}

/* Block size, factors and super groups. */
typedef struct shape_case {
    int64_t b, m, groups;
} shape_case;

static void test_shapes(void)
{
    const shape_case cases[] = {
        {1, 1, 5},   {2, 1, 7},   {3, 1, 70},  {4, 1, 33},  {5, 1, 3},   {7, 1, 9},   {8, 1, 17},  {16, 1, 3},
        {20, 1, 3},  {32, 1, 5},  {33, 1, 2},  {40, 1, 2},  {64, 1, 2},  {96, 1, 1},  {97, 1, 1},  {130, 1, 1},
        {2, 2, 65},  {2, 3, 5},   {2, 4, 3},   {2, 5, 2},   {2, 7, 1},   {2, 8, 1},   {4, 2, 19},  {4, 3, 3},
        {4, 4, 3},   {4, 5, 1},   {4, 6, 1},   {6, 2, 3},   {6, 3, 2},   {8, 2, 9},   {8, 3, 3},   {8, 4, 1},
        {8, 5, 1},   {10, 2, 3},  {10, 4, 1},  {16, 2, 3},  {16, 3, 1},  {16, 4, 1},  {16, 5, 1},  {20, 2, 3},
        {20, 3, 1},  {20, 4, 1},  {32, 2, 2},  {32, 3, 1},  {32, 4, 1},  {36, 2, 1},  {40, 2, 1},  {40, 3, 1},
        {64, 2, 1},  {64, 3, 1},  {96, 2, 1},  {34, 3, 1},  {34, 5, 1},  {64, 4, 1},  {80, 1, 1},  {128, 3, 1},
        {80, 2, 1},  {80, 3, 1},  {81, 1, 2},  {96, 3, 1},  {128, 1, 1}, {128, 2, 1}, {160, 1, 1}, {160, 2, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int r = 0; r < 2; r++) {
            const shape_case *c = &cases[i];
            const int64_t d = (c->b << (c->m - 1)) * c->groups;
            /* Larger ones take long. */
            if (c->b <= 32 || (r == 1 && (d < 128 || i % 2 == 0)))
                check(reals[r], d, c->b, c->m, 1, 0);
            if (c->b <= 32 || (r == 0 && (d < 128 || i % 2 == 1)))
                check(reals[r], d, c->b, c->m, 1, 1);
        }
}

static void test_sizes(void)
{
    const shape_case cases[] = {{2, 2, 3},  {3, 1, 5},  {4, 3, 2},  {5, 1, 9},  {8, 2, 3},  {15, 1, 2},
                                {16, 2, 1}, {31, 1, 2}, {32, 1, 2}, {33, 1, 2}, {40, 2, 1}, {98, 1, 1}};
    const double sizes[] = {0, 1e-30, 1e-3, 15, 100, 1e8, 1e30};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
            for (size_t r = 0; r < 2; r++) {
                const shape_case *c = &cases[i];
                if (c->b <= 32 || r == k % 2)
                    check(reals[r], (c->b << (c->m - 1)) * c->groups, c->b, c->m, sizes[k], k % 2);
            }
    check(BOFT_F64, 24, 4, 2, 1e300, 0);
    check(BOFT_F64, 40, 40, 1, 1e300, 0);
    check(BOFT_F32, 370, 370, 1, 1, 0); /* a panel that shared memory has no room for */
}

static void test_nan(void)
{
    const shape_case cases[] = {{1, 1, 5}, {2, 3, 4},  {4, 2, 5},  {7, 1, 3},  {8, 2, 3},
                                {8, 5, 1}, {16, 4, 1}, {32, 2, 1}, {40, 2, 2}, {98, 1, 2}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int r = 0; r < 2; r++)
            check_nan(reals[r], (cases[i].b << (cases[i].m - 1)) * cases[i].groups, cases[i].b, cases[i].m);
}

int main(int argc, char **argv)
{
    test_start("test_blocks", argc, argv);
    EXPECT_OK(boft_cpu_select("scalar"));
    check_refusals();
    test_nan();
    test_sizes();
    test_shapes();
    return test_finish();
}
