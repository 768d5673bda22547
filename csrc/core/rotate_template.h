/*
 * x R and its backward over tiles of rows x channels, where channels are whole super groups.
 *
 * With one level and data of type REAL the product runs from x straight to y. Otherwise a tile is converted to a strip
 * of REALs, goes through all levels there, and is rounded once on its way out: one pass over memory for any number of
 * levels, and no rounding between them.
 */

/* Rows of a tile: element (t, j) at t stride + j. Rows to fetch into cache lie `ahead` below, 0 for those that are there. */
typedef struct FN(strip) {
    const REAL *data;
    int64_t stride, ahead;
} FN(strip);

/* A strip to write. */
typedef struct FN(room) {
    REAL *data;
    int64_t stride, ahead;
} FN(room);

VEC_FN FN(strip) FN(strip_of)(FN(room) room)
{
    return (FN(strip)){room.data, room.stride, room.ahead};
}

/* Fetches `channels` channels from channel j on of the rows ahead. */
VEC_FN void FN(fetch)(FN(strip) strip, int64_t j, int64_t rows, int64_t channels)
{
    boft_fetch(strip.data + j, sizeof(REAL), strip.stride, strip.ahead, rows, channels);
}

/* The same for group g of small tiles. */
VEC_FN void FN(fetch_in_turn)(FN(strip) strip, int64_t g, int64_t group)
{
    boft_fetch_in_turn(strip.data, sizeof(REAL), strip.stride, strip.ahead, BOFT_ROWS_ONCE, g, group);
}

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

/* The tile as a strip: where it lies if its type is REAL, otherwise converted into `buffer`. */
VEC_FN FN(strip) FN(load_strip)(boft_dtype dtype, const void *data, int64_t stride, boft_tile tile, REAL *buffer)
{
    if (FN(is_real)(dtype))
        return (FN(strip)){(const REAL *)data + tile.row * stride + tile.channel, stride, tile.ahead};
    for (int64_t t = 0; t < tile.rows; t++) {
        const int64_t at = (tile.row + t) * stride + tile.channel;
        boft_fetch((const uint16_t *)data + at, sizeof(uint16_t), stride, tile.ahead, 1, tile.channels);
        FN(load_run)(dtype, data, at, tile.channels, buffer + t * tile.channels);
    }
    return (FN(strip)){buffer, tile.channels, 0};
}

VEC_FN void FN(store_strip)(boft_dtype dtype, const REAL *strip, void *data, int64_t stride, boft_tile tile)
{
    for (int64_t t = 0; t < tile.rows; t++) {
        const int64_t at = (tile.row + t) * stride + tile.channel;
        boft_fetch((const uint16_t *)data + at, sizeof(uint16_t), stride, tile.ahead, 1, tile.channels);
        FN(store_run)(dtype, strip + t * tile.channels, data, at, tile.channels);
    }
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
        const FN(strip) group = {in.data + g * level->group, in.stride, 0};
        if (!copy)
            return group;
        for (int64_t t = 0; t < rows; t++)
            memcpy(buffer + t * level->group, group.data + t * group.stride, (size_t)level->group * sizeof(REAL));
        return (FN(strip)){buffer, level->group, 0};
    }
    const REAL *from = in.data + boft_group_start(level, g);
    const int64_t stride = boft_run_stride(level), chunk = level->chunk;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t run = 0; run < level->runs; run++)
            FN(copy_chunk)(chunk, from + t * in.stride + run * stride, buffer + t * level->group + run * chunk);
    return (FN(strip)){buffer, level->group, 0};
}

/* Undo gather_group's copy. */
VEC_FN void FN(scatter_group)(const boft_level *level, int64_t g, const REAL *buffer, int64_t rows, FN(room) out)
{
    const int64_t stride = boft_run_stride(level), chunk = level->chunk;
    REAL *to = out.data + boft_group_start(level, g);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t run = 0; run < level->runs; run++)
            FN(copy_chunk)(chunk, buffer + t * level->group + run * chunk, to + t * out.stride + run * stride);
}

