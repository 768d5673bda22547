/*
 * x R and its backward over tiles of rows x channels, where channels are whole super groups.
 *
 * With one level and data of type REAL the product runs from x straight to y. Otherwise a tile is converted to a strip
 * of REALs, goes through all levels there, and is rounded once on its way out: one pass over memory for any number of
 * levels, and no rounding between them.
 */
#include "lanes_template.h"

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

/* to = from, `count` REALs that overlap nothing. Chunks of the usual block sizes are single moves. */
VEC_FN void FN(copy_chunk)(int64_t count, const REAL *from, REAL *to)
{
    switch (count) {
    case 1:
        *to = *from;
        return;
    case 2:
        memcpy(to, from, 2 * sizeof(REAL));
        return;
    case 4:
        memcpy(to, from, 4 * sizeof(REAL));
        return;
    case 8:
        memcpy(to, from, 8 * sizeof(REAL));
        return;
    default:
        for (; count >= VEC(VEC_LANES); count -= VEC(VEC_LANES), from += VEC(VEC_LANES), to += VEC(VEC_LANES))
            VEC(store)(to, VEC(load)(from));
        for (int64_t j = 0; j < count; j++)
            to[j] = from[j];
    }
}

/* The rows of group g of a strip: where they lie if its channels are contiguous, otherwise, or to `copy`, in `buffer`. */
VEC_FN FN(strip) FN(gather_group)(const boft_level *level, int64_t g, FN(strip) in, int64_t rows, int copy, REAL *buffer)
{
    if (level->runs == 1) {
        const FN(strip) group = {in.data + g * level->group, in.stride};
        if (!copy)
            return group;
        for (int64_t t = 0; t < rows; t++)
            memcpy(buffer + t * level->group, group.data + t * group.stride, (size_t)level->group * sizeof(REAL));
        return (FN(strip)){buffer, level->group};
    }
    const REAL *from = in.data + boft_group_start(level, g);
    const int64_t stride = boft_run_stride(level), chunk = level->chunk;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t run = 0; run < level->runs; run++)
            FN(copy_chunk)(chunk, from + t * in.stride + run * stride, buffer + t * level->group + run * chunk);
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
            FN(copy_chunk)(chunk, buffer + t * level->group + run * chunk, to + t * out_stride + run * stride);
}

/*
 * Groups of exactly one or two vectors that lie side by side, BOFT_TILE_ROWS_SMALL rows: out = x times the blocks, and
 * dblocks += x^T dy. `vectors` is a constant. The functions that fix it are not inlined, so that their loops have the
 * registers to themselves (two Zen 4 cores, 64 x 768 in cache: 1.0 times the floor, inlined 1.3).
 */
VEC_FN void FN(multiply_small)(const int vectors, int64_t groups, FN(strip) x, const REAL *blocks, REAL *out,
                               int64_t out_stride)
{
    const int64_t group = vectors * VEC(VEC_LANES);
    for (int64_t g = 0; g < groups; g++)
        FN(gemm_tile)(BOFT_TILE_ROWS_SMALL, vectors, 0, 0, group, x.data + g * group, x.stride, 1,
                      blocks + g * group * group, group, out + g * group, out_stride, 0);
}

VEC_ATTR static __attribute__((noinline)) void FN(multiply_one)(int64_t groups, FN(strip) x, const REAL *blocks, REAL *out,
                                                                int64_t out_stride)
{
    FN(multiply_small)(1, groups, x, blocks, out, out_stride);
}

VEC_ATTR static __attribute__((noinline)) void FN(multiply_two)(int64_t groups, FN(strip) x, const REAL *blocks, REAL *out,
                                                                int64_t out_stride)
{
    FN(multiply_small)(2, groups, x, blocks, out, out_stride);
}

