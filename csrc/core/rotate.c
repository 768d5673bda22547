/* x R, the merge and the backward of x R: checks, sizes, and the call of the current variant. */
#include "kernels.h"
#include "status.h"
#include "tiles.h"

#include <string.h>

/* Enough tasks for the threads of a large machine to share evenly. */
enum { TASKS = 32 };
/* Rows that a caller works on together through a whole layer: splits should not be larger. */
enum { PART_ROWS = 512 };
/* Partial gradients stay below this many elements where two splits suffice. */
enum { SPLIT_ELEMENTS = 1 << 21 };
/* Lanes of the widest vector of reals. */
enum { BOFT_MOST_LANES = 16 };

/* At most this many REALs hold the blocks of a span packed for groups in lanes: a window is more than half a vector. */
static int64_t packed_reals(const boft_plan *plan)
{
    const int64_t vectors_of_a_tile = 2 * boft_tile_channels(plan) + BOFT_MOST_LANES;
    const int64_t tiles = boft_quotient_up(boft_span_channels(plan), boft_tile_channels(plan));
    return plan->levels == 1 && 2 * plan->super <= BOFT_MOST_LANES ? tiles * vectors_of_a_tile * plan->super : 0;
}

/* Floats that hold the blocks of a span as pairs of bfloat16 numbers, hi and lo. */
static int64_t paired_floats(const boft_plan *plan, boft_dtype dtype)
{
    return dtype == BOFT_BF16 && boft_goes_in_pairs(plan) ? boft_span_channels(plan) * plan->super : 0;
}

size_t boft_rotate_workspace(const boft_plan *plan, boft_dtype dtype)
{
    /* Two strips of a tile and, for levels with gathered channels, two of a group. */
    const int64_t strips = 2 * BOFT_TILE_ROWS * (boft_tile_channels(plan) + plan->super);
    return (size_t)(strips + boft_max(packed_reals(plan), paired_floats(plan, dtype))) * boft_real_size(dtype);
}

static boft_status check_rotate(const boft_rotate_args *args)
{
    boft_status status = boft_check_data("rotate", args->dtype);
    if (status)
        return status;
    if (args->rows < 0 || args->x_stride < 0 || args->y_stride < args->plan->d)
        return boft_refuse(BOFT_BAD_SHAPE, "rotate: %lld rows with strides %lld and %lld for %lld channels",
                           (long long)args->rows, (long long)args->x_stride, (long long)args->y_stride,
                           (long long)args->plan->d);
    return BOFT_OK;
}

boft_status boft_merge(const boft_rotate_args *args, const void *s, int64_t begin, int64_t end, void *workspace)
{
    boft_status status;
    if ((status = boft_check_pointer("rotate: args", args)) || (status = boft_check_pointer("rotate: plan", args->plan)) ||
        (status = check_rotate(args)) || (status = boft_check_range("rotate: rows", begin, end, args->rows)))
        return status;
    if (begin == end)
        return BOFT_OK;
    if ((status = boft_check_pointer("rotate: x", args->x)) || (status = boft_check_pointer("rotate: y", args->y)) ||
        (status = boft_check_pointer("rotate: blocks", args->blocks)) ||
        (status = boft_check_pointer("rotate: workspace", workspace)))
        return status;
    boft_kernels_current()->rotate[boft_real_index(args->dtype)](args, s, begin, end, workspace);
    return BOFT_OK;
}

boft_status boft_rotate(const boft_rotate_args *args, int64_t begin, int64_t end, void *workspace)
{
    return boft_merge(args, NULL, begin, end, workspace);
}

int64_t boft_rotate_backward_splits(const boft_plan *plan, int64_t rows)
{
    const int64_t wanted = boft_max(boft_quotient_up(TASKS, boft_spans(plan)), boft_quotient_up(rows, PART_ROWS));
    const int64_t most = boft_max(2, SPLIT_ELEMENTS / plan->count);
    /* A split costs a pass over the blocks, so it should sum as many rows as one of scale's, twice as many where the
     * blocks of all channels are more than the second-level cache holds (two Zen 4 cores, bfloat16, 1024 x 1280 in
     * groups of 160: step of a layer 1.29 instead of 1.31). */
    int64_t splits = boft_scale_backward_splits(boft_spans(plan) > 1 ? rows / 2 : rows);
    while (splits > 1 && (splits > most || splits / 2 >= wanted))
        splits /= 2;
    return splits;
}

int64_t boft_rotate_backward_tasks(const boft_plan *plan, int64_t rows)
{
    return boft_rotate_backward_splits(plan, rows) * boft_spans(plan);
}

