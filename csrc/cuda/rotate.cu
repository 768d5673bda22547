/* x R, x R^T and their backward: checks, the choice of kernels, and launches. */
#include "launch.cuh"

#include "rotate_general.cuh"
#include "rotate_tensor.cuh"

/*
 * Rows are split so that thread blocks are about as many as the 132 multiprocessors of H100 and H200 hold at a time:
 * one wave, since each thread block prepares blocks of R first. A constant, so that sums over rows are split in the
 * same way on every device.
 */
enum { MULTIPROCESSORS = 132, GENERAL_RESIDENT = 3 };
/* A split of the gradient costs a pass over the blocks, so it sums at least this many rows. */
enum { SPLIT_ROWS = 64, WIDE_SPLIT_ROWS = 128 };
/* Kernels count the rows of a split in 32 bits. */
enum { MOST_ROWS = 1 << 30 };

static size_t real_size(boft_dtype dtype)
{
    return dtype == BOFT_F64 ? sizeof(double) : sizeof(float);
}

static boft_dtype real_dtype(boft_dtype dtype)
{
    return dtype == BOFT_F64 ? BOFT_F64 : BOFT_F32;
}

static size_t aligned(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static boft_status check_grid(const char *what, int64_t blocks)
{
    if (blocks > INT32_MAX)
        return boft_refuse(BOFT_BAD_SHAPE, "%s: %lld thread blocks are more than a launch can have", what,
                           (long long)blocks);
    return BOFT_OK;
}

/* Splits of at least `least` rows each and at most MOST_ROWS, for about `resident` blocks on each multiprocessor. */
static int64_t splits_for(int64_t tiles, int64_t rows, int64_t resident, int64_t least)
{
    const int64_t wanted = min(MULTIPROCESSORS * resident / tiles, ceil_div(rows, least));
    return max(max((int64_t)1, ceil_div(rows, MOST_ROWS)), wanted);
}

static int is_aligned(const void *data, int64_t stride, size_t element)
{
    return (uintptr_t)data % 16 == 0 && stride * (int64_t)element % 16 == 0;
}

/* ---- The general kernels ----------------------------------------------------------------------------------------- */

static int general_columns(boft_dtype dtype)
{
    return dtype == BOFT_F64 ? general_size<double>::columns : general_size<float>::columns;
}

static general_level general_level_of(const boft_plan *plan, int64_t index, boft_dtype dtype)
{
    const boft_level *level = &plan->level[index];
    const int columns = general_columns(dtype);
    general_level out;
    out.group = level->group;
    out.chunk = level->chunk;
    out.inner = level->inner;
    out.groups = plan->d / level->group;
    out.unit = level->group <= columns ? (int)(level->group + 3) / 4 * 4 : columns;
    out.units = columns / out.unit;
    out.slices = ceil_div(level->group, columns);
    return out;
}

/* Tiles across the channels, with `slices` tiles of each that holds groups. */
static int64_t general_tiles(const general_level &level, int64_t slices)
{
    return ceil_div(level.groups, level.units) * slices;
}

/* Of the gradient: none where there are more tiles than counters. */
static int64_t general_outer_splits(int64_t tiles, int64_t rows)
{
    return tiles > BOFT_CUDA_COUNTERS ? 1 : splits_for(tiles, rows, GENERAL_RESIDENT, SPLIT_ROWS);
}

static general_product general_product_of(const boft_plan *plan, int64_t index, boft_dtype dtype, general_rows in,
                                          general_rows out, const void *blocks, int transpose, int64_t rows)
{
    general_product p;
    p.level = general_level_of(plan, index, dtype);
    p.in = in;
    p.out = out;
    p.blocks = (const char *)blocks + (size_t)plan->level[index].offset * real_size(dtype);
    p.transpose = transpose;
    p.rows = rows;
    p.tiles = general_tiles(p.level, p.level.slices);
    p.splits = splits_for(p.tiles, rows, GENERAL_RESIDENT, GENERAL_ROWS);
    return p;
}

static general_outer general_outer_of(const boft_plan *plan, int64_t index, boft_dtype dtype, general_rows left,
                                      general_rows right, void *dblocks, void *parts, unsigned *counters, int64_t rows)
{
    general_outer p;
    p.level = general_level_of(plan, index, dtype);
    p.left = left;
    p.right = right;
    p.dblocks = (char *)dblocks + (size_t)plan->level[index].offset * real_size(dtype);
    p.parts = parts;
    p.counters = counters;
    p.rows = rows;
    p.tiles = general_tiles(p.level, p.level.slices * p.level.slices);
    p.splits = general_outer_splits(p.tiles, rows);
    return p;
}

static size_t general_parts_bytes(const boft_plan *plan, int64_t index, boft_dtype dtype, int64_t rows)
{
    const general_level level = general_level_of(plan, index, dtype);
    const int64_t splits = general_outer_splits(general_tiles(level, level.slices * level.slices), rows);
    return splits > 1 ? (size_t)(splits * plan->d * level.group) * real_size(dtype) : 0;
}

static int general_is_vector(const general_level &level, const general_rows &a, const general_rows &b)
{
    return a.dtype == BOFT_F32 && b.dtype == BOFT_F32 && level.inner == 1 && level.group % 4 == 0 &&
           is_aligned(a.data, a.stride, 4) && is_aligned(b.data, b.stride, 4);
}

static boft_status launch_general(const general_product &p, boft_dtype dtype, void *stream)
{
    const int64_t blocks = p.tiles * p.splits;
    const boft_status status = check_grid("rotate", blocks);
    if (status)
        return status;
    if (dtype == BOFT_F64)
        LAUNCH((rotate_general<double, false>), (unsigned)blocks, GENERAL_THREADS, general_size<double>::product_bytes,
               stream, p);
    else if (general_is_vector(p.level, p.in, p.out))
        LAUNCH((rotate_general<float, true>), (unsigned)blocks, GENERAL_THREADS, general_size<float>::product_bytes,
               stream, p);
    else
        LAUNCH((rotate_general<float, false>), (unsigned)blocks, GENERAL_THREADS, general_size<float>::product_bytes,
               stream, p);
    return launched("rotate");
}

/* Either may be absent: without rows or tiles. */
static boft_status launch_general_backward(const general_product &p, const general_outer &outer, boft_dtype dtype,
                                           void *stream)
{
    const int64_t products = p.tiles * p.splits, blocks = products + outer.tiles * outer.splits;
    const boft_status status = check_grid("rotate backward", blocks);
    if (status || blocks == 0)
        return status;
    const int is_vector = (products == 0 || general_is_vector(p.level, p.in, p.out)) &&
                          (outer.tiles == 0 || general_is_vector(outer.level, outer.left, outer.right));
    if (dtype == BOFT_F64)
        LAUNCH((rotate_backward_general<double, false>), (unsigned)blocks, GENERAL_THREADS,
               general_size<double>::product_bytes, stream, p, products, outer);
    else if (is_vector)
        LAUNCH((rotate_backward_general<float, true>), (unsigned)blocks, GENERAL_THREADS,
               general_size<float>::product_bytes, stream, p, products, outer);
    else
        LAUNCH((rotate_backward_general<float, false>), (unsigned)blocks, GENERAL_THREADS,
               general_size<float>::product_bytes, stream, p, products, outer);
    return launched("rotate backward");
}

/* ---- On tensor cores --------------------------------------------------------------------------------------------- */

static int chunks_of(int64_t width)
{
    return (int)ceil_div(width, CHUNK);
}

/*
 * Channels of a tile: whole groups that start at multiples of 16 bytes, in the fewest chunks of which at least 3/4 are
 * used, or the most that can be; 0 if no tile holds a group.
 */
static int tensor_width(int64_t group)
{
    int64_t least = group;
    while (least % 8 != 0 && least <= LARGEST_CHUNKS * CHUNK)
        least += group;
    int64_t best = 0;
    for (int64_t width = least; width <= LARGEST_CHUNKS * CHUNK; width += least) {
        const int64_t all = chunks_of(width) * CHUNK, best_all = best ? chunks_of(best) * CHUNK : 1;
        if (best * 4 < best_all * 3 ? width * best_all > best * all : all == best_all)
            best = width;
    }
    return (int)best;
}

static tensor_level tensor_level_of(const boft_plan *plan)
{
    tensor_level level;
    level.d = plan->d;
    level.group = (int)plan->super;
    level.width = tensor_width(plan->super);
    level.tiles = ceil_div(plan->d, level.width);
    level.meets = 0;
    const int chunks = chunks_of(level.width);
    for (int a = 0; a < chunks; a++)
        for (int b = 0; b < chunks; b++)
            if ((min(a, b) * CHUNK + CHUNK - 1) / level.group >= max(a, b) * CHUNK / level.group)
                level.meets |= 1u << (a * chunks + b);
    return level;
}

static int tensor_can(const boft_plan *plan, boft_dtype dtype)
{
    return (dtype == BOFT_BF16 || dtype == BOFT_F16) && plan->levels == 1 && plan->d % 8 == 0 &&
           plan->super <= LARGEST_CHUNKS * CHUNK && tensor_width(plan->super) > 0;
}

static int64_t tensor_splits(const tensor_level &level, int64_t rows)
{
    const int resident[LARGEST_CHUNKS] = {tensor_size<1>::resident, tensor_size<2>::resident, tensor_size<3>::resident,
                                          tensor_size<4>::resident};
    const int chunks = chunks_of(level.width);
    return splits_for(level.tiles, rows, resident[chunks - 1], chunks == 1 ? SPLIT_ROWS : WIDE_SPLIT_ROWS);
}

/* Of the backward, where there must not be more tiles than counters. */
static int64_t tensor_outer_splits(const tensor_level &level, int64_t rows)
{
    const int resident[LARGEST_CHUNKS] = {tensor_size<1>::backward_resident, tensor_size<2>::backward_resident,
                                          tensor_size<3>::backward_resident, tensor_size<4>::backward_resident};
    const int chunks = chunks_of(level.width);
    if (level.tiles > BOFT_CUDA_COUNTERS)
        return 1;
    return splits_for(level.tiles, rows, resident[chunks - 1], SPLIT_ROWS);
}

static size_t tensor_parts_bytes(const boft_plan *plan, boft_dtype dtype, int64_t rows)
{
    if (!tensor_can(plan, dtype))
        return 0;
    const int64_t splits = tensor_outer_splits(tensor_level_of(plan), rows);
    return splits > 1 ? (size_t)(splits * plan->count) * sizeof(float) : 0;
}

static tensor_product tensor_product_of(const boft_plan *plan, const void *in, int64_t in_stride, void *out,
                                        int64_t out_stride, const void *blocks, int transpose, int64_t rows)
{
    tensor_product p;
    p.level = tensor_level_of(plan);
    p.in = (const uint16_t *)in;
    p.in_stride = in_stride;
    p.out = (uint16_t *)out;
    p.out_stride = out_stride;
    p.blocks = (const float *)blocks;
    p.transpose = transpose;
    p.rows = rows;
    p.splits = tensor_splits(p.level, rows);
    return p;
}

template <class D, int CHUNKS> static boft_status launch_tensor_of(const tensor_product &p, void *stream)
{
    const int64_t blocks = p.level.tiles * p.splits;
    boft_status status = check_grid("rotate", blocks);
    if (status || (status = allow_shared(rotate_tensor<D, CHUNKS>, tensor_size<CHUNKS>::fragment_bytes, "rotate")))
        return status;
    LAUNCH((rotate_tensor<D, CHUNKS>), (unsigned)blocks, 128, tensor_size<CHUNKS>::fragment_bytes, stream, p);
    return launched("rotate");
}

template <class D, int CHUNKS>
static boft_status launch_tensor_backward_of(const tensor_product &p, const tensor_outer &outer, void *stream)
{
    typedef tensor_size<CHUNKS> size;
    const int64_t blocks = p.level.tiles * p.splits;
    boft_status status = check_grid("rotate backward", blocks);
    if (status || (status = allow_shared(rotate_backward_tensor<D, CHUNKS>, size::backward_bytes, "rotate backward")))
        return status;
    LAUNCH((rotate_backward_tensor<D, CHUNKS>), (unsigned)blocks, size::backward_threads, size::backward_bytes,
           stream, p, outer);
    return launched("rotate backward");
}

template <class D> static boft_status launch_tensor(const tensor_product &p, const tensor_outer *outer, void *stream)
{
    switch (chunks_of(p.level.width)) {
    case 1:
        return outer ? launch_tensor_backward_of<D, 1>(p, *outer, stream) : launch_tensor_of<D, 1>(p, stream);
    case 2:
        return outer ? launch_tensor_backward_of<D, 2>(p, *outer, stream) : launch_tensor_of<D, 2>(p, stream);
    case 3:
        return outer ? launch_tensor_backward_of<D, 3>(p, *outer, stream) : launch_tensor_of<D, 3>(p, stream);
    default:
        return outer ? launch_tensor_backward_of<D, 4>(p, *outer, stream) : launch_tensor_of<D, 4>(p, stream);
    }
}

/* outer: NULL, or the gradient, too. */
static boft_status launch_tensor(boft_dtype dtype, const tensor_product &p, const tensor_outer *outer, void *stream)
{
    return dtype == BOFT_BF16 ? launch_tensor<bf16>(p, outer, stream) : launch_tensor<f16>(p, outer, stream);
}

/* ---- Forward ----------------------------------------------------------------------------------------------------- */

/* Index of the level that x meets in step `step`. */
static int64_t level_of_step(const boft_plan *plan, int transpose, int64_t step)
{
    return transpose ? step : plan->levels - 1 - step;
}

/* Bytes of rows between two levels. */
static size_t strip_bytes(const boft_plan *plan, boft_dtype dtype, int64_t rows)
{
    return aligned((size_t)(rows * plan->d) * real_size(dtype));
}

static general_rows strip(const boft_plan *plan, boft_dtype dtype, int64_t rows, void *workspace, int64_t index)
{
    return {(char *)workspace + (size_t)index * strip_bytes(plan, dtype, rows), plan->d, real_dtype(dtype)};
}

size_t boft_cuda_rotate_workspace(const boft_plan *plan, boft_dtype dtype, int64_t rows)
{
    return (size_t)min(plan->levels - 1, (int64_t)2) * strip_bytes(plan, dtype, rows);
}

static boft_status check_rotate(const boft_rotate_args *args, const void *workspace)
{
    boft_status status;
    if ((status = boft_check_pointer("rotate: args", args)) ||
        (status = boft_check_pointer("rotate: plan", args->plan)) ||
        (status = boft_check_data("rotate", args->dtype)))
        return status;
    if (args->rows < 0 || args->x_stride < 0 || args->y_stride < args->plan->d)
        return boft_refuse(BOFT_BAD_SHAPE, "rotate: %lld rows with strides %lld and %lld for %lld channels",
                           (long long)args->rows, (long long)args->x_stride, (long long)args->y_stride,
                           (long long)args->plan->d);
    if (args->rows > 0 &&
        ((status = boft_check_pointer("rotate: x", args->x)) || (status = boft_check_pointer("rotate: y", args->y)) ||
         (status = boft_check_pointer("rotate: blocks", args->blocks))))
        return status;
    if (args->rows > 0 && args->plan->levels > 1)
        return boft_check_pointer("rotate: workspace", workspace);
    return BOFT_OK;
}

boft_status boft_cuda_rotate(const boft_rotate_args *args, void *workspace, void *stream)
{
    boft_status status = check_rotate(args, workspace);
    if (status || args->rows == 0)
        return status;
    const boft_plan *plan = args->plan;
    if (tensor_can(plan, args->dtype) && is_aligned(args->x, args->x_stride, 2) &&
        is_aligned(args->y, args->y_stride, 2))
        return launch_tensor(args->dtype, tensor_product_of(plan, args->x, args->x_stride, args->y, args->y_stride,
                                                            args->blocks, args->transpose, args->rows), NULL, stream);
    const general_rows y = {args->y, args->y_stride, args->dtype};
    general_rows in = {(void *)args->x, args->x_stride, args->dtype};
    for (int64_t step = 0; step < plan->levels; step++) {
        const int is_last = step == plan->levels - 1;
        const general_rows out = is_last ? y : strip(plan, args->dtype, args->rows, workspace, step % 2);
        const int64_t index = level_of_step(plan, args->transpose, step);
        const general_product product = general_product_of(plan, index, args->dtype, in, out, args->blocks,
                                                           args->transpose, args->rows);
        if ((status = launch_general(product, args->dtype, stream)))
            return status;
        in = out;
    }
    return BOFT_OK;
}

/* ---- Backward ---------------------------------------------------------------------------------------------------- */

/* Workspace: the inputs of all levels but the first, two strips of gradients between levels, and parts of dblocks. */
static int64_t backward_strips(const boft_plan *plan)
{
    return plan->levels - 1 + min(plan->levels - 1, (int64_t)2);
}

size_t boft_cuda_rotate_backward_workspace(const boft_plan *plan, boft_dtype dtype, int64_t rows)
{
    size_t parts = tensor_parts_bytes(plan, dtype, rows);
    for (int64_t i = 0; i < plan->levels; i++)
        parts = max(parts, general_parts_bytes(plan, i, dtype, rows));
    return (size_t)backward_strips(plan) * strip_bytes(plan, dtype, rows) + parts;
}

static boft_status check_rotate_backward(const boft_rotate_backward_args *args, const void *workspace,
                                         const unsigned *counters)
{
    boft_status status;
    if ((status = boft_check_pointer("rotate backward: args", args)) ||
        (status = boft_check_pointer("rotate backward: plan", args->plan)) ||
        (status = boft_check_data("rotate backward", args->dtype)))
        return status;
    if (args->rows < 0 || args->dy_stride < 0 || (args->dblocks && args->x_stride < 0) ||
        (args->dx && args->dx_stride < args->plan->d))
        return boft_refuse(BOFT_BAD_SHAPE,
                           "rotate backward: %lld rows with strides %lld, %lld and %lld for %lld channels",
                           (long long)args->rows, (long long)args->dy_stride, (long long)args->x_stride,
                           (long long)args->dx_stride, (long long)args->plan->d);
    if (args->rows == 0)
        return BOFT_OK;
    if ((status = boft_check_pointer("rotate backward: dy", args->dy)) ||
        (args->dblocks && (status = boft_check_pointer("rotate backward: x", args->x))) ||
        ((args->dx || args->plan->levels > 1) &&
         (status = boft_check_pointer("rotate backward: blocks", args->blocks))) ||
        (boft_cuda_rotate_backward_workspace(args->plan, args->dtype, args->rows) > 0 &&
         (status = boft_check_pointer("rotate backward: workspace", workspace))))
        return status;
    return args->dblocks ? boft_check_pointer("rotate backward: counters", counters) : BOFT_OK;
}

boft_status boft_cuda_rotate_backward(const boft_rotate_backward_args *args, void *workspace, unsigned *counters,
                                      void *stream)
{
    boft_status status = check_rotate_backward(args, workspace, counters);
    if (status || (!args->dx && !args->dblocks) || (args->rows == 0 && !args->dblocks))
        return status;
    const boft_plan *plan = args->plan;
    const boft_dtype dtype = args->dtype;
    const int64_t rows = args->rows, last = plan->levels - 1;
    const int dx_aligned = !args->dx || is_aligned(args->dx, args->dx_stride, 2);
    const int x_aligned = !args->dblocks || is_aligned(args->x, args->x_stride, 2);
    if (tensor_can(plan, dtype) && rows > 0 && is_aligned(args->dy, args->dy_stride, 2) && dx_aligned && x_aligned) {
        tensor_product p = tensor_product_of(plan, args->dy, args->dy_stride, args->dx, args->dx_stride, args->blocks,
                                             !args->transpose, rows);
        if (!args->dblocks)
            return launch_tensor(dtype, p, NULL, stream);
        p.splits = tensor_outer_splits(p.level, rows);
        const tensor_outer outer = {(const uint16_t *)args->x, args->x_stride, args->transpose, (float *)args->dblocks,
                                    (float *)workspace, counters};
        return launch_tensor(dtype, p, &outer, stream);
    }
    void *parts = (char *)workspace + (size_t)backward_strips(plan) * strip_bytes(plan, dtype, rows);
    general_rows inputs[BOFT_MAX_LEVELS] = {};
    inputs[0] = {(void *)args->x, args->x_stride, dtype};
    for (int64_t step = 0; step < last && args->dblocks && rows > 0; step++) {
        inputs[step + 1] = strip(plan, dtype, rows, workspace, step);
        const int64_t index = level_of_step(plan, args->transpose, step);
        const general_product product = general_product_of(plan, index, dtype, inputs[step], inputs[step + 1],
                                                           args->blocks, args->transpose, rows);
        if ((status = launch_general(product, dtype, stream)))
            return status;
    }
    general_rows dy = {(void *)args->dy, args->dy_stride, dtype};
    for (int64_t step = last; step >= 0; step--) {
        const int64_t index = level_of_step(plan, args->transpose, step);
        const general_rows dx = step == 0 ? general_rows{args->dx, args->dx_stride, dtype}
                                          : strip(plan, dtype, rows, workspace, last + (step - 1) % 2);
        general_product product = {};
        general_outer outer = {};
        if (rows > 0 && (step > 0 || args->dx))
            product = general_product_of(plan, index, dtype, dy, dx, args->blocks, !args->transpose, rows);
        if (args->dblocks) /* for x R^T the gradient is of the untransposed blocks */
            outer = general_outer_of(plan, index, dtype, args->transpose ? dy : inputs[step],
                                     args->transpose ? inputs[step] : dy, args->dblocks, parts, counters, rows);
        if ((status = launch_general_backward(product, outer, dtype, stream)))
            return status;
        dy = dx;
    }
    return BOFT_OK;
}
