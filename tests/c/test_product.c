/* Rows times a packed matrix. */
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* One product: sizes, the values that the core is given, and what must come out, in double. */
typedef struct problem {
    boft_dtype dtype;
    int64_t rows, depth, columns, x_stride, stride, y_stride;
    int transposed, biased;
    double *x, *matrix, *bias, *y, *bound; /* matrix: (depth, columns) */
    int integers; /* small ones: sums do not round, so bounds do not count */
    char name[160];
} problem;

static double *random_values(boft_dtype dtype, int64_t count, int integers)
{
    double *values = doubles(count);
    for (int64_t i = 0; i < count; i++)
        values[i] = integers ? (double)(random_below(7) - 3) : rounded(dtype, 2 * random_unit());
    return values;
}

/* The truth, and depth + 1 roundings of the absolute values to float. */
static void find_truth(problem *p)
{
    for (int64_t t = 0; t < p->rows; t++)
        for (int64_t j = 0; j < p->columns; j++) {
            double sum = p->biased ? p->bias[j] : 0, size = fabs(sum);
            for (int64_t k = 0; k < p->depth; k++) {
                const double term = p->x[t * p->depth + k] * p->matrix[k * p->columns + j];
                sum += term;
                size += fabs(term);
            }
            p->y[t * p->columns + j] = sum;
            p->bound[t * p->columns + j] = (double)(p->depth + 1) * unit_roundoff(BOFT_F32) * size;
        }
}

static void make_problem(problem *p, boft_dtype dtype, int64_t rows, int64_t depth, int64_t columns, int transposed,
                         int biased, int gaps, int integers)
{
    *p = (problem){.dtype = dtype,
                   .rows = rows,
                   .depth = depth,
                   .columns = columns,
                   .x_stride = depth + 5 * gaps,
                   .stride = (transposed ? depth : columns) + 3 * gaps,
                   .y_stride = columns + gaps,
                   .transposed = transposed,
                   .biased = biased,
                   .integers = integers};
    snprintf(p->name, sizeof p->name, "%s, %lld rows, %lld to %lld%s%s%s%s", dtype == BOFT_F32 ? "float32" : "bfloat16",
             (long long)rows, (long long)depth, (long long)columns, transposed ? ", transposed" : "",
             biased ? ", bias" : "", gaps ? ", gaps" : "", integers ? ", integers" : "");
    p->x = random_values(dtype, rows * depth, integers);
    p->matrix = random_values(dtype, depth * columns, integers);
    p->bias = random_values(dtype, columns, integers);
    p->y = doubles(rows * columns);
    p->bound = doubles(rows * columns);
    find_truth(p);
}

static boft_product_pack_args make_pack(const problem *p)
{
    const int64_t rows = p->transposed ? p->columns : p->depth, length = p->transposed ? p->depth : p->columns;
    double *laid = doubles(rows * length);
    for (int64_t k = 0; k < p->depth; k++)
        for (int64_t j = 0; j < p->columns; j++)
            laid[p->transposed ? j * length + k : k * length + j] = p->matrix[k * p->columns + j];
    return (boft_product_pack_args){
        .dtype = p->dtype,
        .depth = p->depth,
        .columns = p->columns,
        .rows = p->depth,
        .matrix = stored_rows(p->dtype, rows, length, p->stride, laid, GUARD_END),
        .stride = p->stride,
        .transposed = p->transposed,
        .packed = room(p->dtype, p->depth * p->columns, GUARD_END),
    };
}

static boft_product_args make_args(const problem *p, const void *packed, guard side)
{
    return (boft_product_args){
        .dtype = p->dtype,
        .rows = p->rows,
        .depth = p->depth,
        .columns = p->columns,
        .x = stored_rows(p->dtype, p->rows, p->depth, p->x_stride, p->x, side),
        .x_stride = p->x_stride,
        .packed = packed,
        .bias = p->biased ? stored_rows(p->dtype, 1, p->columns, p->columns, p->bias, side) : NULL,
        .y = room(p->dtype, extent(p->rows, p->columns, p->y_stride), side),
        .y_stride = p->y_stride,
    };
}

static void pack_panels(const boft_product_pack_args *args, division how)
{
    const ranges r = divide(args->columns / BOFT_PRODUCT_COLUMNS, how);
    int64_t begin, end;
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++)
        EXPECT_OK(boft_product_pack(args, begin, end));
}

