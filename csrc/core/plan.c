/* Shape rules and the choice of levels. */
#include "status.h"

/*
 * Cost of one level, in multiply-adds per element of x over a forward and a backward pass: 3 group for the product and
 * its two gradients, and `touch` for reading and writing an element in cache. A level with first > 0 also gathers and
 * scatters its channels, and the backward computes its result again: group more, and GATHER and, for each run of b / 2
 * channels, GATHER_RUN (two Zen 4 cores, 1024 rows: at d = 1280, b = 40, m = 3, levels of 80 and 40 took 14.3 ms, one of
 * 160 takes 12; at d = 1024, b = 2, m = 6, two levels of 8 took 13 ms, one of 64 takes 6.3). Then collapsing (k factors
 * cost about 3 group b (k - 1) per channel), spread over this many rows.
 */
enum { TOUCH = 24, GATHER = 80, GATHER_RUN = 520, ROWS = 1024 };

static double level_cost(int64_t b, int64_t first, int64_t factors)
{
    double group = (double)b * (double)((int64_t)1 << (factors - 1));
    double gathering = first == 0 ? 0 : group + GATHER + GATHER_RUN / (0.5 * (double)b);
    return 3 * group + TOUCH + gathering + 3 * group * (double)b * (double)(factors - 1) / ROWS;
}

/* Splits factors 0 ... m-1 into the cheapest levels; cut[i] is the first factor of the level that ends before i. */
static void choose_levels(int64_t b, int64_t m, int64_t cut[])
{
    double best[64] = {0};
    for (int64_t end = 1; end <= m; end++) {
        for (int64_t first = 0; first < end; first++) {
            double cost = best[first] + level_cost(b, first, end - first);
            if (first == 0 || cost < best[end]) {
                best[end] = cost;
                cut[end] = first;
            }
        }
    }
}

static void fill_level(boft_plan *plan, boft_level *level, int64_t first, int64_t factors)
{
    level->first = first;
    level->factors = factors;
    level->group = plan->b << (factors - 1);
    level->runs = first == 0 ? 1 : (int64_t)1 << factors;
    level->chunk = level->group / level->runs;
    level->inner = (int64_t)1 << first;
    level->offset = 0;
}

boft_status boft_plan_make(int64_t d, int64_t b, int64_t m, boft_plan *plan)
{
    const long long ld = d, lb = b, lm = m;
    if (!plan)
        return boft_refuse(BOFT_BAD_ARGUMENT, "plan is NULL");
    if (d < 1 || b < 1 || m < 1)
        return boft_refuse(BOFT_BAD_SHAPE, "d = %lld, b = %lld and m = %lld must be at least 1", ld, lb, lm);
    if (d % b != 0)
        return boft_refuse(BOFT_BAD_SHAPE, "%lld channels are not divisible by the block size b = %lld", ld, lb);
    if (m > 1 && b % 2 != 0)
        return boft_refuse(BOFT_BAD_SHAPE, "block size b = %lld must be even for m = %lld butterfly factors", lb, lm);
    int64_t super = b;
    for (int64_t i = 1; i < m; i++) {
        if ((d / super) % 2 != 0) {
            if (m <= 62 && b <= INT64_MAX >> (m - 1))
                return boft_refuse(BOFT_BAD_SHAPE,
                                   "%lld channels are not divisible by b 2^(m-1) = %lld (b = %lld, m = %lld); m can be "
                                   "at most %lld",
                                   ld, lb << (m - 1), lb, lm, (long long)i);
            return boft_refuse(BOFT_BAD_SHAPE,
                               "%lld channels are not divisible by b 2^(m-1) (b = %lld, m = %lld); m can be at most %lld",
                               ld, lb, lm, (long long)i);
        }
        super *= 2;
    }
    if (super > INT32_MAX || d > INT64_MAX / 64 / super)
        return boft_refuse(BOFT_BAD_SHAPE, "%lld channels with groups of %lld are more than can be addressed", ld,
                           (long long)super);

    int64_t cut[64];
    choose_levels(b, m, cut);
    plan->d = d;
    plan->b = b;
    plan->m = m;
    plan->blocks = d / b;
    plan->super = super;
    plan->levels = 0;
    for (int64_t end = m; end > 0; end = cut[end])
        plan->levels++;
    int64_t end = m;
    for (int64_t i = plan->levels - 1; i >= 0; i--) {
        fill_level(plan, &plan->level[i], cut[end], end - cut[end]);
        end = cut[end];
    }
    plan->count = 0;
    for (int64_t i = 0; i < plan->levels; i++) {
        plan->level[i].offset = plan->count;
        plan->count += d * plan->level[i].group;
    }
    return BOFT_OK;
}
