/* Groups of more than 128 channels of 16-bit numbers: launches. */
#include "rotate_kernels.cuh"
#include "rotate_wide.cuh"

static int wide_chunks(const boft_plan *plan)
{
    return (int)ceil_div(plan->super, CHUNK);
}

int wide_serves(const boft_plan *plan, boft_dtype dtype)
{
    return (dtype == BOFT_BF16 || dtype == BOFT_F16) && plan->levels == 1 && plan->super % 8 == 0 &&
           plan->super > 128 && plan->super <= WIDE_CHUNKS * CHUNK;
}

/* `resident`: thread blocks of the product on each multiprocessor. */
static wide_product wide_product_of(const boft_rotate_args *args, int64_t resident)
{
    wide_product p;
    p.in = (const uint16_t *)args->x;
    p.in_stride = args->x_stride;
    p.out = (uint16_t *)args->y;
    p.out_stride = args->y_stride;
    p.blocks = (const float *)args->blocks;
    p.transpose = args->transpose;
    p.group = (int)args->plan->super;
    p.chunks = wide_chunks(args->plan);
    p.pieces = (int)ceil_div(p.chunks, WIDE_PIECE);
    p.tiles = args->plan->d / p.group * p.pieces;
    p.rows = args->rows;
    p.splits = splits_for(p.tiles, args->rows, resident, WIDE_SPLIT_ROWS);
    return p;
}

template <class D> static boft_status launch_wide(const wide_product &p, void *stream)
{
    const int64_t blocks = p.tiles * p.splits;
    const size_t bytes = (size_t)p.chunks * WIDE_CHUNK_BYTES;
    boft_status status = check_grid("rotate", blocks);
    if (status || (status = allow_shared(rotate_wide<D>, bytes, "rotate")))
        return status;
    LAUNCH((rotate_wide<D>), (unsigned)blocks, WIDE_THREADS, bytes, stream, p);
    return launched("rotate");
}

boft_status wide_rotate(const boft_rotate_args *args, void *stream)
{
    const wide_product p = wide_product_of(args, WIDE_RESIDENT);
    return args->dtype == BOFT_BF16 ? launch_wide<bf16>(p, stream) : launch_wide<f16>(p, stream);
}

/* Squares along a side of the gradient of a group. */
static int64_t wide_side(const boft_plan *plan)
{
    return ceil_div(wide_chunks(plan), WIDE_PIECE);
}

static int64_t wide_outer_tiles(const boft_plan *plan)
{
    return plan->d / plan->super * ceil_div(wide_side(plan) * wide_side(plan), WIDE_WARPS);
}

/* The product and the gradient have a thread block each on a multiprocessor. */
static int64_t wide_outer_splits(const boft_plan *plan, int64_t rows)
{
    return outer_splits_for(wide_outer_tiles(plan), rows, WIDE_BACKWARD_RESIDENT - 1, WIDE_SPLIT_ROWS);
}

size_t wide_backward_workspace(const boft_plan *plan, int64_t rows)
{
    const int64_t splits = wide_outer_splits(plan, rows);
    return splits > 1 ? (size_t)(splits * plan->count) * sizeof(float) : 0;
}

template <class D> static boft_status launch_wide_backward(const wide_product &p, const wide_outer &outer, void *stream)
{
    const int64_t products = p.out ? p.tiles * p.splits : 0, blocks = products + outer.tiles * outer.splits;
    const size_t bytes = products ? (size_t)p.chunks * WIDE_CHUNK_BYTES : 0;
    boft_status status = check_grid("rotate backward", blocks);
    if (status || (status = allow_shared(rotate_backward_wide<D>, bytes, "rotate backward")))
        return status;
    LAUNCH((rotate_backward_wide<D>), (unsigned)blocks, WIDE_THREADS, bytes, stream, p, (unsigned)products, outer);
    return launched("rotate backward");
}

boft_status wide_rotate_backward(const boft_rotate_backward_args *args, void *workspace, unsigned *counters,
                                 void *stream)
{
    const boft_plan *plan = args->plan;
    const uint16_t *x = (const uint16_t *)args->x, *dy = (const uint16_t *)args->dy;
    const boft_rotate_args back = args_of_dx(args);
    const wide_product p = wide_product_of(&back, 1);
    wide_outer outer;
    outer.left = args->transpose ? dy : x; /* for x R^T the gradient is of the untransposed blocks */
    outer.right = args->transpose ? x : dy;
    outer.left_stride = args->transpose ? args->dy_stride : args->x_stride;
    outer.right_stride = args->transpose ? args->x_stride : args->dy_stride;
    outer.dblocks = (float *)args->dblocks;
    outer.parts = (float *)workspace;
    outer.counters = counters;
    outer.group = p.group;
    outer.side = (int)wide_side(plan);
    outer.groups = plan->d / p.group;
    outer.tiles = wide_outer_tiles(plan);
    outer.rows = args->rows;
    outer.splits = wide_outer_splits(plan, args->rows);
    return args->dtype == BOFT_BF16 ? launch_wide_backward<bf16>(p, outer, stream)
                                    : launch_wide_backward<f16>(p, outer, stream);
}
