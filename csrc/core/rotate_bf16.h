/*
 * x R and its backward for bfloat16 data by the functions of rotate_pairs.h or rotate_amx.h, for one level of groups of
 * whole vectors. One of the two has been included before.
 */

/* Whether the functions below take these arguments. From the whole call's shape, so that threads do not matter. */
static inline int bf16_serves(const boft_plan *plan, boft_dtype dtype, int64_t rows)
{
    return dtype == BOFT_BF16 && boft_goes_in_pairs(plan) && rows >= BOFT_PAIRS_ROWS_MIN;
}

/* Not inlined, and with the smallest group as a constant, so that its loops have the registers to themselves. */
VEC_ATTR static __attribute__((noinline)) void bf16_gradient_one(int64_t groups, bf16_rows x, bf16_rows dy,
                                                                 float *dblocks, int start)
{
    bf16_gradient_rows(BF16_LANES, groups, BF16_BACK_ROWS, x, dy, dblocks, start);
}

VEC_ATTR static __attribute__((noinline)) void bf16_gradient(int64_t group, int64_t groups, int64_t rows, bf16_rows x,
                                                             bf16_rows dy, float *dblocks, int start)
{
    if (group == BF16_LANES && rows == BF16_BACK_ROWS)
        bf16_gradient_one(groups, x, dy, dblocks, start);
    else if (rows == BF16_BACK_ROWS)
        bf16_gradient_rows(group, groups, BF16_BACK_ROWS, x, dy, dblocks, start);
    else if (group == BF16_LANES)
        bf16_gradient_rows(BF16_LANES, groups, rows, x, dy, dblocks, start);
    else
        bf16_gradient_rows(group, groups, rows, x, dy, dblocks, start);
}

VEC_ATTR static void bf16_rotate(const boft_rotate_args *args, const float *factors, int64_t begin, int64_t end,
                                 void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t span = boft_span_channels(plan), group = plan->super;
    bf16_begin(group);
    for (int64_t first = 0; first < plan->d; first += span) {
        const int64_t groups = boft_min(span, plan->d - first) / group;
        const bf16_blocks blocks = bf16_pack(group, groups, (const float *)args->blocks + first * group, workspace);
        for (int64_t row = begin; row < end; row += BF16_ROWS) {
            const int64_t rows = boft_min(BF16_ROWS, end - row);
            const int64_t ahead = boft_ahead(BF16_ROWS, row, rows, args->rows);
            const bf16_rows x = {(const uint16_t *)args->x + row * args->x_stride + first, args->x_stride, ahead};
            const bf16_room y = {(uint16_t *)args->y + row * args->y_stride + first, args->y_stride, ahead};
            bf16_multiply(group, groups, rows, x, blocks, factors ? factors + row : NULL, y);
        }
    }
    bf16_end();
}

VEC_ATTR static void bf16_rotate_backward(const boft_rotate_backward_args *args, int64_t begin, int64_t end,
                                          void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t span = boft_span_channels(plan), across = boft_spans(plan), group = plan->super;
    const int64_t splits = boft_rotate_backward_splits(plan, args->rows);
    bf16_begin(group);
    for (int64_t task = begin; task < end; task++) {
        const int64_t split = task / across, channel = task % across * span;
        const int64_t groups = boft_min(span, plan->d - channel) / group;
        const int64_t first = boft_split_begin(args->rows, split, splits);
        const int64_t past = boft_split_begin(args->rows, split + 1, splits);
        float *dblocks = args->dblocks ? (float *)args->dblocks + split * plan->count + channel * group : NULL;
        bf16_blocks back = {NULL, 0};
        if (args->dx)
            back = bf16_pack(group, groups, (const float *)args->blocks_back + channel * group, workspace);
        for (int64_t row = first; row < past; row += BF16_BACK_ROWS) {
            const int64_t rows = boft_min(BF16_BACK_ROWS, past - row);
            const int64_t ahead = boft_ahead(BF16_ROWS, row, rows, args->rows);
            bf16_rows dy = {(const uint16_t *)args->dy + row * args->dy_stride + channel, args->dy_stride, ahead};
            if (dblocks) {
                const bf16_rows x = {(const uint16_t *)args->x + row * args->x_stride + channel, args->x_stride, ahead};
                bf16_gradient(group, groups, rows, args->transpose ? dy : x, args->transpose ? x : dy, dblocks,
                              row == first);
                dy.ahead = 0;
            }
            if (args->dx) {
                const bf16_room dx = {(uint16_t *)args->dx + row * args->dx_stride + channel, args->dx_stride, ahead};
                bf16_multiply(group, groups, rows, dy, back, NULL, dx);
            }
        }
    }
    bf16_end();
}