/* The whole matrix, panels and rows divided. */
static void pack(const boft_product_pack_args *args, division panels, division rows)
{
    const ranges r = divide(args->depth / BOFT_PRODUCT_DEPTH, rows);
    int64_t begin, end;
    scrub(args->packed);
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++) {
        boft_product_pack_args part = *args;
        part.first = begin * BOFT_PRODUCT_DEPTH;
        part.rows = (end - begin) * BOFT_PRODUCT_DEPTH;
        part.matrix = (const char *)args->matrix +
                      part.first * (args->transposed ? 1 : args->stride) * (args->dtype == BOFT_F32 ? 4 : 2);
        pack_panels(&part, panels);
    }
}

static void run(const boft_product_args *args, division how)
{
    const ranges r = divide(args->rows, how);
    int64_t begin, end;
    scrub(args->y);
    for (int64_t i = 0; range_at(&r, i, &begin, &end); i++)
        EXPECT_OK(boft_product(args, begin, end));
}

/* The next variant that has products of this shape. */
static int next_variant_that_packs(int *v, const problem *p)
{
    while (next_variant(v))
        if (boft_product_serves(p->dtype, p->depth, p->columns))
            return 1;
    return 0;
}

static void product_case(boft_dtype dtype, int64_t rows, int64_t depth, int64_t columns, int turn)
{
    problem p;
    make_problem(&p, dtype, rows, depth, columns, turn % 2, turn / 2 % 2, turn / 4 % 2, turn / 8 % 2);
    const boft_product_pack_args packing = make_pack(&p);
    const boft_product_args whole = make_args(&p, packing.packed, GUARD_END);
    const boft_product_args cut = make_args(&p, packing.packed, GUARD_START);
    for (int v = 0; next_variant_that_packs(&v, &p);) {
        test_case("product %s", p.name);
        pack(&packing, turn % 3 ? WHOLE : SINGLES, turn % 7 ? WHOLE : turn % 2 ? SINGLES : PIECES);
        run(&whole, WHOLE);
        EXPECT_CLOSE("y", p.dtype, whole.y, p.y_stride, rows, columns, p.y, p.integers ? NULL : p.bound);
        EXPECT_GAPS("y", p.dtype, whole.y, p.y_stride, rows, columns);
        run(&cut, turn % 5 ? PIECES : SINGLES);
        EXPECT_SAME("y in pieces", p.dtype, whole.y, cut.y, p.y_stride, rows, columns);
    }
    release_memory();
}

static void test_all_sizes(boft_dtype dtype)
{
    const int64_t rows[] = {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 100};
    const int64_t sizes[] = {32, 64, 96, 160, 512, 800, 1056};
    enum { ROWS = sizeof rows / sizeof *rows, SIZES = sizeof sizes / sizeof *sizes };
    int turn = (int)random_below(1000);
    for (int i = 0; i < ROWS; i++)
        for (int depth = 0; depth < SIZES; depth++)
            for (int columns = 0; columns < SIZES; columns++, turn++)
                if (sizes[depth] * sizes[columns] <= 160 * 512 || i % 5 == 0)
                    product_case(dtype, rows[i], sizes[depth], sizes[columns], turn);
}

/* A NaN in x reaches its own row, and one in the matrix its own column. */
static void test_nan(boft_dtype dtype)
{
    problem p;
    make_problem(&p, dtype, 35, 64, 64, 1, 1, 0, 0);
    p.x[random_below(p.rows * p.depth)] = p.matrix[random_below(p.depth * p.columns)] = NAN;
    find_truth(&p);
    const boft_product_pack_args packing = make_pack(&p);
    const boft_product_args args = make_args(&p, packing.packed, GUARD_END);
    for (int v = 0; next_variant_that_packs(&v, &p);) {
        test_case("NaN in product %s", p.name);
        pack(&packing, WHOLE, WHOLE);
        run(&args, WHOLE);
        EXPECT_CLOSE("y", p.dtype, args.y, p.y_stride, p.rows, p.columns, p.y, p.bound);
    }
    release_memory();
}

