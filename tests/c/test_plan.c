/* Shape rules, levels, offsets, sizes near overflow, and the messages of refusals. */
#include "support.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

/* 1 if (d, b, m) has a BOFT rotation: the rules of boft.h, by halving so that nothing overflows. */
static int valid_shape(int64_t d, int64_t b, int64_t m)
{
    if (d < 1 || b < 1 || m < 1 || d % b != 0 || (m > 1 && b % 2 != 0))
        return 0;
    int64_t blocks = d / b;
    for (int64_t i = 1; i < m; i++, blocks /= 2)
        if (blocks % 2 != 0)
            return 0;
    return 1;
}

/* Everything that boft.h says about a plan; products are formed with an overflow check. */
static void expect_plan(const boft_plan *plan, int64_t d, int64_t b, int64_t m)
{
    EXPECT(plan->d == d && plan->b == b && plan->m == m, "the plan is for another shape");
    EXPECT(plan->blocks == d / b, "blocks = %lld", (long long)plan->blocks);
    int64_t super = b;
    for (int64_t i = 1; i < m; i++)
        EXPECT(!__builtin_mul_overflow(super, 2, &super), "b 2^(m-1) overflows, yet it was accepted");
    EXPECT(plan->super == super, "super = %lld", (long long)plan->super);
    if (!EXPECT(plan->levels >= 1 && plan->levels <= BOFT_MAX_LEVELS && plan->levels <= m, "%lld levels",
                (long long)plan->levels))
        return;
    int64_t next_factor = 0, next_offset = 0;
    for (int64_t i = 0; i < plan->levels; i++) {
        const boft_level *level = &plan->level[i];
        EXPECT(level->first == next_factor && level->factors >= 1, "level %lld: factors from %lld, %lld of them",
               (long long)i, (long long)level->first, (long long)level->factors);
        next_factor = level->first + level->factors;
        if (!EXPECT(next_factor <= m, "level %lld: factors up to %lld", (long long)i, (long long)next_factor))
            return;
        EXPECT(level->group == b << (level->factors - 1), "level %lld: group = %lld", (long long)i,
               (long long)level->group);
        EXPECT(level->runs == (level->first == 0 ? 1 : (int64_t)1 << level->factors), "level %lld: runs = %lld",
               (long long)i, (long long)level->runs);
        EXPECT(level->runs * level->chunk == level->group, "level %lld: chunk = %lld", (long long)i,
               (long long)level->chunk);
        EXPECT(level->inner == (int64_t)1 << level->first, "level %lld: inner = %lld", (long long)i,
               (long long)level->inner);
        EXPECT(d % (level->group * level->inner) == 0, "level %lld: its groups do not divide the channels",
               (long long)i);
        EXPECT(level->offset == next_offset, "level %lld: offset = %lld", (long long)i, (long long)level->offset);
        int64_t size;
        EXPECT(!__builtin_mul_overflow(d, level->group, &size) &&
                   !__builtin_add_overflow(next_offset, size, &next_offset),
               "level %lld: its offset overflows", (long long)i);
    }
    EXPECT(next_factor == m, "the levels end at factor %lld", (long long)next_factor);
    EXPECT(plan->count == next_offset, "count = %lld", (long long)plan->count);
}

static void test_valid_shapes(void)
{
    const int64_t multiples[] = {1, 2, 3, 5, 7, 64, 1000};
    for (int64_t b = 1; b <= 320; b++)
        for (int64_t m = 1; m <= 12 && (m == 1 || b % 2 == 0); m++) {
            test_case("plans for b = %lld, m = %lld", (long long)b, (long long)m);
            for (size_t i = 0; i < sizeof multiples / sizeof *multiples; i++) {
                const int64_t d = (b << (m - 1)) * multiples[i];
                boft_plan plan;
                EXPECT_OK(boft_plan_make(d, b, m, &plan));
                expect_plan(&plan, d, b, m);
            }
        }
}

static void test_same_for_all_variants(void)
{
    boft_plan first = {0}, plan;
    for (int v = 0; next_variant(&v);) {
        test_case("the plan does not depend on the variant");
        EXPECT_OK(boft_plan_make(4096, 8, 6, &plan));
        expect_plan(&plan, 4096, 8, 6);
        if (v == 1 || first.levels == 0)
            first = plan;
        EXPECT(plan.levels == first.levels, "%lld and %lld levels", (long long)plan.levels, (long long)first.levels);
        for (int64_t i = 0; i < plan.levels && i < first.levels; i++)
            EXPECT(plan.level[i].factors == first.level[i].factors, "level %lld differs", (long long)i);
    }
}

/* A shape is refused with the right status and message, and the plan is left alone. */
static void refused_shape(int64_t d, int64_t b, int64_t m, const char *words)
{
    test_case("plan of d = %lld, b = %lld, m = %lld is refused", (long long)d, (long long)b, (long long)m);
    boft_plan plan;
    memset(&plan, 0xff, sizeof plan);
    EXPECT_REFUSED(boft_plan_make(d, b, m, &plan), BOFT_BAD_SHAPE, words);
    EXPECT(untouched(&plan, sizeof plan), "the plan was written");
}

