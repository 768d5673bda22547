/*
 * x R and its backward over tiles of rows x channels, where channels are whole super groups.
 *
 * With one level and data of type REAL the product runs from x straight to y. Otherwise a tile is converted to a strip
 * of REALs, goes through all levels there, and is rounded once on its way out: one pass over memory for any number of
 * levels, and no rounding between them.
 */

/* `count` values at element `at` of data, as REALs. */
VEC_FN void FN(load_run)(boft_dtype dtype, const void *data, int64_t at, int64_t count, REAL *to)
{
    enum { LANES = VEC_LANES_float };
    const int64_t whole = count / LANES * LANES;
    if (dtype == BOFT_BF16 || dtype == BOFT_F16) {
        const uint16_t *from = (const uint16_t *)data + at;
        float *out = (float *)to; /* 16-bit data has float arithmetic */
        for (int64_t j = 0; j < whole; j += LANES)
            store_float(out + j, dtype == BOFT_BF16 ? load_bf16(from + j) : load_f16(from + j));
        if (whole < count)
            storen_float(out + whole,
                         dtype == BOFT_BF16 ? loadn_bf16(from + whole, count - whole) : loadn_f16(from + whole, count - whole),
                         count - whole);
        return;
    }
    memcpy(to, (const REAL *)data + at, (size_t)count * sizeof(REAL));
}

/* Undo load_run, rounding to nearest even. */
VEC_FN void FN(store_run)(boft_dtype dtype, const REAL *from, void *data, int64_t at, int64_t count)
{
    enum { LANES = VEC_LANES_float };
    const int64_t whole = count / LANES * LANES, rest = count - whole;
    if (dtype == BOFT_BF16 || dtype == BOFT_F16) {
        uint16_t *to = (uint16_t *)data + at;
        const float *in = (const float *)from;
        for (int64_t j = 0; j < whole; j += LANES) {
            if (dtype == BOFT_BF16)
                store_bf16(to + j, load_float(in + j));
            else
                store_f16(to + j, load_float(in + j));
        }
        if (rest && dtype == BOFT_BF16)
            storen_bf16(to + whole, loadn_float(in + whole, rest), rest);
        else if (rest)
            storen_f16(to + whole, loadn_float(in + whole, rest), rest);
        return;
    }
    memcpy((REAL *)data + at, from, (size_t)count * sizeof(REAL));
}

/* Whether data of this dtype can be multiplied where it lies. */
VEC_FN int FN(is_real)(boft_dtype dtype)
{
    return dtype == (sizeof(REAL) == sizeof(double) ? BOFT_F64 : BOFT_F32);
}

/* A strip of rows of a tile: element (t, j) at t stride + j. */
typedef struct FN(strip) {
    const REAL *data;
    int64_t stride;
} FN(strip);

/* The tile as a strip: where it lies if its type is REAL, otherwise converted into `buffer`. */
VEC_FN FN(strip) FN(load_strip)(boft_dtype dtype, const void *data, int64_t stride, int64_t row, int64_t rows,
                                int64_t channel, int64_t channels, REAL *buffer)
{
    if (FN(is_real)(dtype))
        return (FN(strip)){(const REAL *)data + row * stride + channel, stride};
    for (int64_t t = 0; t < rows; t++)
        FN(load_run)(dtype, data, (row + t) * stride + channel, channels, buffer + t * channels);
    return (FN(strip)){buffer, channels};
}

VEC_FN void FN(store_strip)(boft_dtype dtype, const REAL *strip, void *data, int64_t stride, int64_t row, int64_t rows,
                            int64_t channel, int64_t channels)
{
    for (int64_t t = 0; t < rows; t++)
        FN(store_run)(dtype, strip + t * channels, data, (row + t) * stride + channel, channels);
}

/* The rows of group g of a strip: where they lie if its channels are contiguous, otherwise copied into `buffer`. */
VEC_FN FN(strip) FN(gather_group)(const boft_level *level, int64_t g, FN(strip) in, int64_t rows, REAL *buffer)
{
    const REAL *from = in.data + boft_group_start(level, g);
    if (level->runs == 1)
        return (FN(strip)){from, in.stride};
    const int64_t stride = boft_run_stride(level), chunk = level->chunk;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t run = 0; run < level->runs; run++)
            for (int64_t j = 0; j < chunk; j++)
                buffer[t * level->group + run * chunk + j] = from[t * in.stride + run * stride + j];
    return (FN(strip)){buffer, level->group};
}