/*
 * Groups of exactly one or two vectors that lie side by side: out = x times the blocks, and dblocks = or += x^T dy.
 * `vectors` is a constant. The functions that fix it are not inlined, so that their loops have the registers to
 * themselves (two Zen 4 cores, 64 x 768 in cache: 1.0 times the floor, inlined 1.3).
 */
VEC_FN void FN(multiply_small)(const int vectors, int64_t groups, int64_t rows, FN(strip) x, const REAL *blocks,
                               FN(room) out)
{
    enum { ONCE = BOFT_ROWS_ONCE };
    const int64_t group = vectors * VEC(VEC_LANES);
    for (; rows >= ONCE; rows -= ONCE, x.data += ONCE * x.stride, out.data += ONCE * out.stride)
        for (int64_t g = 0; g < groups; g++) {
            FN(fetch_in_turn)(x, g, group);
            FN(fetch_in_turn)(FN(strip_of)(out), g, group);
            FN(gemm_tile)(ONCE, vectors, 0, 0, group, x.data + g * group, x.stride, 1, blocks + g * group * group, group,
                          out.data + g * group, out.stride, 0);
        }
    for (; rows > 0; rows--, x.data += x.stride, out.data += out.stride)
        for (int64_t g = 0; g < groups; g++)
            FN(gemm_tile)(1, vectors, 0, 0, group, x.data + g * group, x.stride, 1, blocks + g * group * group, group,
                          out.data + g * group, out.stride, 0);
}

VEC_ATTR static __attribute__((noinline)) void FN(multiply_one)(int64_t groups, int64_t rows, FN(strip) x,
                                                                const REAL *blocks, FN(room) out)
{
    FN(multiply_small)(1, groups, rows, x, blocks, out);
}

VEC_ATTR static __attribute__((noinline)) void FN(multiply_two)(int64_t groups, int64_t rows, FN(strip) x,
                                                                const REAL *blocks, FN(room) out)
{
    FN(multiply_small)(2, groups, rows, x, blocks, out);
}

/* `rows` rows, a constant of at most BOFT_ROWS_ONCE. */
VEC_FN void FN(gradient_rows)(const int vectors, const int rows, int64_t groups, FN(strip) x, FN(strip) dy,
                              REAL *dblocks, int accumulate)
{
    enum { LANES = VEC(VEC_LANES), ONCE = BOFT_ROWS_ONCE };
    const int64_t group = vectors * LANES;
    for (int64_t g = 0; g < groups; g++) {
        const REAL *in = x.data + g * group;
        REAL *row = dblocks + g * group * group;
        FN(fetch_in_turn)(x, g, group);
        FN(fetch_in_turn)(dy, g, group);
        VEC(vec) grad[ONCE][2];
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                grad[t][v] = VEC(load)(dy.data + t * dy.stride + g * group + v * LANES);
#pragma GCC unroll 16
        for (int64_t k = 0; k < group; k++, row += group)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                VEC(vec) sum = accumulate ? VEC(load)(row + v * LANES) : VEC(zero)();
#pragma GCC unroll 4
                for (int t = 0; t < rows; t++)
                    sum = VEC(fma)(VEC(set1)(in[t * x.stride + k]), grad[t][v], sum);
                VEC(store)(row + v * LANES, sum);
            }
    }
}

VEC_FN void FN(gradient_small)(const int vectors, int64_t groups, int64_t rows, FN(strip) x, FN(strip) dy, REAL *dblocks,
                               int accumulate)
{
    enum { ONCE = BOFT_ROWS_ONCE };
    for (; rows >= ONCE; rows -= ONCE, x.data += ONCE * x.stride, dy.data += ONCE * dy.stride, accumulate = 1)
        FN(gradient_rows)(vectors, ONCE, groups, x, dy, dblocks, accumulate);
    for (; rows > 0; rows--, x.data += x.stride, dy.data += dy.stride, accumulate = 1)
        FN(gradient_rows)(vectors, 1, groups, x, dy, dblocks, accumulate);
}