static void test_refusals(void)
{
    refused_shape(0, 4, 1, "0 4 1");
    refused_shape(-8, 4, 1, "-8");
    refused_shape(8, 0, 1, "8 0");
    refused_shape(8, -4, 1, "-4");
    refused_shape(8, 4, 0, "0");
    refused_shape(8, 4, -3, "-3");
    refused_shape(10, 3, 1, "10 3");
    refused_shape(3, 10, 1, "3 10");
    refused_shape(12, 3, 2, "3 2");
    refused_shape(5, 1, 2, "1 2");
    refused_shape(24, 4, 5, "24 4 5");
    refused_shape(24, 4, 3, "24 4 3");
    refused_shape(768, 8, 8, "768 8 8");
    refused_shape(768, 8, 1000, "768 8 1000");
    refused_shape(INT64_MAX, 2, 1, "9223372036854775807 2");
    test_case("a missing plan is refused");
    EXPECT_REFUSED(boft_plan_make(16, 4, 2, NULL), BOFT_BAD_ARGUMENT, "plan");
}

/* Extreme sizes are refused or right; below 2^40 elements a valid shape is never refused. */
static void test_extreme_sizes(void)
{
    const int64_t large = (int64_t)1 << 62;
    const int64_t sizes[] = {INT64_MIN,
                             INT64_MIN + 1,
                             -1,
                             0,
                             1,
                             2,
                             3,
                             6,
                             1000,
                             INT32_MAX,
                             (int64_t)INT32_MAX + 1,
                             (int64_t)3 << 30,
                             (int64_t)1 << 32,
                             (int64_t)1 << 40,
                             (int64_t)3 << 50,
                             large / 2,
                             large,
                             large + 2,
                             INT64_MAX - 1,
                             INT64_MAX};
    const int64_t factors[] = {INT64_MIN, -1, 0,  1,  2,  3,  20, 30,  31,        32,
                               33,        40, 61, 62, 63, 64, 65, 128, INT32_MAX, INT64_MAX};
    enum { SIZES = sizeof sizes / sizeof *sizes, FACTORS = sizeof factors / sizeof *factors };
    for (int i = 0; i < SIZES; i++)
        for (int j = 0; j < SIZES; j++) {
            const int64_t d = sizes[i], b = sizes[j];
            test_case("plans of d = %lld, b = %lld", (long long)d, (long long)b);
            for (int k = 0; k < FACTORS; k++) {
                const int64_t m = factors[k];
                boft_plan plan;
                const boft_status status = boft_plan_make(d, b, m, &plan);
                const int valid = valid_shape(d, b, m);
                if (status == BOFT_OK) {
                    EXPECT(valid, "m = %lld was accepted", (long long)m);
                    expect_plan(&plan, d, b, m);
                    continue;
                }
                EXPECT(status == BOFT_BAD_SHAPE, "m = %lld: status %d", (long long)m, (int)status);
                /* super <= d, so d (m - 1 doublings of b) is at most d^2. */
                EXPECT(!(valid && d <= 1 << 20), "m = %lld: a small valid shape was refused: %s", (long long)m,
                       boft_last_error());
            }
        }
}

static void *last_error_of_a_thread(void *out)
{
    const char *before = boft_last_error();
    *(int *)out = before[0] == '\0' && boft_plan_make(7, 7, 7, NULL) == BOFT_BAD_ARGUMENT && boft_last_error()[0];
    return NULL;
}

/* Must run first: no refusal may have happened in this thread. */
static void test_last_error(void)
{
    test_case("the last error is empty at first, outlives successes and belongs to one thread");
    EXPECT(strcmp(boft_last_error(), "") == 0, "it is \"%s\" at first", boft_last_error());
    boft_plan plan;
    EXPECT_OK(boft_plan_make(16, 4, 2, &plan));
    EXPECT(strcmp(boft_last_error(), "") == 0, "a success left \"%s\"", boft_last_error());
    EXPECT_REFUSED(boft_plan_make(23, 4, 2, &plan), BOFT_BAD_SHAPE, "23 4");
    char before[512];
    snprintf(before, sizeof before, "%s", boft_last_error());
    EXPECT_OK(boft_plan_make(16, 4, 2, &plan));
    EXPECT(strcmp(boft_last_error(), before) == 0, "a success changed it to \"%s\"", boft_last_error());
    pthread_t thread;
    int separate = 0;
    EXPECT(pthread_create(&thread, NULL, last_error_of_a_thread, &separate) == 0, "no thread");
    pthread_join(thread, NULL);
    EXPECT(separate, "another thread did not start with an empty message of its own");
    EXPECT(strcmp(boft_last_error(), before) == 0, "another thread changed it to \"%s\"", boft_last_error());
}

int main(int argc, char **argv)
{
    test_start("test_plan", argc, argv);
    test_last_error();
    test_valid_shapes();
    test_same_for_all_variants();
    test_refusals();
    test_extreme_sizes();
    return test_finish();
}