/* Undo gather_group's copy. */
VEC_FN void FN(scatter_group)(const boft_level *level, int64_t g, const REAL *buffer, int64_t rows, REAL *out,
                              int64_t out_stride)
{
    const int64_t stride = boft_run_stride(level), chunk = level->chunk;
    REAL *to = out + boft_group_start(level, g);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t run = 0; run < level->runs; run++)
            for (int64_t j = 0; j < chunk; j++)
                to[t * out_stride + run * stride + j] = buffer[t * level->group + run * chunk + j];
}

/* out = in with each group multiplied by its block; `gathered` holds 2 rows group REALs. */
VEC_FN void FN(apply_level)(const boft_level *level, const REAL *blocks, int64_t rows, int64_t channels, FN(strip) in,
                            REAL *out, int64_t out_stride, REAL *gathered)
{
    const int64_t group = level->group;
    REAL *product = gathered + rows * group;
    for (int64_t g = 0; g < channels / group; g++) {
        const FN(strip) x = FN(gather_group)(level, g, in, rows, gathered);
        const REAL *block = blocks + g * group * group;
        if (level->runs == 1) {
            FN(gemm)(rows, group, group, x.data, x.stride, 1, block, group, out + g * group, out_stride, 0);
        } else {
            FN(gemm)(rows, group, group, x.data, x.stride, 1, block, group, product, group, 0);
            FN(scatter_group)(level, g, product, rows, out, out_stride);
        }
    }
}

VEC_FN void FN(rotate_tile)(const boft_rotate_args *args, int64_t row, int64_t rows, int64_t channel, int64_t channels,
                            REAL *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t size = BOFT_TILE_ROWS * boft_tile_channels(plan);
    REAL *strips[2] = {workspace, workspace + size}, *gathered = workspace + 2 * size;
    FN(strip) x = FN(load_strip)(args->dtype, args->x, args->x_stride, row, rows, channel, channels, strips[1]);
    for (int64_t step = 0; step < plan->levels; step++) {
        const boft_level *level = &plan->level[args->transpose ? step : plan->levels - 1 - step];
        const REAL *blocks = (const REAL *)args->blocks + boft_tile_blocks(level, channel);
        if (step == plan->levels - 1 && FN(is_real)(args->dtype)) {
            FN(apply_level)(level, blocks, rows, channels, x, (REAL *)args->y + row * args->y_stride + channel,
                            args->y_stride, gathered);
            return;
        }
        FN(apply_level)(level, blocks, rows, channels, x, strips[step % 2], channels, gathered);
        x = (FN(strip)){strips[step % 2], channels};
    }
    FN(store_strip)(args->dtype, x.data, args->y, args->y_stride, row, rows, channel, channels);
}

VEC_ATTR static void FN(rotate)(const boft_rotate_args *args, int64_t begin, int64_t end, void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t tile = boft_tile_channels(plan);
    /* Blocks that fit the second-level cache stay there while rows stream by; larger ones are read once per tile. */
    const int64_t block_of_rows = plan->count * (int64_t)sizeof(REAL) <= 1 << 19 ? BOFT_TILE_ROWS : end - begin;
    for (int64_t first = begin; first < end; first += block_of_rows) {
        const int64_t past = boft_min(first + block_of_rows, end);
        for (int64_t channel = 0; channel < plan->d; channel += tile)
            for (int64_t row = first; row < past; row += BOFT_TILE_ROWS)
                FN(rotate_tile)(args, row, boft_min(BOFT_TILE_ROWS, past - row), channel,
                                boft_min(tile, plan->d - channel), workspace);
    }
}