VEC_ATTR static __attribute__((noinline)) void FN(gradient_one)(int64_t groups, int64_t rows, FN(strip) x, FN(strip) dy,
                                                                REAL *dblocks, int accumulate)
{
    FN(gradient_small)(1, groups, rows, x, dy, dblocks, accumulate);
}

VEC_ATTR static __attribute__((noinline)) void FN(gradient_two)(int64_t groups, int64_t rows, FN(strip) x, FN(strip) dy,
                                                                REAL *dblocks, int accumulate)
{
    FN(gradient_small)(2, groups, rows, x, dy, dblocks, accumulate);
}

/* Whole vectors of a group, if there are few enough for the functions above to take this tile, otherwise 0. */
VEC_FN int FN(small_vectors)(const boft_level *level, int64_t rows)
{
    enum { LANES = VEC(VEC_LANES) };
    const int serves = level->runs == 1 && rows <= BOFT_TILE_ROWS_SMALL && boft_is_vectors(level->group, LANES);
    return serves ? (int)(level->group / LANES) : 0;
}

/* out = in with each group multiplied by its block; `gathered` holds 2 rows group REALs. */
VEC_FN void FN(apply_level)(const boft_level *level, const REAL *blocks, int64_t rows, int64_t channels, FN(strip) in,
                            FN(room) out, REAL *gathered)
{
    const int64_t group = level->group, groups = channels / group;
    const int vectors = FN(small_vectors)(level, rows);
    if (vectors == 1) {
        FN(multiply_one)(groups, rows, in, blocks, out);
        return;
    }
    if (vectors == 2) {
        FN(multiply_two)(groups, rows, in, blocks, out);
        return;
    }
    REAL *product = gathered + rows * group;
    for (int64_t g = 0; g < groups; g++) {
        const FN(strip) x = FN(gather_group)(level, g, in, rows, 0, gathered);
        const REAL *block = blocks + g * group * group;
        FN(fetch)(in, g * group, rows, group);
        FN(fetch)(FN(strip_of)(out), g * group, rows, group);
        if (level->runs == 1) {
            FN(gemm)(rows, group, group, x.data, x.stride, 1, block, group, out.data + g * group, out.stride, 0);
        } else {
            FN(gemm)(rows, group, group, x.data, x.stride, 1, block, group, product, group, 0);
            FN(scatter_group)(level, g, product, rows, out);
        }
    }
}

/* Row t of a strip times factors[t], in place. */
VEC_FN void FN(scale_strip)(const REAL *factors, int64_t rows, int64_t channels, FN(room) strip)
{
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < channels; j++)
            strip.data[t * strip.stride + j] *= factors[t];
}

/* factors: NULL, or one for each row from `row` on. */
VEC_FN void FN(rotate_tile)(const boft_rotate_args *args, const REAL *factors, const FN(lanes) *lanes, boft_tile tile,
                            REAL *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t rows = tile.rows, channel = tile.channel, channels = tile.channels;
    const int64_t size = rows * channels;
    REAL *strips[2] = {workspace, workspace + size}, *gathered = workspace + 2 * size;
    FN(strip) x = FN(load_strip)(args->dtype, args->x, args->x_stride, tile, strips[1]);
    for (int64_t step = 0; step < plan->levels; step++) {
        const boft_level *level = &plan->level[args->transpose ? step : plan->levels - 1 - step];
        const int straight = step == plan->levels - 1 && FN(is_real)(args->dtype);
        FN(room) out = {strips[step % 2], channels, 0};
        if (straight)
            out = (FN(room)){(REAL *)args->y + tile.row * args->y_stride + channel, args->y_stride, tile.ahead};
        if (lanes->group)
            FN(lanes_rotate)(lanes, channel, rows, channels, x, out);
        else
            FN(apply_level)(level, (const REAL *)args->blocks + boft_tile_blocks(level, channel), rows, channels, x, out,
                            gathered);
        if (factors && step == plan->levels - 1)
            FN(scale_strip)(factors, rows, channels, out);
        if (straight)
            return;
        x = FN(strip_of)(out);
    }
    FN(store_strip)(args->dtype, x.data, args->y, args->y_stride, tile);
}