size_t boft_rotate_backward_workspace(const boft_plan *plan, boft_dtype dtype)
{
    /* The input of every level and two strips of dy; two gathered groups and one gathered result. */
    const int64_t strips = BOFT_TILE_ROWS * ((plan->levels + 2) * boft_tile_channels(plan) + 3 * plan->super);
    return (size_t)(strips + boft_max(2 * packed_reals(plan), paired_floats(plan, dtype))) * boft_real_size(dtype);
}

static boft_status check_rotate_backward(const boft_rotate_backward_args *args)
{
    boft_status status = boft_check_data("rotate backward", args->dtype);
    if (status)
        return status;
    if (args->rows < 0 || args->dy_stride < 0 || (args->dblocks && args->x_stride < 0) ||
        (args->dx && args->dx_stride < args->plan->d))
        return boft_refuse(BOFT_BAD_SHAPE, "rotate backward: %lld rows with strides %lld, %lld and %lld for %lld channels",
                           (long long)args->rows, (long long)args->dy_stride, (long long)args->x_stride,
                           (long long)args->dx_stride, (long long)args->plan->d);
    return BOFT_OK;
}

boft_status boft_rotate_backward(const boft_rotate_backward_args *args, int64_t begin, int64_t end, void *workspace)
{
    boft_status status;
    if ((status = boft_check_pointer("rotate backward: args", args)) ||
        (status = boft_check_pointer("rotate backward: plan", args->plan)) || (status = check_rotate_backward(args)) ||
        (status = boft_check_range("rotate backward: tasks", begin, end,
                                   boft_rotate_backward_tasks(args->plan, args->rows))))
        return status;
    if (begin == end || (!args->dx && !args->dblocks))
        return BOFT_OK;
    if ((status = boft_check_pointer("rotate backward: workspace", workspace)))
        return status;
    int several = args->plan->levels > 1;
    if (args->rows > 0) {
        if ((status = boft_check_pointer("rotate backward: dy", args->dy)))
            return status;
        if (args->dblocks && (status = boft_check_pointer("rotate backward: x", args->x)))
            return status;
        if (args->dblocks && several && (status = boft_check_pointer("rotate backward: blocks", args->blocks)))
            return status;
        if ((args->dx || several) && (status = boft_check_pointer("rotate backward: blocks_back", args->blocks_back)))
            return status;
    }
    boft_kernels_current()->rotate_backward[boft_real_index(args->dtype)](args, begin, end, workspace);
    return BOFT_OK;
}

/* Elements summed at a time: splits are read as streams, and the sums stay in the first-level cache. */
enum { SUM_ELEMENTS = 256 };

/* to[i] = from[i] + from[count + i] + ... for i in [begin, end); to may be from. */
#define DEFINE_SUM(REAL)                                                                                               \
    static void sum_##REAL(int64_t splits, int64_t count, const REAL *from, REAL *to, int64_t begin, int64_t end)      \
    {                                                                                                                  \
        for (int64_t first = begin; first < end; first += SUM_ELEMENTS) {                                              \
            const int64_t elements = boft_min(SUM_ELEMENTS, end - first);                                              \
            REAL sum[SUM_ELEMENTS];                                                                                    \
            memcpy(sum, from + first, (size_t)elements * sizeof *sum);                                                 \
            for (int64_t split = 1; split < splits; split++)                                                           \
                for (int64_t i = 0; i < elements; i++)                                                                 \
                    sum[i] += from[split * count + first + i];                                                         \
            memcpy(to + first, sum, (size_t)elements * sizeof *sum);                                                   \
        }                                                                                                              \
    }

DEFINE_SUM(float)
DEFINE_SUM(double)
#undef DEFINE_SUM

boft_status boft_sum_splits(boft_dtype dtype, int64_t splits, int64_t count, const void *parts, void *out, int64_t begin,
                            int64_t end)
{
    boft_status status;
    if ((status = boft_check_real("sum of splits", dtype)) ||
        (status = boft_check_range("sum of splits: elements", begin, end, count)))
        return status;
    if (splits < 1)
        return boft_refuse(BOFT_BAD_SHAPE, "sum of splits: %lld parts", (long long)splits);
    if (begin == end)
        return BOFT_OK;
    if ((status = boft_check_pointer("sum of splits: parts", parts)) ||
        (status = boft_check_pointer("sum of splits: out", out)))
        return status;
    if (dtype == BOFT_F64)
        sum_double(splits, count, parts, out, begin, end);
    else
        sum_float(splits, count, parts, out, begin, end);
    return BOFT_OK;
}