VEC_FN void FN(gradient_small)(const int vectors, int64_t groups, FN(strip) x, FN(strip) dy, REAL *dblocks)
{
    enum { LANES = VEC(VEC_LANES), ROWS = BOFT_TILE_ROWS_SMALL };
    const int64_t group = vectors * LANES;
    for (int64_t g = 0; g < groups; g++) {
        const REAL *in = x.data + g * group;
        REAL *row = dblocks + g * group * group;
        VEC(vec) grad[ROWS][2];
#pragma GCC unroll 4
        for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                grad[t][v] = VEC(load)(dy.data + t * dy.stride + g * group + v * LANES);
#pragma GCC unroll 16
        for (int64_t k = 0; k < group; k++, row += group)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                VEC(vec) sum = VEC(load)(row + v * LANES);
#pragma GCC unroll 4
                for (int t = 0; t < ROWS; t++)
                    sum = VEC(fma)(VEC(set1)(in[t * x.stride + k]), grad[t][v], sum);
                VEC(store)(row + v * LANES, sum);
            }
    }
}

VEC_ATTR static __attribute__((noinline)) void FN(gradient_one)(int64_t groups, FN(strip) x, FN(strip) dy, REAL *dblocks)
{
    FN(gradient_small)(1, groups, x, dy, dblocks);
}

VEC_ATTR static __attribute__((noinline)) void FN(gradient_two)(int64_t groups, FN(strip) x, FN(strip) dy, REAL *dblocks)
{
    FN(gradient_small)(2, groups, x, dy, dblocks);
}

/* Whole vectors of a group, if there are few enough for the functions above to take this tile, otherwise 0. */
VEC_FN int FN(small_vectors)(const boft_level *level, int64_t rows)
{
    enum { LANES = VEC(VEC_LANES) };
    const int serves = level->runs == 1 && rows == BOFT_TILE_ROWS_SMALL && boft_is_vectors(level->group, LANES);
    return serves ? (int)(level->group / LANES) : 0;
}

/* out = in with each group multiplied by its block; `gathered` holds 2 rows group REALs. */
VEC_FN void FN(apply_level)(const boft_level *level, const REAL *blocks, int64_t rows, int64_t channels, FN(strip) in,
                            REAL *out, int64_t out_stride, REAL *gathered)
{
    const int64_t group = level->group, groups = channels / group;
    const int vectors = FN(small_vectors)(level, rows);
    if (vectors == 1) {
        FN(multiply_one)(groups, in, blocks, out, out_stride);
        return;
    }
    if (vectors == 2) {
        FN(multiply_two)(groups, in, blocks, out, out_stride);
        return;
    }
    REAL *product = gathered + rows * group;
    for (int64_t g = 0; g < groups; g++) {
        const FN(strip) x = FN(gather_group)(level, g, in, rows, 0, gathered);
        const REAL *block = blocks + g * group * group;
        if (level->runs == 1) {
            FN(gemm)(rows, group, group, x.data, x.stride, 1, block, group, out + g * group, out_stride, 0);
        } else {
            FN(gemm)(rows, group, group, x.data, x.stride, 1, block, group, product, group, 0);
            FN(scatter_group)(level, g, product, rows, out, out_stride);
        }
    }
}

/* Row t of a strip times factors[t], in place. */
VEC_FN void FN(scale_strip)(const REAL *factors, int64_t rows, int64_t channels, REAL *strip, int64_t stride)
{
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < channels; j++)
            strip[t * stride + j] *= factors[t];
}

/* factors: NULL, or one for each row from `row` on. */
VEC_FN void FN(rotate_tile)(const boft_rotate_args *args, const REAL *factors, const FN(lanes) *lanes, int64_t row,
                            int64_t rows, int64_t channel, int64_t channels, REAL *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t size = boft_tile_rows(plan, VEC(VEC_LANES)) * boft_tile_channels(plan);
    REAL *strips[2] = {workspace, workspace + size}, *gathered = workspace + 2 * size;
    FN(strip) x = FN(load_strip)(args->dtype, args->x, args->x_stride, row, rows, channel, channels, strips[1]);
    for (int64_t step = 0; step < plan->levels; step++) {
        const boft_level *level = &plan->level[args->transpose ? step : plan->levels - 1 - step];
        const int straight = step == plan->levels - 1 && FN(is_real)(args->dtype);
        REAL *out = straight ? (REAL *)args->y + row * args->y_stride + channel : strips[step % 2];
        const int64_t out_stride = straight ? args->y_stride : channels;
        if (lanes->group)
            FN(lanes_rotate)(lanes, channel, rows, channels, x.data, x.stride, out, out_stride);
        else
            FN(apply_level)(level, (const REAL *)args->blocks + boft_tile_blocks(level, channel), rows, channels, x, out,
                            out_stride, gathered);
        if (factors && step == plan->levels - 1)
            FN(scale_strip)(factors, rows, channels, out, out_stride);
        if (straight)
            return;
        x = (FN(strip)){out, channels};
    }
    FN(store_strip)(args->dtype, x.data, args->y, args->y_stride, row, rows, channel, channels);
}