VEC_ATTR static void FN(rotate)(const boft_rotate_args *args, const void *factors, int64_t begin, int64_t end,
                                void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t tile = boft_tile_channels(plan), span = boft_span_channels(plan);
    const int64_t tall = boft_tile_rows(plan, VEC(VEC_LANES), VEC_TILE_ROWS_WIDE, FN(is_real)(args->dtype));
    const int64_t band = boft_band_rows(tall);
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
                for (int64_t row = at; row < boft_min(at + band, end); row += tall) {
                    const boft_tile part = boft_tile_at(row, boft_min(tall, end - row), channel,
                                                        boft_min(tile, past - channel), band, args->rows);
                    FN(rotate_tile)(args, factors ? (const REAL *)factors + row : NULL, &lanes, part, strips);
                }
    }
}

/*
 * A level's part of the backward: dblocks (unless NULL) of x and dy, which for x R^T change places, and dx (unless its
 * data is NULL) = dy times the blocks; `gathered` holds 3 rows group REALs.
 */
VEC_FN void FN(level_backward)(const boft_level *level, int transpose, const REAL *blocks_back, int64_t rows,
                               int64_t channels, FN(strip) x, FN(strip) dy, REAL *dblocks, int accumulate, FN(room) dx,
                               REAL *gathered)
{
    const int64_t group = level->group, groups = channels / group;
    const int vectors = FN(small_vectors)(level, rows);
    if (vectors) {
        const FN(strip) left = transpose ? dy : x, right = transpose ? x : dy;
        if (dblocks && vectors == 1)
            FN(gradient_one)(groups, rows, left, right, dblocks, accumulate);
        else if (dblocks)
            FN(gradient_two)(groups, rows, left, right, dblocks, accumulate);
        if (dblocks)
            dy.ahead = 0;
        if (dx.data)
            FN(apply_level)(level, blocks_back, rows, channels, dy, dx, gathered);
        return;
    }
    REAL *product = gathered + 2 * rows * group;
    /* gemm reads a row once for each panel of columns, so dx in the place of dy would change it for the second. */
    const int one_panel = group <= VEC(VEC_LANES) || group == 2 * VEC(VEC_LANES);
    const int overlap = dx.data == dy.data && !one_panel;
    /* Rows far apart share sets of the first-level cache (AVX2 on a Zen 3 core, 512 x 1024 in groups of 64: 43 GF/s,
     * copied 75; 512 x 1280 in groups of 160: 67 and 83). */
    const int copy = rows > BOFT_ROWS_ONCE && group >= BOFT_SMALL_GROUP;
    for (int64_t g = 0; g < groups; g++) {
        const REAL *block = blocks_back + g * group * group;
        const FN(strip) grad = FN(gather_group)(level, g, dy, rows, overlap || copy, gathered);
        FN(fetch)(dy, g * group, rows, group);
        if (dx.data)
            FN(fetch)(FN(strip_of)(dx), g * group, rows, group);
        if (dblocks) {
            FN(fetch)(x, g * group, rows, group);
            const FN(strip) in = FN(gather_group)(level, g, x, rows, copy, gathered + rows * group);
            const FN(strip) left = transpose ? grad : in, right = transpose ? in : grad;
            FN(gemm)(group, group, rows, left.data, 1, left.stride, right.data, right.stride, dblocks + g * group * group,
                     group, accumulate);
        }
        if (dx.data && level->runs == 1) {
            FN(gemm)(rows, group, group, grad.data, grad.stride, 1, block, group, dx.data + g * group, dx.stride, 0);
        } else if (dx.data) {
            FN(gemm)(rows, group, group, grad.data, grad.stride, 1, block, group, product, group, 0);
            FN(scatter_group)(level, g, product, rows, dx);
        }
    }
}