static void test_refusals(boft_dtype dtype)
{
    problem p;
    make_problem(&p, dtype, 2, 64, 96, 0, 0, 0, 0);
    const boft_product_pack_args packing = make_pack(&p);
    const boft_product_args good = make_args(&p, packing.packed, GUARD_END);
    for (int v = 0; next_variant(&v);) {
        test_case("shapes that are not served");
        EXPECT(!boft_product_serves(BOFT_F64, 64, 96), "float64 is served");
        EXPECT(!boft_product_serves(BOFT_F16, 64, 96), "float16 is served");
        EXPECT(!boft_product_serves(dtype, 48, 96), "a depth of 48 is served");
        EXPECT(!boft_product_serves(dtype, 64, 48), "48 columns are served");
        boft_product_pack_args odd = packing;
        odd.depth = odd.rows = 48;
        EXPECT_REFUSED(boft_product_pack(&odd, 0, 1), BOFT_BAD_SHAPE, "product 48 96");
        boft_product_args other = good;
        other.columns = 40;
        EXPECT_REFUSED(boft_product(&other, 0, 2), BOFT_BAD_SHAPE, "product 64 40");
    }
    for (int v = 0; next_variant_that_packs(&v, &p);) {
        test_case("refusals");
        boft_product_pack_args odd = packing;
        EXPECT_REFUSED(boft_product_pack(NULL, 0, 1), BOFT_BAD_ARGUMENT, "product pack args");
        EXPECT_REFUSED(boft_product_pack(&packing, 0, 4), BOFT_BAD_SHAPE, "product pack 4 3");
        odd.stride = 95;
        EXPECT_REFUSED(boft_product_pack(&odd, 0, 3), BOFT_BAD_SHAPE, "product pack 95");
        odd = packing, odd.rows = 96;
        EXPECT_REFUSED(boft_product_pack(&odd, 0, 3), BOFT_BAD_SHAPE, "product pack 96 0 64");
        odd = packing, odd.first = 32;
        EXPECT_REFUSED(boft_product_pack(&odd, 0, 3), BOFT_BAD_SHAPE, "product pack 64 32");
        odd = packing, odd.rows = 16;
        EXPECT_REFUSED(boft_product_pack(&odd, 0, 3), BOFT_BAD_SHAPE, "product pack 16");
        odd = packing, odd.first = -32;
        EXPECT_REFUSED(boft_product_pack(&odd, 0, 3), BOFT_BAD_SHAPE, "product pack -32");
        odd = packing, odd.matrix = NULL;
        EXPECT_REFUSED(boft_product_pack(&odd, 0, 3), BOFT_BAD_ARGUMENT, "product pack matrix");
        odd = packing, odd.packed = NULL;
        EXPECT_REFUSED(boft_product_pack(&odd, 0, 3), BOFT_BAD_ARGUMENT, "product pack packed");
        boft_product_args bad = good;
        scrub(good.y);
        EXPECT_REFUSED(boft_product(NULL, 0, 1), BOFT_BAD_ARGUMENT, "product args");
        EXPECT_REFUSED(boft_product(&good, 0, 3), BOFT_BAD_SHAPE, "product 3 2");
        bad.y_stride = 95;
        EXPECT_REFUSED(boft_product(&bad, 0, 2), BOFT_BAD_SHAPE, "product 95 96");
        bad = good, bad.x_stride = -64;
        EXPECT_REFUSED(boft_product(&bad, 0, 2), BOFT_BAD_SHAPE, "product -64");
        bad = good, bad.x = NULL;
        EXPECT_REFUSED(boft_product(&bad, 0, 2), BOFT_BAD_ARGUMENT, "product x");
        bad = good, bad.packed = NULL;
        EXPECT_REFUSED(boft_product(&bad, 0, 2), BOFT_BAD_ARGUMENT, "product packed");
        bad = good, bad.y = NULL;
        EXPECT_REFUSED(boft_product(&bad, 0, 2), BOFT_BAD_ARGUMENT, "product y");
        EXPECT(untouched(good.y, (size_t)(2 * p.columns) * (dtype == BOFT_F32 ? 4 : 2)), "a refused call wrote");
    }
    release_memory();
}

int main(int argc, char **argv)
{
    test_start("test_product", argc, argv);
    const boft_dtype dtypes[] = {BOFT_F32, BOFT_BF16};
    for (int i = 0; i < 2; i++) {
        test_all_sizes(dtypes[i]);
        test_nan(dtypes[i]);
        test_refusals(dtypes[i]);
    }
    return test_finish();
}