VEC_ATTR static void FN(rotate)(const boft_rotate_args *args, const void *factors, int64_t begin, int64_t end,
                                void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t tile = boft_tile_channels(plan), span = boft_span_channels(plan);
    const int64_t tall = boft_tile_rows(plan, VEC(VEC_LANES)), band = boft_band_rows(tall);
    for (int64_t first = 0; first < plan->d; first += span) {
        const int64_t past = boft_min(first + span, plan->d);
        FN(lanes) lanes = FN(lanes_of)(plan, first);
        REAL *strips = workspace;
        if (lanes.group) {
            FN(lanes_pack)(&lanes, past - first, args->blocks, strips);
            strips += FN(lanes_size)(&lanes, past - first);
        }
        for (int64_t at = begin; at < end; at += band)
            for (int64_t channel = first; channel < past; channel += tile)
                for (int64_t row = at; row < boft_min(at + band, end); row += tall)
                    FN(rotate_tile)(args, factors ? (const REAL *)factors + row : NULL, &lanes, row,
                                    boft_min(tall, end - row), channel, boft_min(tile, past - channel), strips);
    }
}

/*
 * A level's part of the backward: dblocks (unless NULL) of x and dy, which for x R^T change places, and dx (unless
 * NULL) = dy times the blocks; `gathered` holds 3 rows group REALs.
 */
VEC_FN void FN(level_backward)(const boft_level *level, int transpose, const REAL *blocks_back, int64_t rows,
                               int64_t channels, FN(strip) x, FN(strip) dy, REAL *dblocks, int accumulate, REAL *dx,
                               int64_t dx_stride, REAL *gathered)
{
    const int64_t group = level->group, groups = channels / group;
    const int vectors = accumulate ? FN(small_vectors)(level, rows) : 0;
    if (vectors) {
        const FN(strip) left = transpose ? dy : x, right = transpose ? x : dy;
        if (dblocks && vectors == 1)
            FN(gradient_one)(groups, left, right, dblocks);
        else if (dblocks)
            FN(gradient_two)(groups, left, right, dblocks);
        if (dx)
            FN(apply_level)(level, blocks_back, rows, channels, dy, dx, dx_stride, gathered);
        return;
    }
    REAL *product = gathered + 2 * rows * group;
    /* gemm reads a row once for each panel of columns, so dx in the place of dy would change it for the second. */
    const int one_panel = group <= VEC(VEC_LANES) || group == 2 * VEC(VEC_LANES);
    const int overlap = dx == dy.data && !one_panel;
    /* Rows far apart share sets of the first-level cache (AVX2 on a Zen 3 core, 512 x 1024 in groups of 64: 43 GF/s,
     * copied 75; 512 x 1280 in groups of 160: 67 and 83). */
    const int copy = rows > BOFT_TILE_ROWS_SMALL && group >= BOFT_SMALL_GROUP;
    for (int64_t g = 0; g < groups; g++) {
        const REAL *block = blocks_back + g * group * group;
        const FN(strip) grad = FN(gather_group)(level, g, dy, rows, overlap || copy, gathered);
        if (dblocks) {
            const FN(strip) in = FN(gather_group)(level, g, x, rows, copy, gathered + rows * group);
            const FN(strip) left = transpose ? grad : in, right = transpose ? in : grad;
            FN(gemm)(group, group, rows, left.data, 1, left.stride, right.data, right.stride, dblocks + g * group * group,
                     group, accumulate);
        }
        if (dx && level->runs == 1) {
            FN(gemm)(rows, group, group, grad.data, grad.stride, 1, block, group, dx + g * group, dx_stride, 0);
        } else if (dx) {
            FN(gemm)(rows, group, group, grad.data, grad.stride, 1, block, group, product, group, 0);
            FN(scatter_group)(level, g, product, rows, dx, dx_stride);
        }
    }
}