/* Backward of a tile; `dblocks` (of the tile's split, or NULL) is added to if `accumulate`, else written. */
VEC_FN void FN(rotate_backward_tile)(const boft_rotate_backward_args *args, FN(lanes) *lanes, boft_tile tile,
                                     REAL *dblocks, int accumulate, REAL *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t rows = tile.rows, channel = tile.channel, channels = tile.channels;
    const int64_t size = rows * channels, last = plan->levels - 1;
    REAL *inputs = workspace, *strips[2] = {inputs + plan->levels * size, inputs + (plan->levels + 1) * size};
    REAL *gathered = inputs + (plan->levels + 2) * size;
    FN(strip) x[BOFT_MAX_LEVELS] = {{NULL, 0, 0}};
    if (dblocks) {
        x[0] = FN(load_strip)(args->dtype, args->x, args->x_stride, tile, inputs);
        for (int64_t step = 0; step < last; step++) {
            const boft_level *level = &plan->level[args->transpose ? step : last - step];
            const FN(room) out = {inputs + (step + 1) * size, channels, 0};
            FN(apply_level)(level, (const REAL *)args->blocks + boft_tile_blocks(level, channel), rows, channels, x[step],
                            out, gathered);
            x[step + 1] = FN(strip_of)(out);
        }
    }
    FN(strip) dy = FN(load_strip)(args->dtype, args->dy, args->dy_stride, tile, strips[1]);
    for (int64_t step = last; step >= 0; step--) {
        const boft_level *level = &plan->level[args->transpose ? step : last - step];
        const int64_t at = boft_tile_blocks(level, channel);
        const int straight = step == 0 && FN(is_real)(args->dtype);
        FN(room) dx = {strips[(last - step) % 2], channels, 0};
        if (step == 0 && !args->dx)
            dx.data = NULL;
        else if (straight)
            dx = (FN(room)){(REAL *)args->dx + tile.row * args->dx_stride + channel, args->dx_stride, tile.ahead};
        if (lanes->group)
            FN(lanes_backward)(lanes, args->transpose, channel, rows, channels, x[0], dy, dblocks != NULL, dx);
        else
            FN(level_backward)(level, args->transpose, (const REAL *)args->blocks_back + at, rows, channels, x[step], dy,
                               dblocks ? dblocks + at : NULL, accumulate, dx, gathered);
        if (!dx.data || straight)
            return;
        dy = FN(strip_of)(dx);
    }
    FN(store_strip)(args->dtype, dy.data, args->dx, args->dx_stride, tile);
}

VEC_ATTR static void FN(rotate_backward)(const boft_rotate_backward_args *args, int64_t begin, int64_t end,
                                         void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t tile = boft_tile_channels(plan), span = boft_span_channels(plan), across = boft_spans(plan);
    const int64_t splits = boft_rotate_backward_splits(plan, args->rows);
    const int64_t tall = boft_backward_tile_rows(plan, VEC(VEC_LANES), FN(is_real)(args->dtype));
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
                for (int64_t row = at; row < boft_min(at + band, past); row += tall) {
                    const boft_tile part = boft_tile_at(row, boft_min(tall, past - row), from,
                                                        boft_min(tile, channel + channels - from), band, args->rows);
                    FN(rotate_backward_tile)(args, &lanes, part, dblocks, row > first, strips);
                }
        if (lanes.group && dblocks)
            FN(lanes_unpack)(&lanes, channels, dblocks);
    }
}