/* dblocks (+)= x_g^T dy_g for each group; `gathered` holds 2 rows group REALs. */
VEC_FN void FN(block_gradients)(const boft_level *level, int64_t rows, int64_t channels, FN(strip) x, FN(strip) dy,
                                REAL *dblocks, int accumulate, REAL *gathered)
{
    const int64_t group = level->group;
    for (int64_t g = 0; g < channels / group; g++) {
        const FN(strip) left = FN(gather_group)(level, g, x, rows, gathered);
        const FN(strip) right = FN(gather_group)(level, g, dy, rows, gathered + rows * group);
        FN(gemm)(group, group, rows, left.data, 1, left.stride, right.data, right.stride, dblocks + g * group * group,
                 group, accumulate);
    }
}

/* Backward of a tile; `dblocks` (of the tile's split, or NULL) is added to if `accumulate`, else written. */
VEC_FN void FN(rotate_backward_tile)(const boft_rotate_backward_args *args, int64_t row, int64_t rows, int64_t channel,
                                     int64_t channels, REAL *dblocks, int accumulate, REAL *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t size = BOFT_TILE_ROWS_BACKWARD * boft_tile_channels(plan), last = plan->levels - 1;
    REAL *inputs = workspace, *strips[2] = {inputs + plan->levels * size, inputs + (plan->levels + 1) * size};
    REAL *gathered = inputs + (plan->levels + 2) * size;
    FN(strip) x[BOFT_MAX_LEVELS];
    if (dblocks) {
        x[0] = FN(load_strip)(args->dtype, args->x, args->x_stride, row, rows, channel, channels, inputs);
        for (int64_t step = 0; step < last; step++) {
            const boft_level *level = &plan->level[args->transpose ? step : last - step];
            REAL *out = inputs + (step + 1) * size;
            FN(apply_level)(level, (const REAL *)args->blocks + boft_tile_blocks(level, channel), rows, channels, x[step],
                            out, channels, gathered);
            x[step + 1] = (FN(strip)){out, channels};
        }
    }
    FN(strip) dy = FN(load_strip)(args->dtype, args->dy, args->dy_stride, row, rows, channel, channels, strips[1]);
    for (int64_t step = last; step >= 0; step--) {
        const boft_level *level = &plan->level[args->transpose ? step : last - step];
        const int64_t at = boft_tile_blocks(level, channel);
        if (dblocks) /* for x R^T the gradient is of the untransposed blocks */
            FN(block_gradients)(level, rows, channels, args->transpose ? dy : x[step], args->transpose ? x[step] : dy,
                                dblocks + at, accumulate, gathered);
        if (step == 0 && !args->dx)
            return;
        const REAL *blocks = (const REAL *)args->blocks_back + at;
        if (step == 0 && FN(is_real)(args->dtype)) {
            FN(apply_level)(level, blocks, rows, channels, dy, (REAL *)args->dx + row * args->dx_stride + channel,
                            args->dx_stride, gathered);
            return;
        }
        REAL *out = strips[(last - step) % 2];
        FN(apply_level)(level, blocks, rows, channels, dy, out, channels, gathered);
        dy = (FN(strip)){out, channels};
    }
    FN(store_strip)(args->dtype, dy.data, args->dx, args->dx_stride, row, rows, channel, channels);
}

VEC_ATTR static void FN(rotate_backward)(const boft_rotate_backward_args *args, int64_t begin, int64_t end,
                                         void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t tile = boft_tile_channels(plan), across = boft_tiles_across(plan);
    const int64_t splits = boft_rotate_backward_splits(plan, args->rows);
    for (int64_t task = begin; task < end; task++) {
        const int64_t split = task / across, channel = task % across * tile;
        const int64_t channels = boft_min(tile, plan->d - channel);
        const int64_t first = args->rows * split / splits, past = args->rows * (split + 1) / splits;
        REAL *dblocks = args->dblocks ? (REAL *)args->dblocks + split * plan->count : NULL;
        for (int64_t i = 0; dblocks && first == past && i < plan->levels; i++)
            memset(dblocks + boft_tile_blocks(&plan->level[i], channel), 0,
                   (size_t)(channels * plan->level[i].group) * sizeof(REAL));
        for (int64_t row = first; row < past; row += BOFT_TILE_ROWS_BACKWARD)
            FN(rotate_backward_tile)(args, row, boft_min(BOFT_TILE_ROWS_BACKWARD, past - row), channel, channels, dblocks,
                                     row > first, workspace);
    }
}