/* Backward of a tile; `dblocks` (of the tile's split, or NULL) is added to if `accumulate`, else written. */
VEC_FN void FN(rotate_backward_tile)(const boft_rotate_backward_args *args, FN(lanes) *lanes, int64_t row, int64_t rows,
                                     int64_t channel, int64_t channels, REAL *dblocks, int accumulate, REAL *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t size = boft_backward_tile_rows(plan, VEC(VEC_LANES)) * boft_tile_channels(plan), last = plan->levels - 1;
    REAL *inputs = workspace, *strips[2] = {inputs + plan->levels * size, inputs + (plan->levels + 1) * size};
    REAL *gathered = inputs + (plan->levels + 2) * size;
    FN(strip) x[BOFT_MAX_LEVELS] = {{NULL, 0}};
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
        const int straight = step == 0 && FN(is_real)(args->dtype);
        REAL *dx = straight ? (REAL *)args->dx : strips[(last - step) % 2];
        if (step == 0 && !args->dx)
            dx = NULL;
        else if (straight)
            dx += row * args->dx_stride + channel;
        const int64_t dx_stride = straight ? args->dx_stride : channels;
        if (lanes->group)
            FN(lanes_backward)(lanes, args->transpose, channel, rows, channels, x[0].data, x[0].stride, dy.data, dy.stride,
                               dblocks != NULL, dx, dx_stride);
        else
            FN(level_backward)(level, args->transpose, (const REAL *)args->blocks_back + at, rows, channels, x[step], dy,
                               dblocks ? dblocks + at : NULL, accumulate, dx, dx_stride, gathered);
        if (!dx || straight)
            return;
        dy = (FN(strip)){dx, channels};
    }
    FN(store_strip)(args->dtype, dy.data, args->dx, args->dx_stride, row, rows, channel, channels);
}

VEC_ATTR static void FN(rotate_backward)(const boft_rotate_backward_args *args, int64_t begin, int64_t end,
                                         void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t tile = boft_tile_channels(plan), span = boft_span_channels(plan), across = boft_spans(plan);
    const int64_t splits = boft_rotate_backward_splits(plan, args->rows), tall = boft_backward_tile_rows(plan, VEC(VEC_LANES));
    const int64_t band = boft_band_rows(tall);
    for (int64_t task = begin; task < end; task++) {
        const int64_t split = task / across, channel = task % across * span;
        const int64_t channels = boft_min(span, plan->d - channel);
        const int64_t first = boft_split_begin(args->rows, split, splits);
        const int64_t past = boft_split_begin(args->rows, split + 1, splits);
        REAL *dblocks = args->dblocks ? (REAL *)args->dblocks + split * plan->count : NULL;
        for (int64_t i = 0; dblocks && first == past && i < plan->levels; i++)
            memset(dblocks + boft_tile_blocks(&plan->level[i], channel), 0,
                   (size_t)(channels * plan->level[i].group) * sizeof(REAL));
        if (first == past)
            continue;
        FN(lanes) lanes = FN(lanes_of)(plan, channel);
        REAL *strips = workspace;
        if (lanes.group) {
            const int64_t size = FN(lanes_size)(&lanes, channels);
            if (args->dx)
                FN(lanes_pack)(&lanes, channels, args->blocks_back, strips);
            lanes.gradients = strips + size;
            memset(lanes.gradients, 0, (size_t)size * sizeof(REAL));
            strips += 2 * size;
        }
        for (int64_t at = first; at < past; at += band)
            for (int64_t from = channel; from < channel + channels; from += tile)
                for (int64_t row = at; row < boft_min(at + band, past); row += tall)
                    FN(rotate_backward_tile)(args, &lanes, row, boft_min(tall, past - row), from,
                                             boft_min(tile, channel + channels - from), dblocks, row > first, strips);
        if (lanes.group && dblocks)
            FN(lanes_unpack)(&lanes, channels, dblocks);
    }
}
